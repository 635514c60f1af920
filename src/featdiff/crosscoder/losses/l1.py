"""ReLU+L1: an L1 penalty on feature values, weighted by decoder norms (the paper's loss, by its lineage: Lindsey et al. 2024).

B batch, M models, D residual width, F features.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from featdiff.crosscoder.losses.loss import Loss, Step, few, rebuild, squared
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.selection import above, places
from featdiff.crosscoder.sparse import Columns, Entries


def l1_loss(crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], weight: float) -> Step:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖² + λ Σ_k f_k Σ_m ‖d_k^m‖₂, with λ = ``weight``, on normalised inputs."""
    f_BF = crosscoder.linear(x_BMD)
    active_BF = above(f_BF, 0.0)
    # At the start of a fit a third of all are active.
    part = Entries(f_BF, places(active_BF)) if few(active_BF.count_nonzero(), f_BF) else Columns(f_BF.relu_(), f_BF.shape[1])
    activity, (rebuilt_BMD,) = rebuild(crosscoder, x_BMD, part, norms_FM=crosscoder.decoder_norms().detach())
    rebuilt_BMD = rebuilt_BMD + crosscoder.b_dec
    total = squared(x_BMD, rebuilt_BMD) + weight * activity / len(x_BMD)
    return Step(total, x_BMD - rebuilt_BMD.detach(), part.counts())


class L1(Loss):
    """:func:`l1_loss` with λ rising linearly to ``l1_weight`` over the first ``l1_warmup_share`` of the steps, so that features
    find directions before the penalty is at its full strength. Every positive value is active at inference."""

    def __call__(self, x_BMD: Float[Tensor, "B M D"], step: int, dead_F: Bool[Tensor, " F"]) -> Step:
        ramp = min(1.0, step / max(1.0, self.params.l1_warmup_share * self.params.steps))
        return l1_loss(self.crosscoder, x_BMD, self.params.l1_weight * ramp)
