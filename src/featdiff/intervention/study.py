"""The intervention study: positions and dose chosen on the tune split, effects measured on the report split.

What is edited, and why: featdiff.intervention.purposes. Every control answers the same questions in the same batches, so that
an edit that changes nothing gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from featdiff import stats
from featdiff.artifacts.artifact import write_json
from featdiff.config.params import InterveneParams
from featdiff.crosscoder.edits import WHOLE_PROMPT, Change
from featdiff.intervention.controls import SINGLE, FeatureSets
from featdiff.intervention.effects import effects
from featdiff.intervention.models import EditableModel, EditableModels
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, ZERO_TUNED, Purpose
from featdiff.language.decode import PromptCache, text_nats
from featdiff.language.evaluation import Row
from featdiff.tasks.task import Sample, TaskInfo, Text, load_samples, load_tasks, load_texts, write_rows

DIRECTIONS = ("mean_difference", "first_component", "random_direction")
"""Directions of the residual stream that need no dictionary."""
LIKELIHOOD_DRAWS = 5
"""Random sets under which the likelihood of right answers is measured."""
T = TypeVar("T")


class Setting(NamedTuple):
    """One way to edit."""

    edit: str
    positions: str
    dose: float


@dataclass(frozen=True)
class Questions:
    """What edited models are asked."""

    tasks: dict[str, TaskInfo]
    samples: list[Sample]
    texts: list[Text]
    """Free text."""

    @classmethod
    def load(cls, data: Path, texts: int) -> Questions:
        """From the artifact ``data``, with the last ``texts`` of its corpus."""
        return cls(load_tasks(data), load_samples(data, "eval"), load_texts(data, "corpus")[-texts:])

    @property
    def tune(self) -> list[Sample]:
        """Those on which settings are chosen: tune split, tasks used for finding."""
        return [sample for sample in self.samples if sample.split == "tune" and self.tasks[sample.task].role == "find"]

    @property
    def report(self) -> list[Sample]:
        """Those on which effects are measured."""
        return [sample for sample in self.samples if sample.split == "report"]


class Once(Protocol):
    """Computes a JSON value, or takes it from a run that was killed: the name says all that tells it from other values."""

    def __call__(self, name: str, compute: Callable[[], T], /) -> T: ...


@contextmanager
def on_a_bar(once: Once, total: int, desc: str) -> Iterator[Once]:
    """``once`` with a progress bar of ``total`` passes."""
    with tqdm(total=total, desc=desc, unit="pass") as bar:

        def counted(name: str, compute: Callable[[], T], /) -> T:
            value = once(name, compute)
            bar.set_postfix_str(name, refresh=False)
            bar.update(1)
            return value

        yield counted


def settings(purpose: Purpose, params: InterveneParams) -> list[Setting]:
    """What is tried on the tune split, gentlest first."""
    if purpose.sign < 0:
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
    model: EditableModel, features: list[int], samples: list[Sample], params: InterveneParams, once: Once
) -> tuple[Setting, list[dict[str, Any]]]:
    """Try every setting on ``samples`` (tune split, tasks used for finding); returns the chosen one and the table of all.

    Mean accuracy decides, lowest for zeroing and highest for amplifying; among the settings within
    ``params.tolerance`` of the best, the first in the order of :func:`settings` is taken, which is the gentlest: a dose
    larger than needed is one at which any set of features does something."""
    name, values, prompts = model.purpose.name, dict[Setting, float](), PromptCache()
    table = []
    for setting in settings(model.purpose, params):
        edit = model.editor.edit(setting.edit, features, setting.positions, setting.dose)
        rows = once(f"tune {name} {'_'.join(map(str, setting))}", partial(answers, model, edit, samples, prompts))
        values[setting] = model.purpose.sign * mean_accuracy(rows)
        table += [{"purpose": name, **setting._asdict(), **line} for line in by_task(rows, model.evaluator.tasks)]
    return gentlest(values, params.tolerance), table


def gentlest(values: Mapping[T, float], tolerance: float) -> T:
    """The first of ``values`` within ``tolerance`` of the best."""
    best = max(values.values())
    return next(tried for tried, value in values.items() if value >= best - tolerance)


def dose_curve(
    model: EditableModel,
    chosen: Setting,
    sets: FeatureSets,
    samples: list[Sample],
    params: InterveneParams,
    once: Once,
) -> list[dict[str, Any]]:
    """Accuracy over doses at the chosen edit and positions, for the found set and the random ones of the tune split."""
    table, prompts = [], PromptCache()
    for control, group in (("set", [sets.found]), ("random", sets.tuning)):
        for number, features in enumerate(group):
            for dose in params.doses:
                edit = model.editor.edit(chosen.edit, features, chosen.positions, dose)
                rows = once(f"dose {dose} {control} {number}", partial(answers, model, edit, samples, prompts))
                facts = {"dose": dose, "control": control, "set_draw": number}
                table += [facts | line for line in by_task(rows, model.evaluator.tasks)]
    return table


def tune_directions(
    model: EditableModel, positions: str, samples: list[Sample], params: InterveneParams, once: Once
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The dose of each direction for amplifying, chosen as :func:`tune` chooses; and the table of all."""
    chosen, table, prompts = {}, [], PromptCache()
    for name in DIRECTIONS:
        values: dict[float, float] = {}
        for dose in sorted(params.doses):
            edit = model.editor.direct("push", name, positions, dose)
            rows = once(f"tune {name} {dose}", partial(answers, model, edit, samples, prompts))
            values[dose] = mean_accuracy(rows)
            facts = {"purpose": model.purpose.name, "edit": name, "positions": positions, "dose": dose}
            table += [facts | line for line in by_task(rows, model.evaluator.tasks)]
        chosen[name] = gentlest(values, params.tolerance)
    return chosen, table


def answers(model: EditableModel, edit: Change | None, samples: list[Sample], shared: PromptCache | None) -> list[Row]:
    """Answers under ``edit``, from ``shared`` prompts where it leaves them as they are."""
    return model.evaluator.answer(samples, edit=edit, shared=prompts_for(edit, shared))


def prompts_for(edit: Change | None, shared: PromptCache | None) -> PromptCache | None:
    """``shared`` where ``edit`` leaves prompts as they are."""
    return None if edit is not None and edit.whole_prompt else shared


def controls(
    model: EditableModel, chosen: Setting, sets: Mapping[str, list[list[int]]], doses: Mapping[str, float]
) -> Iterator[tuple[str, int, Change | None]]:
    """Everything that one model answers under, by name and number of the set: unedited, no-op, reconstruction only, the
    feature ``sets``, and the directions that need no dictionary."""
    editor = model.editor
    yield "none", 0, None
    yield "noop", 0, editor.edit("scale", sets["set"][0], chosen.positions, 1.0)
    yield "reconstruction", 0, editor.edit("reconstruct", None, chosen.positions, 0.0)
    for control, group in sets.items():
        for number, features in enumerate(group):
            yield control, number, editor.edit(chosen.edit, features, chosen.positions, chosen.dose)
    for name, dose in doses.items():
        yield name, 0, editor.direct("push" if model.purpose.sign > 0 else "project", name, chosen.positions, dose)


def run_controls(
    model: EditableModel,
    chosen: Setting,
    sets: Mapping[str, list[list[int]]],
    doses: Mapping[str, float],
    samples: list[Sample],
    once: Once,
) -> list[Row]:
    """Answers under every control to all ``samples`` (report split, every task), with the likelihood of the right ones under
    most. Where no edit changes the prompt before its last token, all share one reading of the prompts, the unedited one
    too."""
    rows, purpose, evaluator = [], model.purpose, model.evaluator
    shared = None if chosen.positions in WHOLE_PROMPT else PromptCache()
    for control, number, edit in controls(model, chosen, sets, doses):
        kept, name = prompts_for(edit, shared), f"{purpose.name} {control} {number}"
        asked = samples if control not in SINGLE and number < LIKELIHOOD_DRAWS else []
        nats = once(f"{name}, likelihood", partial(evaluator.likelihood, asked, edit=edit, shared=kept))
        facts = {"purpose": purpose.name, "model": purpose.model, "control": control, "set_draw": number}
        for row in once(name, partial(evaluator.answer, samples, edit=edit, shared=kept)):
            start, rest = nats.get(row["sample_id"], (None, None))
            rows.append(facts | row | {"start_nats": start, "rest_nats": rest})
    return rows


def collateral(
    model: EditableModel,
    chosen: Setting,
    sets: Mapping[str, list[list[int]]],
    doses: Mapping[str, float],
    texts: list[Text],
    params: InterveneParams,
    seed: int,
    once: Once,
) -> list[dict[str, Any]]:
    """Perplexity of free text under every control. It has no answer to start, so the edit is made at every token, the worst
    case. Mean over texts of the change in nats per token, with its paired bootstrap interval over texts."""
    purpose, evaluator, everywhere = model.purpose, model.evaluator, chosen._replace(positions="all")
    pad, size, before = evaluator.tokenizer.pad_token_id, evaluator.batch_size, np.empty(0)
    written = [text.prompt + text.completion for text in texts]
    ids = evaluator.tokenizer(written, truncation=True, max_length=params.collateral_tokens)["input_ids"]
    ids = [text for text in ids if len(text) > 1]
    rows = []
    for control, number, edit in controls(model, everywhere, sets, doses):
        read = partial(text_nats, evaluator.model, ids, pad=pad, batch_size=size, edit=edit)
        nats = np.array(once(f"{purpose.name} {control} {number}, free text", read))
        before = nats if control == "none" else before
        found = stats.paired_difference(nats, before, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
        facts = {"purpose": purpose.name, "model": purpose.model, "control": control, "set_draw": number}
        change = {"change": found.value, "low": found.low, "high": found.high, "n": found.n}
        rows.append(facts | {"perplexity": float(np.exp(nats.mean()))} | change)
    return rows


@dataclass(frozen=True)
class InterventionResult:
    """Everything the stage publishes but the sensitivity."""

    choice: dict[str, Any]
    tuning: list[dict[str, Any]]
    dose: list[dict[str, Any]]
    samples: list[Row]
    effects: list[dict[str, Any]]
    collateral: list[dict[str, Any]]
    chosen: dict[str, Setting]
    """Setting by purpose, of the two for which one is chosen."""

    def save(self, out: Path, **more: list[dict[str, Any]]) -> None:
        """Write ``choice.json``, every table and ``more`` tables by name into ``out``."""
        write_json(out / "choice.json", self.choice)
        tables = {name: getattr(self, name) for name in ("tuning", "dose", "samples", "effects", "collateral")}
        for name, rows in (tables | more).items():
            write_rows(out / f"{name}.parquet", rows)

    def summary(self) -> dict[str, Any]:
        """Per purpose and task: accuracy and share of answers step by step before and after the edit of the set, and whether
        it beats every random set."""
        chosen = [row for row in self.effects if row["control"] == "set" and row["subset"] == "all"]
        kept = ("n", "baseline", "accuracy", "effect", "low", "high", "beyond_random", "steps_baseline", "steps")
        return {
            purpose: {row["task"]: {key: row[key] for key in kept} for row in chosen if row["purpose"] == purpose}
            for purpose in dict.fromkeys(row["purpose"] for row in chosen)
        }


def intervene(
    models: EditableModels, sets: FeatureSets, questions: Questions, params: InterveneParams, seed: int, once: Once
) -> InterventionResult:
    """The whole study of one feature set.

    Settings are chosen for the tuned and the original model on the tune split of the tasks used for finding, where dose
    curves are drawn too. The contrast model and the repeats of the tuned model take over what was chosen for zeroing in the
    tuned one: nothing is chosen on them. Everything else is measured on the report split of every task, under every control,
    and on free text."""
    asked = {purpose: sets.by_control if purpose.chosen else sets.whole for purpose in models.purposes}
    total = sum(len(settings(model.purpose, params)) for model in (models.tuned, models.original))
    total += (1 + len(sets.tuning) + len(DIRECTIONS)) * len(params.doses)
    total += 3 * sum(3 + len(DIRECTIONS) + sum(map(len, group.values())) for group in asked.values())
    with on_a_bar(once, total, "intervene") as once:
        zero, table = tune(models.tuned, sets.found, questions.tune, params, once)
        amplify, more = tune(models.original, sets.found, questions.tune, params, once)
        dose = dose_curve(models.original, amplify, sets, questions.tune, params, once)
        doses, directions = tune_directions(models.original, amplify.positions, questions.tune, params, once)

        def measure(purpose: Purpose) -> tuple[list[Row], list[dict[str, Any]]]:
            model, how = models.open(purpose), (amplify if purpose.sign > 0 else zero, asked[purpose], doses)
            rows = run_controls(model, *how, questions.report, once)
            return rows, collateral(model, *how, questions.texts, params, seed, once)

        measured = [measure(purpose) for purpose in models.purposes]
    rows = [row for answered, _ in measured for row in answered]
    right = {
        purpose: {row["sample_id"] for row in rows if row["purpose"] == purpose and row["control"] == "none" and row["correct"]}
        for purpose in (ZERO_TUNED, AMPLIFY_ORIGINAL)
    }
    return InterventionResult(
        choice={
            "zero": {"positions": zero.positions},
            "amplify": amplify._asdict(),
            "directions": doses,
            "features": sets.found,
            "sets": sets.whole,
        },
        tuning=table + more + directions,
        dose=dose,
        samples=rows,
        effects=effects(rows, right[ZERO_TUNED] - right[AMPLIFY_ORIGINAL], questions.tasks, params, seed),
        collateral=[row for _, spilled in measured for row in spilled],
        chosen={ZERO_TUNED: zero, AMPLIFY_ORIGINAL: amplify},
    )
