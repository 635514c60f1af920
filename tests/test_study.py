"""The intervention study: tuning, arms, paired effects against matched random draws."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from featdiff import stats
from featdiff.config.params import InterveneParams
from featdiff.crosscoder.edits import Editor
from featdiff.intervention.effects import effects
from featdiff.intervention.sensitivity import sensitivity
from featdiff.intervention.study import (
    BASELINES,
    Passes,
    Setting,
    Subject,
    arms,
    by_task,
    collateral,
    dose_curve,
    intervene,
    mean_accuracy,
    run_arms,
    settings,
    tune,
    tune_directions,
)
from featdiff.language.evaluation import Examinee
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, TaskInfo, Text
from tiny import params_of, random_crosscoder, tiny_model

Row = dict[str, Any]
WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", False, 0)
SUMS = replace(WORDS, name="sums", role="train", domain="math")
QUIZ = TaskInfo("quiz", "heldout", "questions", "option_text_norm", "letter", "strict", False, 3)
TASKS = {task.name: task for task in (SUMS, WORDS, QUIZ)}
CPU = torch.device("cpu")


def params(**changes: Any) -> InterveneParams:
    small = {
        "positions": ["prompt_last", "all"],
        "amplify": ["add", "scale"],
        "doses": [1.0, 3.0],
        "bootstrap": 300,
        "max_new_tokens": 4,
    }
    return params_of(InterveneParams, "intervene", **small | {"tuning_random_sets": 2, "tolerance": 0.05} | changes)


def test_settings_are_every_combination_and_zeroing_has_no_dose() -> None:
    assert (
        settings("zero_grpo", params())
        == settings("zero_sft", params())
        == [Setting("zero", "prompt_last", 0.0), Setting("zero", "all", 0.0)]
    )
    amplify = settings("amplify_base", params())
    assert len(amplify) == len(set(amplify)) == 2 * 2 * 2
    assert {setting.edit for setting in amplify} == {"add", "scale"}
    assert {setting.dose for setting in amplify} == {1.0, 3.0}


def answers(task: str, correct: list[bool], manner: str = "steps", **more: Any) -> list[Row]:
    return [
        {
            "sample_id": f"{task}-{i}",
            "task": task,
            "correct": right,
            "manner": manner,
            "parsed": "x" if right else None,
            "flexible": right,
        }
        | more
        for i, right in enumerate(correct)
    ]


def test_every_task_counts_the_same_however_many_questions_it_has() -> None:
    rows = answers("words", [True] * 9 + [False]) + answers("sums", [False, True], "direct")
    assert mean_accuracy(rows) == pytest.approx((0.9 + 0.5) / 2)
    table = {line["task"]: line for line in by_task(rows, TASKS)}
    assert (table["words"]["n"], table["words"]["accuracy"], table["words"]["steps"], table["words"]["role"]) == (
        10,
        0.9,
        1,
        "find",
    )
    assert (table["sums"]["n"], table["sums"]["accuracy"], table["sums"]["steps"], table["sums"]["role"]) == (
        2,
        0.5,
        0,
        "train",
    )


BASELINE = [False] * 6 + [True] * 4
N = len(BASELINE)


def shifted(right: int) -> list[bool]:
    """Answers of which ``right`` are right: what was right stays so as far as possible."""
    order = [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    return [place in order[:right] for place in range(N)]


def study_rows(purpose: str, set_right: int, random_right: list[int], task: str = "words") -> list[Row]:
    model = {"zero_grpo": "grpo", "zero_sft": "sft", "amplify_base": "base"}[purpose]
    facts = {"purpose": purpose, "model": model, "start_nats": 1.0, "rest_nats": None}
    rows = answers(task, BASELINE, "direct", arm="none", draw=0, **facts) + answers(
        task, BASELINE, "direct", arm="noop", draw=0, **facts
    )
    rows += answers(task, shifted(set_right), arm="set", draw=0, **facts)
    for draw, right in enumerate(random_right):
        rows += answers(task, shifted(right), arm="random", draw=draw, **facts)
    return rows


def one(table: list[Row], arm: str = "set", subset: str = "all", **wanted: Any) -> Row:
    found = [
        row
        for row in table
        if row["arm"] == arm and row["subset"] == subset and all(row[key] == value for key, value in wanted.items())
    ]
    assert len(found) == 1, found
    return found[0]


def test_likelihood_is_compared_per_sample_where_there_is_one() -> None:
    rows = study_rows("amplify_base", 9, [4])
    for i, row in enumerate(rows):
        if row["arm"] == "set":
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
        ("amplify_base", 9, [4, 5, 8], True),
        ("amplify_base", 8, [4, 5, 8], False),  # as far as one of them is not beyond it
        ("amplify_base", 1, [4, 5, 8], False),  # the wrong direction
        ("zero_grpo", 1, [4, 3, 2], True),
        ("zero_grpo", 2, [4, 3, 2], False),
        ("zero_grpo", 9, [4, 3, 2], False),
        ("zero_sft", 0, [4, 3, 2], True),
        ("zero_sft", 3, [4, 3, 2], False),
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
    assert all(other["beyond_random"] is None for other in table if other["arm"] == "random")
    assert one(table, "noop")["beyond_random"] is (False if min(random_right) <= 4 <= max(random_right) else None)
    further = sum((right >= set_right) if purpose == "amplify_base" else (right <= set_right) for right in random_right)
    assert row["p_random"] == (1 + further) / 4
    assert row["p_mcnemar"] == pytest.approx(stats.mcnemar(np.array(shifted(set_right)), np.array(BASELINE)))
    draws = [(right - 4) / N for right in random_right]
    assert (row["random_low"], row["random_high"]) == pytest.approx(tuple(np.quantile(draws, [0.05, 0.95])))
    assert [one(table, "random", draw=draw)["effect"] for draw in range(3)] == pytest.approx(draws)


def test_no_effect_is_zero_within_what_so_few_samples_can_tell() -> None:
    row = one(effects(study_rows("zero_grpo", 1, [4]), set(), TASKS, params(), 0), "noop")
    unseen = stats.unseen(row["n"], 0.95)
    assert (row["effect"], row["low"], row["high"]) == pytest.approx((0, -unseen, unseen)), "none seen is not none"


def test_without_random_draws_nothing_is_said_about_chance() -> None:
    row = one(effects(study_rows("zero_grpo", 1, []), set(), TASKS, params(), 0))
    assert row["beyond_random"] is None
    assert np.isnan(row["random_low"])


def test_intervals_are_paired_by_sample_whatever_the_order_of_the_rows() -> None:
    rows = study_rows("amplify_base", 7, [4, 5])
    row = one(effects(rows, set(), TASKS, params(), 0))
    interval = stats.paired_difference(
        np.array(shifted(7), float), np.array(BASELINE, float), resamples=300, confidence=0.95, seed=0, within=(-1, 1)
    )
    assert (row["low"], row["high"]) == (interval.low, interval.high)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    mixed = one(effects(shuffled, set(), TASKS, params(), 0))
    assert (mixed["effect"], mixed["low"], mixed["high"]) == (row["effect"], row["low"], row["high"])


def test_arms_that_answered_other_questions_are_refused() -> None:
    rows = study_rows("amplify_base", 7, [4, 5])
    rows = [row | {"sample_id": "words-99"} if row["arm"] == "set" and row["sample_id"] == "words-3" else row for row in rows]
    with pytest.raises(ValueError, match="amplify_base set 0"):
        effects(rows, set(), TASKS, params(), 0)


def test_the_flipped_subset_is_those_samples_alone() -> None:
    rows = study_rows("amplify_base", 7, [4, 5]) + study_rows("amplify_base", 2, [4, 5], task="sums")
    flipped = {"words-0", "words-1", "words-5"}
    table = effects(rows, flipped, TASKS, params(), 0)
    row = one(table, subset="flipped", task="words")
    assert (row["n"], row["baseline"], row["accuracy"]) == (3, 0, pytest.approx(2 / 3))
    assert row["random_high"] == pytest.approx(np.quantile([0, 1 / 3], 0.95))
    assert not [other for other in table if other["task"] == "sums" and other["subset"] == "flipped"]
    assert one(table, subset="all", task="sums")["effect"] == pytest.approx(-0.2)


def test_purposes_and_tasks_do_not_mix() -> None:
    rows = (
        study_rows("zero_grpo", 1, [4, 3])
        + study_rows("amplify_base", 9, [5, 6])
        + study_rows("zero_grpo", 2, [0, 1], task="sums")
    )
    table = effects(rows, set(), TASKS, params(), 0)
    assert one(table, purpose="zero_grpo", task="words")["effect"] == pytest.approx(-0.3)
    assert one(table, purpose="amplify_base", task="words")["effect"] == pytest.approx(0.5)
    row = one(table, purpose="zero_grpo", task="sums")
    assert (row["model"], row["role"], row["beyond_random"]) == ("grpo", "train", False)
    assert len(table) == 3 * (1 + 1 + 2)


def samples() -> list[Sample]:
    made = []
    for split, number in (("find", 3), ("tune", 2), ("report", 3)):
        for i in range(number):
            made.append(Sample(f"words-{split}-{i}", "words", split, f"rev {'abc'[: i + 1]}=", "cba"))
            made.append(Sample(f"sums-{split}-{i}", "sums", split, f"add {i} 2=", str(i + 2)))
            made.append(Sample(f"quiz-{split}-{i}", "quiz", split, f"who {i}=", "B", ("red", "blue", "green")))
    return made


def subject(name: str, seed: int) -> Subject:
    model, tokenizer = tiny_model(seed)
    crosscoder = random_crosscoder(("base", "sft", "grpo"), d_model=16, n_features=24, threshold=1.0)
    directions = dict(
        zip((*BASELINES, "original_mean"), torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), strict=True)
    )
    editor = Editor(crosscoder, name, 1, CPU, torch.full((24,), 6.0), donor=tiny_model(2)[0], directions=directions)
    return Subject(Examinee(model, tokenizer, TASKS, batch_size=4, max_new_tokens=4), editor)


silent = Passes(0, Scratch(), "test")


class Scripted(Examinee):
    """A real examinee whose accuracy under each edit is known beforehand."""

    right: dict[tuple[str, str, float], int]

    def answer(self, samples: list[Sample], *, edit: Any = None, **how: Any) -> list[Row]:
        rows = super().answer(samples, edit=edit, **how)
        return [row | {"correct": i < self.right[edit.kind, edit.positions, edit.dose]} for i, row in enumerate(rows)]


def test_tuning_takes_the_lowest_accuracy_when_zeroing_the_highest_when_amplifying_and_the_first_of_equals() -> None:
    made = subject("base", 0)
    made.examinee.__class__ = Scripted
    chosen = [sample for sample in samples() if sample.task == "words"]
    made.examinee.right = {("zero", "prompt_last", 0.0): 4, ("zero", "all", 0.0): 2}
    assert tune("zero_grpo", made, [1, 2], chosen, params(), silent)[0] == Setting("zero", "all", 0.0)
    right = dict.fromkeys([tuple(setting) for setting in settings("amplify_base", params())], 3)
    made.examinee.right = right | {("add", "all", 3.0): 7, ("scale", "prompt_last", 1.0): 7}
    best, table = tune("amplify_base", made, [1, 2], chosen, params(), silent)
    assert best == Setting("add", "all", 3.0)
    assert len(table) == 8
    assert {line["accuracy"] for line in table if (line["edit"], line["positions"], line["dose"]) == best} == {7 / 8}


def test_of_settings_as_good_the_gentlest_is_taken() -> None:
    made = subject("base", 0)
    made.examinee.__class__ = Scripted
    chosen = [sample for sample in samples() if sample.task == "words"]
    made.examinee.right = {("add", "prompt_last", 1.0): 7, ("add", "prompt_last", 3.0): 8}
    narrow = {"positions": ["prompt_last"], "amplify": ["add"], "doses": [3.0, 1.0]}
    best, _ = tune("amplify_base", made, [1, 2], chosen, params(**narrow, tolerance=0.2), silent)
    assert best == Setting("add", "prompt_last", 1.0)
    best, _ = tune("amplify_base", made, [1, 2], chosen, params(**narrow, tolerance=0.1), silent)
    assert best == Setting("add", "prompt_last", 3.0)


SETS = {"set": [[3, 5]], "random": [[1, 2], [7, 9]], "shared": [[4, 6]]}
DOSES = {"mean_difference": 2.0}


def test_every_arm_edits_as_chosen_and_the_no_op_gives_the_same_answers() -> None:
    made, chosen = subject("grpo", 2), Setting("zero", "all", 0.0)
    planned = list(arms("zero_grpo", made, chosen, SETS, DOSES))
    names = [(arm, draw) for arm, draw, _ in planned]
    first = [("none", 0), ("noop", 0), ("reconstruction", 0), ("set", 0), ("random", 0), ("random", 1)]
    assert names == [*first, ("shared", 0), ("mean_difference", 0)]
    kinds = [(edit.kind, edit.positions, edit.dose) for _, _, edit in planned if edit is not None]
    assert kinds == [
        ("scale", "all", 1.0),
        ("reconstruct", "all", 0.0),
        *[("zero", "all", 0.0)] * 4,
        ("project", "all", 2.0),
    ]
    assert list(arms("amplify_base", made, chosen, SETS, DOSES))[-1][2].kind == "push"
    directions = made.editor.edit("reconstruct", None, "all", 0.0).reader.directions_FD
    assert torch.equal(planned[5][2].reader.directions_FD, directions[[7, 9]])
    rows = run_arms("zero_grpo", made, chosen, SETS, DOSES, samples(), silent)
    by_arm = {arm: [row for row in rows if row["arm"] == arm and row["draw"] == 0] for arm, _ in names}
    assert {len(group) for group in by_arm.values()} == {24}
    kept = ("sample_id", "completion", "correct", "parsed", "manner")
    assert [[row[key] for key in kept] for row in by_arm["none"]] == [[row[key] for key in kept] for row in by_arm["noop"]]
    assert [row["completion"] for row in by_arm["none"]] != [row["completion"] for row in by_arm["reconstruction"]]


def test_collateral_is_nothing_for_the_no_op_and_something_for_other_arms() -> None:
    made, texts = subject("base", 0), [Text(f"rev {'abc'[:i]}=", "cba", "t") for i in (1, 2, 3)]
    rows = collateral("amplify_base", made, Setting("add", "prompt_last", 2.0), SETS, DOSES, texts, params(), 0, silent)
    by_arm = {row["arm"]: row for row in rows if row["draw"] == 0}
    assert (by_arm["noop"]["change"], by_arm["noop"]["low"], by_arm["noop"]["high"]) == (0, 0, 0)
    assert by_arm["noop"]["perplexity"] == by_arm["none"]["perplexity"]
    assert by_arm["set"]["change"] != 0
    assert by_arm["set"]["n"] == 3
    assert by_arm["set"]["perplexity"] == pytest.approx(by_arm["none"]["perplexity"] * np.exp(by_arm["set"]["change"]))


def test_directions_get_the_gentlest_good_dose_of_their_own() -> None:
    made = subject("base", 0)
    made.examinee.__class__ = Scripted
    made.examinee.right = {("push", "prompt_last", 1.0): 3, ("push", "prompt_last", 3.0): 6}
    chosen = [sample for sample in samples() if sample.task == "words"]
    doses, table = tune_directions(made, "prompt_last", chosen, params(), silent)
    assert doses == dict.fromkeys(BASELINES, 3.0)
    assert len(table) == len(BASELINES) * 2
    assert {line["edit"] for line in table} == set(BASELINES)
    made.examinee.right[("push", "prompt_last", 1.0)] = 6
    assert tune_directions(made, "prompt_last", chosen, params(), silent)[0] == dict.fromkeys(BASELINES, 1.0)


def test_dose_curves_have_every_set_at_every_dose() -> None:
    chosen = Setting("add", "all", 3.0)
    curve = dose_curve(
        subject("base", 0), chosen, {("set", 0): [1], ("random", 0): [2], ("random", 1): [3]}, samples()[:3], params(), silent
    )
    assert {(line["dose"], line["arm"], line["draw"]) for line in curve} == {
        (dose, arm, draw) for dose in (1.0, 3.0) for arm, draw in (("set", 0), ("random", 0), ("random", 1))
    }


VARIANTS = [
    {"readout": "swap", "positions": "prompt_last", "features": [4, 5]},
    {"readout": "slot", "positions": "all", "features": []},
]


@pytest.mark.parametrize("with_sft", [True, False])
def test_the_whole_study_never_tunes_on_the_report_split(with_sft: bool) -> None:
    subjects = {"base": subject("base", 0), "grpo": subject("grpo", 2)} | ({"sft": subject("sft", 1)} if with_sft else {})
    draws = [[i, i + 1] for i in range(20)]
    sets = {"set": [[21, 22]], "random": draws, "alone": [[21], [22]]}
    texts = [Text("rev ab=", "ba", "t"), Text("rev a=", "a", "t")]
    wide = params(amplify=["add", "scale", "transplant"])
    outcome = intervene(subjects, sets, [[2, 9]], samples(), texts, wide, 0, Scratch())
    assert {line["task"] for line in outcome.tuning} == {line["task"] for line in outcome.dose} == {"words"}
    assert {line["n"] for line in outcome.tuning} == {line["n"] for line in outcome.dose} == {2}
    assert {row["split"] for row in outcome.samples} == {"report"}
    assert {row["task"] for row in outcome.samples} == set(TASKS)
    purposes = ["zero_grpo", "zero_sft", "amplify_base"] if with_sft else ["zero_grpo", "amplify_base"]
    assert list(dict.fromkeys(row["purpose"] for row in outcome.samples)) == purposes
    passes = {purpose: 3 + 1 + 20 + 3 + (2 if purpose != "zero_sft" else 0) for purpose in purposes}
    assert len(outcome.samples) == 9 * sum(passes.values())
    assert len(outcome.collateral) == sum(passes.values())
    tried = sensitivity(
        subjects, outcome, VARIANTS, lambda features, n: [[k + 1 for k in features]] * n, samples(), 2, Scratch()
    )
    assert {row["purpose"] for row in tried} == {"zero_grpo", "amplify_base"}
    assert [row["choice"] for row in tried if row["purpose"] == "zero_grpo"] == [
        "swap at prompt_last",
        "slot at all",
        "zero at prompt_last",
        "zero at all",
    ]
    empty = next(row for row in tried if row["choice"] == "slot at all")
    assert (empty["size"], empty["effect"], empty["random"]) == (0, None, None)
    assert all(row["effect"] is not None and row["random"] is not None for row in tried if row["size"])
    right = {
        purpose: {
            row["sample_id"] for row in outcome.samples if row["purpose"] == purpose and row["arm"] == "none" and row["correct"]
        }
        for purpose in ("zero_grpo", "amplify_base")
    }
    flipped = right["zero_grpo"] - right["amplify_base"]
    counts = {
        (row["purpose"], row["task"]): row["n"] for row in outcome.effects if row["arm"] == "set" and row["subset"] == "flipped"
    }
    for task in TASKS:
        number = sum(sample_id.startswith(task) for sample_id in flipped)
        assert [counts.get((purpose, task), 0) for purpose in purposes] == [number] * len(purposes)
    assert all(row["effect"] == 0 for row in outcome.effects if row["arm"] == "noop")
    nats = {(row["arm"], row["task"]): row["start_nats"] for row in outcome.effects if row["draw"] == 0}
    assert nats["noop", "words"] == 0 != nats["set", "words"]
    assert nats["set", "quiz"] is None
    json.dumps(outcome.summary(), allow_nan=False)
    json.dumps(outcome.choice)
    assert set(outcome.summary()["zero_grpo"]) == set(TASKS)
