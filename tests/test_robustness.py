"""Would the selection have come out otherwise: sweep, shuffled identities, seeds."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdiff.artifacts.tables import SWEEP
from featdiff.config.sets import LocalizeParams
from featdiff.crosscoder.model import Crosscoder
from featdiff.localization.flipped import FlippedStreams
from featdiff.localization.robustness import common, mutual_matches, seed_stability, shuffled_identities, strongest, sweep
from featdiff.localization.search import Search
from tiny import ROLES, params_of, random_crosscoder

PLANTED = [4, 17]


def differences(samples: int = 40, n_features: int = 60, planted: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {task: torch.randn(samples, n_features, generator=generator) for task in ("a", "b", "c")}
    for rows in made.values():
        rows[:, PLANTED] += planted
    return made


def test_a_planted_set_stands_over_a_range_of_thresholds_and_not_by_chance(tmp_path: Path) -> None:
    made = differences()
    rows = {row["threshold"]: row for row in sweep(made, [0.001, 0.4, 0.6], PLANTED, 50, torch.Generator().manual_seed(1))}
    SWEEP.write(tmp_path, list(rows.values()))
    assert (rows[0.4]["size"], rows[0.4]["jaccard"]) == (2, 1.0)
    assert rows[0.001]["size"] > 2
    assert rows[0.001]["jaccard"] == 2 / rows[0.001]["size"]
    assert rows[0.6]["p_shuffled"] == 1 / 51
    assert rows[0.6]["expected_shuffled"] < 0.1
    assert rows[0.6]["expected_independent"] == pytest.approx(60 * (2 / 60) ** 3)


def test_shuffled_identities_turn_samples_around_whole() -> None:
    made = differences()
    shuffled = shuffled_identities(made, torch.Generator().manual_seed(0))
    for task, rows in made.items():
        turned = (shuffled[task] / rows).round().int()
        assert set(turned.unique().tolist()) == {-1, 1}
        assert (turned == turned[:, :1]).all()
        assert 8 < (turned[:, 0] < 0).sum() < 32
    assert common(shuffled, 0.6) != PLANTED


def test_the_strongest_reach_furthest_where_they_are_weakest() -> None:
    made = {"a": torch.tensor([[10.0, 5.0, 6.0]]), "b": torch.tensor([[1.0, 4.0, 8.0]])}
    assert strongest(made, 2) == [2, 1]
    assert strongest(made, 3) == [2, 1, 0]


def shuffled_copy(crosscoder: Crosscoder, order: list[int], sign: float = 1.0) -> Crosscoder:
    made = random_crosscoder(tuple(crosscoder.models), d_model=crosscoder.d_model, n_features=crosscoder.n_features)
    made.W_dec.data = sign * crosscoder.W_dec.data[order] * torch.linspace(0.5, 2, len(order))[:, None, None]
    return made


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)))
def test_the_same_dictionary_in_another_order_is_matched_whole(order: list[int]) -> None:
    first = random_crosscoder(("base", "grpo"), d_model=16, n_features=12)
    match, cosine = mutual_matches(first, shuffled_copy(first, order))
    assert match.tolist() == [order.index(k) for k in range(12)]
    torch.testing.assert_close(cosine, torch.ones(12))
    sets = {"one": [3, 4], "two": [order.index(3), order.index(4)], "three": [order.index(3)]}
    coders = {"one": first, "two": shuffled_copy(first, order), "three": shuffled_copy(first, order)}
    found = seed_stability(sets, coders, 0.7)
    assert found["jaccard"] == {"one · two": 1.0, "one · three": 0.5, "two · three": 0.5}
    assert found["mean_jaccard"] == pytest.approx(2 / 3)
    assert found["partners"]["4"]["three"]["selected"] is False
    assert found["partners"]["3"]["three"] == {"feature": order.index(3), "cosine": pytest.approx(1.0), "selected": True}


def test_unlike_dictionaries_share_nothing_and_one_seed_says_nothing() -> None:
    first, other = (random_crosscoder(("base", "grpo"), d_model=16, n_features=12, seed=seed) for seed in (0, 1))
    found = seed_stability({"one": [1], "two": [1]}, {"one": first, "two": other}, 0.99)
    assert found["mean_jaccard"] == 0
    assert found["partners"]["1"]["two"]["feature"] is None
    assert seed_stability({"one": [1]}, {"one": first}, 0.7)["mean_jaccard"] is None


def test_directions_come_from_the_positions_of_the_search() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(6, generator=generator)
    base = torch.randn(30, 6, generator=generator)
    owner = torch.arange(30) // 2
    strength = torch.rand(30, 1, generator=generator) + 1
    reading = FlippedStreams({"base": base, "grpo": base + strength * v}, owner, 15)
    other = FlippedStreams({"base": base, "grpo": base * 0}, owner, 15)
    params = params_of(LocalizeParams, "localize", positions="answer")
    coders = {params.fit: random_crosscoder()}
    search = Search(coders, {"task": {"prompt_last": other, "answer": reading}}, params, ROLES)
    assert "set_change" not in search.directions([], 3)
    found = search.directions([2, 5], 3)
    torch.testing.assert_close(found["mean_difference"], reading.mean(strength * v).mean(0))
    torch.testing.assert_close(found["first_component"], found["mean_difference"], rtol=1e-3, atol=1e-3)
    assert found["random_direction"].norm() == pytest.approx(found["mean_difference"].norm().item())
    torch.testing.assert_close(found["original_mean"], base.mean(0))
    assert torch.equal(found["random_direction"], search.directions([], 3)["random_direction"])
    torch.testing.assert_close(found["set_change"], search.set_changes([2, 5])["task"].mean(0))
