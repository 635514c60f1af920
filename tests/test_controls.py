"""Controls: which sets and directions are drawn, and that each moves the stream as far as the set does."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featdiff import stats
from featdiff.crosscoder.edits import AsLong, Editor, FeatureEdit, Push
from featdiff.intervention import controls
from featdiff.intervention.controls import (
    Control,
    Draws,
    Setting,
    comparison_sets,
    lengths,
    random_directions,
    random_sets,
    reach,
)
from featdiff.intervention.purposes import DIRECTIONS
from tiny import random_crosscoder

Lengths = NDArray[np.float32]
FOUND = [3, 5, 8]


def planted(rates: NDArray[np.float64], seed: int = 0, questions: int = 40) -> Lengths:
    """Lengths [Q, F] of features that act on these shares of the questions, over some orders of magnitude."""
    rng = np.random.default_rng(seed)
    acting = rng.permuted(np.arange(questions)[:, None] < np.round(rates * questions), axis=0)
    return (acting * np.exp(rng.normal(0, 1, len(rates)))).astype(np.float32)


def some_rates(n: int, seed: int) -> NDArray[np.float64]:
    """Rates as they come: some features silent, some always active."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 0.2, 0.0, np.where(rng.random(n) < 0.3, 1.0, rng.random(n)))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_random_sets_act_differ_and_have_nothing_of_the_set(seed: int, size: int) -> None:
    length_QF = planted(some_rates(60, seed), seed)
    live = np.flatnonzero((length_QF > 0).any(0))
    features = np.random.default_rng(seed).choice(live, size, replace=False).tolist()
    sets = random_sets(features, length_QF, 8, seed)
    assert len(sets) == 8
    assert len({frozenset(drawn) for drawn in sets}) == 8
    for drawn in sets:
        assert len(set(drawn)) == size
        assert not set(drawn) & set(features)
        assert (length_QF[:, list(drawn)] > 0).any(1).mean() >= controls.LEAST_ACTING
    assert sets == random_sets(features, length_QF, 8, seed)


def test_another_seed_draws_other_sets() -> None:
    length_QF = planted(np.full(60, 0.9))
    assert random_sets(FOUND, length_QF, 20, 0) != random_sets(FOUND, length_QF, 20, 1)


def test_each_feature_is_replaced_by_one_that_acts_as_often_and_as_much() -> None:
    rates = np.repeat([1.0, 1.0, 0.25], 30)
    length_QF = planted(rates)
    length_QF[:, :30] = 5.0
    length_QF[:, 30:60] = 0.1
    for first, second, third in random_sets([0, 59, 70], length_QF, 20, 0):
        assert first < 30 <= second < 60 <= third


def test_they_are_matched_where_the_edit_acts_better_than_by_chance() -> None:
    length_QF = planted(np.random.default_rng(1).uniform(0.3, 1, 200), 1)
    mean_F = np.log(length_QF.mean(0))
    for features in (np.argsort(mean_F)[:4], np.argsort(-mean_F)[:4]):
        drawn = random_sets(features.tolist(), length_QF, 20, 0)
        off = np.mean([np.abs(mean_F[list(each)] - mean_F[features]).mean() for each in drawn])
        others = np.setdiff1d(np.arange(200), features)
        assert off < 0.5 * np.abs(mean_F[others][:, None] - mean_F[features]).mean()


def test_sets_that_hardly_act_are_passed_over_for_farther_neighbours() -> None:
    """All that is near the set acts too seldom: only a pair with an always active feature will do."""
    rates = np.array([0.1] * 40 + [1.0] * 4)
    sets = random_sets([0, 1], planted(rates), 10, 0)
    assert len(sets) == 10
    assert all(max(drawn) >= 40 for drawn in sets)


def test_all_sets_that_exist_where_active_features_are_few() -> None:
    length_QF = planted(np.array([1.0, 1, 1, 1, 1, 0]))
    assert {frozenset(drawn) for drawn in random_sets([0, 1], length_QF, 20, 0)} == set(
        map(frozenset, combinations((2, 3, 4), 2))
    )
    assert random_sets([0, 1], planted(np.full(12, 0.2)), 5, 0) == [], "no two of them act on most questions"


def test_too_few_active_features_give_no_random_set() -> None:
    assert random_sets([0, 1, 2], planted(np.array([1.0, 1, 1, 1, 1, 0])), 20, 0) == []


def test_a_silent_feature_of_the_set_is_replaced_by_one_that_acts_little() -> None:
    rates = np.linspace(0.2, 1, 60)
    rates[0] = 0
    length_QF = planted(rates)
    length_QF[length_QF > 0] = 1.0
    drawn = random_sets([0, 59], length_QF, 10, 0)
    assert len(drawn) == 10
    assert np.mean([first for first, _ in drawn]) < np.mean([second for _, second in drawn]) - 20


def test_random_directions_have_length_one_and_no_preferred_way() -> None:
    drawn = torch.stack(random_directions(16, 400, 3))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(400))
    assert drawn.mean(0).norm() < 0.12  # of 400 directions about 1 / 20
    assert torch.equal(drawn, torch.stack(random_directions(16, 400, 3)))
    assert not torch.equal(drawn, torch.stack(random_directions(16, 400, 4)))


def test_comparison_sets_are_the_most_even_and_the_original_s_own_of_what_acts_on_half_of_the_questions() -> None:
    shares_FM = np.random.default_rng(0).dirichlet(np.ones(3), 100)
    rates = np.concatenate([np.full(60, 0.8), np.full(20, 0.3), np.zeros(20)])
    found = comparison_sets([3, 4, 5], shares_FM, 1, planted(rates))
    pool = [k for k in range(60) if k not in (3, 4, 5)]
    assert found["base_specific"] == tuple(sorted(pool, key=lambda k: -shares_FM[k, 1])[:3])
    assert found["shared"] == tuple(sorted(pool, key=lambda k: np.ptp(shares_FM[k]))[:3])
    rates[:60] = 0.1  # too few act on half of the questions: those that act most stand in
    rates[[60, 61]] = 0.4
    assert {60, 61} < set(comparison_sets([3, 4, 5], shares_FM, 1, planted(rates))["shared"]) <= set(range(60, 80))


def maker() -> Editor:
    """Edits of the original, in whose slot the features act on most of the streams."""
    crosscoder = random_crosscoder(d_model=6, n_features=40, threshold=0.5).requires_grad_(False)
    return Editor(crosscoder, "base", 1, torch.device("cpu"), torch.arange(40.0), donor_name="grpo")


def streams(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    own, donors = torch.randn(2, 30, 1, 6, generator=torch.Generator().manual_seed(seed)) * 3
    return own, donors


def draws(directions: dict[str, torch.Tensor], single_features: int = 3) -> Draws:
    shares_FM = np.random.default_rng(0).dirichlet(np.ones(2), 40)
    return Draws(6, 4, single_features, shares_FM, 0, (9, 8, 7), directions, 0)


DRAWN = dict(zip(DIRECTIONS, torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), strict=True))


def test_what_the_set_is_held_against() -> None:
    length_QF = lengths(maker(), "zero", *streams())
    made = draws(DRAWN).controls(FOUND, 1, length_QF)
    names = [control.name for control in made]
    assert list(dict.fromkeys(names)) == [
        "set", "shared", "base_specific", "shuffled", *DIRECTIONS, "random", "random_direction", "alone", "without"
    ]  # fmt: skip
    assert len({control.label for control in made}) == len(made)
    by_name = {name: [control for control in made if control.name == name] for name in names}
    assert [control.features for control in by_name["set"] + by_name["shuffled"]] == [(3, 5, 8), (9, 8, 7)]
    assert [control.features for control in by_name["alone"]] == [(3,), (5,), (8,)]
    assert [control.features for control in by_name["without"]] == [(5, 8), (3, 8), (3, 5)]
    assert [control.features for control in by_name["random"]] == random_sets(FOUND, length_QF, 6, stats.stream(0, 1))
    assert [len(by_name[name]) for name in ("random", "random_direction")] == [6, 4]
    for control in (control for name in (*DIRECTIONS, "random_direction") for control in by_name[name]):
        assert control.direction_D is not None
        assert control.direction_D.norm().item() == pytest.approx(1)
    small = [control.name for control in draws(DRAWN, single_features=2).controls(FOUND, 1, length_QF)]
    assert not {"alone", "without"} & set(small), "only of sets small enough"
    assert "alone" not in [control.name for control in draws(DRAWN).controls([3], 1, length_QF)]


def test_features_of_another_dictionary_are_edited_in_it_for_the_same_model_and_donor() -> None:
    editor, (own, donors) = maker(), streams()
    other = random_crosscoder(d_model=6, n_features=12, threshold=0.1, seed=5).requires_grad_(False)
    foreign = Editor(other, "grpo", 1, torch.device("cpu"), torch.ones(12), donor_name="base")
    rival = Control("random_dictionary", 0, (1, 11), editor=foreign)
    length_QF = lengths(editor, "zero", own, donors)
    without, held = (replace(draws(DRAWN), random_dictionary=each).controls(FOUND, 1, length_QF) for each in (None, rival))
    assert [each.label for each in held if each.label not in [other.label for other in without]] == [rival.label]
    for edit in ("zero", "transplant"):
        setting = Setting(edit, "prompt", 0.5)
        delta = rival.change(editor, FOUND, setting).delta(own, donors)
        plain = replace(foreign, model="base", donor_name="grpo").edit(edit, [1, 11], "prompt", 0.5).delta(own, donors)
        like = editor.edit(edit, FOUND, "prompt", 0.5).delta(own, donors).norm(dim=-1)
        acts = (plain.norm(dim=-1) > 1e-6) & (like > 0)
        assert acts.any()
        torch.testing.assert_close(delta.norm(dim=-1)[acts], like[acts])
        cosine = torch.nn.functional.cosine_similarity(delta[acts], plain[acts], dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_directions_point_the_claimed_way_and_one_of_no_length_is_no_control() -> None:
    length_QF = lengths(maker(), "zero", *streams())

    def known(sign: int, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
        made = draws(DRAWN | changes).controls(FOUND, sign, length_QF)
        return {each.name: each.direction_D for each in made if each.name in DIRECTIONS and each.direction_D is not None}

    up, down = known(1), known(-1)
    for name, direction in DRAWN.items():
        torch.testing.assert_close(up[name], direction / direction.norm())
        torch.testing.assert_close(down[name], -direction / direction.norm())
    assert list(known(1, first_component=torch.zeros(6))) == ["mean_difference", "set_change"]


@pytest.mark.parametrize("edit", ["zero", "scale", "add", "transplant"])
def test_every_control_but_single_features_is_as_long_as_the_set(edit: str) -> None:
    editor, (own, donors) = maker(), streams()
    setting = Setting(edit, "prompt", 1.5)
    like = editor.edit(edit, FOUND, "prompt", 1.5)
    length = like.delta(own, donors).norm(dim=-1)
    assert (length > 0).any()
    for control in draws(DRAWN).controls(FOUND, -1, lengths(editor, edit, own, donors)):
        change = control.change(editor, FOUND, setting)
        assert (change.positions, change.dose, change.layer) == ("prompt", 1.5, 1)
        delta = change.delta(own, donors)
        if control.direction_D is not None:
            assert isinstance(change, Push)
            torch.testing.assert_close(delta, length[..., None] * control.direction_D)
        else:
            alone = editor.edit(edit, list(control.features), "prompt", 1.5).delta(own, donors)
            if control.name in ("set", "alone", "without"):
                assert isinstance(change, FeatureEdit)
                torch.testing.assert_close(delta, alone)
            else:
                assert isinstance(change, AsLong)
                acts = alone.norm(dim=-1) > 0
                torch.testing.assert_close(delta.norm(dim=-1), torch.where(acts, length, 0.0), rtol=1e-4, atol=1e-4)
                along = torch.cosine_similarity(delta[acts], alone[acts], dim=-1)
                torch.testing.assert_close(along[length[acts] > 0], torch.ones_like(along[length[acts] > 0]))


@pytest.mark.parametrize("edit", ["zero", "scale", "add", "transplant"])
def test_lengths_are_what_each_feature_alone_changes(edit: str) -> None:
    editor, (own, donors) = maker(), streams()
    found = lengths(editor, edit, own, donors)
    alone = [editor.edit(edit, [k], "all", 1.0).delta(own, donors)[:, 0].norm(dim=-1) for k in range(40)]
    np.testing.assert_allclose(found, torch.stack(alone, dim=1).numpy(), rtol=1e-4, atol=1e-5)
    assert (found > 0).any()


def test_reach_is_relative_to_the_stream_and_at_dose_one() -> None:
    editor, (own, donors) = maker(), streams()
    found = Control("set", 0, (11,))
    control = Control("random", 0, (12,))
    for dose in (0.5, 4.0):
        for each in (found, control):
            far = reach(each.change(editor, [11], Setting("zero", "all", dose)), own, donors)
            like, alone = (
                editor.edit("zero", [k], "all", 1.0).delta(own, donors)[:, 0].norm(dim=-1) for k in (11, each.features[0])
            )
            acts = (alone > 0) & ((like > 0) | (each is found))
            assert 0 < acts.double().mean() < 1, "the fixture shows a part of the questions"
            assert far.acting == pytest.approx(acts.double().mean().item())
            moved = torch.where(acts, like, 0.0) / own[:, 0].norm(dim=-1)
            assert far.norm == pytest.approx(moved.mean().item(), rel=1e-4)
            assert far.unscaled == pytest.approx(1 if each is found else (alone.mean() / like.mean()).item(), rel=1e-4)
    direction = Control("random_direction", 0, direction_D=torch.eye(6)[0]).change(editor, [11], Setting("zero", "all", 1.0))
    assert reach(direction, own, donors).unscaled == 1
