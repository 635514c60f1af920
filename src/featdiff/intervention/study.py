"""The intervention study: positions and dose chosen on the tune split, effects measured on the report split.

Three purposes: zeroing the set in GRPO (is it necessary?), zeroing it in SFT (is it GRPO's?), amplifying it in base
(is it sufficient?). Every arm answers the same questions in the same batches, so that an edit that changes nothing
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from featdiff import stats
from featdiff.config import InterveneParams
from featdiff.crosscoder.model import Crosscoder
from featdiff.decode import PromptCache
from featdiff.evaluation import Examinee, Row
from featdiff.intervention.edits import WHOLE_PROMPT, Editor, FeatureEdit
from featdiff.models import load_model, load_tokenizer
from featdiff.ranks import process_state
from featdiff.tasks.task import Sample, TaskInfo

PURPOSES = {"zero_grpo": "grpo", "zero_sft": "sft", "amplify_base": "base"}


class Setting(NamedTuple):
    """One way to edit."""

    edit: str
    positions: str
    dose: float


class Subject(NamedTuple):
    """A model under intervention."""

    examinee: Examinee
    editor: Editor


def make_subjects(
    crosscoder: Crosscoder,
    layer: int,
    folders: dict[str, Path],
    tasks: dict[str, TaskInfo],
    largest_F: Tensor,
    params: InterveneParams,
) -> dict[str, Subject]:
    """The models in ``folders`` ready to be edited after ``layer`` blocks; GRPO is every edit's donor."""
    device, tokenizer = process_state().device, load_tokenizer(folders["base"])
    models = {name: load_model(folder).to(device) for name, folder in folders.items()}
    return {
        name: Subject(
            Examinee(model, tokenizer, tasks, batch_size=params.batch_size, max_new_tokens=params.max_new_tokens),
            Editor(crosscoder, name, layer, device, largest_F, donor=models["grpo"]),
        )
        for name, model in models.items()
    }


def settings(purpose: str, params: InterveneParams) -> list[Setting]:
    """What is tried on the tune split, gentlest first."""
    if purpose != "amplify_base":
        return [Setting("zero", positions, 0.0) for positions in params.positions]
    return [
        Setting(edit, positions, dose)
        for edit in params.amplify
        for positions in params.positions
        for dose in sorted(params.doses)
    ]


def mean_accuracy(rows: list[Row]) -> float:
    """Mean over tasks of their accuracy."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return float(np.mean([np.mean([row["correct"] for row in rows if row["task"] == task]) for task in tasks]))


def by_task(rows: list[Row], tasks: dict[str, TaskInfo]) -> Iterator[dict[str, Any]]:
    """n, accuracy and share of step-by-step answers per task."""
    for name in dict.fromkeys(row["task"] for row in rows):
        group = [row for row in rows if row["task"] == name]
        yield {
            "task": name,
            "role": tasks[name].role,
            "n": len(group),
            "accuracy": float(np.mean([row["correct"] for row in group])),
            "steps": float(np.mean([row["manner"] == "steps" for row in group])),
        }


def tune(
    purpose: str, subject: Subject, features: list[int], samples: list[Sample], params: InterveneParams, bar: tqdm[Any]
) -> tuple[Setting, list[dict[str, Any]]]:
    """Try every setting on ``samples`` (tune split, tasks used for finding); returns the chosen one and the table of all.

    Mean accuracy decides, lowest for zeroing and highest for amplifying; among the settings within
    ``params.tolerance`` of the best, the first in the order of :func:`settings` is taken, which is the gentlest: a dose
    larger than needed is one at which any set of features does something."""
    sign = 1 if purpose == "amplify_base" else -1
    values: dict[Setting, float] = {}
    table, prompts = [], PromptCache()
    for setting in settings(purpose, params):
        edit = subject.editor.edit(setting.edit, features, setting.positions, setting.dose)
        rows = subject.examinee.answer(samples, edit=edit, shared=None if edit.whole_prompt else prompts)
        values[setting] = sign * mean_accuracy(rows)
        table += [{"purpose": purpose, **setting._asdict(), **line} for line in by_task(rows, subject.examinee.tasks)]
        bar.set_postfix_str(f"tune {purpose}", refresh=False)
        bar.update(1)
    best = max(values.values())
    return next(setting for setting, value in values.items() if value >= best - params.tolerance), table


def dose_curve(
    subject: Subject,
    chosen: Setting,
    sets: dict[tuple[str, int], list[int]],
    samples: list[Sample],
    params: InterveneParams,
    bar: tqdm[Any],
) -> list[dict[str, Any]]:
    """Accuracy over doses at the chosen edit and positions, for the found set and some random sets (tune split)."""
    table, prompts = [], PromptCache()
    for (arm, draw), features in sets.items():
        for dose in params.doses:
            edit = subject.editor.edit(chosen.edit, features, chosen.positions, dose)
            rows = subject.examinee.answer(samples, edit=edit, shared=None if edit.whole_prompt else prompts)
            table += [{"dose": dose, "arm": arm, "draw": draw, **line} for line in by_task(rows, subject.examinee.tasks)]
            bar.set_postfix_str("dose curve", refresh=False)
            bar.update(1)
    return table


def arms(
    subject: Subject, chosen: Setting, features: list[int], random_sets: list[list[int]]
) -> Iterator[tuple[str, int, FeatureEdit | None]]:
    """Every arm of one purpose with its edit: unedited, no-op, reconstruction only, the set, the random sets."""
    editor = subject.editor
    yield "none", 0, None
    yield "noop", 0, editor.edit("scale", features, chosen.positions, 1.0)
    yield "reconstruction", 0, editor.edit("reconstruct", None, chosen.positions, 0.0)
    yield "set", 0, editor.edit(chosen.edit, features, chosen.positions, chosen.dose)
    for draw, drawn in enumerate(random_sets):
        yield "random", draw, editor.edit(chosen.edit, drawn, chosen.positions, chosen.dose)


def run_arms(
    purpose: str,
    subject: Subject,
    chosen: Setting,
    features: list[int],
    random_sets: list[list[int]],
    samples: list[Sample],
    bar: tqdm[Any],
) -> list[Row]:
    """Answers under every arm to all ``samples`` (report split, every task). Where no arm changes the prompt
    before its last token, all arms share one reading of the prompts, the unedited one too."""
    rows = []
    shared = None if chosen.positions in WHOLE_PROMPT else PromptCache()
    for arm, draw, edit in arms(subject, chosen, features, random_sets):
        answered = subject.examinee.answer(samples, edit=edit, shared=shared)
        rows += [{"purpose": purpose, "model": PURPOSES[purpose], "arm": arm, **row, "draw": draw} for row in answered]
        bar.set_postfix_str(f"{purpose} {arm}", refresh=False)
        bar.update(1)
    return rows


def effects(
    rows: list[Row], flipped: set[str], tasks: dict[str, TaskInfo], params: InterveneParams, seed: int
) -> list[dict[str, Any]]:
    """Change of accuracy against the unedited model, per purpose, arm, task and subset, with paired bootstrap
    intervals and the band of the matched random draws. ``flipped`` holds the sample ids that base fails and GRPO
    solves: chosen by outcome, so read it beside the full set."""
    table: list[dict[str, Any]] = []
    for purpose in dict.fromkeys(row["purpose"] for row in rows):
        for task in tasks.values():
            for subset in ("all", "flipped"):
                group = [
                    row
                    for row in rows
                    if row["purpose"] == purpose
                    and row["task"] == task.name
                    and (subset == "all" or row["sample_id"] in flipped)
                ]
                if group:
                    table += _task_effects(purpose, task, subset, group, params, seed)
    return table


def _task_effects(
    purpose: str, task: TaskInfo, subset: str, rows: list[Row], params: InterveneParams, seed: int
) -> list[dict[str, Any]]:
    answers: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["sample_id"])):
        answers.setdefault((row["arm"], row["draw"]), []).append(row)
    asked = [row["sample_id"] for row in answers["none", 0]]
    for (arm, draw), group in answers.items():
        if [row["sample_id"] for row in group] != asked:
            raise ValueError(f"{purpose} {arm} {draw}: other samples of {task.name} than the unedited model answered")
    right = {key: np.array([row["correct"] for row in group], dtype=float) for key, group in answers.items()}
    baseline, before = right["none", 0], answers["none", 0]
    draws = [float((value - baseline).mean()) for (arm, _), value in right.items() if arm == "random"]
    low_random, high_random = np.quantile(draws, [0.05, 0.95]) if draws else (np.nan, np.nan)
    table = []
    for (arm, draw), value in right.items():
        if arm == "none":
            continue
        effect = float((value - baseline).mean())
        interval = (
            stats.paired_difference(value, baseline, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
            if arm != "random"
            else None
        )
        beyond = None
        if arm == "set" and draws:
            beyond = effect > max(draws) if purpose == "amplify_base" else effect < min(draws)
        table.append(
            {
                "purpose": purpose,
                "model": PURPOSES[purpose],
                "arm": arm,
                "draw": draw,
                "task": task.name,
                "role": task.role,
                "subset": subset,
                "n": len(value),
                "accuracy": float(value.mean()),
                "baseline": float(baseline.mean()),
                "effect": effect,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "steps": float(np.mean([row["manner"] == "steps" for row in answers[arm, draw]])),
                "steps_baseline": float(np.mean([row["manner"] == "steps" for row in before])),
                "parse_failures": float(np.mean([row["parsed"] is None for row in answers[arm, draw]])),
                "random_low": float(low_random),
                "random_high": float(high_random),
                "beyond_random": beyond,
            }
        )
    return table


class Outcome(NamedTuple):
    """Everything the stage publishes."""

    choice: dict[str, Any]
    tuning: list[dict[str, Any]]
    dose: list[dict[str, Any]]
    samples: list[Row]
    effects: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Per purpose and task: accuracy before and after the edit of the set, and whether it beats every random draw."""
        chosen = [row for row in self.effects if row["arm"] == "set" and row["subset"] == "all"]
        kept = ("n", "baseline", "accuracy", "effect", "low", "high", "beyond_random")
        return {
            purpose: {row["task"]: {key: row[key] for key in kept} for row in chosen if row["purpose"] == purpose}
            for purpose in dict.fromkeys(row["purpose"] for row in chosen)
        }


def intervene(
    subjects: dict[str, Subject],
    features: list[int],
    random_sets: list[list[int]],
    tuning_sets: list[list[int]],
    samples: list[Sample],
    params: InterveneParams,
    seed: int,
) -> Outcome:
    """The whole study of one feature set. ``subjects`` by model; a model the crosscoder does not know is left out.

    Settings are tuned on tune-split samples of the tasks used for finding, where dose curves are drawn too, with random
    sets of their own (``tuning_sets``); zeroing in SFT takes over what was chosen for GRPO. Everything else is measured
    on the report split of every task, against ``random_sets``."""
    tasks = subjects["grpo"].examinee.tasks
    tuning_samples = [sample for sample in samples if sample.split == "tune" and tasks[sample.task].role == "find"]
    report_samples = [sample for sample in samples if sample.split == "report"]
    curve_sets = {("set", 0): features} | {("random", i): drawn for i, drawn in enumerate(tuning_sets)}
    purposes = [purpose for purpose, model in PURPOSES.items() if model in subjects]
    passes = sum(len(settings(purpose, params)) for purpose in ("zero_grpo", "amplify_base"))
    passes += len(curve_sets) * len(params.doses) + len(purposes) * (4 + len(random_sets))
    with tqdm(total=passes, desc="intervene", unit="pass") as bar:
        zero, tuning = tune("zero_grpo", subjects["grpo"], features, tuning_samples, params, bar)
        amplify, more = tune("amplify_base", subjects["base"], features, tuning_samples, params, bar)
        dose = dose_curve(subjects["base"], amplify, curve_sets, tuning_samples, params, bar)
        chosen = {"zero_grpo": zero, "zero_sft": zero, "amplify_base": amplify}
        rows: list[Row] = []
        for purpose in purposes:
            rows += run_arms(purpose, subjects[PURPOSES[purpose]], chosen[purpose], features, random_sets, report_samples, bar)
    right = {
        purpose: {row["sample_id"] for row in rows if row["purpose"] == purpose and row["arm"] == "none" and row["correct"]}
        for purpose in purposes
    }
    flipped = right["zero_grpo"] - right["amplify_base"]
    choice = {
        "zero": {"positions": zero.positions},
        "amplify": amplify._asdict(),
        "features": features,
        "random_sets": random_sets,
    }
    return Outcome(choice, tuning + more, dose, rows, effects(rows, flipped, tasks, params, seed))
