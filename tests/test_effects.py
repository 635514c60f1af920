"""What an edit did: paired effects against the unedited model and matched random sets."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from featdiff import stats
from featdiff.config.params import InterveneParams
from featdiff.intervention.effects import effects
from featdiff.tasks.task import TaskInfo
from tiny import answers, params_of

Row = dict[str, Any]
WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", False, 0)
SUMS = replace(WORDS, name="sums", role="train", domain="math")
QUIZ = TaskInfo("quiz", "heldout", "questions", "option_text_norm", "letter", "strict", False, 3)
TASKS = {task.name: task for task in (SUMS, WORDS, QUIZ)}


def params() -> InterveneParams:
    return params_of(InterveneParams, "intervene", bootstrap=300)


BASELINE = [False] * 6 + [True] * 4
N = len(BASELINE)


def shifted(right: int) -> list[bool]:
    """Answers of which ``right`` are right: what was right stays so as far as possible."""
    order = [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    return [place in order[:right] for place in range(N)]


def study_rows(purpose: str, set_right: int, random_right: list[int], task: str = "words") -> list[Row]:
    model = {"zero_tuned": "rl", "zero_contrast": "imitator", "amplify_original": "base"}.get(purpose, "rl_1")
    facts = {"purpose": purpose, "model": model, "start_nats": 1.0, "rest_nats": None}
    rows = answers(task, BASELINE, "direct", control="none", set_draw=0, **facts) + answers(
        task, BASELINE, "direct", control="noop", set_draw=0, **facts
    )
    rows += answers(task, shifted(set_right), control="set", set_draw=0, **facts)
    for draw, right in enumerate(random_right):
        rows += answers(task, shifted(right), control="random", set_draw=draw, **facts)
    return rows


def one(table: list[Row], control: str = "set", subset: str = "all", **wanted: Any) -> Row:
    found = [
        row
        for row in table
        if row["control"] == control and row["subset"] == subset and all(row[key] == value for key, value in wanted.items())
    ]
    assert len(found) == 1, found
    return found[0]


def test_likelihood_is_compared_per_sample_where_there_is_one() -> None:
    rows = study_rows("amplify_original", 9, [4])
    for i, row in enumerate(rows):
        if row["control"] == "set":
            rows[i] = row | {"start_nats": 0.5 if row["sample_id"] == rows[0]["sample_id"] else 0.75}
    table = effects(rows, set(), TASKS, params(), 0)
    found = one(table)
    assert found["start_nats"] == pytest.approx(-0.25 - 0.25 / found["n"])
    assert found["start_nats_low"] < found["start_nats"] < found["start_nats_high"] <= -0.25
    assert (one(table, "noop")["start_nats"], one(table, "noop")["start_nats_high"]) == (0, 0)
    assert found["rest_nats"] is found["rest_nats_low"] is None


@pytest.mark.parametrize(
    ("purpose", "set_right", "random_right", "beyond"),
    [
        ("amplify_original", 9, [4, 5, 8], True),
        ("amplify_original", 8, [4, 5, 8], False),  # as far as one of them is not beyond it
        ("amplify_original", 1, [4, 5, 8], False),  # the wrong direction
        ("zero_tuned", 1, [4, 3, 2], True),
        ("zero_tuned", 2, [4, 3, 2], False),
        ("zero_tuned", 9, [4, 3, 2], False),
        ("zero_contrast", 0, [4, 3, 2], True),
        ("zero_contrast", 3, [4, 3, 2], False),
        ("repeat_rl_1", 1, [4, 3, 2], True),
        ("repeat_rl_1", 9, [4, 3, 2], False),
    ],
)
def test_beyond_random_is_beyond_every_draw_in_the_claimed_direction(
    purpose: str, set_right: int, random_right: list[int], beyond: bool
) -> None:
    table = effects(study_rows(purpose, set_right, random_right), set(), TASKS, params(), 0)
    row = one(table)
    assert row["beyond_random"] is beyond
    assert row["effect"] == pytest.approx((set_right - 4) / N)
    assert (row["accuracy"], row["baseline"], row["n"]) == (pytest.approx(set_right / N), 0.4, N)
    assert (row["steps"], row["steps_baseline"], row["parse_failures"]) == (1, 0, pytest.approx(1 - set_right / N))
    assert row["flexible"] == row["accuracy"]
    assert all(other["beyond_random"] is None for other in table if other["control"] == "random")
    assert one(table, "noop")["beyond_random"] is (False if min(random_right) <= 4 <= max(random_right) else None)
    further = sum((right >= set_right) if purpose == "amplify_original" else (right <= set_right) for right in random_right)
    assert row["p_random"] == (1 + further) / 4
    assert row["p_mcnemar"] == pytest.approx(stats.mcnemar(np.array(shifted(set_right)), np.array(BASELINE)))
    draws = [(right - 4) / N for right in random_right]
    assert (row["random_low"], row["random_high"]) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])))
    assert [one(table, "random", set_draw=draw)["effect"] for draw in range(3)] == pytest.approx(draws)


def test_no_effect_is_zero_within_what_so_few_samples_can_tell() -> None:
    row = one(effects(study_rows("zero_tuned", 1, [4]), set(), TASKS, params(), 0), "noop")
    unseen = stats.unseen(row["n"], 0.95)
    assert (row["effect"], row["low"], row["high"]) == pytest.approx((0, -unseen, unseen)), "none seen is not none"


def test_without_random_draws_nothing_is_said_about_chance() -> None:
    row = one(effects(study_rows("zero_tuned", 1, []), set(), TASKS, params(), 0))
    assert row["beyond_random"] is None
    assert np.isnan(row["random_low"])


def test_intervals_are_paired_by_sample_whatever_the_order_of_the_rows() -> None:
    rows = study_rows("amplify_original", 7, [4, 5])
    row = one(effects(rows, set(), TASKS, params(), 0))
    interval = stats.paired_difference(
        np.array(shifted(7), float), np.array(BASELINE, float), resamples=300, confidence=0.95, seed=0, within=(-1, 1)
    )
    assert (row["low"], row["high"]) == (interval.low, interval.high)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    mixed = one(effects(shuffled, set(), TASKS, params(), 0))
    assert (mixed["effect"], mixed["low"], mixed["high"]) == (row["effect"], row["low"], row["high"])


def test_controls_that_answered_other_questions_are_refused() -> None:
    rows = study_rows("amplify_original", 7, [4, 5])
    rows = [
        row | {"sample_id": "words-99"} if row["control"] == "set" and row["sample_id"] == "words-3" else row for row in rows
    ]
    with pytest.raises(ValueError, match="amplify_original set 0"):
        effects(rows, set(), TASKS, params(), 0)


def test_the_flipped_subset_is_those_samples_alone() -> None:
    rows = study_rows("amplify_original", 7, [4, 5]) + study_rows("amplify_original", 2, [4, 5], task="sums")
    flipped = {"words-0", "words-1", "words-5"}
    table = effects(rows, flipped, TASKS, params(), 0)
    row = one(table, subset="flipped", task="words")
    assert (row["n"], row["baseline"], row["accuracy"]) == (3, 0, pytest.approx(2 / 3))
    assert row["random_high"] == pytest.approx(np.quantile([0, 1 / 3], 0.95))
    assert not [other for other in table if other["task"] == "sums" and other["subset"] == "flipped"]
    assert one(table, subset="all", task="sums")["effect"] == pytest.approx(-0.2)


def test_purposes_and_tasks_do_not_mix() -> None:
    rows = (
        study_rows("zero_tuned", 1, [4, 3])
        + study_rows("amplify_original", 9, [5, 6])
        + study_rows("zero_tuned", 2, [0, 1], task="sums")
    )
    table = effects(rows, set(), TASKS, params(), 0)
    assert one(table, purpose="zero_tuned", task="words")["effect"] == pytest.approx(-0.3)
    assert one(table, purpose="amplify_original", task="words")["effect"] == pytest.approx(0.5)
    row = one(table, purpose="zero_tuned", task="sums")
    assert (row["model"], row["role"], row["beyond_random"]) == ("rl", "train", False)
    assert len(table) == 3 * (1 + 1 + 2)
