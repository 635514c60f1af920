"""BatchTopK: a batch keeps its k·B largest feature values, and dead features learn from what the others leave over.

Selection: Bussmann et al. 2024, on values weighted by decoder norms as in Minder, Dumas et al. 2025.
Auxiliary loss: Gao et al. 2024.
B batch, M models, D residual width, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featdiff.crosscoder.losses.loss import Loss, Step, part_of, rebuild, squared
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.selection import above, largest_of_rows, places
from featdiff.crosscoder.sparse import Columns

THRESHOLD_MEMORY = 0.99
"""Weight of the past in the running mean of cutoffs: it looks back over about 100 batches."""
GUESS = 0.95
"""Share of the last cutoff, or of a sample's, that serves as guess of the next. A guess above the cutoff costs a second search,
one far below it spares little: this leaves room for what cutoffs vary by from batch to batch."""
SAMPLE = 16
"""One row in so many gives a guess where the last cutoff gave none, or one that is too high."""


def batch_top_k(
    f_BF: Float[Tensor, "B F"], norms_F: Float[Tensor, " F"], count: int, guess: Float[Tensor, ""] | None = None
) -> tuple[Float[Tensor, ""], Int[Tensor, " E"]]:
    """The cutoff and what is kept: the ``count``-th largest of f_k · norms_k, but at least the smallest normal positive number,
    so that a zero is never kept; and the ascending places, in the flattened tensor, of all entries from there on.

    ``guess`` is any number; the result does not depend on it. A guess a little below the cutoff makes the search fast."""
    # Exact: where at least `count` values reach the floor, the `count` largest of all are among these, and so is the smallest
    # of them. Where fewer do, the floor was too high; from the least floor on, everything is found that may be kept.
    least = norms_F.new_tensor(torch.finfo(f_BF.dtype).tiny)
    for floor in _floors(f_BF, norms_F, count, guess, least):
        # One division per feature in place of a product per entry, with a margin for how both round: all entries that reach
        # the floor are near it, and few others.
        near = places(above(f_BF, floor * (1 - 1e-5) / norms_F - least))
        value_E = f_BF.flatten().index_select(0, near) * norms_F.index_select(0, near % len(norms_F))
        if len(near) >= count and (cutoff := value_E.topk(count, sorted=False).values.amin()) >= floor:
            return cutoff, near[value_E >= cutoff]
    return least, near[value_E >= least]  # fewer are positive than might be kept: all of them are


def _floors(
    f_BF: Float[Tensor, "B F"], norms_F: Float[Tensor, " F"], count: int, guess: Tensor | None, least: Tensor
) -> Iterator[Float[Tensor, ""]]:
    """Floors to search from: the guess, one by a sample of the rows, and the least of all."""
    if guess is not None:
        yield guess.clamp(min=least)
    if len(f_BF) > SAMPLE:
        some = (f_BF[::SAMPLE] * norms_F).flatten()
        sampled = some.topk(min(len(some), -(-count // SAMPLE)), sorted=False).values.amin()
        yield (GUESS * sampled).clamp(min=least)
    yield least


class Kept(NamedTuple):
    """What a batch keeps of its preactivations."""

    f_BF: Float[Tensor, "B F"]
    """Before the ReLU."""
    places_E: Int[Tensor, " E"]
    """Ascending places, in the flattened ``f_BF``, of the entries with f_k Σ_m‖d_k^m‖ ≥ cutoff."""

    @classmethod
    @torch.no_grad()
    def at(cls, crosscoder: Crosscoder, x_BMD: Float[Tensor, "B M D"], cutoff: Float[Tensor, ""] | float) -> Kept:
        """What ``cutoff`` keeps of the preactivations of ``x_BMD``."""
        f_BF = crosscoder.linear(x_BMD)
        return cls(f_BF, places(f_BF * crosscoder.decoder_norms().sum(1) >= cutoff))


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
    part = part_of(*kept)
    dead = _of_the_dead(kept.f_BF, dead_F, aux_k)
    _, (rebuilt, *of_the_dead) = rebuild(crosscoder, x_BMD, *(each for each in (part, dead) if each is not None))
    rebuilt = rebuilt + crosscoder.b_dec
    left, error = squared(x_BMD, rebuilt), x_BMD - rebuilt.detach()
    total = left / variance
    for rebuilt_error in of_the_dead:
        # The error is detached: living features must not learn to leave errors that dead ones can explain. Each process divides
        # by the error of its own rows, so with several processes the ratio is the mean of theirs (the one approximation).
        total = total + aux_weight * squared(error, rebuilt_error) / left.detach()
    return Step(total, error, part.counts())


def _of_the_dead(f_BF: Float[Tensor, "B F"], dead_F: Bool[Tensor, " F"], aux_k: int) -> Columns | None:
    """The values of each row's ``aux_k`` most active dead features, and of any that equal the last of these; None where no
    feature is dead."""
    dead_C = places(dead_F)
    if not len(dead_C):
        return None
    f_BC = f_BF.index_select(1, dead_C).relu_()
    if aux_k < len(dead_C):
        f_BC *= f_BC >= largest_of_rows(f_BC, aux_k)
    return Columns(f_BC, len(dead_F), dead_C)


class BatchTopK(Loss):
    """:func:`batchtopk_loss` with the cutoff of the whole batch over all processes.

    At inference there is no batch to select from, so ``crosscoder.threshold`` stands in for the cutoff. Bussmann et al. 2024
    take the mean of the cutoffs; this is a running mean, which forgets early training. L0 is then about k on average."""

    last: Float[Tensor, ""] | None = None
    """The last step's cutoff. It need not survive a kill, as it changes no result."""

    def __call__(self, x_BMD: Float[Tensor, "B M D"], step: int, dead_F: Bool[Tensor, " F"]) -> Step:
        threshold = self.crosscoder.threshold
        f_BF = self.crosscoder.linear(x_BMD)
        self.last, places_E = self._selected(f_BF)
        result = self._step(x_BMD, Kept(f_BF, places_E), dead_F)
        # The first cutoff replaces what was there, be it the 0 of a new crosscoder or the threshold of the one that this fit
        # started from, whose inputs were others. A mean that started from 0 would stay too low for hundreds of steps.
        memory = THRESHOLD_MEMORY if step > 1 else 0.0
        threshold.mul_(memory).add_(self.last, alpha=1 - memory)
        return result

    def _step(self, x_BMD: Float[Tensor, "B M D"], kept: Kept, dead_F: Bool[Tensor, " F"]) -> Step:
        """The loss of what the whole batch's cutoff keeps of these rows."""
        params = self.params
        return batchtopk_loss(self.crosscoder, x_BMD, kept, dead_F, params.aux_k, params.aux_weight, self.variance)

    @torch.no_grad()
    def _selected(self, f_BF: Float[Tensor, "B F"]) -> tuple[Float[Tensor, ""], Int[Tensor, " E"]]:
        """Cutoff of the whole batch, and what of this process's rows is kept. At most ``count`` of the largest values can come
        from one process, so each sends that many of its own and the result is exact."""
        norms_F = self.crosscoder.decoder_norms().sum(1)
        count = self.params.k * self.params.batch_tokens
        if self.accelerator.num_processes == 1:
            return batch_top_k(f_BF, norms_F, count, None if self.last is None else GUESS * self.last)
        _, near = batch_top_k(f_BF, norms_F, count)
        value_E = f_BF.flatten().index_select(0, near) * norms_F.index_select(0, near % len(norms_F))
        sent = torch.zeros(count, dtype=value_E.dtype, device=value_E.device)
        largest = value_E.topk(min(count, len(near)), sorted=False).values
        sent[: len(largest)] = largest
        cutoff = self.accelerator.gather(sent).topk(count, sorted=False).values.amin()
        cutoff = cutoff.clamp(min=torch.finfo(f_BF.dtype).tiny)  # a zero is what was not sent
        return cutoff, near[value_E >= cutoff]
