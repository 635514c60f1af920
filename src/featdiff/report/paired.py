"""Outcomes per sample, of models and of edits, in the pairs that comparisons need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featdiff.report.evidence import Evidence, grouped


class Outcomes:
    """Share of right answers per sample: of the models under a scoring rule, and under the edits."""

    def __init__(self, evidence: Evidence) -> None:
        self.tasks = {sample_id: sample.task for sample_id, sample in evidence.questions.items()}
        self._models: dict[tuple[str, str | None], dict[str, float]] = {}
        for model, rows in evidence.answers.items():
            own: dict[str, float] = {}
            for (mode,), group in grouped(rows, "mode").items():
                shares = self._models[model, mode] = _shares(group)
                own |= {key: share for key, share in shares.items() if evidence.primary_mode(self.tasks[key]) == mode}
            self._models[model, None] = own
        self._edited = _by_edit(evidence)
        self._stitched: dict[str, dict[int, dict[str, float]]] = {}
        for (lower, depth), rows in grouped(evidence.stitched, "lower", "depth").items():
            self._stitched.setdefault(lower, {})[depth] = _shares(rows)
        self._original, self._tuned = evidence.roles.original, evidence.roles.tuned

    def under(self, evidence: Evidence) -> Outcomes:
        """The same models and their answers without an edit, and those under edits that ``evidence`` has."""
        found = copy(self)
        unedited = {key: shares for key, shares in self._edited.items() if key[1] == "none"}
        found._edited = unedited | _by_edit(evidence)
        return found

    def model(self, model: str, mode: str | None = None) -> dict[str, float]:
        """Share right by sample under ``mode``, or under each task's own rule."""
        return self._models.get((model, mode), {})

    def runs(self, models: Sequence[str], mode: str | None = None) -> dict[str, float]:
        """Share right by sample, mean over training runs, on the samples that all of them answered."""
        each = [self.model(model, mode) for model in models]
        return {key: sum(shares[key] for shares in each) / len(each) for key in set.intersection(*map(set, each))}

    def edited(self, purpose: str, control: str) -> dict[str, float]:
        """Share right by sample of one model under the set (``set``), without an edit (``none``)."""
        return self._edited.get((purpose, control), {})

    def stitched(self, lower: str) -> dict[int, dict[str, float]]:
        """Share right by sample of the models that have the first blocks of ``lower``, by their number."""
        return self._stitched.get(lower, {})

    def flipped(self) -> set[str]:
        """Samples that the original fails and the tuned model solves."""
        before, after = self.model(self._original), self.model(self._tuned)
        return {key for key in before.keys() & after.keys() if before[key] < 0.5 <= after[key]}

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


def _by_edit(evidence: Evidence) -> dict[tuple[Any, ...], dict[str, float]]:
    """Share right by sample, by purpose and control."""
    return {key: _shares(rows) for key, rows in grouped(evidence.edited, "purpose", "control").items()}


def _shares(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row["sample_id"], []).append(bool(row["correct"]))
    return {key: sum(values) / len(values) for key, values in right.items()}
