"""Would another choice have given another answer? Other readouts and positions to find the set, other edits and positions
to test it, each against matched random sets, on the tune split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from featdiff.crosscoder.edits import Change
from featdiff.intervention.models import EditableModel, EditableModels
from featdiff.intervention.purposes import sign_of
from featdiff.intervention.study import DIRECTIONS, InterventionResult, Once, Setting, answers, mean_accuracy, on_a_bar
from featdiff.language.decode import PromptCache
from featdiff.tasks.task import Sample


class Case(NamedTuple):
    """One way in which the study could have been done."""

    purpose: str
    varied: str
    """``found by`` (readout and positions of the search) or ``edited by`` (edit and positions)."""
    choice: str
    features: list[int]
    setting: Setting


def cases(result: InterventionResult, variants: list[dict[str, Any]]) -> list[Case]:
    """The set of every readout and position under the chosen settings, and the set itself under every edit and position
    at the dose that was best for them on the tune split."""
    planned = []
    for purpose, chosen in result.chosen.items():
        for variant in variants:
            choice = f"{variant['readout']} at {variant['positions']}"
            planned.append(Case(purpose, "found by", choice, variant["features"], chosen))
        means: dict[tuple[str, str], dict[float, list[float]]] = {}
        for row in result.tuning:
            if row["purpose"] == purpose and row["edit"] not in DIRECTIONS:
                means.setdefault((row["edit"], row["positions"]), {}).setdefault(row["dose"], []).append(row["accuracy"])
        for (edit, positions), doses in means.items():
            dose = max(doses, key=lambda dose: sign_of(purpose) * float(np.mean(doses[dose])))
            setting = Setting(edit, positions, dose)
            planned.append(Case(purpose, "edited by", f"{edit} at {positions}", result.choice["features"], setting))
    return planned


def sensitivity(
    models: EditableModels,
    result: InterventionResult,
    variants: list[dict[str, Any]],
    match: Callable[[list[int], int], list[list[int]]],
    samples: list[Sample],
    draws: int,
    once: Once,
) -> list[dict[str, Any]]:
    """One row per case: ``effect`` is the change in mean accuracy on ``samples`` (tune split, tasks used for finding),
    ``random`` the largest change in the claimed direction that any of ``draws`` matched sets (``match`` draws them) makes;
    both None where a search found nothing."""
    edited = {model.purpose.name: (model, PromptCache()) for model in (models.tuned, models.original)}
    planned, rows = cases(result, variants), []
    total = len(edited) + sum((1 + draws) * bool(case.features) for case in planned)
    with on_a_bar(once, total, "sensitivity") as once:

        def accuracy(model: EditableModel, prompts: PromptCache, name: str, edit: Change | None) -> float:
            return mean_accuracy(once(f"sensitivity {name}", partial(answers, model, edit, samples, prompts)))

        before = {name: accuracy(*model, name, None) for name, model in edited.items()}
        for case in planned:
            model, prompts = edited[case.purpose]
            sign, label = model.purpose.sign, f"{case.purpose} {case.varied} {case.choice}"
            sets = [case.features, *match(case.features, draws)] if case.features else []
            edits = [model.editor.edit(case.setting.edit, features, *case.setting[1:]) for features in sets]
            changes = [
                accuracy(model, prompts, f"{label} {number}", edit) - before[case.purpose] for number, edit in enumerate(edits)
            ]
            facts = {"purpose": case.purpose, "varied": case.varied, "choice": case.choice, "size": len(case.features)}
            largest = sign * max(sign * change for change in changes[1:]) if sets else None
            rows.append(facts | case.setting._asdict() | {"effect": changes[0] if sets else None, "random": largest})
    return rows
