"""The two training objectives: the paper's ReLU+L1, and BatchTopK with an auxiliary loss on dead features.

B batch, M models, D residual width, F features. Inputs are normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.sparse import autoencode

SPARSE_BELOW = 0.01
"""Share of active entries below which sparse sums beat dense products (measured on CPUs)."""


class Loss(NamedTuple):
    """One step's objective and what to know about it."""

    total: Tensor
    """Scalar to minimise."""
    error: Float[Tensor, "B M D"]
    """x − x̂, detached."""
    fired: Float[Tensor, "B F"]
    """Feature values after selection, detached."""
    cutoff: Tensor
    """BatchTopK: smallest kept f_k Σ_m‖d_k^m‖; 0 for L1."""


def _rebuild(crosscoder: Crosscoder, x_BMD: Tensor, f_BF: Tensor, kept_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Error [B, M, D] of the reconstruction from the features ``f_BF`` where ``kept_BF`` is true, and their
    Σ_k f_k Σ_m ‖d_k^m‖₂ summed over the batch; by sparse sums where that is faster."""
    norms_F = crosscoder.decoder_norms().sum(1)
    if kept_BF.float().mean() >= SPARSE_BELOW:
        code_BF = f_BF * kept_BF
        return x_BMD - crosscoder.decode(code_BF), (code_BF * norms_F).sum()
    rebuilt_BI, value_E, entries = autoencode(
        x_BMD.flatten(1),
        crosscoder.W_enc.flatten(0, 1),
        crosscoder.b_enc,
        crosscoder.W_dec.flatten(1),
        crosscoder.b_dec.flatten(),
        f_BF.detach() * kept_BF,
    )
    return x_BMD - rebuilt_BI.view_as(x_BMD), (value_E * norms_F[entries.column_E]).sum()


def l1_loss(crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], weight: float) -> Loss:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖² + λ Σ_k f_k Σ_m ‖d_k^m‖₂ (the paper's, by its lineage)."""
    f_BF = crosscoder.preactivations(x_BMD)
    error, activity = _rebuild(crosscoder, x_BMD, f_BF, f_BF.detach() > 0)
    total = error.square().sum((1, 2)).mean() + weight * activity / len(x_BMD)
    return Loss(total, error.detach(), f_BF.detach(), torch.zeros(()))


def batch_top_k(value_BF: Float[Tensor, "B F"], count: int, guess: Tensor | None = None) -> Tensor:
    """The ``count``-th largest entry of ``value_BF``, at least the smallest positive number: what is below it is dropped.

    ``guess``, a number a little below the expected result, spares looking at most entries; the result is the same."""
    candidates = value_BF.flatten()
    if guess is not None and len(near := candidates[candidates > guess]) >= count:
        candidates = near
    cutoff = candidates.topk(min(count, len(candidates)), sorted=False).values.amin()
    return cutoff.clamp(min=torch.finfo(value_BF.dtype).tiny)


def batchtopk_loss(
    crosscoder: Crosscoder,
    x_BMD: Float[Tensor, "B M D"],
    cutoff: Tensor,
    dead_F: Tensor,
    aux_k: int,
    aux_weight: float,
    variance: float,
    f_BF: Float[Tensor, "B F"] | None = None,
) -> Loss:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖² / ``variance`` over the features with f_k Σ_m‖d_k^m‖ ≥ ``cutoff``
    (Bussmann et al. 2024; norm-weighted as in Minder, Dumas et al. 2025), plus ``aux_weight`` times the same for
    the residual error rebuilt by the ``aux_k`` most active dead features (Gao et al. 2024). ``f_BF`` are the
    preactivations where they are known already."""
    f_BF = crosscoder.preactivations(x_BMD) if f_BF is None else f_BF
    kept_BF = f_BF.detach() * crosscoder.decoder_norms().detach().sum(1) >= cutoff
    error, _ = _rebuild(crosscoder, x_BMD, f_BF, kept_BF)
    total = error.square().sum((1, 2)).mean() / variance
    dead = dead_F.nonzero().squeeze(1)
    if len(dead):
        top = f_BF[:, dead].topk(min(aux_k, len(dead)), dim=1)
        sparse = torch.zeros_like(f_BF[:, dead]).scatter(1, top.indices, top.values)
        rebuilt = (sparse @ crosscoder.W_dec[dead].flatten(1)).view_as(error)
        aux = (error.detach() - rebuilt).square().sum((1, 2)).mean() / error.detach().square().sum((1, 2)).mean()
        total = total + aux_weight * aux
    return Loss(total, error.detach(), f_BF.detach() * kept_BF, cutoff)
