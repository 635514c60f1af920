"""The same stream (harvest.py) by TransformerLens, which comes with sae-lens: its bridge stops the model after a block."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

import harvest_model
from pace import case, timed

given = case()
BATCH, LAYER = int(given["batch"]), harvest_model.LAYER
texts, sums = harvest_model.texts(int(given["texts"])), [0.0]
unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a")
model = TransformerBridge.boot_transformers("HuggingFaceTB/SmolLM2-135M", hf_model=harvest_model.model(), tokenizer=unused)


@torch.inference_mode()
def stopped() -> None:
    found = []
    for low in range(0, len(texts), BATCH):
        some = texts[low : low + BATCH]
        read = harvest_model.padded(some)
        resid_BTD = model(read["input_ids"], attention_mask=read["attention_mask"], stop_at_layer=LAYER, return_type=None)
        found += harvest_model.kept(resid_BTD, some)
    sums[0] = float(torch.cat(found).double().sum())


timed(stopped, int(given["block"]), lambda: {"tokens": sum(len(text) - 1 for text in texts), "sum": sums[0]})
