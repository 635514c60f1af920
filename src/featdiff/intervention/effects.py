"""What an edit did: paired change of accuracy per task against the unedited model, beside the matched random sets."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np

from featdiff import stats
from featdiff.config.params import InterveneParams
from featdiff.intervention.purposes import sign_of
from featdiff.language.evaluation import Row
from featdiff.tasks.task import TaskInfo


def effects(
    rows: list[Row], flipped: set[str], tasks: dict[str, TaskInfo], params: InterveneParams, seed: int
) -> list[dict[str, Any]]:
    """Change of accuracy against the unedited model, per purpose, control, task and subset, with paired bootstrap
    intervals and the band of the matched random sets, and of the likelihood of right answers. ``flipped`` holds the
    sample ids that the original model fails and the tuned one solves: chosen by outcome, so read it beside the full set.

    ``control`` and ``set_draw`` of a row say under what it was answered. Raises ValueError where a control was not asked
    the questions of the unedited model."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["purpose"], row["task"]].append(row)
    table: list[dict[str, Any]] = []
    for purpose in dict.fromkeys(row["purpose"] for row in rows):
        for task in tasks.values():
            whole = groups[purpose, task.name]
            for subset, group in (("all", whole), ("flipped", [row for row in whole if row["sample_id"] in flipped])):
                if group:
                    table += _task_effects(purpose, task, subset, group, params, seed)
    return table


def _task_effects(
    purpose: str, task: TaskInfo, subset: str, rows: list[Row], params: InterveneParams, seed: int
) -> list[dict[str, Any]]:
    answers: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row["sample_id"])):
        answers.setdefault((row["control"], row["set_draw"]), []).append(row)
    asked = [row["sample_id"] for row in answers["none", 0]]
    for (control, number), group in answers.items():
        if [row["sample_id"] for row in group] != asked:
            raise ValueError(f"{purpose} {control} {number}: other samples of {task.name} than the unedited model answered")
    right = {key: np.array([row["correct"] for row in group], dtype=float) for key, group in answers.items()}
    baseline, before = right["none", 0], answers["none", 0]
    sign = sign_of(purpose)
    draws = [float((value - baseline).mean()) for (control, _), value in right.items() if control == "random"]
    low_random, high_random = np.quantile(draws, [0.05, 0.95]) if draws else (np.nan, np.nan)
    paired = partial(stats.paired_difference, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
    table = []
    for (control, number), value in right.items():
        if control == "none":
            continue
        effect = float((value - baseline).mean())
        interval = paired(value, baseline, within=stats.CHANGES) if control != "random" else None
        likelihood: dict[str, float | None] = {}
        for part in ("start_nats", "rest_nats"):
            now, then = ([row[part] for row in group] for group in (answers[control, number], before))
            change = paired(now, then) if None not in (now[0], then[0]) else None
            numbers = (change.value, change.low, change.high) if change else (None, None, None)
            likelihood |= zip((part, f"{part}_low", f"{part}_high"), numbers, strict=True)
        beyond = None
        if control != "random" and draws:
            beyond = sign * effect > max(sign * value for value in draws)
        table.append(
            {
                "purpose": purpose,
                "model": rows[0]["model"],
                "control": control,
                "set_draw": number,
                "task": task.name,
                "role": task.role,
                "subset": subset,
                "n": len(value),
                "accuracy": float(value.mean()),
                "baseline": float(baseline.mean()),
                "effect": effect,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "steps": float(np.mean([row["manner"] == "steps" for row in answers[control, number]])),
                "steps_baseline": float(np.mean([row["manner"] == "steps" for row in before])),
                "flexible": float(np.mean([row["flexible"] for row in answers[control, number]])),
                "parse_failures": float(np.mean([row["parsed"] is None for row in answers[control, number]])),
                "random_low": float(low_random),
                "random_high": float(high_random),
                "beyond_random": beyond,
                "p_random": stats.draws_p(effect, draws, sign) if control != "random" and draws else None,
                "p_mcnemar": stats.mcnemar(value, baseline) if control != "random" else None,
                **likelihood,
            }
        )
    return table
