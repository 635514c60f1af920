"""Statistics as pure functions on arrays: every number of the study gets its n, interval and test here.

A difference is always between two treatments of the same samples. N samples, R bootstrap resamples. scipy is imported where it
is used: most stages need none of it, and it takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Range = tuple[float, float]

SHARES: Range = (0.0, 1.0)
"""Between which every sample's share of right answers lies."""
CHANGES: Range = (-1.0, 1.0)
"""Between which every paired difference of two shares lies."""


class Interval(NamedTuple):
    """An estimate with a bootstrap interval."""

    value: float
    low: float
    high: float
    n: int
    """Independent samples behind it (questions, not draws), over all strata."""
    strata: int = 1


def stream(*numbers: int) -> int:
    """A seed for the random stream with these ``numbers``, far from that of any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def resample(n: int, resamples: int, seed: int | np.random.Generator) -> NDArray[np.int64]:
    """Row numbers [R, N] drawn with replacement."""
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def unseen(n: int, confidence: float) -> float:
    """Largest share of a kind of sample of which ``n`` samples show none: the upper end of the exact two-sided binomial
    interval (Clopper and Pearson 1934), near 3.7 / n at 95 %."""
    return float(1 - ((1 - confidence) / 2) ** (1 / n))


def mean_over_strata(
    values: Mapping[str, ArrayLike], *, resamples: int, confidence: float, seed: int, within: Range | None = None
) -> Interval | None:
    """Mean of the means of each stratum (a task: each counts the same) with its percentile bootstrap interval, samples
    resampled within their stratum. ``values`` holds one number per sample; None where no stratum has samples.

    A bootstrap knows only what was seen: of ten samples that are all zero it makes [0, 0]. Where every sample lies
    ``within`` two numbers, the interval is therefore never narrower than :func:`unseen` samples at either end leave
    possible (ours; for strata of different size, as if all were as small as the smallest)."""
    held = [array for array in (np.asarray(numbers, dtype=float) for numbers in values.values()) if len(array)]
    if not held:
        return None
    rng, tail = np.random.default_rng(seed), (1 - confidence) / 2
    means_R = np.mean([array[resample(len(array), resamples, rng)].mean(axis=1) for array in held], axis=0)
    low, high = np.quantile(means_R, [tail, 1 - tail])
    value = float(np.mean([array.mean() for array in held]))
    if within is not None:
        share = unseen(min(map(len, held)) * len(held), confidence)
        low, high = min(low, value + share * (within[0] - value)), max(high, value + share * (within[1] - value))
    return Interval(value, float(low), float(high), sum(map(len, held)), len(held))


def bootstrap_mean(
    values_N: ArrayLike, *, resamples: int, confidence: float, seed: int, within: Range | None = None
) -> Interval:
    """:func:`mean_over_strata` of one stratum; NaN where there is no sample."""
    found = mean_over_strata({"": values_N}, resamples=resamples, confidence=confidence, seed=seed, within=within)
    return found or Interval(float("nan"), float("nan"), float("nan"), 0)


def over_runs(means_R: Sequence[float], *, confidence: float) -> Interval:
    """Mean of one number per training run, with Student's t interval on R − 1 degrees of freedom; ``n`` is R. One run has no
    spread to judge by: its interval is NaN."""
    runs, value = len(means_R), float(np.mean(means_R))
    reach = float("nan")
    if runs > 1:
        from scipy.stats import t as student

        reach = float(student.ppf((1 + confidence) / 2, runs - 1) * np.std(means_R, ddof=1) / np.sqrt(runs))
    return Interval(value, value - reach, value + reach, runs)


def with_runs(estimate: Interval, *sides: Sequence[float], confidence: float, within: Range | None = None) -> Interval:
    """``estimate``, a mean over questions of numbers that were averaged over training runs, with an interval over questions
    and runs. Each of ``sides`` holds the means of the runs of one arm; a side of a single run adds nothing, so that with one
    run per arm the interval is that of the questions alone.

    Runs and questions are crossed: each run answers all questions. To resample both with replacement (the pigeonhole
    bootstrap, Owen 2007) is far too narrow for two or three runs, since R resampled runs vary by (R − 1)/R of what they should
    and a quantile of three numbers is no quantile. So the runs get Student's t (:func:`over_runs`), the questions their
    bootstrap, and the distances of both from the mean add as squares (MOVER, Zou and Donner 2008). What is left over of run
    and question together is counted in both, and t is applied to each part by itself: the interval errs towards too wide. It
    is never narrower than that of the questions, and never leaves ``within``."""
    reaches = [over_runs(side, confidence=confidence) for side in sides if len(side) > 1]
    runs = float(np.sum([(reach.high - reach.value) ** 2 for reach in reaches]))
    low = estimate.value - float(np.sqrt((estimate.value - estimate.low) ** 2 + runs))
    high = estimate.value + float(np.sqrt((estimate.high - estimate.value) ** 2 + runs))
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    return estimate._replace(low=low, high=high)


def binomial(found: int, n: int, confidence: float) -> Interval:
    """``found`` of ``n`` as a share, with the exact binomial interval (Clopper and Pearson 1934); of none, 0 to 1."""
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    from scipy.stats import binomtest

    limits = binomtest(found, n).proportion_ci(confidence_level=confidence, method="exact")
    return Interval(found / n, float(limits.low), float(limits.high), n)


def minus(a: Interval, b: Interval) -> Interval:
    """a − b of two independent estimates; distances of the ends add as squares (MOVER, Zou and Donner 2008)."""
    value = a.value - b.value
    low = value - float(np.hypot(a.value - a.low, b.high - b.value))
    return Interval(value, low, value + float(np.hypot(a.high - a.value, b.value - b.low)), a.n + b.n)


def around(value: float, draws_R: ArrayLike, *, confidence: float, n: int) -> Interval:
    """``value`` with the spread of bootstrap draws around their own median. A resample repeats part of the sample and lacks the
    rest; a statistic that noise lowers, such as an overlap, is lower in every draw than in the sample."""
    tail = (1 - confidence) / 2
    low, middle, high = np.nanquantile(np.asarray(draws_R, dtype=float), [tail, 0.5, 1 - tail])
    return Interval(value, value - float(middle - low), value + float(high - middle), n)


def paired(after_N: ArrayLike, before_N: ArrayLike) -> Floats:
    """``after_N − before_N``; raises ValueError unless both hold the same number of samples."""
    after_N, before_N = np.asarray(after_N, dtype=float), np.asarray(before_N, dtype=float)
    if len(after_N) != len(before_N):
        raise ValueError(f"paired samples differ in number: {len(after_N)} and {len(before_N)}")
    return after_N - before_N


def paired_difference(
    after_N: ArrayLike, before_N: ArrayLike, *, resamples: int, confidence: float, seed: int, within: Range | None = None
) -> Interval:
    """:func:`bootstrap_mean` of ``after_N − before_N`` over the same samples."""
    values_N = paired(after_N, before_N)
    return bootstrap_mean(values_N, resamples=resamples, confidence=confidence, seed=seed, within=within)


def mcnemar(after_N: ArrayLike, before_N: ArrayLike) -> float:
    """Exact two-sided p-value that as many samples were won as lost (McNemar 1947); 1 where nothing changed."""
    change_N = paired(after_N, before_N)
    won, changed = int((change_N > 0).sum()), int((change_N != 0).sum())
    from scipy.stats import binomtest

    return float(binomtest(won, changed).pvalue) if changed else 1.0


def draws_p(effect: float, draws: Sequence[float], sign: int) -> float:
    """One-sided p-value of ``effect`` against matched random draws, in the claimed direction ``sign`` (1 or −1):
    (1 + draws at least as far) / (1 + draws), the permutation p-value that can never be zero (Phipson and Smyth 2010)."""
    return (1 + sum(sign * drawn >= sign * effect for drawn in draws)) / (1 + len(draws))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm 1979).

    By hand: statsmodels' ``multipletests`` collects garbage at every call, half a second where a study is in memory."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        adjusted[name] = least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
    return {name: adjusted[name] for name in p_values}


def detectable(spread: float, n: int, *, confidence: float, power: float) -> float:
    """Smallest mean paired difference that a t-test on ``n`` samples finds with probability ``power``, where ``spread``
    is the standard deviation of one difference; NaN below two samples."""
    from statsmodels.stats.power import TTestPower

    if n < 2 or spread == 0:
        return float("nan") if n < 2 else 0.0
    return spread * float(TTestPower().solve_power(nobs=n, alpha=1 - confidence, power=power))


def samples_to_detect(effect: float, spread: float, *, confidence: float, power: float) -> int:
    """Samples that a t-test needs to find a mean paired difference of ``effect`` with probability ``power``; where samples
    so far have no ``spread``, those whose never seen change could be no larger than ``effect`` (:func:`unseen`)."""
    from statsmodels.stats.power import TTestPower

    if effect == 0:
        raise ValueError("no number of samples finds an effect of zero")
    if spread == 0:
        return int(np.ceil(np.log((1 - confidence) / 2) / np.log(1 - min(abs(effect), 1 - 1e-9))))
    return int(np.ceil(TTestPower().solve_power(effect_size=abs(effect) / spread, alpha=1 - confidence, power=power)))


def rank_correlation(x_N: Floats, y_N: Floats) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN where one of the two never varies."""
    if not (np.ptp(x_N) and np.ptp(y_N)):
        return float("nan")
    from scipy.stats import rankdata

    # scipy's spearmanr, without the p-value that takes most of its time: a bootstrap asks a thousand times.
    return float(np.corrcoef(rankdata(x_N), rankdata(y_N))[0, 1])


def r_squared(x_N: Floats, y_N: Floats) -> float:
    """Share of the variance of y that a quadratic in x explains (least squares, on the points of the fit); NaN where one of
    the two never varies."""
    if not (np.ptp(x_N) and np.ptp(y_N)):
        return float("nan")
    terms_N3 = np.vander(x_N, 3)
    rest_N = y_N - terms_N3 @ np.linalg.lstsq(terms_N3, y_N)[0]
    return float(1 - np.var(rest_N) / np.var(y_N))


def over_clusters(
    statistic: Callable[[Floats, Floats], float],
    clusters: Mapping[str, Sequence[tuple[float, float]]],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Interval | None:
    """``statistic`` of the points (x, y) of all clusters together, with its percentile interval by the cluster bootstrap: whole
    clusters are resampled, because points of one (checkpoints of a run) are no independent samples; they are what n counts.

    Resamples without the statistic are left out. None where the points have none."""
    held = [np.asarray(points, dtype=float) for points in clusters.values() if len(points)]
    value = statistic(*np.concatenate(held).T) if held else float("nan")
    if np.isnan(value):
        return None
    drawn_R = [statistic(*np.concatenate([held[i] for i in rows]).T) for rows in resample(len(held), resamples, seed)]
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn_R, [tail, 1 - tail])
    return Interval(value, float(low), float(high), len(held))
