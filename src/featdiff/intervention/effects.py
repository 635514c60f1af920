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
from featdiff.config.params import InterveneParams
from featdiff.intervention.purposes import DRAWN, RANDOM, Purpose, against_draws
from featdiff.language.evaluation import Row
from featdiff.tasks.task import Sample, TaskInfo

Marks = dict[str, list[bool]]
"""What became of each answer, in the order of the questions, by column of :func:`marks`."""
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

    ``answered`` holds the marks of ``samples`` by control and number (``none`` is unedited); ``flipped`` the sample ids that
    the original model fails and the tuned one solves: chosen by outcome, so read it beside the full set. ``unread_toward``
    is the share of unread answers of the model ``purpose.toward``, by task."""
    table: list[dict[str, Any]] = []
    for task in tasks.values():
        rows = np.array([i for i, sample in enumerate(samples) if sample.task == task.name], dtype=int)
        chosen = np.array([i for i in rows if samples[i].sample_id in flipped], dtype=int)
        for subset, group in (("all", rows), ("flipped", chosen)):
            if len(group):
                facts = {
                    "purpose": purpose.name,
                    "model": purpose.model,
                    "task": task.name,
                    "role": task.role,
                    "subset": subset,
                }
                marked = {
                    key: {name: np.array(values)[group] for name, values in each.items()} for key, each in answered.items()
                }
                ids = [samples[i].sample_id for i in group]
                known = facts | {"n": len(group), "unread_toward": unread_toward[task.name]}
                table += [known | line for line in _lines(marked, nats, ids, purpose.sign, params, seed)]
    return table


def _lines(
    marked: Mapping[tuple[str, int], Mapping[str, NDArray[np.bool_]]],
    nats: Mapping[tuple[str, int], Nats],
    ids: Sequence[str],
    sign: int,
    params: InterveneParams,
    seed: int,
) -> list[dict[str, Any]]:
    before = marked["none", 0]
    paired = partial(stats.paired_difference, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
    change = {key: float(each["correct"].mean() - before["correct"].mean()) for key, each in marked.items()}
    draws = [value for (name, _), value in change.items() if name == RANDOM]
    lines = []
    for (control, number), each in marked.items():
        if control == "none":
            continue
        effect, single = change[control, number], control not in DRAWN
        chance = against_draws(effect, draws, sign)
        interval = paired(each["correct"], before["correct"], within=stats.CHANGES)
        lines.append(
            {
                "control": control,
                "set_draw": number,
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
