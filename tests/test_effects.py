"""What an edit did: marks of the answers, paired effects against the unedited model and random sets."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from featdiff import stats
from featdiff.config.sets import InterveneParams
from featdiff.intervention.effects import Marks, Nats, effects, marks, questions_under
from featdiff.intervention.purposes import Purpose, purposes
from featdiff.tasks.task import Sample, TaskInfo
from tiny import ROLES, answers, params_of

Row = dict[str, Any]
WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", False, 0)
SUMS = replace(WORDS, name="sums", role="train", domain="math")
EMPTY = replace(WORDS, name="empty")
TASKS = {task.name: task for task in (SUMS, WORDS, EMPTY)}
ZEROED, CONTRASTED, AMPLIFIED, REPEATED = purposes(ROLES, ["grpo", "grpo_1"])
N = 10
SAMPLES = [Sample(f"{task}-{i}", task, "report", f"{i}=", "a") for i in range(N) for task in ("words", "sums")]
"""The tasks take turns, so that rows of one are no run of rows."""


def params() -> InterveneParams:
    return params_of(InterveneParams, "intervene", bootstrap=300)


def shifted(right: int) -> list[bool]:
    """Answers of which ``right`` are right: what the unedited model has right stays so as far as possible."""
    order = [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    return [place in order[:right] for place in range(N)]


BASELINE = shifted(4)


def marked(words: int, sums: int = 4) -> Marks:
    """Marks of answers of which so many are right; those that are not cannot be read."""
    right = [mark for pair in zip(shifted(words), shifted(sums), strict=True) for mark in pair]
    wrong = [not mark for mark in right]
    return {"correct": right, "flexible": right, "steps": right, "unread": wrong, "alike": wrong}


def answered(set_right: int, random_right: list[int], sums: int = 4) -> dict[tuple[str, int], Marks]:
    given = {("none", 0): marked(4), ("noop", 0): marked(4), ("set", 0): marked(set_right, sums)}
    return given | {("random", i): marked(right) for i, right in enumerate(random_right)}


def table_of(
    purpose: Purpose,
    given: dict[tuple[str, int], Marks],
    flipped: set[str] | None = None,
    nats: dict[tuple[str, int], Nats] | None = None,
) -> list[Row]:
    unread = {"words": 0.25, "sums": 0.5}
    return effects(purpose, given, nats or {}, SAMPLES, flipped or set(), unread, TASKS, params(), 0)


def one(table: list[Row], control: str = "set", subset: str = "all", task: str = "words", **wanted: Any) -> Row:
    wanted |= {"control": control, "subset": subset, "task": task}
    (found,) = [row for row in table if wanted.items() <= row.items()]
    return found


def test_marks_by_hand() -> None:
    """A broken answer is unread; one like the other model's is its very answer, or can be read in its manner."""
    toward = {
        row["sample_id"]: row
        for row in (
            *answers("right", [True], "direct", completion="a."),
            *answers("manner", [True], "direct", completion="b."),
            *answers("other", [True], "direct", completion="c."),
            *answers("broken", [True], "direct", completion="d."),
            *answers("same", [False], "none", completion="=="),
            *answers("option", [True], "", completion="red"),
            *answers("chosen", [True], "", completion="red"),
        )
    }
    rows = [
        *answers("right", [True], "direct", completion="a."),
        *answers("manner", [False], "direct", completion="zz.", parsed="zz"),
        *answers("other", [True], "steps", completion="<a>c."),
        *answers("broken", [False], "direct", completion="d==", flexible=True),
        *answers("same", [False], "none", completion="=="),
        *answers("option", [False], "", completion="blue", parsed="B"),
        *answers("chosen", [True], "", completion="red"),
    ]
    assert marks(rows, toward) == {
        "correct": [True, False, True, False, False, False, True],
        "steps": [False, False, True, False, False, False, False],
        "flexible": [True, False, True, True, False, False, True],
        "unread": [False, False, False, True, True, False, False],
        "alike": [True, True, False, False, True, False, True],
    }


@pytest.mark.parametrize(
    ("purpose", "set_right", "random_right", "beyond"),
    [
        (AMPLIFIED, 9, [4, 5, 8], True),
        (AMPLIFIED, 8, [4, 5, 8], False),  # as far as one of them is not beyond it
        (AMPLIFIED, 1, [4, 5, 8], False),  # the wrong direction
        (ZEROED, 1, [4, 3, 2], True),
        (ZEROED, 2, [4, 3, 2], False),
        (ZEROED, 9, [4, 3, 2], False),
        (CONTRASTED, 0, [4, 3, 2], True),
        (REPEATED, 1, [4, 3, 2], True),
        (REPEATED, 9, [4, 3, 2], False),
    ],
)
def test_beyond_random_is_beyond_every_draw_in_the_claimed_direction(
    purpose: Purpose, set_right: int, random_right: list[int], beyond: bool
) -> None:
    table = table_of(purpose, answered(set_right, random_right))
    row = one(table)
    assert (row["purpose"], row["model"], row["role"]) == (purpose.name, purpose.model, "find")
    assert row["beyond_random"] is beyond
    assert row["effect"] == pytest.approx((set_right - 4) / N)
    assert (row["accuracy"], row["baseline"], row["n"]) == (pytest.approx(set_right / N), 0.4, N)
    assert (row["steps"], row["steps_baseline"]) == (row["accuracy"], row["baseline"])
    assert (row["unread"], row["unread_toward"]) == (pytest.approx(1 - set_right / N), 0.25)
    assert (row["alike"], row["alike_baseline"]) == (pytest.approx(1 - set_right / N), 0.6)
    further = sum(purpose.sign * right >= purpose.sign * set_right for right in random_right)
    assert row["p_random"] == (1 + further) / 4
    assert row["p_mcnemar"] == pytest.approx(stats.mcnemar(np.array(shifted(set_right)), np.array(BASELINE)))
    draws = [(right - 4) / N for right in random_right]
    assert (row["random_low"], row["random_high"]) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])))
    assert [one(table, "random", set_draw=draw)["effect"] for draw in range(3)] == pytest.approx(draws)
    for drawn in (row for row in table if row["control"] == "random"):
        assert drawn["beyond_random"] is drawn["p_random"] is None, "a draw is not held against itself"
        assert drawn["low"] <= drawn["effect"] <= drawn["high"]


def test_random_directions_are_draws_but_chance_is_that_of_random_sets() -> None:
    given = answered(9, [4, 5]) | {("random_direction", 0): marked(10), ("shared", 0): marked(5)}
    table = table_of(AMPLIFIED, given)
    assert one(table)["beyond_random"] is True
    assert one(table, "random_direction")["p_random"] is one(table, "random_direction")["beyond_random"] is None
    assert (one(table, "shared")["p_random"], one(table, "shared")["beyond_random"]) == (pytest.approx(2 / 3), False)
    assert one(table, "random_direction")["effect"] == pytest.approx(0.6)


def test_draws_are_asked_less_and_paired_with_the_same_questions_unedited() -> None:
    few = 4
    p = params().model_copy(update={"draw_questions": few})
    given = answered(9, [4, 7])
    for key in given:
        if key[0] == "random":
            given[key] = {name: values[: 2 * few] for name, values in given[key].items()}
    assert len(questions_under("random", SAMPLES, p)) == 2 * few
    assert questions_under("set", SAMPLES, p) == SAMPLES
    unread = {"words": 0.25, "sums": 0.5}
    table = effects(ZEROED, given, {}, SAMPLES, {"words-0", "words-9"}, unread, TASKS, p, 0)
    for draw, right in ((0, 4), (1, 7)):
        row = one(table, "random", set_draw=draw)
        assert row["n"] == few
        assert row["baseline"] == np.mean(BASELINE[:few])
        assert row["effect"] == np.mean(shifted(right)[:few]) - np.mean(BASELINE[:few])
    assert one(table)["n"] == N
    assert one(table)["random_low"] <= one(table)["random_high"]
    assert one(table, "random", "flipped", set_draw=0)["n"] == 1, "the other one was not asked"
    assert one(table, "set", "flipped")["n"] == 2


def test_no_effect_is_zero_within_what_so_few_samples_can_tell() -> None:
    row = one(table_of(ZEROED, answered(1, [4])), "noop")
    unseen = stats.unseen(N, 0.95)
    assert (row["effect"], row["low"], row["high"]) == pytest.approx((0, -unseen, unseen)), "none seen is not none"


def test_without_random_draws_nothing_is_said_about_chance() -> None:
    row = one(table_of(ZEROED, answered(1, [])))
    assert row["beyond_random"] is row["p_random"] is row["random_low"] is row["random_high"] is None


def test_intervals_are_paired_by_sample() -> None:
    row = one(table_of(AMPLIFIED, answered(7, [4, 5])))
    after, before = (np.array(right, float) for right in (shifted(7), BASELINE))
    interval = stats.paired_difference(after, before, resamples=300, confidence=0.95, seed=0, within=(-1, 1))
    assert (row["low"], row["high"]) == (interval.low, interval.high)


def test_the_flipped_subset_is_those_samples_alone_and_tasks_do_not_mix() -> None:
    table = table_of(AMPLIFIED, answered(7, [4, 5], sums=2), {"words-0", "words-1", "words-5"})
    row = one(table, subset="flipped")
    assert (row["n"], row["baseline"], row["accuracy"]) == (3, 0, pytest.approx(2 / 3))
    assert row["random_high"] == pytest.approx(np.quantile([0, 1 / 3], 0.95))
    assert not [other for other in table if other["task"] == "sums" and other["subset"] == "flipped"]
    sums = one(table, task="sums")
    assert (sums["effect"], sums["role"], sums["unread_toward"]) == (pytest.approx(-0.2), "train", 0.5)
    assert {row["task"] for row in table} == {"words", "sums"}, "a task without questions has no row"
    assert len(table) == (2 + 1) * 4, "all of both tasks and the flipped of one, under four controls"


def test_likelihood_is_compared_per_sample_where_there_is_one() -> None:
    ids = [sample.sample_id for sample in SAMPLES if sample.task == "words"]
    before: Nats = {key: [1.0, 2.0] for key in ids[:8]}
    after: Nats = {key: [0.5 if key == ids[0] else 0.75, 2.0] for key in ids}
    nats = {("none", 0): before, ("noop", 0): before, ("set", 0): after}
    table = table_of(AMPLIFIED, answered(9, [4]), nats=nats)
    found = one(table)
    assert found["start_nats"] == pytest.approx(-0.25 - 0.25 / 8), "of samples with both numbers"
    assert found["start_nats_low"] < found["start_nats"] < found["start_nats_high"] <= -0.25
    assert (found["rest_nats"], found["rest_nats_low"]) == (0, 0)
    assert (one(table, "noop")["start_nats"], one(table, "noop")["start_nats_high"]) == (0, 0)
    assert one(table, "random")["start_nats"] is one(table, task="sums")["start_nats_high"] is None
