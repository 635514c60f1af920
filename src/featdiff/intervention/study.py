"""The intervention study: positions and doses chosen on the tune split, effects measured on the report split.

What is edited, and why: featdiff.intervention.purposes; what it is held against: featdiff.intervention.controls. Every control
answers the same questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featdiff import stats
from featdiff.artifacts.artifact import write_json
from featdiff.artifacts.tables import COLLATERAL, EDITED_SAMPLES, EFFECTS, OUTCOMES, SEARCH, SENSITIVITY
from featdiff.config.sets import InterveneParams
from featdiff.crosscoder.edits import Change
from featdiff.intervention.controls import Control, Draws
from featdiff.intervention.effects import Marks, effects, marks, questions_under
from featdiff.intervention.models import EditableModel, EditableModels
from featdiff.intervention.purposes import DRAWN, RIVALS, SET, SINGLE, Purpose
from featdiff.intervention.search import Job, Once, Searched, on_a_bar, search
from featdiff.language.decode import TOGETHER, text_nats
from featdiff.language.evaluation import Row
from featdiff.tasks.task import Sample, TaskInfo, Text, load_samples, load_tasks, load_texts

FEW = 5
"""Random sets and directions whose effect on likelihoods and on free text is measured."""


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
        """Those on which effects are measured: report split, but for tasks that are reported without edits."""
        return [sample for sample in self.samples if sample.split == "report" and self.tasks[sample.task].edited]


Edits = dict[tuple[str, int], Change | None]
"""What one model answers under, by control and number."""


def edits(model: EditableModel, found: Sequence[int], searched: Searched, controls: Sequence[Control]) -> Edits:
    """Unedited, no-op, reconstruction only, and ``controls`` each under the setting chosen for it."""
    setting, editor = searched.setting, model.editor
    made: Edits = {
        ("none", 0): None,
        ("noop", 0): editor.edit(setting.edit, list(found), setting.positions, 0.0),
        ("reconstruction", 0): editor.edit("reconstruct", None, setting.positions, 1.0),
    }
    return made | {(each.name, each.number): each.change(editor, found, searched.chosen[each.label]) for each in controls}


def fewer(made: Edits, draws: int) -> Edits:
    """``made`` with the first ``draws`` of every kind of draw, and without parts of the set."""
    seen: Counter[str] = Counter()
    kept: Edits = {}
    for (control, number), edit in made.items():
        seen[control] += 1
        if control not in SINGLE and (control not in DRAWN or seen[control] <= draws):
            kept[control, number] = edit
    return kept


def chunks(made: Edits) -> Iterator[tuple[str, Edits]]:
    """``made`` in parts, each with a name: what a kill costs."""
    items = list(made.items())
    for low in range(0, len(items), TOGETHER):
        part = dict(items[low : low + TOGETHER])
        yield ", ".join(f"{control} {number}" for control, number in part), part


@dataclass(frozen=True)
class Answered:
    """What one model answered under every control."""

    marks: dict[tuple[str, int], Marks]
    rows: list[Row]
    """Whole answers without an edit, under an edit of dose 0, under the set and its :data:`RIVALS`."""
    nats: dict[tuple[str, int], dict[str, list[float]]]


def answer(
    model: EditableModel,
    made: Edits,
    samples: list[Sample],
    toward: Mapping[str, Row],
    params: InterveneParams,
    once: Once,
) -> Answered:
    """Answers to ``samples`` (report split, every task) under ``made``, marked beside those of ``toward``, and the likelihood
    of right answers under a few."""
    name, prompts = model.purpose.name, model.prompts(samples)
    found, kept = dict[tuple[str, int], Marks](), list[Row]()

    def compute(part: Edits, questions: list[Sample]) -> list[Any]:
        answered = model.evaluator.answer_under(list(part.values()), questions, shared=prompts)
        whole = [
            rows if control in ("none", "noop", SET, *RIVALS) else None
            for (control, _), rows in zip(part, answered, strict=True)
        ]
        return [[marks(rows, toward) for rows in answered], whole]

    parts = [
        (label, part, questions_under(next(iter(part))[0], samples, params))
        for drawn in (False, True)
        for label, part in chunks({key: edit for key, edit in made.items() if (key[0] in DRAWN) is drawn})
    ]
    few = fewer(made, FEW)
    read = [
        partial(
            model.evaluator.likelihood,
            questions_under(control, samples, params),
            edit=edit,
            shared=None if edit is not None and edit.whole_prompt else prompts,
        )
        for (control, _), edit in few.items()
    ]
    jobs: list[Job[Any]] = [(f"{name} {label}", partial(compute, part, asked)) for label, part, asked in parts]
    jobs += [(f"{name} {control} {number}, likelihood", job) for (control, number), job in zip(few, read, strict=True)]
    answered = once(jobs)
    for (_, part, _), (marked, whole) in zip(parts, answered, strict=False):
        for (control, number), each, rows in zip(part, marked, whole, strict=True):
            found[control, number] = each
            facts = {"purpose": name, "model": model.purpose.model, "control": control, "set_draw": number}
            kept += [facts | row for row in rows or []]
    nats = {
        key: {sample_id: list(value) for sample_id, value in each.items()}
        for key, each in zip(few, answered[len(parts) :], strict=True)
    }
    return Answered(found, kept, nats)


def reading(model: EditableModel, made: Edits, texts: list[Text], params: InterveneParams) -> list[Job[Any]]:
    """Jobs that read ``texts`` under each of ``made``: nats of each text (:func:`featdiff.language.decode.text_nats`)."""
    evaluator = model.evaluator
    pad, size = evaluator.tokenizer.pad_token_id, evaluator.batch_size
    written = [text.prompt + text.completion for text in texts]
    ids = evaluator.tokenizer(written, truncation=True, max_length=params.collateral_tokens)["input_ids"]
    ids = [text for text in ids if len(text) > 1]
    return [
        (
            f"{model.purpose.name} {control} {number}, free text",
            partial(text_nats, evaluator.model, ids, pad=pad, batch_size=size, edit=edit),
        )
        for (control, number), edit in made.items()
    ]


def collateral(purpose: Purpose, made: Edits, read: list[list[float]], params: InterveneParams, seed: int) -> list[Row]:
    """Perplexity of free text under ``made``, edits at every token (free text has no prompt), the worst case. Mean over texts
    of the change in nats per token, with its paired bootstrap interval over texts. ``read`` is what :func:`reading` gave."""
    rows, before = list[Row](), np.empty(0)
    for (control, number), found in zip(made, read, strict=True):
        nats = np.array(found)
        before = nats if control == "none" else before
        paired = stats.paired_difference(nats, before, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
        facts = {"purpose": purpose.name, "model": purpose.model, "control": control, "set_draw": number}
        change = {"change": paired.value, "low": paired.low, "high": paired.high, "n": paired.n}
        rows.append(facts | {"perplexity": float(np.exp(nats.mean()))} | change)
    return rows


@dataclass(frozen=True)
class InterventionResult:
    """Everything the stage publishes but the sensitivity."""

    choice: dict[str, Any]
    search: list[dict[str, Any]]
    samples: list[Row]
    effects: list[dict[str, Any]]
    collateral: list[dict[str, Any]]
    outcomes: dict[str, list[Any]]
    """Whether each answer to the report split was right, under every control: columns of :data:`OUTCOMES`."""
    searched: dict[str, Searched]
    """By purpose, of the one for which settings are chosen."""

    def save(self, out: Path, *, sensitivity: list[dict[str, Any]]) -> None:
        """Write ``choice.json``, every table and the table ``sensitivity`` into ``out``."""
        write_json(out / "choice.json", self.choice)
        SEARCH.write(out, self.search)
        EDITED_SAMPLES.write(out, self.samples)
        EFFECTS.write(out, self.effects)
        COLLATERAL.write(out, self.collateral)
        SENSITIVITY.write(out, sensitivity)
        OUTCOMES.write_columns(out, self.outcomes)

    def summary(self) -> dict[str, Any]:
        """Per purpose and task: accuracy and share of answers step by step before and after the edit of the set, and whether
        it beats every random set."""
        chosen = [row for row in self.effects if row["control"] == SET and row["subset"] == "all"]
        kept = (
            "n",
            "baseline",
            "accuracy",
            "effect",
            "low",
            "high",
            "beyond_random",
            "steps_baseline",
            "steps",
            "alike",
            "unread",
        )
        return {
            purpose: {row["task"]: {key: row[key] for key in kept} for row in chosen if row["purpose"] == purpose}
            for purpose in dict.fromkeys(row["purpose"] for row in chosen)
        }


def intervene(
    models: EditableModels,
    side: str,
    draws: Draws,
    found: Sequence[int],
    questions: Questions,
    params: InterveneParams,
    seed: int,
    once: Once,
) -> InterventionResult:
    """One ``side`` of the study of the feature set ``found``.

    Settings are chosen for the tuned (``remove``) or the original model (``amplify``) on the tune split of the tasks used for
    finding, for the set and for every control alike. The contrast model and the repeats of the tuned model take over what was
    chosen for taking the set away from the tuned one, with fewer draws: nothing is chosen on them. Everything else is measured
    on the report split of every task, and on free text."""
    samples, tasks = questions.report, questions.tasks
    with on_a_bar(once, f"intervene {side}") as once:
        chosen, *_ = models.asked(side)
        searched = search(models.open(chosen), draws, found, questions.tune, params, once)
        both = {each.purpose.model: each.evaluator for each in (models.tuned, models.original)}
        plain = once([(f"{side}: {name} unedited", partial(asked.answer, samples)) for name, asked in both.items()])
        unedited = {name: {row["sample_id"]: row for row in given} for name, given in zip(both, plain, strict=True)}
        right = {model: {key for key, row in rows.items() if row["correct"]} for model, rows in unedited.items()}
        flipped = right[models.tuned.purpose.model] - right[models.original.purpose.model]
        rows, table, spilled = list[Row](), list[dict[str, Any]](), list[dict[str, Any]]()
        columns: tuple[list[Any], ...] = tuple([] for _ in OUTCOMES.columns)
        for purpose in models.asked(side):
            model, toward = models.open(purpose), unedited[purpose.toward]
            made = edits(model, found, searched, searched.controls)
            made = made if purpose.chosen else fewer(made, params.other_draws)
            answered = answer(model, made, samples, toward, params, once)
            rows += answered.rows
            for (control, number), marked in answered.marks.items():
                ids = [sample.sample_id for sample in questions_under(control, samples, params)]
                n = len(ids)
                facts = ([purpose.name] * n, [control] * n, [number] * n, ids)
                each: tuple[list[Any], ...] = (*facts, marked["correct"])
                for column, values in zip(columns, each, strict=True):
                    column.extend(values)
            unread = _unread(toward, tasks)
            # Counted by one rank, while others read.
            facing = answered.marks, answered.nats, samples, flipped, unread, tasks
            counted, whole = partial(effects, purpose, *facing, params, seed), _everywhere(made)
            jobs: list[Job[Any]] = [(f"{purpose.name} effects", counted), *reading(model, whole, questions.texts, params)]
            lines, *read = once(jobs)
            table += lines
            spilled += collateral(purpose, whole, read, params, seed)
    return InterventionResult(
        choice={
            "features": list(found),
            "controls": {chosen.name: _settings(searched)},
        },
        search=searched.rows,
        samples=rows,
        effects=table,
        collateral=spilled,
        outcomes=dict(zip(OUTCOMES.columns, columns, strict=True)),
        searched={chosen.name: searched},
    )


def _everywhere(made: Edits) -> Edits:
    """A few of ``made``, at every token."""
    kept = fewer(made, FEW)
    for edit in kept.values():
        if edit is not None:
            edit.positions = "all"
    return kept


def _unread(rows: Mapping[str, Row], tasks: Mapping[str, TaskInfo]) -> dict[str, float]:
    return {
        name: float(np.mean([row["parsed"] is None for row in rows.values() if row["task"] == name]))
        for name in tasks
        if any(row["task"] == name for row in rows.values())
    }


def _settings(searched: Searched) -> list[dict[str, Any]]:
    """Features and chosen setting of every control."""
    return [
        {"control": each.name, "set_draw": each.number, "features": list(each.features)} | searched.chosen[each.label]._asdict()
        for each in searched.controls
    ]
