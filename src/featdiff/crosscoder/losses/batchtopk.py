"""BatchTopK: a batch keeps its k·B largest feature values, and dead features learn from what the others leave over.

Selection: Bussmann et al. 2024, on values weighted by decoder norms as in Minder, Dumas et al. 2025.
Auxiliary loss: Gao et al. 2024.
B batch, M models, D residual width, F features.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featdiff.crosscoder.losses.loss import Loss, Step, rebuild
from featdiff.crosscoder.model import Crosscoder

THRESHOLD_MEMORY = 0.99
"""Weight of the past in the running mean of cutoffs: it looks back over about 100 batches."""
GUESS = 0.8
"""Share of the running threshold that serves as guess of the next cutoff. A guess above the cutoff costs a second search over
all entries, a guess far below it spares little: 0.8 leaves room for what cutoffs vary by from batch to batch."""


def batch_top_k(value: Tensor, count: int, guess: Tensor | None = None) -> Float[Tensor, ""]:
    """The ``count``-th largest entry of ``value`` (of any shape), but at least the smallest normal positive number, so that a
    zero is never kept. The caller drops what is below the result.

    ``guess`` is any number; the result does not depend on it. A guess a little below the result makes the search fast."""
    candidates = value.flatten()
    # Exact: where at least `count` entries exceed the guess, the `count` largest of all are among these, and so is the
    # smallest of them. Where fewer do, the guess was too high, and the search goes over everything.
    if guess is not None and len(near := candidates[candidates > guess]) >= count:
        candidates = near
    cutoff = candidates.topk(min(count, len(candidates)), sorted=False).values.amin()
    return cutoff.clamp(min=torch.finfo(value.dtype).tiny)


def batchtopk_loss(
    crosscoder: Crosscoder,
    x_BMD: Float[Tensor, "B M D"],
    cutoff: Float[Tensor, ""],
    dead_F: Bool[Tensor, " F"],
    aux_k: int,
    aux_weight: float,
    variance: float,
    f_BF: Float[Tensor, "B F"] | None = None,
) -> Step:
    """Mean over tokens of Σ_m ‖x^m − x̂^m‖² / ``variance``, where x̂ uses the features with f_k Σ_m‖d_k^m‖ ≥ ``cutoff``
    (Bussmann et al. 2024; norm-weighted as in Minder, Dumas et al. 2025).

    Where features are dead, ``aux_weight`` times an auxiliary loss is added (Gao et al. 2024): each token's ``aux_k`` most
    active dead features rebuild the error, and what they leave is divided by the error, both as means over tokens.
    ``f_BF`` are the preactivations of ``x_BMD``, for a caller that has them."""
    f_BF = crosscoder.preactivations(x_BMD) if f_BF is None else f_BF
    # The choice of entries is a constant to the gradient: it moves only when two values change places.
    kept_BF = f_BF.detach() * crosscoder.decoder_norms().detach().sum(1) >= cutoff
    error, _, code_BF = rebuild(crosscoder, x_BMD, f_BF, kept_BF)
    total = error.square().sum((1, 2)).mean() / variance
    dead = dead_F.nonzero().squeeze(1)
    if len(dead):
        top = f_BF[:, dead].topk(min(aux_k, len(dead)), dim=1)
        sparse = torch.zeros_like(f_BF[:, dead]).scatter(1, top.indices, top.values)
        rebuilt = (sparse @ crosscoder.W_dec[dead].flatten(1)).view_as(error)
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
        cutoff = self._cutoff(f_BF.detach(), threshold * GUESS if step > 1 else None)
        result = self._step(x_BMD, f_BF, cutoff, dead_F)
        # The first cutoff replaces what was there, be it the 0 of a new crosscoder or the threshold of the one that this fit
        # started from, whose inputs were others. A mean that started from 0 would stay too low for hundreds of steps.
        memory = THRESHOLD_MEMORY if step > 1 else 0.0
        threshold.mul_(memory).add_(cutoff, alpha=1 - memory)
        return result

    def _step(
        self, x_BMD: Float[Tensor, "B M D"], f_BF: Float[Tensor, "B F"], cutoff: Float[Tensor, ""], dead_F: Bool[Tensor, " F"]
    ) -> Step:
        """The loss at the batch's cutoff, from its preactivations ``f_BF``."""
        params = self.params
        return batchtopk_loss(self.crosscoder, x_BMD, cutoff, dead_F, params.aux_k, params.aux_weight, self.variance, f_BF)

    @torch.no_grad()
    def _cutoff(self, f_BF: Float[Tensor, "B F"], guess: Tensor | None) -> Float[Tensor, ""]:
        """Cutoff of the whole batch. At most ``count`` of the largest values can come from one process, so each sends that
        many of its own and the result is exact."""
        value = f_BF * self.crosscoder.decoder_norms().sum(1)
        count = self.params.k * self.params.batch_tokens
        if self.accelerator.num_processes > 1:
            value = self.accelerator.gather(value.flatten().topk(min(count, value.numel())).values)
        return batch_top_k(value, count, guess)
