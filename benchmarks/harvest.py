"""The residual stream of a model of SmolLM2-135M's shape at half depth: read as `activations` reads it, and from a whole
forward pass with a hook, logits and all."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import harvest_model
from featdiff.activations.residual import TokenStream, read_residual
from featdiff.language.models import block, truncate
from pace import case, timed

given, way = case(), sys.argv[2]
BATCH, LAYER = int(given["batch"]), harvest_model.LAYER
texts, model = harvest_model.texts(int(given["texts"])), harvest_model.model()
stream, trunk, sums = TokenStream(texts, 1), truncate(model, LAYER), [0.0]


def ours() -> None:
    sums[0] = float(read_residual(trunk, stream, BATCH, 0, torch.float32).double().sum())


def whole() -> None:
    kept: list[Tensor] = []
    hook = block(model, LAYER).register_forward_hook(lambda _module, _inputs, output: kept.append(output))

    def read(given: dict[str, Tensor]) -> Tensor:
        model(**given, use_cache=False)
        return kept.pop()

    sums[0] = harvest_model.total(texts, BATCH, read)
    hook.remove()


timed(
    {"featdiff": ours, "whole forward pass": whole}[way], int(given["block"]), lambda: {"tokens": stream.rows, "sum": sums[0]}
)
