"""Encode and decode through the active features alone: only the encoder's matrix product stays dense.

With E active entries in a batch (2 % of B·F for BatchTopK), decoding and all weight gradients are weighted sums of rows:
8·E·I operations instead of 8·B·F·I. Where many entries are active, products over those features are faster. A code may have
parts of both kinds, whose gradients meet in one tensor per weight. Nothing is approximated, see ``_Rebuild``.
B token rows, M models, D residual width, I = M·D inputs, F features, C of them, E active entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from featdiff.crosscoder.selection import order_of


class Slopes(NamedTuple):
    """∂L/∂weights of some features, row by row as the weights lie in memory."""

    features_C: Int[Tensor, " C"] | None
    """None: all, in their order."""
    W_enc_CI: Float[Tensor, "C I"]
    b_enc_C: Float[Tensor, " C"]
    W_dec_CI: Float[Tensor, "C I"]


class Part(Protocol):
    """Some values of a code, each of which is relu(x_b · W_enc[:, k] + b_enc[k]); those that are 0 count for nothing."""

    def counts(self) -> Int[Tensor, " F"]:
        """On how many rows each feature is active."""

    def totals(self) -> Float[Tensor, " F"]:
        """Σ_b f_bk"""

    def decode(self, W_dec_FI: Float[Tensor, "F I"]) -> Float[Tensor, "B I"]:
        """f W_dec"""

    def slopes(
        self, x_BI: Float[Tensor, "B I"], W_dec_FI: Float[Tensor, "F I"], g_BI: Float[Tensor, "B I"], h_F: Tensor | None
    ) -> Slopes:
        """∂L/∂weights through these values, from g = ∂L/∂(f W_dec), and from h_k = ∂L/∂f_bk by any other way, which is the
        same for all active values of a feature."""


def _weighted_rows(table: Tensor, index_E: Tensor, start: Tensor, weight_E: Tensor) -> Tensor:
    """For each bag, the sum of ``weight_e · table[index_e]`` over its entries: from its ``start`` to the next bag's. An empty
    bag gives zeros. Each is summed in the order of its entries, whatever the number of threads."""
    return embedding_bag(index_E, table, start, mode="sum", per_sample_weights=weight_E)


def _sums(weight_E: Tensor, start: Tensor) -> Tensor:
    """The sum of each bag's weights."""
    index_E = torch.zeros(len(weight_E), dtype=torch.long, device=weight_E.device)
    return _weighted_rows(weight_E.new_ones(1, 1), index_E, start, weight_E).squeeze(1)


def _starts(number_E: Tensor, numbers: int) -> Tensor:
    """How many of the ascending ``number_E`` lie below 0, 1, ... up to ``numbers``. Unlike bincount, no host waits for it."""
    return torch.searchsorted(number_E, torch.arange(numbers, device=number_E.device))


class Entries:
    """A part of which few values are active: those alone."""

    def __init__(self, f_BF: Float[Tensor, "B F"], kept_E: Int[Tensor, " E"]) -> None:
        """The values of ``f_BF`` at ``kept_E``, ascending places in the flattened tensor, all of them positive."""
        rows, features = f_BF.shape
        self.row_E = kept_E.div(features, rounding_mode="floor")
        self.column_E = kept_E - self.row_E * features
        self.value_E = f_BF.detach().flatten().index_select(0, kept_E)
        self.start_B = _starts(self.row_E, rows)
        # x̂ needs sums by row, the weights' gradients need them by feature. Equal columns stay in the order of their rows.
        self.order_E = order_of(self.column_E, features)
        self.start_F = _starts(self.column_E.index_select(0, self.order_E), features)

    def counts(self) -> Int[Tensor, " F"]:
        return self.start_F.diff(append=self.start_F.new_full((1,), len(self.column_E)))

    def totals(self) -> Float[Tensor, " F"]:
        return _sums(self.value_E.index_select(0, self.order_E), self.start_F)

    def decode(self, W_dec_FI: Float[Tensor, "F I"]) -> Float[Tensor, "B I"]:
        # The gather g_b(e) · W_dec[k(e)] that the slopes need would write E·I numbers twice; the bag's own gradient of its
        # weights sums as it goes. Its graph is kept for that.
        with torch.enable_grad():
            self._weight_E = self.value_E.detach().requires_grad_()
            self._decoded_BI = _weighted_rows(W_dec_FI.detach(), self.column_E, self.start_B, self._weight_E)
        return self._decoded_BI.detach()

    def slopes(
        self, x_BI: Float[Tensor, "B I"], W_dec_FI: Float[Tensor, "F I"], g_BI: Float[Tensor, "B I"], h_F: Tensor | None
    ) -> Slopes:
        (d_E,) = torch.autograd.grad(self._decoded_BI, self._weight_E, g_BI, retain_graph=True)
        if h_F is not None:
            d_E += h_F.index_select(0, self.column_E)
        row_E, value_E, d_E = (part.index_select(0, self.order_E) for part in (self.row_E, self.value_E, d_E))
        d_W_enc_FI = _weighted_rows(x_BI, row_E, self.start_F, d_E)
        return Slopes(None, d_W_enc_FI, _sums(d_E, self.start_F), _weighted_rows(g_BI, row_E, self.start_F, value_E))


class Columns:
    """A part of which many values are active: all values of some features."""

    def __init__(self, f_BC: Float[Tensor, "B C"], n_features: int, features_C: Int[Tensor, " C"] | None = None) -> None:
        """``features_C`` are different ones of ``n_features``; None: all."""
        self.f_BC, self.n_features, self.features_C = f_BC.detach(), n_features, features_C

    def _of_all(self, found_C: Tensor) -> Tensor:
        if self.features_C is None:
            return found_C
        return found_C.new_zeros(self.n_features).index_copy_(0, self.features_C, found_C)

    def _of_these(self, table: Tensor) -> Tensor:
        return table if self.features_C is None else table.index_select(0, self.features_C)

    def counts(self) -> Int[Tensor, " F"]:
        return self._of_all((self.f_BC > 0).sum(0))

    def totals(self) -> Float[Tensor, " F"]:
        return self._of_all(self.f_BC.sum(0))

    def decode(self, W_dec_FI: Float[Tensor, "F I"]) -> Float[Tensor, "B I"]:
        return self.f_BC @ self._of_these(W_dec_FI)

    def slopes(
        self, x_BI: Float[Tensor, "B I"], W_dec_FI: Float[Tensor, "F I"], g_BI: Float[Tensor, "B I"], h_F: Tensor | None
    ) -> Slopes:
        d_BC = g_BI @ self._of_these(W_dec_FI).T
        if h_F is not None:
            d_BC += self._of_these(h_F)
        d_BC *= self.f_BC > 0
        return Slopes(self.features_C, d_BC.T @ x_BI, d_BC.sum(0), self.f_BC.T @ g_BI)


class _Rebuild(torch.autograd.Function):
    """f W_dec of each part of a code f, and its activity, as functions of the weights, with the gradient written by hand.

    The active entry of row b and feature k has the value v = relu(x_b · W_enc[:, k] + b_enc[k]) > 0. With g_b = ∂L/∂(f W_dec)_b
    of its part, and h_k = ∂L/∂v by way of the activity A = Σ v Σ_m ‖d_k^m‖, which is a = ∂L/∂A times Σ_m ‖d_k^m‖:

        δ = ∂L/∂v in all = h_k + g_b · W_dec[k]               relu' = 1, as v > 0: δ is the preactivation's too
        ∂L/∂W_enc[:, k] = Σ_b δ x_b      ∂L/∂b_enc[k] = Σ_b δ
        ∂L/∂W_dec[k] = Σ_b v g_b         and by way of the norms, for each model m, a Σ_b v · d_k^m / ‖d_k^m‖

    over active entries, and all parts. This is exact. A value that is left out is 0: either relu' is 0 there, or a selection
    dropped it, which is a constant factor 0. Only the order of summation differs from dense products over all features."""

    @staticmethod
    def forward(
        ctx: Any, x_BI: Tensor, W_enc_IF: Tensor, b_enc_F: Tensor, W_dec_FMD: Tensor, norms_FM: Tensor | None, *parts: Part
    ) -> tuple[Tensor, ...]:
        # The encoder's weights are arguments only so that they get a gradient: their product is in the parts already.
        ctx.save_for_backward(x_BI, W_dec_FMD)
        ctx.norms_FM, ctx.parts = norms_FM, parts
        ctx.set_materialize_grads(False)
        if norms_FM is None:
            activity = x_BI.new_zeros(())
        else:
            ctx.total_F = torch.stack([part.totals() for part in parts]).sum(0)
            activity = ctx.total_F @ norms_FM.sum(1)
        return activity, *(part.decode(W_dec_FMD.flatten(1)) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        a, *g = gradients
        x_BI, W_dec_FMD = ctx.saved_tensors
        h_F = None if a is None else a * ctx.norms_FM.sum(1)
        held: Slopes | None = None
        for part, g_BI in zip(ctx.parts, g, strict=True):
            if g_BI is None:
                g_BI = torch.zeros_like(x_BI)
            found = part.slopes(x_BI, W_dec_FMD.flatten(1), g_BI, h_F)
            held = _sum(held, found, len(W_dec_FMD))
        assert held is not None
        d_W_dec_FMD = held.W_dec_CI.view_as(W_dec_FMD)
        if a is not None:
            # A row without length has no direction to grow in.
            share_FM = torch.where(ctx.norms_FM > 0, a * ctx.total_F[:, None] / ctx.norms_FM, 0.0)
            d_W_dec_FMD.addcmul_(W_dec_FMD, share_FM[:, :, None])
        return None, held.W_enc_CI.T, held.b_enc_C, d_W_dec_FMD, None, *(None for _ in ctx.parts)


def _sum(held: Slopes | None, found: Slopes, n_features: int) -> Slopes:
    """Both together, of all features, in the memory of the first."""
    if held is None:
        if found.features_C is None:
            return found
        held = Slopes(None, *(part.new_zeros(n_features, *part.shape[1:]) for part in found[1:]))
    for mine, theirs in zip(held[1:], found[1:], strict=True):
        if found.features_C is None:
            mine.add_(theirs)
        else:
            mine.index_add_(0, found.features_C, theirs)
    return held


def rebuild_parts(
    x_BI: Float[Tensor, "B I"],
    W_enc_IF: Float[Tensor, "I F"],
    b_enc_F: Float[Tensor, " F"],
    W_dec_FMD: Float[Tensor, "F M D"],
    parts: Sequence[Part],
    norms_FM: Float[Tensor, "F M"] | None = None,
) -> tuple[Float[Tensor, ""], list[Float[Tensor, "B I"]]]:
    """Activity Σ_b Σ_k f_k Σ_m ‖d_k^m‖ of all ``parts`` together, 0 without ``norms_FM``, the norms of the decoder's rows; and
    each part's f W_dec. All are differentiable in all weights, and not in ``x_BI``."""
    activity, *rebuilt = _Rebuild.apply(x_BI, W_enc_IF, b_enc_F, W_dec_FMD, norms_FM, *parts)
    return activity, rebuilt
