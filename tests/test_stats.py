"""Intervals: against theory, against scipy, and under changes that must not matter."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import PolynomialFeatures
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from featdiff.stats import (
    Interval,
    around,
    binomial,
    bootstrap_mean,
    detectable,
    draws_p,
    holm,
    mcnemar,
    mean_over_strata,
    minus,
    over_clusters,
    over_runs,
    paired_difference,
    r_squared,
    rank_correlation,
    resample,
    samples_to_detect,
    unseen,
    with_runs,
)

HOW = {"resamples": 400, "confidence": 0.95, "seed": 3}
VALUES = arrays(float, st.integers(1, 30), elements=st.floats(-100, 100, width=32))


@given(VALUES)
def test_the_interval_lies_between_the_extremes(values: np.ndarray) -> None:
    found = bootstrap_mean(values, **HOW)
    assert found.n == len(values)
    assert found.value == pytest.approx(values.mean())
    slack = 1e-9 * max(1.0, np.abs(values).max())
    assert values.min() - slack <= found.low <= found.high <= values.max() + slack


@given(VALUES, st.floats(-50, 50), st.floats(0.1, 10))
def test_shift_and_scale_pass_through(values: np.ndarray, shift: float, scale: float) -> None:
    before, after = bootstrap_mean(values, **HOW), bootstrap_mean(values * scale + shift, **HOW)
    assert after[:3] == pytest.approx([bound * scale + shift for bound in before[:3]], abs=1e-6)


@given(VALUES, st.data())
def test_paired_differences_turn_around_with_their_order(before: np.ndarray, data: st.DataObject) -> None:
    after = data.draw(arrays(float, len(before), elements=st.floats(-100, 100, width=32)))
    forth, back = paired_difference(after, before, **HOW), paired_difference(before, after, **HOW)
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-6)


def test_equal_pairs_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert paired_difference(values, values, **HOW)[:3] == (0.0, 0.0, 0.0)


def test_pairing_is_used() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=200) * 10
    after = before + 1 + rng.normal(size=200) * 0.1
    found = paired_difference(after, before, **HOW)
    assert 0.9 < found.low < found.high < 1.1
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference(np.zeros(3), np.zeros(2), **HOW)


def test_the_seed_decides_the_draws() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_mean(values, **HOW) == bootstrap_mean(values, **HOW)
    assert bootstrap_mean(values, **HOW) != bootstrap_mean(values, **HOW | {"seed": 4})
    rows = resample(7, 500, 0)
    assert rows.shape == (500, 7)
    assert set(rows.ravel()) == set(range(7))


def test_it_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=80)
    ours = bootstrap_mean(values, resamples=20_000, confidence=0.9, seed=0)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=1)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        found = bootstrap_mean(rng.random(80) < 0.3, resamples=300, confidence=0.9, seed=seed)
        covered += found.low <= 0.3 <= found.high
    assert 0.84 <= covered / 400 <= 0.95


@settings(max_examples=20)
@given(VALUES)
def test_more_confidence_is_never_narrower(values: np.ndarray) -> None:
    narrow, wide = (bootstrap_mean(values, **HOW | {"confidence": level}) for level in (0.5, 0.99))
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


def test_no_sample_gives_no_number() -> None:
    found = bootstrap_mean(np.array([]), **HOW)
    assert found.n == 0
    assert np.isnan(found[:3]).all()


samples = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=30)


@given(st.dictionaries(st.text(min_size=1, max_size=3), samples, min_size=1, max_size=4), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_means_over_strata_weigh_strata_alike_and_lie_in_their_interval(values: dict[str, list[float]], seed: int) -> None:
    arrays = {task: np.array(numbers) for task, numbers in values.items()}
    found = mean_over_strata(arrays, resamples=400, confidence=0.95, seed=seed)
    assert found is not None
    assert found.value == pytest.approx(np.mean([array.mean() for array in arrays.values()]))
    assert found.low <= found.high
    assert found.low >= -1
    assert found.high <= 1
    assert (found.n, found.strata) == (sum(map(len, values.values())), len(values))


def test_the_interval_narrows_with_samples_as_statistics_says() -> None:
    widths = []
    for n in (100, 400):
        found = mean_over_strata({"a": np.tile([0.0, 1.0], n // 2)}, resamples=4000, confidence=0.95, seed=n)
        assert found is not None
        widths.append(found.high - found.low)
        assert widths[-1] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(n), rel=0.12)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("n", [1, 10, 120])
def test_what_was_never_seen_has_the_bound_of_the_exact_binomial_interval(n: int) -> None:
    exact = scipy.stats.binomtest(0, n).proportion_ci(0.95, method="exact")
    assert unseen(n, 0.95) == pytest.approx(exact.high)


def test_ten_samples_alike_do_not_make_an_interval_of_nothing() -> None:
    bound = unseen(10, 0.95)
    assert bootstrap_mean(np.zeros(10), **HOW)[:3] == (0, 0, 0)
    assert bootstrap_mean(np.zeros(10), within=(-1, 1), **HOW)[:3] == pytest.approx((0, -bound, bound))
    assert bootstrap_mean(np.ones(10), within=(0, 1), **HOW)[:3] == pytest.approx((1, 1 - bound, 1))
    strata = {"a": np.zeros(5), "b": np.zeros(5)}
    assert mean_over_strata(strata, within=(-1, 1), **HOW)[:3] == pytest.approx((0, -bound, bound))
    uneven = strata | {"b": np.zeros(500)}
    assert mean_over_strata(uneven, within=(-1, 1), **HOW)[:3] == pytest.approx((0, -bound, bound)), "the smallest counts"


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_known_range_only_widens_and_is_never_left(values: list[float]) -> None:
    plain, wide = bootstrap_mean(values, **HOW), bootstrap_mean(values, within=(0, 1), **HOW)
    assert 0 <= wide.low <= plain.low <= plain.high <= wide.high <= 1
    assert (wide.value, wide.n) == (plain.value, plain.n)


def test_rare_changes_are_covered_where_a_bootstrap_misses_them() -> None:
    rng, covered = np.random.default_rng(0), {None: 0, (0.0, 1.0): 0}
    for seed in range(400):
        values = rng.random(30) < 0.03
        for within in covered:
            found = bootstrap_mean(values, within=within, **HOW | {"seed": seed})
            covered[within] += found.low <= 0.03 <= found.high
    assert covered[None] / 400 < 0.7
    assert covered[0.0, 1.0] / 400 >= 0.95


@pytest.mark.parametrize(("found", "n"), [(0, 30), (1, 30), (17, 40), (30, 30)])
def test_a_share_has_the_exact_binomial_interval(found: int, n: int) -> None:
    """Clopper and Pearson: at the ends, what was seen or farther out has half of what confidence leaves."""
    share = binomial(found, n, confidence=0.9)
    assert (share.value, share.n) == (found / n, n)
    if found:
        assert scipy.stats.binom.sf(found - 1, n, share.low) == pytest.approx(0.05)
    if found < n:
        assert scipy.stats.binom.cdf(found, n, share.high) == pytest.approx(0.05)
    assert binomial(0, 0, confidence=0.9)[1:3] == (0.0, 1.0)


def test_a_difference_of_estimates_is_that_of_normal_ones_where_they_are_normal() -> None:
    a, b = Interval(1.0, 1.0 - 3.0, 1.0 + 3.0, 5), Interval(0.5, 0.5 - 4.0, 0.5 + 4.0, 6)
    assert minus(a, b) == Interval(0.5, 0.5 - 5.0, 0.5 + 5.0, 11)
    known = Interval(0.5, 0.5, 0.5, 6)
    assert minus(known, a)[:3] == (-0.5, -3.5, 2.5)
    skewed = Interval(0.0, 0.0, 2.0, 5)
    assert minus(known, skewed)[:3] == (0.5, -1.5, 0.5)


def test_draws_give_their_spread_and_not_their_bias() -> None:
    draws = np.linspace(-1, 1, 2001)
    found = around(7.0, draws - 3.0, confidence=0.9, n=4)
    assert found[:3] == pytest.approx((7.0, 6.1, 7.9))
    assert around(7.0, [*draws, np.nan], confidence=0.9, n=4)[:3] == pytest.approx(found[:3])


def test_no_samples_no_estimate() -> None:
    assert mean_over_strata({"a": np.array([])}, **HOW) is None


RUNS = arrays(float, st.integers(2, 6), elements=st.floats(-1, 1, width=32))


@given(RUNS)
def test_runs_have_the_t_interval_of_their_mean(means: np.ndarray) -> None:
    found = over_runs(means, confidence=0.9)
    theirs = scipy.stats.t.interval(0.9, len(means) - 1, means.mean(), max(scipy.stats.sem(means), 1e-300))
    assert found[1:3] == pytest.approx(theirs, abs=1e-9)
    assert (found.value, found.n) == (pytest.approx(means.mean()), len(means))


@given(VALUES, st.lists(RUNS, max_size=2))
def test_runs_only_widen_and_single_runs_leave_the_interval_of_the_questions(
    values: np.ndarray, sides: list[np.ndarray]
) -> None:
    questions = bootstrap_mean(values, **HOW)
    assert with_runs(questions, [0.3], [-0.2], confidence=0.95)[:3] == pytest.approx(questions[:3], abs=1e-12)
    found = with_runs(questions, *sides, confidence=0.95)
    slack = 1e-9 * max(1.0, np.abs(values).max())
    assert found.low <= questions.low + slack
    assert found.high >= questions.high - slack
    bounded = with_runs(questions, *sides, confidence=0.95, within=(-100, 100))
    assert -100 <= bounded.low <= bounded.high <= 100


def test_without_spread_of_questions_the_interval_is_that_of_the_runs() -> None:
    means = [0.2, 0.3, 0.4]
    exact = bootstrap_mean(np.full(50, 0.3), **HOW)
    assert with_runs(exact, means, confidence=0.95)[:3] == pytest.approx(over_runs(means, confidence=0.95)[:3])


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
def test_an_interval_over_runs_covers_where_resampling_both_does_not(runs: int, spread: float) -> None:
    """Answers of some runs to the same questions: each run and each question has a height of its own."""
    rng, studies, covered = np.random.default_rng(runs), 300, {"ours": 0, "resampled": 0}
    for seed in range(studies):
        height_RN = 0.5 + spread * rng.normal(size=(runs, 1)) + 0.15 * rng.normal(size=60)
        right_RN = (rng.random((runs, 60)) < height_RN).astype(float)
        questions = bootstrap_mean(right_RN.mean(axis=0), **HOW | {"seed": seed})
        found = with_runs(questions, right_RN.mean(axis=1), confidence=0.95)
        covered["ours"] += found.low <= 0.5 <= found.high
        draws = [right_RN[rng.integers(runs, size=runs)][:, rng.integers(60, size=60)].mean() for _ in range(100)]
        low, high = np.quantile(draws, [0.025, 0.975])
        covered["resampled"] += low <= 0.5 <= high
    assert covered["ours"] / studies >= 0.94
    if spread == 0.2:
        assert covered["resampled"] / studies < 0.9


def test_mcnemar_is_the_exact_sign_test_of_the_pairs_that_changed() -> None:
    before = np.array([1, 1, 1, 1, 0, 0, 1, 0], dtype=float)
    after = np.array([0, 0, 0, 0, 1, 0, 1, 0], dtype=float)
    assert mcnemar(after, before) == pytest.approx(2 * (1 + 5) / 2**5)
    assert mcnemar(after, before) == mcnemar(before, after)
    assert mcnemar(before, before) == 1.0
    assert mcnemar(after, before) == pytest.approx(statsmodels_mcnemar([[1, 4], [1, 2]], exact=True).pvalue)


def test_p_against_draws_counts_them_and_is_never_zero() -> None:
    draws = [-0.1, 0.0, 0.1, 0.2]
    assert draws_p(0.3, draws, 1) == 1 / 5
    assert draws_p(0.1, draws, 1) == 3 / 5
    assert draws_p(-0.3, draws, -1) == 1 / 5
    assert draws_p(-0.1, draws, -1) == 2 / 5
    assert draws_p(0.3, draws, -1) == 1.0
    assert draws_p(0.3, [], 1) == 1.0


def test_p_against_draws_of_the_same_kind_is_uniform() -> None:
    rng = np.random.default_rng(0)
    found = [draws_p(effect, draws, 1) for effect, *draws in rng.normal(size=(2000, 20))]
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(2 / 20, abs=0.02)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=6))
def test_holm_keeps_the_order_and_is_at_most_bonferroni(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    for name, p in p_values.items():
        assert p - 1e-12 <= adjusted[name] <= min(1.0, p * len(p_values)) + 1e-12
    ordered = sorted(p_values, key=p_values.__getitem__)
    assert all(adjusted[a] <= adjusted[b] + 1e-12 for a, b in pairwise(ordered))
    least = ordered[0]
    assert adjusted[least] == pytest.approx(min(1.0, p_values[least] * len(p_values)))
    assert holm({}) == {}


def test_a_detectable_effect_is_detected_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    effect = detectable(0.5, 80, confidence=0.95, power=0.8)
    drawn = rng.normal(effect, 0.5, size=(4000, 80))
    assert (scipy.stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)
    assert samples_to_detect(effect, 0.5, confidence=0.95, power=0.8) in (80, 81)
    assert detectable(0.0, 80, confidence=0.95, power=0.8) == 0.0
    assert np.isnan(detectable(0.5, 1, confidence=0.95, power=0.8))
    alike = samples_to_detect(0.05, 0, confidence=0.95, power=0.8)
    assert unseen(alike, 0.95) <= 0.05 < unseen(alike - 1, 0.95)
    with pytest.raises(ValueError, match="no number of samples"):
        samples_to_detect(0.0, 0.5, confidence=0.95, power=0.8)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_correlation_and_fit_agree_with_scipy_and_scikit_learn(seed: int, ties: bool) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, 12)).round(0 if ties else 6)
    y = y + x**2 / 3
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    terms = PolynomialFeatures(2).fit_transform(x[:, None])
    assert r_squared(x, y) == pytest.approx(LinearRegression().fit(terms, y).score(terms, y), abs=1e-9)


def test_a_quadratic_is_explained_and_a_monotone_curve_is_ranked() -> None:
    x = np.linspace(-1, 2, 9)
    assert r_squared(x, 3 * x**2 - x + 1) == pytest.approx(1)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert np.isnan(rank_correlation(x, np.ones(9)))
    assert np.isnan(r_squared(np.ones(9), x))


def test_clusters_are_resampled_whole() -> None:
    """Points of a run that hang together count as one: an interval over points would be far too narrow."""
    rng = np.random.default_rng(0)
    levels = rng.normal(size=(6, 2))
    clusters = {f"run {i}": [tuple(level + 0.01 * rng.normal(size=2)) for _ in range(20)] for i, level in enumerate(levels)}
    points = [point for found in clusters.values() for point in found]
    by_run = over_clusters(rank_correlation, clusters, **HOW)
    by_point = over_clusters(rank_correlation, {str(i): [point] for i, point in enumerate(points)}, **HOW)
    assert by_run is not None
    assert by_point is not None
    assert by_run.value == by_point.value == rank_correlation(*np.array(points).T)
    assert by_run.high - by_run.low > 2 * (by_point.high - by_point.low)
    assert (by_run.n, by_point.n) == (6, 120)
    assert over_clusters(rank_correlation, clusters, **HOW) == by_run


def test_without_variation_or_points_there_is_no_statistic() -> None:
    assert over_clusters(rank_correlation, {}, **HOW) is None
    assert over_clusters(r_squared, {"run": [(0.0, 1.0), (1.0, 1.0)]}, **HOW) is None
    alike = {"a": [(0.0, 1.0), (0.0, 1.0)], "b": [(1.0, 2.0)]}  # a resample of one run alone has none
    assert over_clusters(rank_correlation, alike, **HOW) == (pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0), 2, 1)
