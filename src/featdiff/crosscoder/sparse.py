"""Encode and decode through the active features alone: only the encoder's matrix product stays dense.

With E active entries in a batch (2 % of B·F for BatchTopK), decoding and all weight gradients are weighted sums of rows:
8·E·I operations instead of 8·B·F·I. Nothing is approximated, see ``_Autoencode``.
B token rows, M models, D residual width, I = M·D inputs, F features, E active entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


class Entries(NamedTuple):
    """Active entries of a batch, row by row."""

    row_E: Int[Tensor, " E"]
    column_E: Int[Tensor, " E"]
    """Feature of each entry."""
    value_E: Float[Tensor, " E"]
    start_B: Int[Tensor, " B"]
    """Number of entries before each row's first one."""

    @classmethod
    def of(cls, f_BF: Float[Tensor, "B F"], kept_E: Int[Tensor, " E"]) -> Entries:
        """The entries of ``f_BF`` at ``kept_E``, ascending places in the flattened tensor."""
        row_E = kept_E.div(f_BF.shape[1], rounding_mode="floor")
        counts_B = torch.bincount(row_E, minlength=len(f_BF))
        value_E = f_BF.detach().flatten()[kept_E]
        return cls(row_E, kept_E - row_E * f_BF.shape[1], value_E, counts_B.cumsum(0) - counts_B)


def _weighted_rows(table: Tensor, index_E: Tensor, start: Tensor, weight_E: Tensor) -> Tensor:
    """For each bag, the sum of ``weight_e · table[index_e]`` over its entries: from its ``start`` to the next bag's. An empty
    bag gives zeros."""
    return embedding_bag(index_E, table, start, mode="sum", per_sample_weights=weight_E)


class _Autoencode(torch.autograd.Function):
    """x̂ and the active values as functions of the weights, with the gradient written by hand.

    Entry e in row b(e) and column k(e) has the value v_e = relu(x_b · W_enc[:, k] + b_enc[k]) > 0, and
    x̂_b = Σ_{e: b(e)=b} v_e W_dec[k(e)] + b_dec. With g = ∂L/∂x̂ [B, I], and h = ∂L/∂v [E] from other uses of v:

        δ_e = ∂L/∂v_e in all = h_e + g_b(e) · W_dec[k(e)]           relu' = 1, as v_e > 0: δ_e is the preactivation's too
        ∂L/∂W_dec[k] = Σ_{e: k(e)=k} v_e g_b(e)                     ∂L/∂b_dec = Σ_b g_b
        ∂L/∂W_enc[:, k] = Σ_{e: k(e)=k} δ_e x_b(e)                  ∂L/∂b_enc[k] = Σ_{e: k(e)=k} δ_e

    This is exact. An entry that is left out has v = 0: either relu' is 0 there, or a selection dropped it, which is a
    constant factor 0. Only the order of summation differs from the dense products. x̂ needs the sums by row, the weights
    need them by feature; so backward sorts the entries by column (stable, hence in the same order each time)."""

    @staticmethod
    def forward(
        ctx: Any, x_BI: Tensor, W_enc_IF: Tensor, b_enc_F: Tensor, W_dec_FI: Tensor, b_dec_I: Tensor, entries: Entries
    ) -> tuple[Tensor, Tensor]:
        # The encoder's weights are arguments only so that they get a gradient: their product is in the entries already.
        ctx.save_for_backward(x_BI, W_dec_FI, *entries)
        ctx.features = len(b_enc_F)
        rebuilt_BI = _weighted_rows(W_dec_FI, entries.column_E, entries.start_B, entries.value_E) + b_dec_I
        return rebuilt_BI, entries.value_E.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_rebuilt_BI, d_value_E = gradients
        x_BI, W_dec_FI, row_E, column_E, value_E, start_B = ctx.saved_tensors
        # The gather g_b(e) · W_dec[k(e)] would write E·I numbers twice; the bag's own gradient of its weights sums as it goes.
        with torch.enable_grad():
            weight_E = value_E.detach().requires_grad_()
            rebuilt_BI = _weighted_rows(W_dec_FI, column_E, start_B, weight_E)
        (slope_E,) = torch.autograd.grad(rebuilt_BI, weight_E, d_rebuilt_BI)
        d_value_E = d_value_E + slope_E
        order = column_E.argsort(stable=True)
        counts_F = torch.bincount(column_E, minlength=ctx.features)
        start_F = counts_F.cumsum(0) - counts_F
        by_feature = row_E[order]
        d_W_dec_FI = _weighted_rows(d_rebuilt_BI, by_feature, start_F, value_E[order])
        d_W_enc_FI = _weighted_rows(x_BI, by_feature, start_F, d_value_E[order])
        d_b_enc_F = torch.zeros(ctx.features, dtype=d_value_E.dtype, device=d_value_E.device).index_add_(0, column_E, d_value_E)
        return None, d_W_enc_FI.T, d_b_enc_F, d_W_dec_FI, d_rebuilt_BI.sum(0), None


def autoencode(
    x_BI: Float[Tensor, "B I"],
    W_enc_IF: Float[Tensor, "I F"],
    b_enc_F: Float[Tensor, " F"],
    W_dec_FI: Float[Tensor, "F I"],
    b_dec_I: Float[Tensor, " I"],
    entries: Entries,
) -> tuple[Float[Tensor, "B I"], Float[Tensor, " E"]]:
    """Reconstruction and active values of ``entries``, which must be positive ones of relu(x W_enc + b_enc).

    Both are differentiable in all weights, and not in ``x_BI``."""
    rebuilt_BI, value_E = _Autoencode.apply(x_BI, W_enc_IF, b_enc_F, W_dec_FI, b_dec_I, entries)
    return rebuilt_BI, value_E
