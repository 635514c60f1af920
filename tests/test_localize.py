"""Scores, threshold, intersection and bootstrap of the features behind the gain."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdiff.config.sets import LocalizeParams
from featdiff.localization.localize import above_threshold, as_json, score, score_rows, select
from tiny import params_of

F = 30


def params(**changes: Any) -> LocalizeParams:
    return params_of(
        LocalizeParams, "localize", **{"threshold": 0.2, "largest_set": 1.0, "bootstrap": 200, "min_flipped": 2} | changes
    )


def planted(features: dict[int, float], samples: int, seed: int, noise: float = 0.05) -> Tensor:
    """Differences [S, F]: noise around 0, and around the strength of each planted feature."""
    difference = torch.randn(samples, F, generator=torch.Generator().manual_seed(seed)) * noise
    for k, strength in features.items():
        difference[:, k] += strength
    return difference


def tasks() -> dict[str, Tensor]:
    return {
        "reverse": planted({3: 2.0, 7: 1.0, 11: 1.5, 20: -3.0}, 40, 1),
        "sort": planted({3: 0.9, 7: 1.0, 12: 1.0, 20: -3.0}, 25, 2),
        "last": planted({3: 5.0, 7: 4.0, 13: 5.0, 20: -3.0}, 60, 3),
    }


def test_planted_features_are_found_and_nothing_else() -> None:
    found = select(tasks(), {"double": "3 flipped samples, 10 needed"}, params(), 0)
    assert (found.status, found.features) == ("found", [3, 7])
    assert [facts["selected"] for facts in found.per_task.values()] == [[3, 7, 11], [3, 7, 12], [3, 7, 13]]
    assert [facts["n_flipped"] for facts in found.per_task.values()] == [40, 25, 60]
    assert found.per_task["last"]["max_score"] == pytest.approx(5, abs=0.1)
    assert found.skipped == {"double": "3 flipped samples, 10 needed"}
    assert found.overlap["reverse"]["sort"] == pytest.approx(2 / 4)
    assert found.overlap["sort"]["sort"] == 1
    assert found.overlap["sort"]["reverse"] == found.overlap["reverse"]["sort"]


def test_the_threshold_rises_until_the_set_is_small_enough() -> None:
    shares = {k: 1 - k / 10 for k in range(8)}  # of the largest score, alike on both tasks
    differences = {name: planted(shares, 200, seed, noise=0.01) for seed, name in enumerate(("reverse", "sort"))}
    assert select(differences, {}, params(), 0).features == list(range(8))
    found = select(differences, {}, params(largest_set=0.1), 0)  # of 30
    assert found.features == [0, 1, 2]
    assert found.threshold == pytest.approx(0.75, abs=0.01)
    assert all(facts["selected"] == [0, 1, 2] for facts in found.per_task.values())
    assert as_json(found, params())["threshold"] == found.threshold
    assert select(differences, {}, params(largest_set=0.3), 0).threshold == 0.2  # as many as there may be
    assert select(differences, {}, params(largest_set=0.001), 0).features == [0]


def test_a_strong_decrease_is_no_gain() -> None:
    assert 20 not in select(tasks(), {}, params(), 0).frequency


def test_score_is_the_mean_over_samples() -> None:
    difference = torch.tensor([[1.0, -2.0], [3.0, 6.0], [2.0, 2.0]])
    assert score(difference).tolist() == [2, 2]


def test_a_feature_exactly_at_the_threshold_counts() -> None:
    scores = torch.tensor([4.0, 1.0, 0.99999, -4.0])
    assert above_threshold(scores, 0.25).tolist() == [True, True, False, False]
    assert above_threshold(scores, 1.0).tolist() == [True, False, False, False]
    assert above_threshold(torch.tensor([2.0, 2.0, 1.0]), 1.0).tolist() == [True, True, False]


def test_a_threshold_of_zero_takes_what_rises_and_nothing_that_stands_still() -> None:
    assert above_threshold(torch.tensor([4.0, 0.1, 0.0, -1.0]), 0.0).tolist() == [True, True, False, False]


def test_no_positive_score_selects_nothing() -> None:
    assert not above_threshold(torch.tensor([0.0, -1.0, -2.0]), 0.2).any()
    assert not above_threshold(torch.zeros(3), 0.2).any()
    found = select(tasks() | {"double": -planted({4: 1.0}, 20, 4).abs()}, {}, params(), 0)
    assert (found.status, found.features, found.frequency) == ("empty_intersection", [], {})
    assert found.per_task["double"]["selected"] == []
    assert found.expected_intersection == 0
    assert found.overlap["double"]["double"] == 0


def test_expected_intersection_of_independent_sets() -> None:
    found = select(tasks(), {}, params(), 0)
    assert found.expected_intersection == pytest.approx(F * (3 / F) ** 3)
    alone = select({"reverse": tasks()["reverse"]}, {}, params(), 0)
    assert alone.expected_intersection == pytest.approx(3)
    rng = np.random.default_rng(0)
    drawn = [
        set.intersection(*(set(rng.choice(F, size, replace=False).tolist()) for size in (20, 15, 10))) for _ in range(4000)
    ]
    wide = {name: planted(dict.fromkeys(range(size), 1.0), 30, size) for name, size in (("a", 20), ("b", 15), ("c", 10))}
    assert select(wide, {}, params(), 0).expected_intersection == pytest.approx(np.mean([len(s) for s in drawn]), abs=0.15)


def test_bootstrap_is_sure_of_what_dominates_and_doubts_one_lucky_sample() -> None:
    differences = tasks()
    for difference in differences.values():
        difference[:, 25] = 0
        difference[0, 25] = 0.22 * difference.mean(0).max() * len(difference)
    found = select(differences, {}, params(bootstrap=400), 0)
    assert found.frequency[3] == found.frequency[7] == 1
    assert 25 in found.features
    assert 0.05 < found.frequency[25] < 0.6  # the sample must be drawn in all three tasks
    for task, shares in found.task_frequency.items():
        assert 0.4 < shares[25] < 0.9, task
        assert ((shares >= 0) & (shares <= 1)).all()
    for k, share in found.frequency.items():
        assert share <= min(shares[k] for shares in found.task_frequency.values())


def test_the_seed_decides_the_resamples() -> None:
    noisy = {name: value + planted({}, len(value), 9, noise=3.0) for name, value in tasks().items()}
    assert select(noisy, {}, params(), 0).frequency == select(noisy, {}, params(), 0).frequency
    assert select(noisy, {}, params(), 0).frequency != select(noisy, {}, params(), 1).frequency


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_permuting_features_permutes_the_result(seed: int) -> None:
    noisy = {name: value + planted({}, len(value), seed, noise=1.0) for name, value in tasks().items()}
    order = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    place = order.argsort().tolist()
    found = select(noisy, {}, params(), 0)
    other = select({name: value[:, order] for name, value in noisy.items()}, {}, params(), 0)
    assert sorted(place[k] for k in found.features) == other.features
    assert {place[k]: share for k, share in found.frequency.items()} == pytest.approx(other.frequency)
    assert found.expected_intersection == pytest.approx(other.expected_intersection)


def test_too_few_flipped_samples_are_a_result() -> None:
    found = select({}, {"reverse": "1 flipped samples, 10 needed"}, params(), 0)
    assert (found.status, found.features) == ("too_few_flipped", [])
    described = json.loads(json.dumps(as_json(found, params())))
    assert described["skipped"] == {"reverse": "1 flipped samples, 10 needed"}
    assert score_rows(found) == []


def test_one_sample_is_enough_to_compute_with() -> None:
    found = select({"a": planted({2: 1.0}, 1, 0, noise=0.0)}, {}, params(), 0)
    assert (found.features, found.frequency) == ([2], {2: 1.0})


def test_what_is_written() -> None:
    found = select(tasks(), {}, params(), 0)
    described = json.loads(json.dumps(as_json(found, params())))
    assert set(described) == {
        "fit",
        "readout",
        "positions",
        "threshold",
        "status",
        "features",
        "per_task",
        "skipped",
        "expected_intersection",
        "frequency",
        "overlap",
    }
    assert described["frequency"]["3"] == 1
    rows = score_rows(found)
    assert len(rows) == 3 * F
    by_key = {(row["task"], row["feature_id"]): row for row in rows}
    assert by_key["last", 3]["score"] == pytest.approx(tasks()["last"][:, 3].mean().item(), rel=1e-5)
    assert by_key["reverse", 11]["frequency"] == 1
    assert by_key["sort", 11]["frequency"] == 0
