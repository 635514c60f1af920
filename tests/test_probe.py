"""Probes of the manner on planted streams, and read from real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from featdiff.artifacts.tables import PROBES
from featdiff.config.sets import DescribeParams
from featdiff.crosscoder.readout import Reader
from featdiff.description.probe import (
    TOO_FEW,
    Read,
    fit_and_score,
    manner_probes,
    probes,
    random_dictionary,
    read_prompts,
    strongest,
)
from featdiff.tasks.task import Sample, TaskInfo, Text
from test_describe import TOKENIZER, sources
from tiny import params_of

Floats = NDArray[np.float64]
PARAMS = params_of(DescribeParams, "describe")
TASKS, QUESTIONS, WIDTH = 6, 60, 24
NAMES = [f"task{t}" for t in range(TASKS) for _ in range(QUESTIONS)]
TASK = np.arange(TASKS).repeat(QUESTIONS)


def stream(seed: int = 0) -> tuple[Floats, Floats]:
    """Noise around a mean of each task's own, and a draw of the manner for every question."""
    rng = np.random.default_rng(seed)
    mean_TD = 3 * rng.standard_normal((TASKS, WIDTH))
    return mean_TD[TASK] + rng.standard_normal((len(TASK), WIDTH)), rng.integers(0, 2, len(TASK)).astype(float)


def one(resid_PD: Floats, steps_P: Floats) -> Read:
    """A model whose features are the coordinates of its stream, each with its negative, and one that never fires."""
    return Read(resid_PD, np.maximum(np.hstack([resid_PD, -resid_PD, np.zeros((len(resid_PD), 1))]), 0), steps_P)


def asked(read: dict[str, Read], *groups: list[str], chosen: tuple[int, ...] = (3,), **changes: Any) -> dict[str, Any]:
    """Rows of the last group by probe."""
    rows = probes(read, groups or [list(read)], NAMES, chosen, params_of(DescribeParams, "describe", **changes), 0)
    return {row["probe"]: row for row in rows if row["models"] == " + ".join((groups or [list(read)])[-1])}


def test_a_direction_that_all_tasks_share_is_read_by_all_but_random_features() -> None:
    resid_PD, steps_P = stream()
    resid_PD[:, 3] = 5 * steps_P + np.random.default_rng(1).standard_normal(len(steps_P))
    rows = asked({"original": one(resid_PD, steps_P)})
    for probe in ("dense", "features_1", "features_5", "set"):
        assert rows[probe]["auc"] > 0.98, probe
        assert rows[probe]["accuracy"] > 0.95, probe
        assert rows[probe]["auc_low"] <= rows[probe]["auc"] <= rows[probe]["auc_high"] <= 1
    assert rows["random_1"]["auc"] < 0.95
    assert rows["random_1"]["minus_dense_high"] < 0
    assert (rows["dense"]["columns"], rows["features_5"]["columns"], rows["set"]["columns"]) == (WIDTH, 5, 1)
    assert {(row["n"], row["tasks"], row["reason"]) for row in rows.values()} == {(len(TASK), TASKS, "")}


def test_what_only_the_task_tells_is_worth_nothing() -> None:
    resid_PD, _ = stream()
    steps_P = (np.random.default_rng(2).random(len(TASK)) < np.where(TASK % 2, 0.85, 0.15)).astype(float)
    rows = asked({"original": one(resid_PD, steps_P)})
    split_N = np.random.default_rng(3).random(len(TASK)) < 0.8
    assert fit_and_score(resid_PD, steps_P, split_N, 1.0).auc > 0.8, "a random split would say otherwise"
    assert {probe: row["auc"] for probe, row in rows.items() if not row["auc_low"] <= 0.5 <= row["auc_high"]} == {}
    assert abs(rows["dense"]["auc"] - 0.5) < 0.1


def test_a_direction_of_each_task_alone_is_not_read_in_another() -> None:
    resid_PD, steps_P = stream()
    resid_PD[np.arange(len(TASK)), TASK] += 8 * steps_P - 4  # task t tells it along coordinate t
    split_N = np.random.default_rng(3).random(len(TASK)) < 0.8
    assert fit_and_score(resid_PD, steps_P, split_N, 1.0).auc > 0.9
    assert asked({"original": one(resid_PD, steps_P)})["dense"]["auc"] < 0.65


def test_the_difference_of_two_models_reads_what_differs() -> None:
    resid_PD, _ = stream()
    rng = np.random.default_rng(4)
    direction_D = rng.standard_normal(WIDTH)
    read = {
        "original": one(resid_PD, (rng.random(len(TASK)) < 0.1).astype(float)),
        "tuned": one(resid_PD + 3 * direction_D, np.ones(len(TASK))),
    }
    rows = asked(read, ["original"], ["tuned"], ["original", "tuned"])
    assert rows["mean_difference"]["columns"] == 1
    assert rows["mean_difference"]["auc"] == pytest.approx(rows["dense"]["auc"], abs=0.05)
    assert rows["dense"]["minus_dense"] == 0
    assert rows["dense"]["n"] == 2 * len(TASK)
    assert rows["dense"]["steps"] == pytest.approx(np.mean([one.steps_P.mean() for one in read.values()]))


def test_one_label_is_no_row_but_its_reason(tmp_path: Path) -> None:
    resid_PD, _ = stream()
    steps_P = np.zeros(len(TASK))
    steps_P[TASK < 2] = 0.5  # both manners, in two tasks of six
    rows = probes({"tuned": one(resid_PD, steps_P)}, [["tuned"]], NAMES, [3], PARAMS, 0)
    assert [(row["models"], row["n"], row["tasks"], row["reason"], row["probe"], row["auc"]) for row in rows] == [
        ("tuned", len(TASK), 2, TOO_FEW, None, None)
    ]
    steps_P[np.flatnonzero(TASK == 2)[: PARAMS.probe_least]] = 1
    enough = probes({"tuned": one(resid_PD, steps_P)}, [["tuned"]], NAMES, [3], PARAMS, 0)
    assert {row["tasks"] for row in enough} == {3}
    PROBES.write(tmp_path, [{"of": "answers"} | row for row in rows + enough])


def test_features_are_not_chosen_on_the_task_asked_about() -> None:
    resid_PD, steps_P = stream()
    noise_PF = np.random.default_rng(5).standard_normal((len(TASK), 2000))
    best_P5 = noise_PF[:, strongest(noise_PF, steps_P)[:5]]
    peeked = [fit_and_score(best_P5, steps_P, task != TASK, 1.0).auc for task in range(TASKS)]
    assert np.mean(peeked) > 0.6, "of 2000 features of noise some fit the labels of all tasks"
    rows = asked({"original": Read(resid_PD, noise_PF, steps_P)})
    assert rows["features_5"]["auc_low"] < 0.5 < rows["features_5"]["auc_high"]
    assert rows["features_5"]["auc"] < 0.55


def test_the_strongest_features_are_those_whose_means_differ_most() -> None:
    steps_N = np.array([1, 1, 0.5, 0, 0, 0])
    values_NF = np.array([[9, 0, 1, 5], [9, 1, 1, 4], [5, 0, 1, 5], [1, 1, 1, 1], [1, 0, 1, 0], [2, 0, 1, 1]], dtype=float)
    assert strongest(values_NF, steps_N).tolist() == [0, 3, 1, 2]
    assert strongest(values_NF[:, ::-1] * [1, 100, -3, 0.1], steps_N).tolist() == [3, 0, 2, 1], "scale and sign do not count"


@given(st.integers(0, 10_000))
def test_a_share_of_answers_counts_as_single_answers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x_NK, answers_NA = rng.standard_normal((40, 2)), rng.integers(0, 2, (40, 2)).astype(float)
    fitted_N = np.arange(40) < 25
    made = fit_and_score(x_NK, answers_NA.mean(1), fitted_N, 1.0)
    single = fit_and_score(x_NK.repeat(2, 0), answers_NA.ravel(), fitted_N.repeat(2), 2.0)
    assert made == pytest.approx(single)


def test_a_random_dictionary_is_as_often_silent_and_knows_nothing_else() -> None:
    resid_PD, steps_P = stream()
    read = [one(resid_PD, steps_P), one(resid_PD + 1, steps_P)]
    made = random_dictionary(read, 0)
    fires_F = np.concatenate([model.values_PF for model in read]).astype(bool).sum(0)
    assert (np.concatenate(made).astype(bool).sum(0) == fires_F).all()
    assert [len(values) for values in made] == [len(TASK), len(TASK)]
    again, other = random_dictionary(read, 0), random_dictionary(read, 1)
    assert (again[0] == made[0]).all()
    assert not (other[0] == made[0]).all()
    turned = random_dictionary([model._replace(steps_P=1 - steps_P) for model in read], 0)
    assert (turned[0] == made[0]).all(), "labels do not matter"


def questions(task: str, count: int) -> list[Sample]:
    return [Sample(f"{task}-{i}", task, "find", f"{task} {'abcde'[i % 5]}{i}=", "a") for i in range(count)]


def graded(samples: list[Sample], seed: int, manner: bool = True) -> list[dict[str, Any]]:
    """A greedy answer and two sampled ones to every question, in a manner drawn by lot."""
    rng = np.random.default_rng(seed)
    return [
        {
            "sample_id": sample.sample_id, "task": sample.task, "split": sample.split, "mode": mode, "draw": draw,
            "completion": "a.", "parsed": "a", "correct": True,
            "manner": ("steps", "direct")[int(rng.integers(2))] if manner else None,
        }
        for sample in samples
        for mode, draw in (("greedy", 0), ("sampled", 0), ("sampled", 1))
    ]  # fmt: skip


def test_own_answers_and_texts_that_show_a_manner_are_both_asked_about(tmp_path: Path) -> None:
    study, _ = sources(tmp_path)
    tasks = {
        name: TaskInfo(name, "find", "words", "generation", "organism", "strict", False, 0) for name in ("rev", "sort", "zip")
    }
    samples = [sample for name in tasks for sample in questions(name, 20)]
    texts = [
        Text(f"eg {task} a=a.\n{task} {'bcde'[i % 4]}{i}=", "b.", f"{task}/{('steps', 'direct')[i % 2]}")
        for task in tasks
        for i in range(20)
    ]
    answers = {name: graded(samples, seed) for seed, name in enumerate(("base", "grpo"))}
    study = replace(study, tasks=tasks, samples=samples, answers=answers, texts=texts)
    small = params_of(DescribeParams, "describe", samples=20, batch_size=7, probe_features=[1, 2])
    rows = manner_probes(study, small, 0)
    names = {"dense", "features_1", "features_2", "random_1", "random_2", "set", "mean_difference"}
    found = {(of, models): {row["probe"] for row in rows if (row["of"], row["models"]) == (of, models)}
             for of, models in {(row["of"], row["models"]) for row in rows}}  # fmt: skip
    assert found == {
        ("answers", "original"): names, ("answers", "tuned"): names, ("answers", "original + tuned"): names,
        ("texts", "original"): names, ("texts", "tuned"): names,
    }  # fmt: skip
    assert manner_probes(study, small, 0) == rows
    PROBES.write(tmp_path, rows)


def test_a_prompt_is_read_at_its_last_token_as_if_alone(tmp_path: Path) -> None:
    study, trunks = sources(tmp_path)
    prompts = TOKENIZER([f"rev {'abcdefgh'[:i]}=" for i in range(1, 8)])["input_ids"]
    steps_P = np.linspace(0, 1, len(prompts))
    for name, trunk in trunks.items():
        read = read_prompts(study, name, prompts, steps_P, params_of(DescribeParams, "describe", batch_size=3))
        with torch.inference_mode():
            last_PD = torch.stack(
                [trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in prompts]
            )
            values_PF = Reader(study.crosscoder, name)(last_PD)
        assert np.allclose(read.resid_PD, last_PD.numpy(), rtol=1e-3, atol=1e-3), name
        assert np.allclose(read.values_PF, values_PF.numpy(), rtol=1e-2, atol=1e-2), name
        assert (read.steps_P == steps_P).all()


def test_where_no_manner_is_known_there_is_no_row(tmp_path: Path) -> None:
    study, _ = sources(tmp_path)
    samples = questions("rev", 10)
    answers = {name: graded(samples, 0, manner=False) for name in ("base", "grpo")}
    assert manner_probes(replace(study, samples=samples, answers=answers, texts=[]), PARAMS, 0) == []
