"""The base with noise on its weights: an arm that was taught nothing, and a case in which a claim of a gain is false.

The noise is Gaussian, equally strong on every weight that a trained arm could change, and in all ``noise.size`` times as long
as the base's weights. One number does for all tensors, because Adam moves every weight about as far, whatever tensor it is in:
each tensor then goes about as far as in a trained arm, whose size :func:`moved` measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import PreTrainedModel

from featdiff import stats
from featdiff.config.models import NoiseParams
from featdiff.language.models import load_model, load_tokenizer, save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.training.arm import Log, load_trainable


@torch.no_grad()
def train(base: Path, data: Path, out: Path, scratch: Scratch, params: NoiseParams, seed: int, log: Log) -> dict[str, Any]:
    """Put noise on ``base`` in ``params.checkpoints`` equal steps along one line; returns the audit.

    ``checkpoints`` counts the steps; ``moved`` is the size of the noise once it is rounded as weights are."""
    audit: dict[str, Any] = {"updates": 0, "checkpoints": list(range(1, params.checkpoints + 1)), "problems": 0, "moved": 0.0}
    if not process_state().is_main_process:
        return audit
    original, model, tokenizer = load_model(base), load_trainable(base, params.blocks), load_tokenizer(base)
    start_W = weights(original)
    # A stream of its own: ``seed`` itself also draws the first weights of the organism, which are such numbers too.
    noise_W = torch.randn(len(start_W), generator=torch.Generator().manual_seed(stats.stream(seed)))
    tensors = list(model.parameters())
    noise_W *= torch.cat([torch.full((tensor.numel(),), float(tensor.requires_grad)) for tensor in tensors])
    noise_W *= params.size * start_W.norm() / noise_W.norm()
    for number in audit["checkpoints"]:
        row_W = start_W + number / params.checkpoints * noise_W
        for tensor, part in zip(tensors, row_W.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
        save_model(model, tokenizer, out if number == params.checkpoints else out / "checkpoints" / str(number))
    return audit | {"moved": moved(original, model)}


@torch.no_grad()
def moved(before: PreTrainedModel, after: PreTrainedModel) -> float:
    """‖θ' − θ‖ / ‖θ‖ over all weights: the ``noise.size`` of an arm that moves as far."""
    start_W = weights(before)
    return float((weights(after) - start_W).norm() / start_W.norm())


def weights(model: PreTrainedModel) -> Tensor:
    """Every weight of ``model`` once, in one row [W]."""
    return parameters_to_vector(model.parameters()).float()
