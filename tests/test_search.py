"""The search for a setting, on models whose accuracy under every edit is known beforehand."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from featdiff.config.sets import InterveneParams
from featdiff.crosscoder.edits import Editor, FeatureEdit
from featdiff.intervention.controls import Draws, Setting
from featdiff.intervention.models import EditableModel
from featdiff.intervention.purposes import DIRECTIONS, RIVALS, purposes
from featdiff.intervention.search import (
    FARTHEST,
    Job,
    Searched,
    by_task,
    gentlest,
    mean_accuracy,
    search,
    strongest,
    wider,
    within,
)
from featdiff.language.evaluation import Evaluator
from featdiff.tasks.task import Sample, TaskInfo
from tiny import ROLES, answers, params_of, random_crosscoder, tiny_model

T = TypeVar("T")
Row = dict[str, Any]
WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", False, 0)
TASKS = {name: replace(WORDS, name=name) for name in ("words", "more")}
ZEROED, _, AMPLIFIED = purposes(ROLES, [])
PER_TASK = 20
SAMPLES = [Sample(f"{task}-{i}", task, "tune", f"{task} {'abcd'[i % 4]}{i}=", "a") for task in TASKS for i in range(PER_TASK)]
FOUND = (20, 21)

Curve = Callable[[str, str, float, bool], float]
"""Share of right answers under an edit of this kind, at these positions and dose, of the set or of a control."""


def params(**changes: Any) -> InterveneParams:
    small = {
        "positions": ["prompt_last", "all"], "amplify": ["add"], "remove": ["zero"], "doses": [0.5, 1.0], "random_sets": 20,
        "random_directions": 2, "control_questions": 10, "single_features": 4, "tolerance": 0.02, "most_of_effect": 0.9,
    }  # fmt: skip
    return params_of(InterveneParams, "intervene", **small | changes)


class Planted(Evaluator):
    """Answers by a planted curve instead of by its model, and notes how many questions were asked at once."""

    curve: Curve
    start: float
    asked: list[int]

    def answer_under(self, edits: Sequence[Any], samples: list[Sample], **_how: Any) -> list[list[Row]]:
        self.asked.append(len(samples))
        found = []
        for edit in edits:
            share = self.start if edit is None else self.curve(_kind(edit), edit.positions, edit.dose, _of_set(edit))
            rows = []
            for task in dict.fromkeys(sample.task for sample in samples):
                count = sum(sample.task == task for sample in samples)
                rows += answers(task, [i < round(share * count) for i in range(count)])
            found.append(rows)
        return found


def _kind(edit: Any) -> str:
    return edit.kind if isinstance(edit, FeatureEdit) else edit.like.kind


def _of_set(edit: Any) -> bool:
    return isinstance(edit, FeatureEdit)


def draws(p: InterveneParams) -> Draws:
    directions = dict(zip(DIRECTIONS, torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), strict=True))
    shares_FM = np.random.default_rng(0).dirichlet(np.ones(2), 24)
    return Draws(p.random_sets, p.random_directions, p.single_features, shares_FM, 0, (4, 6), directions, 0)


def searched(curve: Curve, once: Any = None, *, up: bool = True, **changes: Any) -> tuple[Searched, Planted]:
    model, tokenizer = tiny_model(3)
    evaluator = Planted(model, tokenizer, TASKS, batch_size=64, max_new_tokens=4)
    evaluator.curve, evaluator.start, evaluator.asked = curve, 0.0 if up else 1.0, []
    purpose = AMPLIFIED if up else ZEROED
    crosscoder = random_crosscoder(("base", "grpo"), d_model=16, n_features=24, threshold=0.2).requires_grad_(False)
    crosscoder.W_dec.data *= 0.01  # so that curves have room before changes are longer than the stream
    editor = Editor(crosscoder, purpose.model, 1, torch.device("cpu"), torch.full((24,), 0.3), donor_name=purpose.toward)
    names: set[str] = set()

    def strict(jobs: Sequence[Job[T]], _done: object = None, /) -> list[T]:
        for name, _ in jobs:
            assert name not in names, f"{name} names two parts"
            names.add(name)
        return [compute() if once is None else once(name, compute) for name, compute in jobs]

    p = params(**changes)
    return search(EditableModel(purpose, evaluator, editor), draws(p), FOUND, SAMPLES, p, strict), evaluator


def step(at: float, controls_at: float = 1e9) -> Curve:
    """Everything is gained from this dose on; controls need another."""
    return lambda _kind, _positions, dose, of_set: float(dose >= (at if of_set else controls_at))


def of(found: Searched, control: str = "set", number: int = 0, **wanted: Any) -> list[Row]:
    rows = [row for row in found.rows if (row["control"], row["set_draw"]) == (control, number)]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def doses(rows: list[Row]) -> list[float]:
    return sorted({row["dose"] for row in rows})


A, B, C = (Setting("add", "prompt_last", dose) for dose in (1.0, 2.0, 4.0))
EVERYWHERE = Setting("add", "all", 0.1)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({A: 0.0, B: 0.9, C: 1.0}, B),  # the smallest that has 90 %
        ({A: 0.0, B: 0.89, C: 1.0}, C),
        ({A: 0.9, B: 1.0, C: 0.2}, A),
        ({EVERYWHERE: 1.0, C: 0.9}, C),  # the first of the positions before the smaller dose
        ({EVERYWHERE: 1.0, C: 0.8}, EVERYWHERE),
        ({A: 0.0, B: 0.0}, A),  # nothing does anything
        ({A: -0.5, B: -0.1, C: -0.3}, B),  # nothing goes the claimed way: the one that does least harm
        ({B: 1.0, Setting("scale", "prompt_last", 3.0): 1.0}, Setting("scale", "prompt_last", 3.0)),  # 2 · .5 against 3 · .1
    ],
)
def test_the_gentlest_of_those_that_have_most_of_the_effect(values: dict[Setting, float], wanted: Setting) -> None:
    assert gentlest(values, {"add": 0.5, "scale": 0.1}, 0.9, ["prompt_last", "all"]) == wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({A: 0.2, B: 0.1, C: 1.0}, A),  # C is longer than the set's change
        ({A: 0.1, B: 0.1, C: 1.0}, B),  # of equals the longest
        ({A: -0.3, B: -0.2, EVERYWHERE: -0.2}, B),
        ({B: 0.1, Setting("add", "all", 2.0): 0.1}, B),  # and of these the first of the positions
        ({B: 0.1, Setting("add", "all", 2.0): 0.2}, Setting("add", "all", 2.0)),
    ],
)
def test_the_strongest_of_those_that_are_no_longer_than_the_set(values: dict[Setting, float], wanted: Setting) -> None:
    assert strongest(values, 2.0, ["prompt_last", "all"]) == wanted


@pytest.mark.parametrize(
    ("effects", "sign", "more"),
    [
        ({0.5: 0.0, 1.0: 0.5, 2.0: 0.5}, 1, []),  # from nothing to saturation
        ({0.5: 0.05, 1.0: 0.5, 2.0: 0.51}, 1, []),  # hardly an effect, hardly more
        ({0.5: 0.06, 1.0: 0.5, 2.0: 0.5}, 1, [0.25]),
        ({0.5: 0.0, 1.0: 0.5, 2.0: 0.6}, 1, [4.0]),
        ({0.5: 0.1, 1.0: 0.5, 2.0: 0.6}, 1, [0.25, 4.0]),
        ({0.5: 0.0, 1.0: 0.02}, 1, []),  # no effect to span
        ({0.5: -0.3, 1.0: -0.2}, 1, []),
        ({1.0: 0.5}, 1, [0.5, 2.0]),
        ({0.25: 0.0, 0.5: 0.5}, -1, [1.0]),
        ({0.25: 0.0, 0.75: 0.5}, -1, [1.0]),  # to where the set is gone, never beyond
        ({0.5: 0.0, 1.0: 0.5}, -1, []),
    ],
)
def test_a_grid_is_widened_where_it_does_not_span_the_effect(effects: dict[float, float], sign: int, more: list[float]) -> None:
    assert wider(effects, sign, 0.02) == more


def test_a_set_is_taken_away_up_to_where_it_is_gone() -> None:
    assert within(-1, [2.0, 0.5, 4.0]) == [0.5, 1.0]
    assert within(1, [2.0, 0.5]) == [0.5, 2.0]


def test_every_task_counts_the_same_however_many_questions_it_has() -> None:
    lines = by_task(answers("words", [True] * 9 + [False]) + answers("more", [False, True], "direct"), TASKS)
    assert [(line["task"], line["role"], line["n"]) for line in lines] == [("words", "find", 10), ("more", "find", 2)]
    assert [(line["accuracy"], line["steps"], line["unread"]) for line in lines] == [(0.9, 1, 0.1), (0.5, 0, 0.5)]
    assert mean_accuracy(lines) == pytest.approx((0.9 + 0.5) / 2)


def test_the_grid_goes_down_to_where_hardly_anything_is_left_and_stops() -> None:
    found, _ = searched(step(0.1))
    assert found.setting == Setting("add", "prompt_last", 0.125)
    for positions in ("prompt_last", "all"):
        tried = doses([row for row in of(found, positions=positions) if row["dose"] <= 1])
        assert tried == [0.0625, 0.125, 0.25, 0.5, 1.0] if positions == "all" else [0.0, 0.0625, 0.125, 0.25, 0.5, 1.0]
    assert {setting.dose for setting in found.effects} == {0.0625, 0.125, 0.25, 0.5, 1.0}


def test_the_grid_goes_up_while_a_larger_dose_adds_something() -> None:
    found, _ = searched(lambda _kind, _positions, dose, of_set: min(1.0, dose / 7) * of_set, doses=[0.5, 1.0])
    assert {setting.dose for setting in found.effects} >= {2.0, 4.0, 8.0, 16.0}, "16 shows that 8 was the end"
    assert max(setting.dose for setting in found.effects) == 16.0
    assert found.setting == Setting("add", "prompt_last", 8.0)


def test_without_an_effect_nothing_is_widened() -> None:
    found, _ = searched(step(1e9))
    assert {setting.dose for setting in found.effects} == {0.5, 1.0}
    assert found.setting == Setting("add", "prompt_last", 0.5)


def test_widening_ends() -> None:
    found, _ = searched(lambda *_: 1.0)
    assert min(setting.dose for setting in found.effects) == 0.5 / 2**8


def test_zeroing_is_chosen_up_to_dose_one_and_shown_beyond() -> None:
    found, _ = searched(lambda _kind, _positions, dose, of_set: max(0.0, 1 - dose / 4 * of_set), up=False, doses=[0.5, 2.0])
    assert {(setting.edit, setting.dose) for setting in found.effects} == {("zero", 2.0**-k) for k in range(5)}, (
        "effect is linear: down to where it is at most a tenth of the largest"
    )
    assert found.setting == Setting("zero", "prompt_last", 1.0)
    assert found.effects[found.setting] == pytest.approx(0.25)
    assert max(doses(of(found))) > 1


def test_controls_get_the_positions_and_doses_of_the_set_and_rivals_choose_by_the_same_rule() -> None:
    """Random sets act at every token from dose 2 on; the set already at the last prompt token from 1."""

    def curve(_kind: str, positions: str, dose: float, of_set: bool) -> float:
        return float(dose >= 1) if of_set else float(dose >= 2 and positions == "all")

    found, evaluator = searched(curve, doses=[0.5, 1.0, 2.0])
    assert found.setting == Setting("add", "prompt_last", 1.0)
    grid = {(setting.positions, setting.dose) for setting in found.effects}
    assert grid == {(positions, dose) for positions in ("prompt_last", "all") for dose in (0.5, 1.0, 2.0)}
    compared = {control.label for control in found.controls if control.name not in ("set", "alone", "without")}
    assert len([label for label in compared if label.startswith("random ")]) == 20
    assert {label.rpartition(" ")[0] for label in compared} == {
        "random", "random_direction", "shared", "base_specific", "shuffled", *DIRECTIONS
    }  # fmt: skip
    for label in compared:
        name, _, number = label.rpartition(" ")
        tried = {(row["positions"], row["dose"]) for row in of(found, name, int(number)) if row["dose"] > 0}
        assert grid <= tried
        longest = Setting("add", "prompt_last", 1.0)
        assert found.chosen[label] == (Setting("add", "all", 2.0) if name in RIVALS else longest), "as long as the set at most"
        assert {row["n"] for row in of(found, name, int(number))} == {10}, "on the first questions of each task"
    assert {row["n"] for row in of(found)} == {PER_TASK}
    assert set(evaluator.asked) == {20, 40}
    assert all(found.chosen[f"{name} {i}"] == found.setting for name in ("alone", "without") for i in range(2))
    for row in found.rows:
        setting = found.chosen[f"{row['control']} {row['set_draw']}"]
        assert row["chosen"] is ((row["edit"], row["positions"], row["dose"]) == setting)


def test_curves_go_on_beyond_the_grid_and_the_choice_does_not() -> None:
    found, _ = searched(step(1.0, controls_at=3.0), doses=[0.5, 1.0])
    assert found.setting.dose == 1.0
    at_set = {"positions": "prompt_last"}
    for control in ("set", "random", "random_direction"):
        curve = doses(of(found, control, **at_set))
        assert curve == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0], "up to eight times the dose chosen"
    assert doses(of(found, "random", positions="all")) == [0.5, 1.0, 2.0]
    assert {row["accuracy"] for row in of(found, "random", dose=4.0, **at_set)} == {1.0}
    assert found.chosen["random 0"].dose == 1.0, "as long as the set, although nothing on the grid has an effect"
    assert {setting.dose for setting in found.effects} == {0.5, 1.0, 2.0}, "2 shows that 1 was the end"


def test_curves_begin_at_the_unedited_model_and_end_where_the_change_is_much_longer_than_the_stream() -> None:
    found, _ = searched(step(1.0), doses=[0.5, 1.0])
    for name in ("set", "random"):
        (start, _) = of(found, name, dose=0.0)
        assert (start["positions"], start["norm"], start["accuracy"], start["chosen"]) == ("prompt_last", 0, 0, False)
    (one, _), (two, _) = of(found, dose=0.5, positions="prompt_last"), of(found, dose=1.0, positions="prompt_last")
    assert two["norm"] == pytest.approx(2 * one["norm"])
    assert one["norm"] > 0
    assert (one["acting"], one["unscaled"]) == (1, 1)
    largest = 2.0 ** np.floor(np.log2(FARTHEST / one["norm"] * 0.5))
    strong, _ = searched(step(largest / 2), doses=[largest / 4, largest / 2])
    assert max(doses(of(strong))) == largest, "twice as much would be too far"


def test_every_edit_of_the_purpose_is_tried_and_controls_take_the_one_chosen() -> None:
    found, _ = searched(lambda kind, _positions, dose, _of_set: 0.6 * (kind == "scale" and dose >= 1), amplify=["add", "scale"])
    assert {setting.edit for setting in found.effects} == {"add", "scale"}
    assert {setting.edit for setting in found.chosen.values()} == {"scale"}
    assert {row["edit"] for row in found.rows if row["control"] != "set"} == {"scale"}
    assert found.setting == Setting("scale", "prompt_last", 1.0)


def test_a_search_that_was_killed_goes_on_and_ends_as_one_that_was_not() -> None:
    kept: dict[str, str] = {}

    def keep(name: str, compute: Callable[[], T], /) -> T:
        kept[name] = json.dumps(value := compute())
        return value

    whole, _ = searched(step(1.0), keep)
    half = dict(list(kept.items())[: len(kept) // 2])
    computed = []

    def resume(name: str, compute: Callable[[], T], /) -> Any:
        if name in half:
            return json.loads(half[name])
        computed.append(name)
        return compute()

    again, _ = searched(step(1.0), resume)
    assert computed == list(kept)[len(half) :]
    assert json.dumps(again.rows) == json.dumps(whole.rows)
    assert (again.chosen, again.effects) == (whole.chosen, whole.effects)
