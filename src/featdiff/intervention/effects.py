"""What an edit did: paired change of accuracy per task against the unedited model, beside the matched random sets."""

from __future__ import annotations

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
    """Change of accuracy against the unedited model, per purpose, arm, task and subset, with paired bootstrap
    intervals and the band of the matched random draws, and of the likelihood of right answers. ``flipped`` holds the
    sample ids that base fails and GRPO solves: chosen by outcome, so read it beside the full set."""
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
    sign = sign_of(purpose)
    draws = [float((value - baseline).mean()) for (arm, _), value in right.items() if arm == "random"]
    low_random, high_random = np.quantile(draws, [0.05, 0.95]) if draws else (np.nan, np.nan)
    paired = partial(stats.paired_difference, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
    table = []
    for (arm, draw), value in right.items():
        if arm == "none":
            continue
        effect = float((value - baseline).mean())
        interval = paired(value, baseline, within=stats.CHANGES) if arm != "random" else None
        likelihood: dict[str, float | None] = {}
        for part in ("start_nats", "rest_nats"):
            now, then = ([row[part] for row in group] for group in (answers[arm, draw], before))
            change = paired(now, then) if None not in (now[0], then[0]) else None
            numbers = (change.value, change.low, change.high) if change else (None, None, None)
            likelihood |= zip((part, f"{part}_low", f"{part}_high"), numbers, strict=True)
        beyond = None
        if arm != "random" and draws:
            beyond = sign * effect > max(sign * value for value in draws)
        table.append(
            {
                "purpose": purpose,
                "model": rows[0]["model"],
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
                "flexible": float(np.mean([row["flexible"] for row in answers[arm, draw]])),
                "parse_failures": float(np.mean([row["parsed"] is None for row in answers[arm, draw]])),
                "random_low": float(low_random),
                "random_high": float(high_random),
                "beyond_random": beyond,
                "p_random": stats.draws_p(effect, draws, sign) if arm != "random" and draws else None,
                "p_mcnemar": stats.mcnemar(value, baseline) if arm != "random" else None,
                **likelihood,
            }
        )
    return table
