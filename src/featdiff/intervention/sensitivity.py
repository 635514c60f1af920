"""Would another choice have given another answer? Other readouts and positions to find the set, other edits and positions
to test it, each against matched random sets, on the tune split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from featdiff.crosscoder.edits import Change
from featdiff.intervention.purposes import PURPOSES, sign_of
from featdiff.intervention.study import BASELINES, Outcome, Passes, Setting, Subject, answers, mean_accuracy, tuning
from featdiff.language.decode import PromptCache
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample


class Case(NamedTuple):
    """One way in which the study could have been done."""

    purpose: str
    varied: str
    """``found by`` (readout and positions of the search) or ``edited by`` (edit and positions)."""
    choice: str
    features: list[int]
    setting: Setting


def cases(outcome: Outcome, variants: list[dict[str, Any]]) -> list[Case]:
    """The set of every readout and position under the chosen settings, and the set itself under every edit and position
    at the dose that was best for them on the tune split."""
    found = []
    for purpose in ("zero_grpo", "amplify_base"):
        for variant in variants:
            choice = f"{variant['readout']} at {variant['positions']}"
            found.append(Case(purpose, "found by", choice, variant["features"], outcome.chosen[purpose]))
        means: dict[tuple[str, str], dict[float, list[float]]] = {}
        for row in outcome.tuning:
            if row["purpose"] == purpose and row["edit"] not in BASELINES:
                means.setdefault((row["edit"], row["positions"]), {}).setdefault(row["dose"], []).append(row["accuracy"])
        for (edit, positions), doses in means.items():
            dose = max(doses, key=lambda dose: sign_of(purpose) * float(np.mean(doses[dose])))
            found.append(
                Case(purpose, "edited by", f"{edit} at {positions}", outcome.choice["features"], Setting(edit, positions, dose))
            )
    return found


def sensitivity(
    subjects: dict[str, Subject],
    outcome: Outcome,
    variants: list[dict[str, Any]],
    match: Callable[[list[int], int], list[list[int]]],
    samples: list[Sample],
    draws: int,
    scratch: Scratch,
) -> list[dict[str, Any]]:
    """One row per case: ``effect`` is the change in mean accuracy, ``random`` the largest change in the claimed direction
    that any of ``draws`` matched sets (``match`` draws them) makes; both None where a search found nothing."""
    asked, prompts = tuning(samples, subjects["grpo"].examinee.tasks), {name: PromptCache() for name in subjects}
    planned = cases(outcome, variants)
    passes = Passes(len(subjects) + sum((1 + draws) * bool(case.features) for case in planned), scratch, "sensitivity")

    def accuracy(model: str, name: str, edit: Change | None) -> float:
        return mean_accuracy(passes(f"sensitivity {name}", partial(answers, subjects[model], edit, asked, prompts[model])))

    base = {name: accuracy(name, name, None) for name in subjects}

    def effect(case: Case, model: str, number: int, features: list[int]) -> float:
        setting = case.setting
        edit = subjects[model].editor.edit(setting.edit, features, setting.positions, setting.dose)
        return accuracy(model, f"{case.purpose} {case.varied} {case.choice} {number}", edit) - base[model]

    rows = []
    for case in planned:
        model, sign = PURPOSES[case.purpose], sign_of(case.purpose)
        sets = [case.features, *match(case.features, draws)] if case.features else []
        found = [effect(case, model, number, members) for number, members in enumerate(sets)]
        facts = {"purpose": case.purpose, "varied": case.varied, "choice": case.choice, "size": len(case.features)}
        largest = sign * max(sign * value for value in found[1:]) if sets else None
        rows.append(facts | case.setting._asdict() | {"effect": found[0] if sets else None, "random": largest})
    return rows
