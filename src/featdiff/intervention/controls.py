"""Feature sets to compare with: random sets matched to the found one in firing rate and size of contribution, and
sets that ought to do nothing.

F features, M models, S features of the set, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from featdiff.artifacts.artifact import ContractError
from featdiff.attribution.norms import mas
from featdiff.config.params import InterveneParams
from featdiff.crosscoder.model import Crosscoder

NEIGHBOURS = 10
SINGLE = ("alone", "without")
"""Controls that edit one feature of the set, or all but one."""


@dataclass(frozen=True)
class FeatureSets:
    """Every feature set of the study."""

    by_control: Mapping[str, list[list[int]]]
    """By what they stand for, one per number; ``set`` has the found one."""
    tuning: list[list[int]]
    """Further random sets, for the tune split only."""

    @property
    def found(self) -> list[int]:
        """The set that is studied."""
        return self.by_control["set"][0]

    @property
    def whole(self) -> dict[str, list[list[int]]]:
        """``by_control`` without single features."""
        return {control: group for control, group in self.by_control.items() if control not in SINGLE}


def matched_random_sets(
    features: list[int], firing_rate_F: Float[np.ndarray, " F"], contribution_F: Float[np.ndarray, " F"], draws: int, seed: int
) -> list[list[int]]:
    """``draws`` sets of the same size, none with a feature of the set and none drawn twice as long as that is possible.

    Each feature is replaced by one drawn from its nearest neighbours in log firing rate and log mean contribution
    f_k‖d_k‖ (both standardised over live features). Where a few neighbours cannot give enough different sets, more
    are taken in. Raises ContractError when fewer live features exist than one set needs."""
    rng = np.random.default_rng(seed)
    live = np.flatnonzero(firing_rate_F > 0)
    pool = np.setdiff1d(live, features)
    _require(pool, features)
    with np.errstate(divide="ignore"):
        described = np.stack([np.log(firing_rate_F), np.log(contribution_F)], axis=1)
    spread = described[live].std(axis=0)
    described = (described - described[live].mean(axis=0)) / np.where(spread > 0, spread, 1)
    neighbours = min(len(pool), max(NEIGHBOURS, len(features) + 1))
    sets: dict[frozenset[int], list[int]] = {}
    for attempt in range(draws * 20):
        if len(sets) == draws:
            break
        if attempt and attempt % (draws * 2) == 0:
            neighbours = min(len(pool), neighbours * 2)
        drawn = _draw(features, pool, described, neighbours, rng)
        sets.setdefault(frozenset(drawn), drawn)
    return list(sets.values())


def _draw(
    features: list[int], pool: NDArray[np.int64], described: NDArray[np.float64], neighbours: int, rng: np.random.Generator
) -> list[int]:
    drawn: list[int] = []
    for feature in features:
        target = np.nan_to_num(described[feature], neginf=described[pool].min())
        free = np.setdiff1d(pool, drawn)
        near = free[np.argsort(((described[free] - target) ** 2).sum(axis=1), kind="stable")[:neighbours]]
        drawn.append(int(rng.choice(near)))
    return drawn


@dataclass(frozen=True)
class Controls:
    """Draws the sets that a found one has to beat, in its own crosscoder."""

    firing_rate_F: Float[np.ndarray, " F"]
    contribution_F: Float[np.ndarray, " F"]
    """Mean of f_k Σ_m‖d_k^m‖ where feature k fires."""
    mas_FM: Float[np.ndarray, "F M"]
    original: int
    """Column of the original model."""
    seed: int

    @classmethod
    def of(cls, crosscoder: Crosscoder, statistics: Mapping[str, Tensor], original: str, seed: int) -> Controls:
        """From a crosscoder that holds the model ``original``, and its ``features.safetensors``."""
        contribution_F = statistics["mean_activation"] * crosscoder.decoder_norms().sum(1)
        shares_FM, column = mas(crosscoder.W_dec).numpy(), crosscoder.slot(original)
        return cls(statistics["firing_rate"].numpy(), contribution_F.numpy(), shares_FM, column, seed)

    def random(self, features: list[int], draws: int) -> list[list[int]]:
        """Matched random sets."""
        return matched_random_sets(features, self.firing_rate_F, self.contribution_F, draws, self.seed)

    def sets(self, features: list[int], shuffled: list[int], params: InterveneParams) -> FeatureSets:
        """The found set, the random ones, those that ought to do nothing (``shuffled`` is given), and, up to
        ``params.single_features`` features, each feature alone and the set without it."""
        drawn = self.random(features, params.random_sets + params.tuning_random_sets)
        sets = {"set": [features], "random": drawn[: params.random_sets], "shuffled": [shuffled]}
        activity_F = self.firing_rate_F * self.contribution_F
        compared = comparison_sets(features, self.mas_FM, self.original, activity_F)
        sets |= {control: [members] for control, members in compared.items()}
        if 1 < len(features) <= params.single_features:
            sets["alone"] = [[k] for k in features]
            sets["without"] = [[other for other in features if other != k] for k in features]
        return FeatureSets(sets, drawn[params.random_sets :])


def comparison_sets(
    features: list[int], mas_FM: Float[np.ndarray, "F M"], original: int, activity_F: Float[np.ndarray, " F"]
) -> dict[str, list[int]]:
    """Two sets of the same size whose decoder norms say that they are not the tuned model's own: ``shared`` has the
    most even shares of all models, ``base_specific`` the largest share of the original model (column ``original``).

    Taken among live features outside the set that are at least as active (firing rate times mean contribution) as the
    least active of the set; where there are too few, among the most active. Raises ContractError as
    :func:`matched_random_sets` does."""
    pool = np.setdiff1d(np.flatnonzero(activity_F > 0), features)
    _require(pool, features)
    active = pool[activity_F[pool] >= activity_F[features].min()]
    if len(active) < len(features):
        active = pool[np.argsort(-activity_F[pool], kind="stable")[: len(features)]]
    evenness, own = mas_FM[active].max(1) - mas_FM[active].min(1), -mas_FM[active, original]
    return {
        name: active[np.argsort(order, kind="stable")[: len(features)]].tolist()
        for name, order in (("shared", evenness), ("base_specific", own))
    }


def _require(pool: NDArray[np.int64], features: list[int]) -> None:
    if len(pool) < len(features):
        expected = f"as many live features outside the set as in it ({len(features)})"
        todo = "raise localize.threshold or crosscoder.training.n_features"
        raise ContractError("analysis/localize/features.json", "features", expected, f"only {len(pool)}", todo)
