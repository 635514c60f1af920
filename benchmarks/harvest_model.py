"""What is read and by which model (harvest.py): random texts, and SmolLM2-135M's shape with random weights. For environments of
peers, too: PyTorch and transformers alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LAYER = 15
"""Blocks below the stream that is read: half of them."""


def texts(count: int) -> list[list[int]]:
    """``count`` texts of 40 to 199 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, 200, (count,), generator=generator).tolist()
    return [torch.randint(49_152, (length,), generator=generator).tolist() for length in lengths]


def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def padded(texts: list[list[int]]) -> dict[str, Tensor]:
    """What a model reads of ``texts`` [B, T], padded on the left."""
    longest = max(map(len, texts))
    mask_BT = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    ids_BT = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}


@torch.inference_mode()
def total(texts: list[list[int]], batch: int, read: Callable[[dict[str, Tensor]], Tensor]) -> float:
    """Sum over the stream at every token of each text but its first; ``read`` gives that of a batch [B, T, D]."""
    found = []
    for low in range(0, len(texts), batch):
        some = texts[low : low + batch]
        resid_BTD = read(padded(some))
        found += [resid_BTD[row, 1 - len(text) :] for row, text in enumerate(some)]
    return float(torch.cat(found).double().sum())
