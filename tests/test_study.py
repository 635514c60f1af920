"""The intervention study: models, tuning, controls, and the whole of it on real models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from featdiff.config.params import InterveneParams, Roles
from featdiff.crosscoder.edits import Editor
from featdiff.intervention.controls import FeatureSets
from featdiff.intervention.models import EditableModel, EditableModels
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, ZERO_TUNED, Purpose, purposes
from featdiff.intervention.sensitivity import sensitivity
from featdiff.intervention.study import (
    DIRECTIONS,
    Questions,
    Setting,
    by_task,
    collateral,
    controls,
    dose_curve,
    intervene,
    mean_accuracy,
    run_controls,
    settings,
    tune,
    tune_directions,
)
from featdiff.language.evaluation import Evaluator
from featdiff.language.models import save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, TaskInfo, Text, read_rows
from tiny import answers, params_of, random_crosscoder, tiny_model

T = TypeVar("T")
Row = dict[str, Any]
WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", False, 0)
SUMS = replace(WORDS, name="sums", role="train", domain="math")
QUIZ = TaskInfo("quiz", "heldout", "questions", "option_text_norm", "letter", "strict", False, 3)
TASKS = {task.name: task for task in (SUMS, WORDS, QUIZ)}
CPU = torch.device("cpu")
ROLES = Roles(original="before", tuned="after", contrast="other")
ZEROED, CONTRASTED, AMPLIFIED, REPEATED = purposes(ROLES, ["after", "after_1"])
HELD = ("before", "other", "after")
"""Models of the crosscoder; the repeat is none of them."""


def once(_name: str, compute: Callable[[], T], /) -> T:
    return compute()


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
    for purpose in (ZEROED, CONTRASTED, REPEATED):
        assert settings(purpose, params()) == [Setting("zero", "prompt_last", 0.0), Setting("zero", "all", 0.0)]
    amplify = settings(AMPLIFIED, params())
    assert len(amplify) == len(set(amplify)) == 2 * 2 * 2
    assert {setting.edit for setting in amplify} == {"add", "scale"}
    assert {setting.dose for setting in amplify} == {1.0, 3.0}


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


def samples() -> list[Sample]:
    made = []
    for split, number in (("find", 3), ("tune", 2), ("report", 3)):
        for i in range(number):
            made.append(Sample(f"words-{split}-{i}", "words", split, f"rev {'abc'[: i + 1]}=", "cba"))
            made.append(Sample(f"sums-{split}-{i}", "sums", split, f"add {i} 2=", str(i + 2)))
            made.append(Sample(f"quiz-{split}-{i}", "quiz", split, f"who {i}=", "B", ("red", "blue", "green")))
    return made


def maker(name: str) -> Editor:
    """Edits in the slot ``name``."""
    crosscoder = random_crosscoder(HELD, d_model=16, n_features=24, threshold=1.0)
    drawn = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    directions = dict(zip((*DIRECTIONS, "original_mean"), drawn, strict=True))
    return Editor(crosscoder, name, 1, CPU, torch.full((24,), 6.0), donor_name="after", directions=directions)


def editable(purpose: Purpose, seed: int, kind: type[Evaluator] = Evaluator) -> Any:
    model, tokenizer = tiny_model(seed)
    evaluator = kind(model, tokenizer, TASKS, batch_size=4, max_new_tokens=4)
    return EditableModel(purpose, evaluator, maker(purpose.alike))


class Scripted(Evaluator):
    """A real evaluator whose accuracy under each edit is known beforehand."""

    right: dict[tuple[str, str, float], int]

    def answer(self, samples: list[Sample], *, edit: Any = None, **how: Any) -> list[Row]:
        rows = super().answer(samples, edit=edit, **how)
        return [row | {"correct": i < self.right[edit.kind, edit.positions, edit.dose]} for i, row in enumerate(rows)]


def test_tuning_takes_the_lowest_accuracy_when_zeroing_the_highest_when_amplifying_and_the_first_of_equals() -> None:
    chosen = [sample for sample in samples() if sample.task == "words"]
    zeroed, amplified = editable(ZEROED, 0, Scripted), editable(AMPLIFIED, 0, Scripted)
    zeroed.evaluator.right = {("zero", "prompt_last", 0.0): 4, ("zero", "all", 0.0): 2}
    assert tune(zeroed, [1, 2], chosen, params(), once)[0] == Setting("zero", "all", 0.0)
    right = dict.fromkeys([tuple(setting) for setting in settings(AMPLIFIED, params())], 3)
    amplified.evaluator.right = right | {("add", "all", 3.0): 7, ("scale", "prompt_last", 1.0): 7}
    best, table = tune(amplified, [1, 2], chosen, params(), once)
    assert best == Setting("add", "all", 3.0)
    assert len(table) == 8
    assert {line["accuracy"] for line in table if (line["edit"], line["positions"], line["dose"]) == best} == {7 / 8}


def test_of_settings_as_good_the_gentlest_is_taken() -> None:
    made = editable(AMPLIFIED, 0, Scripted)
    chosen = [sample for sample in samples() if sample.task == "words"]
    made.evaluator.right = {("add", "prompt_last", 1.0): 7, ("add", "prompt_last", 3.0): 8}
    narrow = {"positions": ["prompt_last"], "amplify": ["add"], "doses": [3.0, 1.0]}
    best, _ = tune(made, [1, 2], chosen, params(**narrow, tolerance=0.2), once)
    assert best == Setting("add", "prompt_last", 1.0)
    best, _ = tune(made, [1, 2], chosen, params(**narrow, tolerance=0.1), once)
    assert best == Setting("add", "prompt_last", 3.0)


SETS = {"set": [[3, 5]], "random": [[1, 2], [7, 9]], "shared": [[4, 6]]}
DOSES = {"mean_difference": 2.0}


def test_every_control_edits_as_chosen_and_the_no_op_gives_the_same_answers() -> None:
    made, chosen = editable(ZEROED, 2), Setting("zero", "all", 0.0)
    planned = list(controls(made, chosen, SETS, DOSES))
    names = [(control, number) for control, number, _ in planned]
    first = [("none", 0), ("noop", 0), ("reconstruction", 0), ("set", 0), ("random", 0), ("random", 1)]
    assert names == [*first, ("shared", 0), ("mean_difference", 0)]
    kinds = [(edit.kind, edit.positions, edit.dose) for _, _, edit in planned if edit is not None]
    assert kinds == [
        ("scale", "all", 1.0),
        ("reconstruct", "all", 0.0),
        *[("zero", "all", 0.0)] * 4,
        ("project", "all", 2.0),
    ]
    assert list(controls(editable(AMPLIFIED, 2), chosen, SETS, DOSES))[-1][2].kind == "push"
    directions = made.editor.edit("reconstruct", None, "all", 0.0).reader.directions_FD
    assert torch.equal(planned[5][2].reader.directions_FD, directions[[7, 9]])
    rows = run_controls(made, chosen, SETS, DOSES, samples(), once)
    assert {(row["purpose"], row["model"]) for row in rows} == {("zero_tuned", "after")}
    by_control = {control: [row for row in rows if (row["control"], row["set_draw"]) == (control, 0)] for control, _ in names}
    assert {len(group) for group in by_control.values()} == {24}
    kept = ("sample_id", "completion", "correct", "parsed", "manner")
    none, noop = ([[row[key] for key in kept] for row in by_control[name]] for name in ("none", "noop"))
    assert none == noop
    assert [row["completion"] for row in by_control["none"]] != [row["completion"] for row in by_control["reconstruction"]]


def test_collateral_is_nothing_for_the_no_op_and_something_for_others() -> None:
    made, texts = editable(AMPLIFIED, 0), [Text(f"rev {'abc'[:i]}=", "cba", "t") for i in (1, 2, 3)]
    rows = collateral(made, Setting("add", "prompt_last", 2.0), SETS, DOSES, texts, params(), 0, once)
    by_control = {row["control"]: row for row in rows if row["set_draw"] == 0}
    assert (by_control["noop"]["change"], by_control["noop"]["low"], by_control["noop"]["high"]) == (0, 0, 0)
    assert by_control["noop"]["perplexity"] == by_control["none"]["perplexity"]
    assert by_control["set"]["change"] != 0
    assert by_control["set"]["n"] == 3
    expected = by_control["none"]["perplexity"] * np.exp(by_control["set"]["change"])
    assert by_control["set"]["perplexity"] == pytest.approx(expected)


def test_directions_get_the_gentlest_good_dose_of_their_own() -> None:
    made = editable(AMPLIFIED, 0, Scripted)
    made.evaluator.right = {("push", "prompt_last", 1.0): 3, ("push", "prompt_last", 3.0): 6}
    chosen = [sample for sample in samples() if sample.task == "words"]
    doses, table = tune_directions(made, "prompt_last", chosen, params(), once)
    assert doses == dict.fromkeys(DIRECTIONS, 3.0)
    assert len(table) == len(DIRECTIONS) * 2
    assert {line["edit"] for line in table} == set(DIRECTIONS)
    made.evaluator.right[("push", "prompt_last", 1.0)] = 6
    assert tune_directions(made, "prompt_last", chosen, params(), once)[0] == dict.fromkeys(DIRECTIONS, 1.0)


def test_dose_curves_have_every_set_at_every_dose() -> None:
    sets = FeatureSets({"set": [[1]], "random": [[8]]}, tuning=[[2], [3]])
    curve = dose_curve(editable(AMPLIFIED, 0), Setting("add", "all", 3.0), sets, samples()[:3], params(), once)
    assert {(line["dose"], line["control"], line["set_draw"]) for line in curve} == {
        (dose, control, number) for dose in (1.0, 3.0) for control, number in (("set", 0), ("random", 0), ("random", 1))
    }


def opened(root: Path, asked: list[Purpose], seeds: dict[str, int], wide: InterveneParams) -> EditableModels:
    """Models on disk by their name's seed, for the purposes that the crosscoder has a slot for."""
    for name, seed in seeds.items():
        save_model(*tiny_model(seed), root / name)
    folders = {purpose: root / purpose.model for purpose in asked if purpose.slot_in(HELD)}
    return EditableModels(folders, maker("after"), TASKS, wide)


def test_a_repeat_is_edited_through_the_slot_of_the_tuned_model(tmp_path: Path) -> None:
    asked = purposes(ROLES, ["after", "after_1"])
    models = opened(tmp_path, asked, {"before": 0, "other": 1, "after": 2, "after_1": 3}, params())
    repeat = models.open(REPEATED)
    assert repeat.editor.model == "after"
    assert {purpose.name: models.open(purpose).editor.model for purpose in models.purposes} == {
        "zero_tuned": "after", "zero_contrast": "other", "amplify_original": "before", "repeat_after_1": "after"
    }  # fmt: skip
    assert models.open(ZEROED) is models.tuned
    assert models.original.editor.donor is models.tuned.evaluator.model
    own, tuned = (next(made.evaluator.model.parameters()) for made in (repeat, models.tuned))
    assert not torch.equal(own, tuned), "it is the repeat that answers"
    resid_BTD = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * 3
    found = repeat.editor.edit("zero", [3, 5], "all", 0.0)(resid_BTD, None, prompt=True)
    assert torch.equal(found, models.tuned.editor.edit("zero", [3, 5], "all", 0.0)(resid_BTD, None, prompt=True))
    assert not torch.equal(found, resid_BTD)


def test_a_repeat_with_the_weights_of_the_tuned_model_shows_what_that_shows(tmp_path: Path) -> None:
    models = opened(tmp_path, [ZEROED, AMPLIFIED, REPEATED], {"before": 0, "after": 2, "after_1": 2}, params())
    sets = FeatureSets({"set": [[21, 22]], "random": [[4, 5], [6, 7]], "alone": [[21], [22]]}, tuning=[[2, 9]])
    result = intervene(models, sets, Questions(TASKS, samples(), [Text("rev ab=", "ba", "t")]), params(), 0, once)
    for table in (result.samples, result.effects, result.collateral):
        tuned, repeat = (
            [
                row | {"purpose": "", "model": ""}
                for row in table
                if row["purpose"] == purpose.name and row["control"] != "alone"
            ]
            for purpose in (ZEROED, REPEATED)
        )
        assert json.dumps(tuned) == json.dumps(repeat) != "[]"
        assert {row["model"] for row in table if row["purpose"] == "repeat_after_1"} == {"after_1"}


VARIANTS = [
    {"readout": "swap", "positions": "prompt_last", "features": [4, 5]},
    {"readout": "slot", "positions": "all", "features": []},
]


@pytest.mark.parametrize("contrast", ["other", None])
def test_the_whole_study_never_tunes_on_the_report_split_nor_on_a_repeat(contrast: str | None, tmp_path: Path) -> None:
    asked = purposes(ROLES.model_copy(update={"contrast": contrast}), ["after", "after_1", "after_2"])
    wide = params(amplify=["add", "scale", "transplant"])
    models = opened(tmp_path, asked, {"before": 0, "other": 1, "after": 2, "after_1": 3, "after_2": 4}, wide)
    sets = FeatureSets({"set": [[21, 22]], "random": [[i, i + 1] for i in range(20)], "alone": [[21], [22]]}, [[2, 9]])
    questions = Questions(TASKS, samples(), [Text("rev ab=", "ba", "t"), Text("rev a=", "a", "t")])
    scratch = Scratch(tmp_path / "scratch")  # which refuses a pass that has the name of another
    result = intervene(models, sets, questions, wide, 0, scratch.part)
    assert {line["task"] for line in result.tuning} == {line["task"] for line in result.dose} == {"words"}
    assert {line["n"] for line in result.tuning} == {line["n"] for line in result.dose} == {2}
    assert {line["purpose"] for line in result.tuning} == {ZERO_TUNED, AMPLIFY_ORIGINAL}
    assert {row["split"] for row in result.samples} == {"report"}
    assert {row["task"] for row in result.samples} == set(TASKS)
    names = ["zero_tuned", *["zero_contrast"] * bool(contrast), "amplify_original", "repeat_after_1", "repeat_after_2"]
    assert list(dict.fromkeys(row["purpose"] for row in result.samples)) == names
    passes = {name: 3 + 1 + 20 + 3 + (2 if name in (ZERO_TUNED, AMPLIFY_ORIGINAL) else 0) for name in names}
    assert len(result.samples) == 9 * sum(passes.values())
    assert len(result.collateral) == sum(passes.values())

    def match(features: list[int], draws: int) -> list[list[int]]:
        return [[k + 1 for k in features]] * draws

    tried = sensitivity(models, result, VARIANTS, match, questions.tune, 2, scratch.part)
    assert {row["purpose"] for row in tried} == {ZERO_TUNED, AMPLIFY_ORIGINAL}
    assert [row["choice"] for row in tried if row["purpose"] == ZERO_TUNED] == [
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
            row["sample_id"]
            for row in result.samples
            if row["purpose"] == purpose and row["control"] == "none" and row["correct"]
        }
        for purpose in (ZERO_TUNED, AMPLIFY_ORIGINAL)
    }
    flipped = right[ZERO_TUNED] - right[AMPLIFY_ORIGINAL]
    counts = {
        (row["purpose"], row["task"]): row["n"]
        for row in result.effects
        if row["control"] == "set" and row["subset"] == "flipped"
    }
    for task in TASKS:
        number = sum(sample_id.startswith(task) for sample_id in flipped)
        assert [counts.get((name, task), 0) for name in names] == [number] * len(names)
    assert all(row["effect"] == 0 for row in result.effects if row["control"] == "noop")
    nats = {(row["control"], row["task"]): row["start_nats"] for row in result.effects if row["set_draw"] == 0}
    assert nats["noop", "words"] == 0 != nats["set", "words"]
    assert nats["set", "quiz"] is None
    json.dumps(result.summary(), allow_nan=False)
    assert list(result.summary()) == names
    assert set(result.summary()[ZERO_TUNED]) == set(TASKS)
    result.save(tmp_path, sensitivity=tried)
    assert json.loads((tmp_path / "choice.json").read_text()) == result.choice
    assert read_rows(tmp_path / "effects.parquet")[0]["control"] == "noop"
    assert len(read_rows(tmp_path / "sensitivity.parquet")) == len(tried)
