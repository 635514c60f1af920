"""Outcomes per sample, of models and of edits, in the pairs that comparisons need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featdiff.report.evidence import Evidence


class Outcomes:
    """Share of right answers per sample: of the models under a scoring rule, and under the edits."""

    def __init__(self, evidence: Evidence) -> None:
        self.tasks = {sample_id: sample.task for sample_id, sample in evidence.questions.items()}
        self._models: dict[tuple[str, str], dict[str, float]] = {}
        for model, rows in evidence.answers.items():
            for (mode,), group in _grouped(rows, "mode").items():
                self._models[model, mode] = _shares(group)
        self._primary = {task: evidence.primary_mode(task) for task in evidence.tasks}
        self._edited = {key: _shares(rows) for key, rows in _grouped(evidence.edited, "purpose", "arm").items()}

    def model(self, model: str, mode: str | None = None) -> dict[str, float]:
        """Share right by sample under ``mode``, or under each task's own rule."""
        if mode is not None:
            return self._models.get((model, mode), {})
        merged: dict[str, float] = {}
        for (name, rule), shares in self._models.items():
            if name == model:
                merged |= {key: value for key, value in shares.items() if self._primary[self.tasks[key]] == rule}
        return merged

    def edited(self, purpose: str, arm: str) -> dict[str, float]:
        """Share right by sample under one arm of one intervention."""
        return self._edited.get((purpose, arm), {})

    def flipped(self) -> set[str]:
        """Samples that base fails and GRPO solves."""
        base, grpo = self.model("base"), self.model("grpo")
        return {key for key in base.keys() & grpo.keys() if base[key] < 0.5 <= grpo[key]}

    def by_task(
        self, tasks: Sequence[str], after: Mapping[str, float], before: Mapping[str, float] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Numbers per sample of each of ``tasks``: ``after``, or its difference to ``before`` on samples both have."""
        numbers: dict[str, list[float]] = {task: [] for task in tasks}
        for key in sorted(after):
            task = self.tasks.get(key)
            if task in numbers and (before is None or key in before):
                numbers[task].append(after[key] - (before[key] if before is not None else 0.0))
        return {task: np.array(values) for task, values in numbers.items()}


def _grouped(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _shares(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row["sample_id"], []).append(bool(row["correct"]))
    return {key: sum(values) / len(values) for key, values in right.items()}
