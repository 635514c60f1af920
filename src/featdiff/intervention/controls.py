"""Feature sets to compare with: random sets matched to the found one in firing rate and size of contribution.

F features, S features of the set, R draws.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from featdiff.artifact import ContractError

NEIGHBOURS = 10


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
    if len(pool) < len(features):
        expected = f"as many live features outside the set as in it ({len(features)})"
        todo = "raise localize.threshold or crosscoder.training.n_features"
        raise ContractError("analysis/localize/features.json", "features", expected, f"only {len(pool)}", todo)
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
