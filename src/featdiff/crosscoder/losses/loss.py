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
from featdiff.crosscoder.sparse import Entries, autoencode

SPARSE_BELOW = 0.05
"""Share of active entries below which sparse sums are faster than dense products (measured on CPUs, widths of 96 and 576)."""


class Step(NamedTuple):
    """What one training step gives."""

    total: Float[Tensor, ""]
    """The scalar to minimise, with its graph."""
    error: Float[Tensor, "B M D"]
    """x − x̂, detached."""
    fired: Float[Tensor, "B F"]
    """Feature values after selection, detached."""


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


def rebuild(
    crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], f_BF: Float[Tensor, "B F"], kept_E: Int[Tensor, " E"]
) -> tuple[Float[Tensor, "B M D"], Float[Tensor, ""], Float[Tensor, "B F"]]:
    """Reconstruct ``x_BMD`` from the positive entries of ``f_BF`` at ``kept_E``, ascending places in the flattened tensor, as a
    differentiable function of all weights.

    Returns the error x − x̂, the activity Σ_b Σ_k f_k Σ_m ‖d_k^m‖, and the code: what was kept of ``f_BF``, detached. ``f_BF``
    are the preactivations of ``x_BMD``. The sum runs over active entries alone where few are active; values and gradients are
    the same either way (up to rounding)."""
    norms_F = crosscoder.decoder_norms().sum(1)
    entries = Entries.of(f_BF, kept_E)
    # Writing the few that are kept spares a pass of comparing and choosing over all of [B, F].
    code_BF = torch.zeros_like(f_BF.detach()).flatten().index_copy(0, kept_E, entries.value_E).view_as(f_BF)
    if len(kept_E) >= SPARSE_BELOW * f_BF.numel():
        dense_BF = torch.where(code_BF > 0, f_BF, 0.0)
        return x_BMD - crosscoder.decode(dense_BF), (dense_BF * norms_F).sum(), code_BF
    # f_BF's own graph is not used here: autoencode's backward reaches the encoder from the active entries.
    rebuilt_BI, value_E = autoencode(
        x_BMD.flatten(1),
        crosscoder.W_enc.flatten(0, 1),
        crosscoder.b_enc,
        crosscoder.W_dec.flatten(1),
        crosscoder.b_dec.flatten(),
        entries,
    )
    # Summed by feature before the norms come in: the gradient of norms_F[column_E] would add up the entries of a feature in
    # whatever order the threads meet (from 32,768 entries on), and two fits would differ.
    activity_F = torch.zeros_like(norms_F).index_add(0, entries.column_E, value_E)
    return x_BMD - rebuilt_BI.view_as(x_BMD), (activity_F * norms_F).sum(), code_BF
