"""Features against the manner of answering, which is known."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from featdiff.config.sets import DescribeParams
from featdiff.description.manner import in_a_manner, step_shares, tell_manner
from featdiff.tasks.task import Text
from tiny import params_of

PARAMS = params_of(DescribeParams, "describe", bootstrap=300)


def told(values: list[list[float]], steps: list[float], tasks: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Features 10, 11, … by their columns."""
    array = np.array(values, dtype=float).T
    return tell_manner(array, [10 + s for s in range(array.shape[1])], np.array(steps), tasks or ["t"] * len(steps), PARAMS, 0)


def test_precision_and_recall_count_answers() -> None:
    row = told([[2, 1, 0, 0]], [1.0, 0.5, 0.5, 0.0])["10"]
    assert (row["prompts"], row["fires"]) == (4, 2)
    assert row["steps"].value == pytest.approx(2 / 4)
    assert row["precision"].value == pytest.approx(1.5 / 2)
    assert row["recall"].value == pytest.approx(1.5 / 2)
    assert row["precision"].low < row["precision"].value < row["precision"].high
    assert row["recall"].n == 4


@given(st.integers(0, 10_000))
def test_auroc_is_that_of_single_answers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, draws = rng.integers(0, 4, 12).astype(float), rng.integers(0, 2, (12, 3))  # few values: many ties
    if draws.min() == draws.max():
        return
    made = told([values.tolist()], draws.mean(1).tolist())["10"]["auroc"]
    assert made.value == pytest.approx(roc_auc_score(draws.ravel(), values.repeat(3)))
    assert 0 <= made.low <= made.high <= 1


def test_a_feature_that_knows_only_the_task_tells_nothing_within_it() -> None:
    tasks, steps = ["a"] * 40 + ["b"] * 40, [0.9] * 40 + [0.1] * 40
    row = told([[1.0] * 40 + [0.0] * 40], steps, tasks)["10"]
    assert row["auroc"].value > 0.85
    assert row["auroc_within_tasks"].value == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    steps = rng.random(80).round().tolist()
    within = [share + (5 if task == "a" else 0) for share, task in zip(steps, tasks, strict=True)]
    row = told([within], steps, tasks)["10"]
    assert row["auroc_within_tasks"].value == 1 > row["auroc"].value


def test_intervals_narrow_with_the_number_of_prompts() -> None:
    rng = np.random.default_rng(0)
    spread = []
    for n in (30, 3000):
        steps = rng.integers(0, 2, n)
        found = told([(steps + rng.normal(0, 1, n)).tolist()], steps.tolist())["10"]["auroc"]
        assert found.low < found.value < found.high
        spread.append(found.high - found.low)
    assert spread[0] > 5 * spread[1]


def test_what_cannot_be_told_is_none() -> None:
    silent = told([[0, 0, 0]], [1, 0, 1])["10"]
    assert silent["precision"] is None
    assert silent["recall"].value == 0
    assert silent["auroc"].value == 0.5
    for share in (0.0, 1.0):
        row = told([[1, 2, 0]], [share] * 3)["10"]
        assert row["auroc"] is None
        assert row["auroc_within_tasks"] is None
        assert (row["recall"] is None) == (share == 0)


def test_the_set_fires_where_any_feature_does_and_its_features_weigh_the_same() -> None:
    steps = [1.0, 1.0, 0.0, 0.0]
    made = told([[3, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], steps)
    assert set(made) == {"10", "11", "12", "set"}
    assert (made["set"]["fires"], made["set"]["precision"].value, made["set"]["recall"].value) == (2, 1, 1)
    assert made["set"]["auroc"].value == 1
    for scale in (1, 100):
        uneven = told([[1, 1, 0, 0], [0, scale, 0, scale]], steps)
        assert uneven["set"]["auroc"].value == 3.5 / 4


def row(sample_id: str, mode: str, manner: str) -> dict[str, Any]:
    return {"sample_id": sample_id, "mode": mode, "manner": manner}


def test_shares_are_of_sampled_answers_and_of_greedy_ones_only_without_them() -> None:
    greedy = [row("a", "greedy", "steps"), row("b", "greedy", "none"), row("c", "option_text", "")]
    assert step_shares(greedy) == {"a": 1.0, "b": 0.0}
    drawn = [row("a", "sampled", manner) for manner in ("steps", "direct", "none", "direct")]
    assert step_shares(greedy + drawn) == {"a": 0.25}
    assert step_shares(greedy[2:]) == {}


def test_texts_that_show_a_manner_have_an_answer_before_and_come_in_both_kinds() -> None:
    def text(family: str, manner: str, prompt: str = "x=y.\nx=") -> Text:
        return Text(prompt, "y.", f"{family}/{manner}")

    texts = [
        text("rev", "steps"),
        text("rev", "direct"),
        text("rev", "mistake"),
        text("add", "steps", "x="),
        text("add", "steps"),
    ]
    assert in_a_manner(texts, 2) == [texts[0], texts[1], texts[4]]
    assert in_a_manner([texts[0], texts[4]], 2) == []
    assert in_a_manner([text("general", ""), text("products", "own"), text("rev", "steps")], 2) == []
