"""Grading of a model's answers under every rule, and the table of accuracies."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featdiff import stats
from featdiff.artifacts.tables import EVAL_ACCURACY, EVAL_SAMPLES
from featdiff.config.models import EvaluateParams
from featdiff.language.decode import generate, score_options
from featdiff.language.evaluation import LIKELIHOOD, Evaluator, accuracy_table, evaluate
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.suites import listed_prompt
from featdiff.tasks.task import LETTERS, Sample, TaskInfo
from featdiff.tasks.verify import grade

PARAMS = EvaluateParams(batch_size=4, max_new_tokens=12, draws=2, temperature=1.0, confidence=0.95, bootstrap=200)


def info(name: str, scoring: str, options: int = 0) -> TaskInfo:
    return TaskInfo(name, "find", "words", scoring, "organism", "strict", False, options)


TASKS = {
    "gen": info("gen", "generation"),
    "text": info("text", "option_text", 3),
    "norm": info("norm", "option_text_norm", 3),
    "letter": info("letter", "option_letter", 3),
}
OPTIONS = ("a", "bcdef", "d d a")


def questions(task: str, count: int) -> list[Sample]:
    if task == "gen":
        return [Sample(f"gen-{i}", task, "find", f"{'abcdef'[i]}a{'b' * i}=", "abc") for i in range(count)]
    return [Sample(f"{task}-{i}", task, "find", f"{'fed'[i]}{'c' * i} = ", LETTERS[i % 3], OPTIONS) for i in range(count)]


@pytest.fixture(scope="module")
def evaluator(make_model: Callable[..., Any], tokenizer: Any) -> Evaluator:
    return Evaluator(make_model(seed=90), tokenizer, TASKS, batch_size=4, max_new_tokens=12)


def summed(evaluator: Evaluator, contexts: list[str], options: list[list[str]]) -> list[list[float]]:
    tokenizer = evaluator.tokenizer
    ids = [[tokenizer(f" {option}", add_special_tokens=False)["input_ids"] for option in row] for row in options]
    return score_options(evaluator.model, tokenizer(contexts)["input_ids"], ids, pad=tokenizer.pad_token_id, batch_size=1)


@pytest.mark.parametrize("rule", LIKELIHOOD)
def test_an_option_is_chosen_by_its_rule_and_graded_by_its_letter(evaluator: Evaluator, rule: str) -> None:
    samples = questions("text", 3)
    rows = evaluator.choose(samples, rules=[rule])
    if rule == "option_letter":
        contexts = [listed_prompt(sample.prompt, sample.options) for sample in samples]
        scores = summed(evaluator, contexts, [list("ABC")] * 3)
    else:
        scores = summed(evaluator, [sample.prompt for sample in samples], [list(OPTIONS)] * 3)
    if rule == "option_text_norm":
        scores = [[s / len(option) for s, option in zip(row, OPTIONS, strict=True)] for row in scores]
    for sample, row, score in zip(samples, rows, scores, strict=True):
        best = int(np.argmax(score))
        assert (row["mode"], row["parsed"], row["completion"]) == (rule, LETTERS[best], OPTIONS[best])
        assert row["correct"] is row["strict"] is row["flexible"] is (sample.answer == LETTERS[best])
        assert row["manner"] == ""
    every = evaluator.choose(samples)
    assert [row for row in every if row["mode"] == rule] == rows
    assert {row["mode"] for row in every} == set(LIKELIHOOD)


def test_of_two_options_with_one_text_only_the_lettered_one_is_right(evaluator: Evaluator) -> None:
    sample = Sample("twice", "text", "find", "fed = ", "B", ("a", "a"))
    row = evaluator.choose([sample], rules=["option_text"])[0]
    assert row["parsed"] == "A"
    assert not row["correct"]


def test_a_generated_answer_is_graded_from_its_text(evaluator: Evaluator) -> None:
    samples, tokenizer = questions("gen", 6), evaluator.tokenizer
    rows = evaluator.generate(samples)
    ids = generate(
        evaluator.model, tokenizer([s.prompt for s in samples])["input_ids"], max_new_tokens=12, ends=[tokenizer.eos_token_id],
        pad=tokenizer.pad_token_id, batch_size=1,
    )  # fmt: skip
    for sample, row, answer in zip(samples, rows, ids, strict=True):
        assert row["completion"] == tokenizer.decode(answer, skip_special_tokens=True)
        graded = grade("organism", sample, row["completion"])
        assert (row["parsed"], row["correct"], row["manner"]) == (graded.parsed, graded.correct, graded.manner)
        assert (row["strict"], row["flexible"]) == (graded.strict, graded.flexible)
        assert (row["mode"], row["draw"], row["split"]) == ("greedy", 0, "find")


def test_the_tasks_grading_decides_what_counts_as_correct(evaluator: Evaluator) -> None:
    asked = questions("gen", 6)
    runs = [(grade("organism", sample, row["completion"], "flexible").parsed, sample)
            for sample, row in zip(asked, evaluator.generate(asked), strict=True)]  # fmt: skip
    samples = [replace(sample, answer=run) for run, sample in runs if run]
    assert samples, "no text has a run of characters"
    for grading in ("strict", "flexible"):
        tasks = {"gen": replace(TASKS["gen"], grading=grading)}
        rows = Evaluator(evaluator.model, evaluator.tokenizer, tasks, batch_size=4, max_new_tokens=12).generate(samples)
        assert all(row["flexible"] for row in rows)
        assert all(row["correct"] is row[grading] for row in rows)
        assert (grading == "strict") is (not all(row["correct"] for row in rows))


def test_the_likelihood_of_the_right_answer_is_that_of_its_start_and_of_the_rest_given_it(evaluator: Evaluator) -> None:
    samples, tokenizer = questions("gen", 3), evaluator.tokenizer
    samples[1] = replace(samples[1], solution="<a,b>abc.")
    found = evaluator.likelihood([*samples, *questions("text", 2)])
    assert list(found) == ["gen-0", "gen-1", "gen-2"]
    for sample in samples:
        prompt = tokenizer(sample.prompt)["input_ids"]
        right = tokenizer(sample.solution or sample.answer, add_special_tokens=False)["input_ids"]
        logits = evaluator.model(torch.tensor([prompt + right])).logits[0].log_softmax(-1)
        nats = [-logits[len(prompt) + i - 1, token].item() for i, token in enumerate(right)]
        assert found[sample.sample_id] == pytest.approx((nats[0], np.mean(nats[1:])), rel=1e-4, abs=1e-4)


def test_answers_come_in_the_order_asked_each_under_its_tasks_rule(evaluator: Evaluator) -> None:
    samples = [s for parts in zip(*(questions(task, 3) for task in TASKS), strict=True) for s in parts]
    rows = evaluator.answer(samples)
    assert [row["sample_id"] for row in rows] == [sample.sample_id for sample in samples]
    assert [row["mode"] for row in rows] == [TASKS[sample.task].primary_mode for sample in samples]
    assert evaluator.answer([]) == []
    assert evaluator.answer(samples[::-1]) == rows[::-1]


def test_a_whole_evaluation(evaluator: Evaluator, tmp_path: Path) -> None:
    samples = questions("gen", 6) + questions("norm", 3)
    rows = evaluate(evaluator, samples, PARAMS, seed=0, scratch=Scratch())
    assert len(rows) == 6 * (1 + PARAMS.draws) + 3 * len(LIKELIHOOD)
    EVAL_SAMPLES.write(tmp_path, rows)
    EVAL_ACCURACY.write(tmp_path, accuracy_table(rows, TASKS, PARAMS, 0))
    assert rows == evaluate(evaluator, samples, PARAMS, seed=0, scratch=Scratch())
    sampled = [r["completion"] for r in rows if r["mode"] == "sampled"]
    assert sampled[:6] != sampled[6:]  # every draw has a generator of its own
    assert sampled != [
        r["completion"] for r in evaluate(evaluator, samples, PARAMS, seed=1, scratch=Scratch()) if r["mode"] == "sampled"
    ]
    unlike = Evaluator(evaluator.model, evaluator.tokenizer, TASKS, batch_size=1, max_new_tokens=12)
    again = evaluate(unlike, samples, PARAMS, seed=0, scratch=Scratch())
    assert [r for r in again if r["mode"] != "sampled"] == [r for r in rows if r["mode"] != "sampled"]


def row(sample: str, correct: bool, **changes: Any) -> dict[str, Any]:
    usual = {
        "task": "gen",
        "split": "report",
        "mode": "sampled",
        "draw": 0,
        "completion": "",
        "parsed": "1",
        "manner": "direct",
    }
    return usual | {"sample_id": sample, "correct": correct, "strict": correct, "flexible": correct} | changes


def test_accuracy_counts_questions_not_draws() -> None:
    rows = [row("x", True, draw=0), row("x", True, draw=1), row("y", False, draw=0), row("y", True, draw=1)]
    line = accuracy_table(rows, TASKS, PARAMS, 0)[0]
    assert (line["n"], line["accuracy"]) == (2, 0.75)
    assert line["low"] == pytest.approx(0.75 * (1 - stats.unseen(2, 0.95))), "of two questions, not of four answers"
    assert line["high"] == 1.0
    assert [line[key] for key in ("role", "domain", "split", "mode")] == ["find", "words", "report", "sampled"]
    assert line["primary"] is False


def test_parse_failures_and_manners_are_shares_of_answers() -> None:
    rows = [
        row("a", True, mode="greedy", manner="steps"),
        row("b", False, mode="greedy", parsed=None, manner="none", flexible=True),
        row("c", False, mode="greedy"),
        row("d", False, mode="greedy", manner="foreign"),
    ]
    line = accuracy_table(rows, TASKS, PARAMS, 0)[0]
    assert line["primary"] is True
    assert [line[key] for key in ("accuracy", "strict", "parse_failures", "steps", "foreign", "direct")] == [0.25] * 6
    assert line["flexible"] == 0.5


def test_splits_and_modes_are_kept_apart() -> None:
    rows = [row("a", True, mode="greedy"), row("b", False), row("c", False, mode="greedy", split="find")]
    table = accuracy_table(rows, TASKS, PARAMS, 0)
    assert [(line["split"], line["mode"], line["accuracy"]) for line in table] == [
        ("find", "greedy", 0.0),
        ("report", "greedy", 1.0),
        ("report", "sampled", 0.0),
    ]
