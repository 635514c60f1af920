"""Would another choice have given another answer? Other readouts and positions to find the set, other seeds of the crosscoder,
other edits and positions to test it, each against random sets made as long, on the tune split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from featdiff import stats
from featdiff.crosscoder.edits import Editor
from featdiff.intervention.controls import Control, Setting, lengths, random_sets
from featdiff.intervention.models import EditableModel, EditableModels
from featdiff.intervention.purposes import RANDOM, SET
from featdiff.intervention.search import Job, Line, Once, asked, mean_accuracy, on_a_bar
from featdiff.intervention.study import InterventionResult
from featdiff.language.session import PromptCache
from featdiff.tasks.task import Sample

DRAWS = 5
"""Random sets per case."""


class Case(NamedTuple):
    """One way in which the study could have been done."""

    purpose: str
    varied: str
    """``found by`` (readout and positions of the search), ``found in`` (another seed's crosscoder) or ``edited by`` (edit and
    positions)."""
    choice: str
    features: list[int]
    setting: Setting
    fit: str = ""
    """Of ``found in``."""


@dataclass(frozen=True)
class Otherwise:
    """Sets that were found otherwise."""

    variants: Sequence[dict[str, Any]]
    """By readout and positions."""
    sets: Mapping[str, list[int]]
    """By the name of another crosscoder."""
    editors: Mapping[str, Editor]
    """By the same names: what makes edits in these crosscoders; model and donor are not read."""


def cases(result: InterventionResult, otherwise: Otherwise) -> list[Case]:
    """The set of every readout and position, and that of every other crosscoder, under the chosen setting; and the set itself
    under every edit and position at the dose that was best for them on the tune split."""
    planned = []
    for purpose, searched in result.searched.items():
        chosen = searched.setting
        for variant in otherwise.variants:
            choice = f"{variant['readout']} at {variant['positions']}"
            planned.append(Case(purpose, "found by", choice, variant["features"], chosen))
        planned += [Case(purpose, "found in", fit, found, chosen, fit) for fit, found in otherwise.sets.items()]
        for edit, positions in dict.fromkeys(setting[:2] for setting in searched.effects):
            tried = [setting for setting in searched.effects if setting[:2] == (edit, positions)]
            best = max(sorted(tried), key=searched.effects.__getitem__)
            planned.append(Case(purpose, "edited by", f"{edit} at {positions}", result.choice["features"], best))
    return planned


def sensitivity(
    models: EditableModels, result: InterventionResult, otherwise: Otherwise, samples: list[Sample], seed: int, once: Once
) -> list[dict[str, Any]]:
    """One row per case: ``effect`` is the change in mean accuracy on ``samples`` (tune split, tasks used for finding),
    ``random`` the largest change in the claimed direction that any of :data:`DRAWS` random sets makes that are as long, and
    ``median`` their median change; None where a search found nothing or too few other features act."""
    opened = [models.open(models.named(name)) for name in result.searched]
    edited = {model.purpose.name: (model, model.prompts(samples)) for model in opened}
    planned, rows = cases(result, otherwise), []
    jobs: list[Job[list[list[Line]]]] = [
        (f"sensitivity {name} unedited", partial(asked, model, [None], samples, prompts))
        for name, (model, prompts) in edited.items()
    ]
    for case in planned:
        if case.features:
            model, prompts = edited[case.purpose]
            if case.fit:
                model = replace(model, editor=otherwise.editors[case.fit].like(model.editor))
            name = f"sensitivity {case.purpose} {case.varied} {case.choice}"
            jobs.append((name, partial(_answers, model, case, samples, prompts, seed)))
    with on_a_bar(once, "sensitivity", len(jobs)) as once:
        answered = iter(once(jobs))
    before = {name: mean_accuracy(*next(answered)) for name in edited}
    for case in planned:
        changes = [mean_accuracy(lines) - before[case.purpose] for lines in next(answered)] if case.features else []
        sign = edited[case.purpose][0].purpose.sign
        facts = {"purpose": case.purpose, "varied": case.varied, "choice": case.choice, "size": len(case.features)}
        chance = sorted(changes[1:], key=lambda change: sign * change)
        found = {
            "effect": changes[0] if changes else None,
            "random": chance[-1] if chance else None,
            "median": chance[len(chance) // 2] if chance else None,
        }
        rows.append(facts | case.setting._asdict() | found)
    return rows


def _answers(model: EditableModel, case: Case, samples: list[Sample], prompts: PromptCache, seed: int) -> list[list[Line]]:
    """Under the set of ``case`` and under its random sets."""
    length_QF = lengths(model.editor, case.setting.edit, *model.streams(samples))
    drawn = random_sets(case.features, length_QF, DRAWS, stats.stream(seed, 2))
    controls = [Control(SET, 0, tuple(case.features)), *(Control(RANDOM, i, members) for i, members in enumerate(drawn))]
    return asked(model, [each.change(model.editor, case.features, case.setting) for each in controls], samples, prompts)
