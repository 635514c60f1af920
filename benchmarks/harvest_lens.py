"""The same stream (harvest.py) by TransformerLens, which comes with sae-lens: its bridge stops the model after a block."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

import harvest_model
from pace import case, timed

given = case()
BATCH = int(given["batch"])
texts, sums = harvest_model.texts(int(given["texts"])), [0.0]
unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a")
model = TransformerBridge.boot_transformers("HuggingFaceTB/SmolLM2-135M", hf_model=harvest_model.model(), tokenizer=unused)


def read(given: dict[str, Tensor]) -> Tensor:
    resid_BTD: Tensor = model(
        given["input_ids"], attention_mask=given["attention_mask"], stop_at_layer=harvest_model.LAYER, return_type=None
    )
    return resid_BTD


def stopped() -> None:
    sums[0] = harvest_model.total(texts, BATCH, read)


timed(stopped, int(given["block"]), lambda: {"tokens": sum(len(text) - 1 for text in texts), "sum": sums[0]})
