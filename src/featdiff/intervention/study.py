"""The intervention study: positions and dose chosen on the tune split, effects measured on the report split.

Three purposes: zeroing the set in GRPO (is it necessary?), zeroing it in SFT (is it GRPO's?), amplifying it in base
(is it sufficient?). Every arm answers the same questions in the same batches, so that an edit that changes nothing
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from featdiff import stats
from featdiff.config.params import InterveneParams
from featdiff.crosscoder.edits import WHOLE_PROMPT, Change, Editor
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention.effects import effects
from featdiff.intervention.purposes import PURPOSES, sign_of
from featdiff.language.decode import PromptCache, text_nats
from featdiff.language.evaluation import Examinee, Row
from featdiff.language.models import load_model, load_tokenizer
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import Sample, TaskInfo, Text

BASELINES = ("mean_difference", "first_component", "random_direction")

SINGLE = ("alone", "without")
"""Arms that edit one feature of the set, or all but one."""
LIKELIHOOD_DRAWS = 5
"""Random sets under which the likelihood of right answers is measured."""
T = TypeVar("T")
FeatureSets = Mapping[str, list[list[int]]]
"""Feature sets by arm, one per draw; ``set`` holds the found one."""


class Setting(NamedTuple):
    """One way to edit."""

    edit: str
    positions: str
    dose: float


class Passes:
    """The passes of a study on a progress bar. Each is done once, also over restarts (``scratch``), so its name must say
    all that tells it from others."""

    def __init__(self, total: int, scratch: Scratch, desc: str) -> None:
        self.scratch, self.bar = scratch, tqdm(total=total, desc=desc, unit="pass")

    def __call__(self, name: str, compute: Callable[[], T]) -> T:
        found = self.scratch.part(name, compute)
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update(1)
        return found


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
    directions: Mapping[str, Tensor],
    params: InterveneParams,
) -> dict[str, Subject]:
    """The models in ``folders`` ready to be edited after ``layer`` blocks; GRPO is every edit's donor."""
    device, tokenizer = process_state().device, load_tokenizer(folders["base"])
    models = {name: load_model(folder).to(device) for name, folder in folders.items()}
    return {
        name: Subject(
            Examinee(model, tokenizer, tasks, batch_size=params.batch_size, max_new_tokens=params.max_new_tokens),
            Editor(crosscoder, name, layer, device, largest_F, donor=models["grpo"], directions=directions),
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


def tuning(samples: list[Sample], tasks: dict[str, TaskInfo]) -> list[Sample]:
    """Those on which settings are chosen: tune split, tasks used for finding."""
    return [sample for sample in samples if sample.split == "tune" and tasks[sample.task].role == "find"]


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
    purpose: str, subject: Subject, features: list[int], samples: list[Sample], params: InterveneParams, passes: Passes
) -> tuple[Setting, list[dict[str, Any]]]:
    """Try every setting on ``samples`` (tune split, tasks used for finding); returns the chosen one and the table of all.

    Mean accuracy decides, lowest for zeroing and highest for amplifying; among the settings within
    ``params.tolerance`` of the best, the first in the order of :func:`settings` is taken, which is the gentlest: a dose
    larger than needed is one at which any set of features does something."""
    sign = sign_of(purpose)
    values: dict[Setting, float] = {}
    table, prompts = [], PromptCache()
    for setting in settings(purpose, params):
        edit = subject.editor.edit(setting.edit, features, setting.positions, setting.dose)
        rows = passes(f"tune {purpose} {'_'.join(map(str, setting))}", partial(answers, subject, edit, samples, prompts))
        values[setting] = sign * mean_accuracy(rows)
        table += [{"purpose": purpose, **setting._asdict(), **line} for line in by_task(rows, subject.examinee.tasks)]
    return gentlest(values, params.tolerance), table


def gentlest(values: Mapping[T, float], tolerance: float) -> T:
    """The first of ``values`` within ``tolerance`` of the best."""
    best = max(values.values())
    return next(tried for tried, value in values.items() if value >= best - tolerance)


def dose_curve(
    subject: Subject,
    chosen: Setting,
    sets: dict[tuple[str, int], list[int]],
    samples: list[Sample],
    params: InterveneParams,
    passes: Passes,
) -> list[dict[str, Any]]:
    """Accuracy over doses at the chosen edit and positions, for the found set and some random sets (tune split)."""
    table, prompts = [], PromptCache()
    for (arm, draw), features in sets.items():
        for dose in params.doses:
            edit = subject.editor.edit(chosen.edit, features, chosen.positions, dose)
            rows = passes(f"dose {dose} {arm} {draw}", partial(answers, subject, edit, samples, prompts))
            table += [{"dose": dose, "arm": arm, "draw": draw, **line} for line in by_task(rows, subject.examinee.tasks)]
    return table


def tune_directions(
    subject: Subject, positions: str, samples: list[Sample], params: InterveneParams, passes: Passes
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The dose of each direction for amplifying in base, chosen as :func:`tune` chooses; and the table of all."""
    chosen, table, prompts = {}, [], PromptCache()
    for name in BASELINES:
        values: dict[float, float] = {}
        for dose in sorted(params.doses):
            edit = subject.editor.direct("push", name, positions, dose)
            rows = passes(f"tune {name} {dose}", partial(answers, subject, edit, samples, prompts))
            values[dose] = mean_accuracy(rows)
            setting = {"edit": name, "positions": positions, "dose": dose}
            table += [{"purpose": "amplify_base", **setting, **line} for line in by_task(rows, subject.examinee.tasks)]
        chosen[name] = gentlest(values, params.tolerance)
    return chosen, table


def answers(subject: Subject, edit: Change | None, samples: list[Sample], shared: PromptCache | None) -> list[Row]:
    """Answers under ``edit``, from ``shared`` prompts where it leaves them as they are."""
    return subject.examinee.answer(samples, edit=edit, shared=prompts_for(edit, shared))


def prompts_for(edit: Change | None, shared: PromptCache | None) -> PromptCache | None:
    """``shared`` where ``edit`` leaves prompts as they are."""
    return None if edit is not None and edit.whole_prompt else shared


def arms(
    purpose: str, subject: Subject, chosen: Setting, sets: FeatureSets, doses: Mapping[str, float]
) -> Iterator[tuple[str, int, Change | None]]:
    """Every arm of one purpose with its edit: unedited, no-op, reconstruction only, the feature sets by arm, and the
    directions that need no dictionary."""
    editor = subject.editor
    yield "none", 0, None
    yield "noop", 0, editor.edit("scale", sets["set"][0], chosen.positions, 1.0)
    yield "reconstruction", 0, editor.edit("reconstruct", None, chosen.positions, 0.0)
    for arm, group in sets.items():
        for draw, features in enumerate(group):
            yield arm, draw, editor.edit(chosen.edit, features, chosen.positions, chosen.dose)
    for name, dose in doses.items():
        kind = "push" if purpose == "amplify_base" else "project"
        yield name, 0, editor.direct(kind, name, chosen.positions, dose)


def run_arms(
    purpose: str,
    subject: Subject,
    chosen: Setting,
    sets: FeatureSets,
    doses: Mapping[str, float],
    samples: list[Sample],
    passes: Passes,
) -> list[Row]:
    """Answers under every arm to all ``samples`` (report split, every task), with the likelihood of the right ones under
    most. Where no arm changes the prompt before its last token, all arms share one reading of the prompts, the unedited
    one too."""
    rows, examinee = [], subject.examinee
    shared = None if chosen.positions in WHOLE_PROMPT else PromptCache()
    for arm, draw, edit in arms(purpose, subject, chosen, sets, doses):
        kept = prompts_for(edit, shared)
        asked = samples if arm not in SINGLE and draw < LIKELIHOOD_DRAWS else []
        nats = passes(f"{purpose} {arm} {draw}, likelihood", partial(examinee.likelihood, asked, edit=edit, shared=kept))
        for row in passes(f"{purpose} {arm} {draw}", partial(examinee.answer, samples, edit=edit, shared=kept)):
            start, rest = nats.get(row["sample_id"], (None, None))
            facts = {"purpose": purpose, "model": PURPOSES[purpose], "arm": arm}
            rows.append(facts | row | {"draw": draw, "start_nats": start, "rest_nats": rest})
    return rows


def collateral(
    purpose: str,
    subject: Subject,
    chosen: Setting,
    sets: FeatureSets,
    doses: Mapping[str, float],
    texts: list[Text],
    params: InterveneParams,
    seed: int,
    passes: Passes,
) -> list[dict[str, Any]]:
    """Perplexity of free text under every arm, which has no answer to start: edited at every token, the worst case.
    Mean over texts of the change in nats per token, with its paired bootstrap interval over texts."""
    examinee, everywhere = subject.examinee, chosen._replace(positions="all")
    pad, size, before = examinee.tokenizer.pad_token_id, examinee.batch_size, np.empty(0)
    written = [text.prompt + text.completion for text in texts]
    ids = examinee.tokenizer(written, truncation=True, max_length=params.collateral_tokens)["input_ids"]
    ids = [text for text in ids if len(text) > 1]
    rows = []
    for arm, draw, edit in arms(purpose, subject, everywhere, sets, doses):
        read = partial(text_nats, examinee.model, ids, pad=pad, batch_size=size, edit=edit)
        nats = np.array(passes(f"{purpose} {arm} {draw}, free text", read))
        before = nats if arm == "none" else before
        found = stats.paired_difference(nats, before, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
        change = {"change": found.value, "low": found.low, "high": found.high, "n": found.n}
        rows.append({"purpose": purpose, "arm": arm, "draw": draw, "perplexity": float(np.exp(nats.mean())), **change})
    return rows


class Outcome(NamedTuple):
    """Everything the stage publishes."""

    choice: dict[str, Any]
    tuning: list[dict[str, Any]]
    dose: list[dict[str, Any]]
    samples: list[Row]
    effects: list[dict[str, Any]]
    collateral: list[dict[str, Any]]
    chosen: dict[str, Setting]
    """Setting by purpose."""

    def summary(self) -> dict[str, Any]:
        """Per purpose and task: accuracy and share of answers step by step before and after the edit of the set, and whether
        it beats every random draw."""
        chosen = [row for row in self.effects if row["arm"] == "set" and row["subset"] == "all"]
        kept = ("n", "baseline", "accuracy", "effect", "low", "high", "beyond_random", "steps_baseline", "steps")
        return {
            purpose: {row["task"]: {key: row[key] for key in kept} for row in chosen if row["purpose"] == purpose}
            for purpose in dict.fromkeys(row["purpose"] for row in chosen)
        }


def intervene(
    subjects: dict[str, Subject],
    sets: FeatureSets,
    tuning_sets: list[list[int]],
    samples: list[Sample],
    texts: list[Text],
    params: InterveneParams,
    seed: int,
    scratch: Scratch,
) -> Outcome:
    """The whole study of one feature set. ``subjects`` by model; a model the crosscoder does not know is left out.

    Settings are tuned on tune-split samples of the tasks used for finding, where dose curves are drawn too, with random
    sets of their own (``tuning_sets``); zeroing in SFT takes over what was chosen for GRPO. Everything else is measured
    on the report split of every task, against the other ``sets`` and the directions, and on free ``texts``."""
    tasks, features = subjects["grpo"].examinee.tasks, sets["set"][0]
    tuning_samples = tuning(samples, tasks)
    report_samples = [sample for sample in samples if sample.split == "report"]
    curve_sets = {("set", 0): features} | {("random", i): members for i, members in enumerate(tuning_sets)}
    purposes = [purpose for purpose, model in PURPOSES.items() if model in subjects]
    arm_sets = {
        purpose: {arm: group for arm, group in sets.items() if purpose != "zero_sft" or arm not in SINGLE}
        for purpose in purposes
    }
    total = sum(len(settings(purpose, params)) for purpose in ("zero_grpo", "amplify_base"))
    total += (len(curve_sets) + len(BASELINES)) * len(params.doses)
    total += 3 * sum(3 + len(BASELINES) + sum(map(len, group.values())) for group in arm_sets.values())
    passes = Passes(total, scratch, "intervene")
    with passes.bar:
        zero, table = tune("zero_grpo", subjects["grpo"], features, tuning_samples, params, passes)
        amplify, more = tune("amplify_base", subjects["base"], features, tuning_samples, params, passes)
        dose = dose_curve(subjects["base"], amplify, curve_sets, tuning_samples, params, passes)
        doses, directions = tune_directions(subjects["base"], amplify.positions, tuning_samples, params, passes)
        chosen = {"zero_grpo": zero, "zero_sft": zero, "amplify_base": amplify}
        rows: list[Row] = []
        spilled: list[dict[str, Any]] = []
        for purpose in purposes:
            subject, setting, group = subjects[PURPOSES[purpose]], chosen[purpose], arm_sets[purpose]
            rows += run_arms(purpose, subject, setting, group, doses, report_samples, passes)
            spilled += collateral(purpose, subject, setting, group, doses, texts, params, seed, passes)
    right = {
        purpose: {row["sample_id"] for row in rows if row["purpose"] == purpose and row["arm"] == "none" and row["correct"]}
        for purpose in purposes
    }
    flipped = right["zero_grpo"] - right["amplify_base"]
    choice = {
        "zero": {"positions": zero.positions},
        "amplify": amplify._asdict(),
        "directions": doses,
        "features": features,
        "sets": {arm: group for arm, group in sets.items() if arm not in SINGLE},
    }
    measured = effects(rows, flipped, tasks, params, seed)
    return Outcome(choice, table + more + directions, dose, rows, measured, spilled, chosen)
