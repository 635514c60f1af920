"""Statistics as pure functions on arrays: every number of the study gets its n and its interval here.

N samples, R bootstrap resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with a bootstrap interval."""

    n: int
    """Independent samples behind it (questions, not draws)."""
    value: float
    low: float
    high: float


def resample(n: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Row numbers [R, N] drawn with replacement."""
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def bootstrap_mean(values_N: Floats, *, resamples: int, confidence: float, seed: int) -> Interval:
    """Mean of ``values_N`` with its percentile bootstrap interval; NaN bounds where there is no sample."""
    values_N = np.asarray(values_N, dtype=float)
    n = len(values_N)
    if n == 0:
        return Interval(0, float("nan"), float("nan"), float("nan"))
    means_R = values_N[resample(n, resamples, seed)].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return Interval(n, float(values_N.mean()), float(low), float(high))


def paired_difference(after_N: Floats, before_N: Floats, *, resamples: int, confidence: float, seed: int) -> Interval:
    """Mean of ``after_N − before_N`` over the same samples, with its paired bootstrap interval."""
    after_N, before_N = np.asarray(after_N, dtype=float), np.asarray(before_N, dtype=float)
    if len(after_N) != len(before_N):
        raise ValueError(f"paired samples differ in number: {len(after_N)} and {len(before_N)}")
    return bootstrap_mean(after_N - before_N, resamples=resamples, confidence=confidence, seed=seed)
