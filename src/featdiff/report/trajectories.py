"""Runs of training as points, one per kept checkpoint: accuracy by question and divergence from the base by task, and where a
run reaches a level that others reach too. Pure functions on the rows of ``checkpoints`` (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from featdiff import stats
from featdiff.report.evidence import Row
from featdiff.stats import CHANGES, SHARES, Floats, Interval

DIRECTIONS = ("forward", "reverse")
"""Of the divergence (featdiff.language.divergence)."""
BOOTSTRAP: dict[str, Any] = {"resamples": 1000, "confidence": 0.95, "seed": 0}


@dataclass(frozen=True)
class Point:
    """One checkpoint of one run; checkpoint 0 is the base."""

    run: str
    checkpoint: int
    step: int | None
    share: float
    """Of training."""
    right: dict[str, Floats]
    """By task, one number per question, the questions in the same order at every point."""
    kl: dict[str, dict[str, float]]
    """By direction and task, in nats per token."""

    def accuracy(self, tasks: Sequence[str]) -> float:
        """Mean over ``tasks``, each of which counts the same."""
        return float(np.mean([self.right[task].mean() for task in tasks]))

    def divergence(self, tasks: Sequence[str], direction: str = "forward") -> float:
        """Mean over ``tasks``."""
        return float(np.mean([self.kl[direction][task] for task in tasks]))

    def towards(self, other: Point, weight: float) -> Point:
        """The point that lies ``weight`` of the way to ``other``, on a straight line in everything."""

        def mixed(a: Any, b: Any) -> Any:
            return {key: mixed(a[key], b[key]) for key in a} if isinstance(a, dict) else (1 - weight) * a + weight * b

        found = {name: mixed(getattr(self, name), getattr(other, name)) for name in ("share", "right", "kl")}
        return Point(self.run, self.checkpoint, None, **found)


Measure = Callable[[Point], float]


def trajectories(checkpoints: Mapping[str, list[Row]], base: Mapping[str, bool]) -> dict[str, list[Point]]:
    """The points of every run in their order, the base first; ``base`` says of every ``sample_id`` whether it is right."""
    kl: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in checkpoints["divergence"]:
        if row["task"] is not None:
            for way in DIRECTIONS:
                kl.setdefault((row["arm"], row["checkpoint"]), {}).setdefault(way, {})[row["task"]] = row[f"{way}_kl"]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(checkpoints["samples"], key=lambda row: row["sample_id"]):  # the same order at every point
        groups.setdefault((row["arm"], row["checkpoint"]), []).append(row)
    runs: dict[str, list[Point]] = {}
    for (run, number), rows in sorted(groups.items(), key=lambda entry: entry[0][1]):
        if run not in runs:
            zero = {way: dict.fromkeys(found, 0.0) for way, found in kl[run, number].items()}
            runs[run] = [Point(run, 0, 0, 0.0, _by_task(rows, lambda row: base[row["sample_id"]]), zero)]
        right = _by_task(rows, lambda row: row["correct"])
        runs[run].append(Point(run, number, rows[0]["step"], rows[0]["share"], right, kl[run, number]))
    return runs


def _by_task(rows: list[Row], right: Callable[[Row], bool]) -> dict[str, Floats]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(float(right(row)))
    return {task: np.array(values) for task, values in found.items()}


def common_level(runs: Sequence[Sequence[Point]], measure: Measure) -> float | None:
    """The largest value of ``measure`` that all runs reach; None where one of them never rises above the base."""
    level = min((max(map(measure, points)) for points in runs), default=None)
    return None if level is None or level <= measure(runs[0][0]) else level


def reach(points: Sequence[Point], measure: Measure, level: float) -> Point | None:
    """Where a run first rises to ``level``, on a straight line between two neighbouring points; None where it never does."""
    for before, after in pairwise(points):
        low, high = measure(before), measure(after)
        if low < level <= high:
            return before.towards(after, (level - low) / (high - low))
    return None


def losses(
    runs: Mapping[str, Sequence[Point]], tasks: Sequence[str], prompts: Sequence[str], direction: str
) -> dict[str, list[tuple[float, float]]]:
    """By run, for every checkpoint: KL divergence on the tasks ``prompts``, and accuracy lost on ``tasks`` since the base."""
    return {
        run: [(point.divergence(prompts, direction), base.accuracy(tasks) - point.accuracy(tasks)) for point in points]
        for run, (base, *points) in runs.items()
    }


def accuracy(point: Point, tasks: Sequence[str]) -> Interval:
    """Mean over ``tasks`` with its interval over questions."""
    found = stats.mean_over_strata({task: point.right[task] for task in tasks}, within=SHARES, **BOOTSTRAP)
    assert found is not None  # every task has questions
    return found


def difference(after: Sequence[Point], before: Sequence[Point], tasks: Sequence[str]) -> Interval:
    """Mean over ``tasks`` of the paired difference of accuracy, each side the mean of its points."""

    def mean(points: Sequence[Point], task: str) -> Floats:
        return np.mean([point.right[task] for point in points], axis=0)

    changes = {task: stats.paired(mean(after, task), mean(before, task)) for task in tasks}
    found = stats.mean_over_strata(changes, within=CHANGES, **BOOTSTRAP)
    assert found is not None
    return found
