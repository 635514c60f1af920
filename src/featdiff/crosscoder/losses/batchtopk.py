"""BatchTopK: a batch keeps its k·B largest feature values, and dead features learn from what the others leave over.

Selection: Bussmann et al. 2024, on values weighted by decoder norms as in Minder, Dumas et al. 2025.
Auxiliary loss: Gao et al. 2024.
B batch, M models, D residual width, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featdiff.crosscoder.losses.loss import Loss, Step, rebuild
from featdiff.crosscoder.model import Crosscoder

THRESHOLD_MEMORY = 0.99
"""Weight of the past in the running mean of cutoffs: it looks back over about 100 batches."""
GUESS = 0.8
"""Share of the running threshold that serves as guess of the next cutoff. A guess above the cutoff costs a second search over
all entries, a guess far below it spares little: 0.8 leaves room for what cutoffs vary by from batch to batch."""


def batch_top_k(value: Tensor, count: int, guess: Tensor | None = None) -> tuple[Float[Tensor, ""], Int[Tensor, " E"]]:
    """The cutoff and what is kept: the ``count``-th largest entry of ``value`` (of any shape), but at least the smallest normal
    positive number, so that a zero is never kept; and the ascending places, in the flattened tensor, of all entries from there
    on.

    ``guess`` is any number; the result does not depend on it. A guess a little below the cutoff makes the search fast."""
    # Exact: where at least `count` entries exceed the guess, the `count` largest of all are among these, and so is the
    # smallest of them. Where fewer do, the guess was too high, and the search goes over everything that may be kept.
    flat, least = value.flatten(), torch.finfo(value.dtype).tiny
    near = torch.empty(0, dtype=torch.long) if guess is None else (flat > guess.clamp(min=least)).nonzero().squeeze(1)
    if len(near) < count:
        near = (flat >= least).nonzero().squeeze(1)
    found = flat[near]
    if not len(near):
        return flat.new_tensor(least), near
    cutoff = found.topk(min(count, len(near)), sorted=False).values.amin()
    if len(near) < count:
        cutoff = flat.new_tensor(least)  # fewer are positive than might be kept: all of them are
    return cutoff, near[found >= cutoff]


class Kept(NamedTuple):
    """What a batch keeps of its preactivations."""

    f_BF: Float[Tensor, "B F"]
    places_E: Int[Tensor, " E"]
    """Ascending places, in the flattened ``f_BF``, of the entries with f_k Σ_m‖d_k^m‖ ≥ cutoff."""

    @classmethod
    def at(cls, crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], cutoff: Float[Tensor, ""] | float) -> Kept:
        """What ``cutoff`` keeps of the preactivations of ``x_BMD``."""
        f_BF = crosscoder.preactivations(x_BMD)
        return cls(f_BF, (f_BF.detach() * crosscoder.decoder_norms().detach().sum(1) >= cutoff).flatten().nonzero().squeeze(1))


def batchtopk_loss(
    crosscoder: Crosscoder,
    x_BMD: Float[Tensor, "B M D"],
    kept: Kept,
    dead_F: Bool[Tensor, " F"],
    aux_k: int,
    aux_weight: float,
    variance: float,
) -> Step:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖² / ``variance``, where x̂ uses what is ``kept`` of the preactivations of
    ``x_BMD`` (Bussmann et al. 2024; norm-weighted as in Minder, Dumas et al. 2025).

    Where features are dead, ``aux_weight`` times an auxiliary loss is added (Gao et al. 2024): each token's ``aux_k`` most
    active dead features rebuild the error, and what they leave is divided by the error, both as means over tokens."""
    # The choice of entries is a constant to the gradient: it moves only when two values change places.
    error, _, code_BF = rebuild(crosscoder, x_BMD, *kept)
    total = error.square().sum((1, 2)).mean() / variance
    dead = dead_F.nonzero().squeeze(1)
    if len(dead):
        # Read anew, C features instead of F: the gradient through f_BF would be a product over all features.
        dead_BC = crosscoder.preactivations(x_BMD, dead)
        top = dead_BC.topk(min(aux_k, len(dead)), dim=1)
        sparse_BC = torch.zeros_like(dead_BC).scatter(1, top.indices, top.values)
        rebuilt = (sparse_BC @ crosscoder.W_dec.index_select(0, dead).flatten(1)).view_as(error)
        # The error is detached: living features must not learn to leave errors that dead ones can explain. Each process divides
        # by the error of its own rows, so with several processes the ratio is the mean of theirs (the one approximation).
        aux = (error.detach() - rebuilt).square().sum((1, 2)).mean() / error.detach().square().sum((1, 2)).mean()
        total = total + aux_weight * aux
    return Step(total, error.detach(), code_BF)


class BatchTopK(Loss):
    """:func:`batchtopk_loss` with the cutoff of the whole batch over all processes.

    At inference there is no batch to select from, so ``crosscoder.threshold`` stands in for the cutoff. Bussmann et al. 2024
    take the mean of the cutoffs; this is a running mean, which forgets early training. L0 is then about k on average."""

    def __call__(self, x_BMD: Float[Tensor, "B M D"], step: int, dead_F: Bool[Tensor, " F"]) -> Step:
        threshold = self.crosscoder.threshold
        f_BF = self.crosscoder.preactivations(x_BMD)
        cutoff, places_E = self._selected(f_BF.detach(), threshold * GUESS if step > 1 else None)
        result = self._step(x_BMD, Kept(f_BF, places_E), dead_F)
        # The first cutoff replaces what was there, be it the 0 of a new crosscoder or the threshold of the one that this fit
        # started from, whose inputs were others. A mean that started from 0 would stay too low for hundreds of steps.
        memory = THRESHOLD_MEMORY if step > 1 else 0.0
        threshold.mul_(memory).add_(cutoff, alpha=1 - memory)
        return result

    def _step(self, x_BMD: Float[Tensor, "B M D"], kept: Kept, dead_F: Bool[Tensor, " F"]) -> Step:
        """The loss of what the whole batch's cutoff keeps of these rows."""
        params = self.params
        return batchtopk_loss(self.crosscoder, x_BMD, kept, dead_F, params.aux_k, params.aux_weight, self.variance)

    @torch.no_grad()
    def _selected(self, f_BF: Float[Tensor, "B F"], guess: Tensor | None) -> tuple[Float[Tensor, ""], Int[Tensor, " E"]]:
        """Cutoff of the whole batch, and what of this process's rows is kept. At most ``count`` of the largest values can come
        from one process, so each sends that many of its own and the result is exact."""
        value = f_BF * self.crosscoder.decoder_norms().sum(1)
        count = self.params.k * self.params.batch_tokens
        if self.accelerator.num_processes == 1:
            return batch_top_k(value, count, guess)
        largest = value.flatten().topk(min(count, value.numel())).values
        cutoff, _ = batch_top_k(self.accelerator.gather(largest), count, guess)
        return cutoff, (value >= cutoff).flatten().nonzero().squeeze(1)
