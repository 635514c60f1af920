"""The residual stream of a model of SmolLM2-135M's shape at half depth: read as `activations` reads it, and from a whole
forward pass with a hook, logits and all."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from featdiff.activations.residual import TokenStream, read_residual
from featdiff.language.models import block, left_pad, truncate
from pace import case, timed

given, way = case(), sys.argv[2]
generator = torch.Generator().manual_seed(0)
lengths = torch.randint(40, 200, (int(given["texts"]),), generator=generator).tolist()
stream = TokenStream([torch.randint(49_152, (length,), generator=generator).tolist() for length in lengths], 1)
config = LlamaConfig(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
LAYER, BATCH = 15, int(given["batch"])
trunk, sums = truncate(model, LAYER), [0.0]


def ours() -> None:
    sums[0] = float(read_residual(trunk, stream, BATCH, 0, torch.float32).double().sum())


@torch.inference_mode()
def whole() -> None:
    kept: list[Tensor] = []
    hook = block(model, LAYER).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    found: list[Tensor] = []
    for low in range(0, len(stream.texts), BATCH):
        texts = stream.texts[low : low + BATCH]
        ids_BT, mask_BT, places_BT = left_pad(texts, 0, torch.device("cpu"))
        model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=places_BT, use_cache=False)
        resid_BTD = kept.pop()
        found += [resid_BTD[row, 1 - len(text) :] for row, text in enumerate(texts)]
    hook.remove()
    sums[0] = float(torch.cat(found).double().sum())


timed(
    {"featdiff": ours, "whole forward pass": whole}[way], int(given["block"]), lambda: {"tokens": stream.rows, "sum": sums[0]}
)
