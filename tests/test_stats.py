"""Intervals: against theory, against scipy, and under changes that must not matter."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featdiff.stats import bootstrap_mean, paired_difference, resample

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
    assert after[1:] == pytest.approx([bound * scale + shift for bound in before[1:]], abs=1e-6)


@given(VALUES, st.data())
def test_paired_differences_turn_around_with_their_order(before: np.ndarray, data: st.DataObject) -> None:
    after = data.draw(arrays(float, len(before), elements=st.floats(-100, 100, width=32)))
    forth, back = paired_difference(after, before, **HOW), paired_difference(before, after, **HOW)
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-6)


def test_equal_pairs_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert paired_difference(values, values, **HOW)[1:] == (0.0, 0.0, 0.0)


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
    assert np.isnan(found[1:]).all()
