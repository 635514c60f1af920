"""The two training objectives: the paper's ReLU+L1, and BatchTopK with an auxiliary loss on dead features.

B batch, M models, D residual width, F features. Inputs are normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.crosscoder.model import Crosscoder


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


def l1_loss(crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], weight: float) -> Loss:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖² + λ Σ_k f_k Σ_m ‖d_k^m‖₂ (the paper's, by its lineage)."""
    f_BF = crosscoder.preactivations(x_BMD)
    error = x_BMD - crosscoder.decode(f_BF)
    penalty = (f_BF * crosscoder.decoder_norms().sum(1)).sum(1).mean()
    total = error.square().sum((1, 2)).mean() + weight * penalty
    return Loss(total, error.detach(), f_BF.detach(), torch.zeros(()))


def batch_top_k(value_BF: Float[Tensor, "B F"], count: int) -> Tensor:
    """The ``count``-th largest entry of ``value_BF``, at least the smallest positive number: what is below it is dropped."""
    flat = value_BF.flatten()
    cutoff = torch.kthvalue(flat, max(1, flat.numel() - count + 1)).values
    return cutoff.clamp(min=torch.finfo(value_BF.dtype).tiny)


def batchtopk_loss(
    crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], cutoff: Tensor, dead_F: Tensor, aux_k: int, aux_weight: float, variance: float
) -> Loss:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖² / ``variance`` over the features with f_k Σ_m‖d_k^m‖ ≥ ``cutoff``
    (Bussmann et al. 2024; norm-weighted as in Minder, Dumas et al. 2025), plus ``aux_weight`` times the same for
    the residual error rebuilt by the ``aux_k`` most active dead features (Gao et al. 2024)."""
    f_BF = crosscoder.preactivations(x_BMD)
    kept_BF = f_BF * (f_BF.detach() * crosscoder.decoder_norms().detach().sum(1) >= cutoff)
    error = x_BMD - crosscoder.decode(kept_BF)
    total = error.square().sum((1, 2)).mean() / variance
    dead = dead_F.nonzero().squeeze(1)
    if len(dead):
        top = f_BF[:, dead].topk(min(aux_k, len(dead)), dim=1)
        sparse = torch.zeros_like(f_BF[:, dead]).scatter(1, top.indices, top.values)
        rebuilt = (sparse @ crosscoder.W_dec[dead].flatten(1)).view_as(error)
        aux = (error.detach() - rebuilt).square().sum((1, 2)).mean() / error.detach().square().sum((1, 2)).mean()
        total = total + aux_weight * aux
    return Loss(total, error.detach(), kept_BF.detach(), cutoff)
