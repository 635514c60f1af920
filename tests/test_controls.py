"""Matched random feature sets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featdiff.artifacts.artifact import ContractError
from featdiff.config.params import InterveneParams
from featdiff.intervention.controls import Controls, FeatureSets, comparison_sets, matched_random_sets
from tiny import params_of, random_crosscoder

Floats = NDArray[np.float64]


def activity(n: int, seed: int, dead_share: float = 0.1) -> tuple[Floats, Floats]:
    """Firing rates and mean contributions as they come: over some orders of magnitude, a share of them dead."""
    rng = np.random.default_rng(seed)
    rate = np.clip(np.exp(rng.normal(-4, 1.5, n)), 0, 1)
    contribution = np.exp(rng.normal(0, 1, n))
    dead = rng.random(n) < dead_share
    return np.where(dead, 0, rate), np.where(dead, 0, contribution)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_sets_have_the_same_size_avoid_the_set_and_the_dead_and_differ(seed: int, size: int) -> None:
    rate, contribution = activity(80, seed)
    features = np.random.default_rng(seed).choice(np.flatnonzero(rate > 0), size, replace=False).tolist()
    sets = matched_random_sets(features, rate, contribution, 20, seed)
    assert len(sets) == 20
    assert len({frozenset(drawn) for drawn in sets}) == 20
    for drawn in sets:
        assert len(set(drawn)) == size
        assert not set(drawn) & set(features)
        assert (rate[drawn] > 0).all()
    assert sets == matched_random_sets(features, rate, contribution, 20, seed)


def test_another_seed_draws_other_sets() -> None:
    rate, contribution = activity(200, 0)
    features = np.flatnonzero(rate > 0)[:4].tolist()
    assert matched_random_sets(features, rate, contribution, 20, 0) != matched_random_sets(features, rate, contribution, 20, 1)


def test_they_are_matched_in_firing_rate_and_in_contribution() -> None:
    rate, contribution = activity(400, 3)
    described = np.stack(
        [np.log(rate, where=rate > 0, out=np.full(400, -99.0)), np.log(contribution, where=rate > 0, out=np.full(400, -99.0))],
        1,
    )
    live = np.flatnonzero(rate > 0)
    for axis, extreme in ((0, 1), (0, -1), (1, 1), (1, -1)):  # a set from each end of either quantity
        features = live[np.argsort(extreme * described[live, axis])[:4]].tolist()
        sets = matched_random_sets(features, rate, contribution, 20, 0)
        target = described[features]
        matched = np.mean([np.abs(described[drawn] - target).mean(0) for drawn in sets], axis=0)
        pool = np.setdiff1d(live, features)
        rng = np.random.default_rng(0)
        unmatched = np.mean(
            [np.abs(described[rng.choice(pool, 4, replace=False)] - target).mean(0) for _ in range(200)], axis=0
        )
        assert (matched < 0.6 * unmatched).all(), (axis, extreme, matched, unmatched)


def test_each_feature_is_replaced_by_one_like_it() -> None:
    rate = np.concatenate([np.full(30, 1e-3), np.full(30, 0.5)])
    contribution = np.concatenate([np.full(30, 5.0), np.full(30, 0.1)])
    for drawn in matched_random_sets([0, 59], rate, contribution, 20, 0):
        assert drawn[0] < 30 <= drawn[1]


def test_more_neighbours_are_taken_in_until_there_are_enough_sets() -> None:
    rate, contribution = activity(60, 1, dead_share=0)
    assert len(matched_random_sets([7], rate, contribution, 40, 0)) == 40


def test_all_sets_that_exist_where_live_features_are_few() -> None:
    rate, contribution = activity(6, 0, dead_share=0)
    sets = matched_random_sets([0, 1], rate, contribution, 20, 0)
    assert {frozenset(drawn) for drawn in sets} == {frozenset((a, b)) for a in range(2, 6) for b in range(2, a)}
    rate[5] = 0
    assert {frozenset(drawn) for drawn in matched_random_sets([0, 1], rate, contribution, 20, 0)} == {
        frozenset(pair) for pair in ((2, 3), (2, 4), (3, 4))
    }


def test_too_few_live_features_are_one_line() -> None:
    rate = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.0])
    with pytest.raises(ContractError, match=r"features: expected .* found only 2"):
        matched_random_sets([0, 1, 2], rate, rate, 20, 0)
    assert matched_random_sets([0, 1], rate[:4], rate[:4], 20, 0) in ([[2, 3]], [[3, 2]])


def test_a_set_with_a_feature_that_the_joint_code_never_fires() -> None:
    rate, contribution = activity(50, 2, dead_share=0)
    rate[0] = contribution[0] = 0
    sets = matched_random_sets([0, 1], rate, contribution, 20, 0)
    assert len(sets) == 20
    rarest = np.argsort(rate[2:]) + 2
    assert {drawn[0] for drawn in sets} <= set(rarest[:25].tolist())


def test_comparison_sets_are_active_live_and_not_the_set() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), 100)
    active = rng.random(100) + 0.5
    active[80:] = 0
    active[60:80] = 0.1
    features = [3, 4, 5]
    found = comparison_sets(features, shares, 0, active)
    pool = [k for k in range(60) if k not in features and active[k] >= active[features].min()]
    assert found["base_specific"] == sorted(pool, key=lambda k: -shares[k, 0])[:3]
    assert found["shared"] == sorted(pool, key=lambda k: np.ptp(shares[k]))[:3]
    active[[k for k in range(60) if k not in features]] = 0.05  # none is as active as the set: the most active stand in
    assert set(comparison_sets(features, shares, 0, active)["shared"]) <= set(range(60, 80))
    with pytest.raises(ContractError, match="only 1"):
        comparison_sets(features, shares, 0, np.where(np.isin(np.arange(100), [3, 4, 5, 6]), 1.0, 0.0))


def test_single_features_only_where_the_set_is_small() -> None:
    rate, contribution = activity(80, 0, dead_share=0.0)
    controls = Controls(rate, contribution, np.full((80, 3), 1 / 3), 0, 0)

    def sets(features: list[int], most: int) -> FeatureSets:
        chosen = params_of(InterveneParams, "intervene", random_sets=20, tuning_random_sets=5, single_features=most)
        return controls.sets(features, [9, 8, 7], chosen)

    made = sets([1, 2, 3], 3)
    assert list(made.by_control) == ["set", "random", "shuffled", "shared", "base_specific", "alone", "without"]
    assert list(made.whole) == list(made.by_control)[:5]
    assert made.by_control["alone"] == [[1], [2], [3]]
    assert made.by_control["without"] == [[2, 3], [1, 3], [1, 2]]
    assert (made.found, made.by_control["shuffled"]) == ([1, 2, 3], [[9, 8, 7]])
    assert made.by_control["random"] + made.tuning == controls.random([1, 2, 3], 25), "one draw, split in two"
    assert [len(made.by_control["random"]), len(made.tuning)] == [20, 5]
    assert "alone" not in sets([1, 2, 3], 2).by_control
    assert "without" not in sets([1], 8).by_control


def test_the_base_specific_set_is_read_off_the_original_models_column() -> None:
    crosscoder = random_crosscoder(("rl", "raw"), d_model=6, n_features=40).requires_grad_(False)
    statistics = {"firing_rate": torch.full((40,), 0.1), "mean_activation": torch.ones(40)}
    controls = Controls.of(crosscoder, statistics, "raw", 0)
    made = controls.sets([0, 1], [2, 3], params_of(InterveneParams, "intervene"))
    norms_FM, sizes_FM = crosscoder.decoder_norms(), crosscoder.W_dec.abs().sum(-1)
    share_F, (own,) = sizes_FM[:, 1] / sizes_FM.sum(1), made.by_control["base_specific"]
    active = [k for k in range(2, 40) if norms_FM[k].sum() >= norms_FM[:2].sum(1).min()]
    assert own == sorted(active, key=lambda k: -float(share_F[k]))[:2]
