"""What an edit did: paired change of accuracy per task against the unedited model, beside the draws of chance.

Q questions of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featdiff import stats
from featdiff.config.sets import InterveneParams
from featdiff.intervention.purposes import DRAWN, RANDOM, Purpose, against_draws
from featdiff.language.evaluation import Row
from featdiff.tasks.task import Sample, TaskInfo, first_of_each

Marks = dict[str, list[bool]]
"""What became of each answer, in the order of the questions, by column of :func:`marks`."""
Marked = Mapping[str, NDArray[np.bool_]]
"""The same of some questions."""
Nats = Mapping[str, Sequence[float]]
"""Nats of the start and of the rest of the right answer, by ``sample_id``."""


def marks(rows: Sequence[Row], toward: Mapping[str, Row]) -> Marks:
    """Whether each answer is right, goes step by step, is right by the flexible rule, could not be read, and is like the one
    of ``toward``: the same answer, or one that can be read in the same manner."""
    return {
        "correct": [bool(row["correct"]) for row in rows],
        "steps": [row["manner"] == "steps" for row in rows],
        "flexible": [bool(row["flexible"]) for row in rows],
        "unread": [row["parsed"] is None for row in rows],
        "alike": [_alike(row, toward[row["sample_id"]]) for row in rows],
    }


def _alike(row: Row, other: Row) -> bool:
    if row["completion"] == other["completion"]:
        return True
    return row["parsed"] is not None and bool(row["manner"]) and row["manner"] == other["manner"]


def effects(
    purpose: Purpose,
    answered: Mapping[tuple[str, int], Marks],
    nats: Mapping[tuple[str, int], Nats],
    samples: Sequence[Sample],
    flipped: set[str],
    unread_toward: Mapping[str, float],
    tasks: Mapping[str, TaskInfo],
    params: InterveneParams,
    seed: int,
) -> list[dict[str, Any]]:
    """Change of accuracy against the unedited model per control, task and subset, with paired bootstrap intervals, the band of
    the random sets, and the change in likelihood of right answers.

    ``answered`` holds the marks of what was asked of ``samples`` (:func:`questions_under`), by control and number (``none`` is
    unedited); ``flipped`` the sample ids that the original model fails and the tuned one solves: chosen by outcome, so read it
    beside the full set. ``unread_toward`` is the share of unread answers of the model ``purpose.toward``, by task."""
    table: list[dict[str, Any]] = []
    ids = {key: [sample.sample_id for sample in questions_under(key[0], samples, params)] for key in answered}
    for task in tasks.values():
        rows = {sample.sample_id for sample in samples if sample.task == task.name}
        for subset, group in (("all", rows), ("flipped", rows & flipped)):
            marked = {key: _of(each, ids[key], group) for key, each in answered.items()}
            before = {key: _of(answered["none", 0], ids["none", 0], group.intersection(ids[key])) for key in answered}
            if group:
                facts = {
                    "purpose": purpose.name,
                    "model": purpose.model,
                    "task": task.name,
                    "role": task.role,
                    "subset": subset,
                    "unread_toward": unread_toward[task.name],
                }
                named = [key for key in ids["none", 0] if key in group]
                table += [facts | line for line in _lines(marked, before, nats, named, purpose.sign, params, seed)]
    return table


def questions_under(control: str, samples: Sequence[Sample], params: InterveneParams) -> list[Sample]:
    """What a model is asked under ``control``: of every task the first ``params.draw_questions`` where many are drawn, whose
    means are then noisier than that of the set, which favours no claim; else all."""
    return first_of_each(samples, params.draw_questions) if control in DRAWN else list(samples)


def _of(marked: Marks, ids: Sequence[str], group: set[str]) -> Marked:
    rows = [i for i, key in enumerate(ids) if key in group]
    return {name: np.array(values)[rows] for name, values in marked.items()}


def _lines(
    marked: Mapping[tuple[str, int], Marked],
    unedited: Mapping[tuple[str, int], Marked],
    nats: Mapping[tuple[str, int], Nats],
    ids: Sequence[str],
    sign: int,
    params: InterveneParams,
    seed: int,
) -> list[dict[str, Any]]:
    paired = partial(stats.paired_difference, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
    marked = {key: each for key, each in marked.items() if len(each["correct"])}
    change = {key: float(each["correct"].mean() - unedited[key]["correct"].mean()) for key, each in marked.items()}
    draws = [value for (name, _), value in change.items() if name == RANDOM]
    lines = []
    for (control, number), each in marked.items():
        if control == "none":
            continue
        effect, single, before = change[control, number], control not in DRAWN, unedited[control, number]
        chance = against_draws(effect, draws, sign)
        interval = paired(each["correct"], before["correct"], within=stats.CHANGES)
        lines.append(
            {
                "control": control,
                "set_draw": number,
                "n": len(each["correct"]),
                "accuracy": float(each["correct"].mean()),
                "baseline": float(before["correct"].mean()),
                "effect": effect,
                "low": interval.low,
                "high": interval.high,
                **{name: float(each[name].mean()) for name in ("steps", "flexible", "unread", "alike")},
                "steps_baseline": float(before["steps"].mean()),
                "alike_baseline": float(before["alike"].mean()),
                **(chance if single else chance | {"beyond_random": None, "p_random": None}),
                "p_mcnemar": stats.mcnemar(each["correct"], before["correct"]),
                **_likelihood(nats.get((control, number), {}), nats.get(("none", 0), {}), ids, paired),
            }
        )
    return lines


def _likelihood(now: Nats, then: Nats, ids: Sequence[str], paired: Any) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    known = [key for key in ids if key in now and key in then]
    for part, name in enumerate(("start_nats", "rest_nats")):
        interval = paired([now[key][part] for key in known], [then[key][part] for key in known]) if known else None
        numbers = (interval.value, interval.low, interval.high) if interval else (None, None, None)
        found |= zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True)
    return found
