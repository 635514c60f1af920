"""Encode and decode through the active features alone: only the encoder's matrix product stays dense.

With E active entries of a batch (2 % of it for BatchTopK), decoding and all weight gradients are weighted sums of
rows, 8·E·I operations instead of 8·B·F·I. A silent ReLU has zero gradient, so nothing is approximated.
B token rows, I = M·D inputs, F features, E active entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Entries(NamedTuple):
    """Active entries of a batch, in row order."""

    row_E: Tensor
    column_E: Tensor
    value_E: Tensor
    start_B: Tensor
    """Where each row's entries begin."""

    @classmethod
    def of(cls, code_BF: Tensor) -> Entries:
        """The non-zero entries of ``code_BF``."""
        row_E, column_E = code_BF.nonzero(as_tuple=True)
        counts_B = torch.bincount(row_E, minlength=len(code_BF))
        return cls(row_E, column_E, code_BF[row_E, column_E], counts_B.cumsum(0) - counts_B)


def _weighted_rows(table: Tensor, index_E: Tensor, start: Tensor, weight_E: Tensor) -> Tensor:
    """Per bag, the sum of ``weight_e · table[index_e]``."""
    return embedding_bag(index_E, table, start, mode="sum", per_sample_weights=weight_E)


class _Autoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BI: Tensor, W_enc_IF: Tensor, b_enc_F: Tensor, W_dec_FI: Tensor, b_dec_I: Tensor, entries: Entries
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BI, W_dec_FI, *entries)
        ctx.features = len(b_enc_F)
        rebuilt_BI = _weighted_rows(W_dec_FI, entries.column_E, entries.start_B, entries.value_E) + b_dec_I
        return rebuilt_BI, entries.value_E.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_rebuilt_BI, d_value_E = gradients
        x_BI, W_dec_FI, row_E, column_E, value_E, _ = ctx.saved_tensors
        d_value_E = d_value_E + (d_rebuilt_BI[row_E] * W_dec_FI[column_E]).sum(1)
        order = column_E.argsort(stable=True)
        counts_F = torch.bincount(column_E, minlength=ctx.features)
        start_F = counts_F.cumsum(0) - counts_F
        by_feature = row_E[order]
        d_W_dec_FI = _weighted_rows(d_rebuilt_BI, by_feature, start_F, value_E[order])
        d_W_enc_FI = _weighted_rows(x_BI, by_feature, start_F, d_value_E[order])
        d_b_enc_F = torch.zeros(ctx.features, dtype=d_value_E.dtype, device=d_value_E.device).index_add_(0, column_E, d_value_E)
        return None, d_W_enc_FI.T, d_b_enc_F, d_W_dec_FI, d_rebuilt_BI.sum(0), None


def autoencode(
    x_BI: Tensor, W_enc_IF: Tensor, b_enc_F: Tensor, W_dec_FI: Tensor, b_dec_I: Tensor, code_BF: Tensor
) -> tuple[Tensor, Tensor, Entries]:
    """Reconstruction [B, I] and active values [E] of ``code_BF`` = relu(x W_enc + b_enc) with some entries dropped,
    differentiable in all weights (not in ``x_BI``)."""
    entries = Entries.of(code_BF)
    rebuilt_BI, value_E = _Autoencode.apply(x_BI, W_enc_IF, b_enc_F, W_dec_FI, b_dec_I, entries)
    return rebuilt_BI, value_E, entries
