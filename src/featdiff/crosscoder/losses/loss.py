"""What a loss is: how one step trains a crosscoder, and which features are active at inference.

B batch, M models, I = M·D inputs, D residual width, F features. Inputs are normalised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.sparse import Columns, Entries, Part, rebuild_parts

SPARSE_BELOW = 0.05
"""Share of active entries below which sparse sums are faster than dense products (measured on CPUs, widths of 96 and 576)."""


class Step(NamedTuple):
    """What one training step gives."""

    total: Float[Tensor, ""]
    """The scalar to minimise, with its graph."""
    error: Float[Tensor, "B M D"]
    """x − x̂, detached."""
    count_F: Int[Tensor, " F"]
    """On how many rows each feature is active after selection."""


class Loss(ABC):
    """One loss in one fit. A fit makes one object and calls it once per step.

    What is active at inference is the value of ``crosscoder.threshold`` (see ``Crosscoder.select``): a loss that selects
    features keeps it up to date while it trains, and a loss that leaves it at 0 gets a plain ReLU.
    What must survive a kill belongs into parameters or buffers of the crosscoder: a checkpoint holds those and nothing else
    of a loss. The fit makes the optimizer after the loss, so parameters that a loss registers are trained."""

    def __init__(self, crosscoder: Crosscoder, params: CrosscoderTraining, variance: float, accelerator: Accelerator) -> None:
        """``variance``: mean squared distance of the training rows to their mean, summed over models, in normalised units."""
        self.crosscoder, self.params, self.variance, self.accelerator = crosscoder, params, variance, accelerator

    @abstractmethod
    def __call__(self, x_BMD: Float[Tensor, "B M D"], step: int, dead_F: Bool[Tensor, " F"]) -> Step:
        """The loss of this process's rows in step ``step`` (the first is 1). ``dead_F`` are the features that have not fired
        for ``dead_after_tokens`` tokens in any process."""


def few(entries: int | Tensor, f_BF: Float[Tensor, "B F"]) -> bool:
    """Whether a code of so many active entries is better rebuilt from them alone. Values and gradients are the same either way
    (up to rounding)."""
    return bool(entries < SPARSE_BELOW * f_BF.numel())


def part_of(f_BF: Float[Tensor, "B F"], kept_E: Int[Tensor, " E"]) -> Part:
    """The code that keeps the positive values of ``f_BF`` at ``kept_E``, ascending places in the flattened tensor."""
    entries = Entries(f_BF, kept_E)
    if few(len(kept_E), f_BF):
        return entries
    return Columns(torch.zeros_like(f_BF).flatten().index_copy_(0, kept_E, entries.value_E).view_as(f_BF), f_BF.shape[1])


def rebuild(
    crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], *parts: Part, norms_FM: Float[Tensor, "F M"] | None = None
) -> tuple[Float[Tensor, ""], list[Float[Tensor, "B M D"]]]:
    """What each of ``parts`` of a code of ``x_BMD`` decodes to, without the decoder's bias, and the activity
    Σ_b Σ_k f_k Σ_m ‖d_k^m‖ of all together, if ``norms_FM`` says the norms; as differentiable functions of all weights."""
    activity, rebuilt = rebuild_parts(
        x_BMD.flatten(1), crosscoder.W_enc.flatten(0, 1), crosscoder.b_enc, crosscoder.W_dec, parts, norms_FM
    )
    return activity, [part_BI.view_as(x_BMD) for part_BI in rebuilt]


def squared(x_BMD: Float[Tensor, "B M D"], rebuilt_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, ""]:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖²."""
    return torch.nn.functional.mse_loss(rebuilt_BMD, x_BMD, reduction="sum") / len(x_BMD)
