"""Where the numbers of a verdict come from: the rows of tables that each was worked out of, and the very artifacts (ours)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from featdiff.artifacts import tables
from featdiff.artifacts.tables import Table
from featdiff.config.dictionary import PAIR
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, RIVALS, SET, ZERO_TUNED, side_of
from featdiff.report.claims import Claims
from featdiff.report.verdicts import Verdict


class Rows(NamedTuple):
    """Rows of one table of an artifact: those that have one of the values of each column of ``where``."""

    table: Table
    of: str
    """Whose table it is: of a model, an arm or a side; empty where there is one only."""
    where: Mapping[str, Sequence[Any]]

    @property
    def path(self) -> Path:
        """The table's file."""
        return Path(re.sub("<[a-z]+>", lambda _: self.of, self.table.name))

    def count(self, root: Path = Path()) -> int:
        """How many rows these are under ``root``."""
        return self.table.count(root / self.path.parent, self.where)


def sources(claims: Claims, verdicts: Sequence[Verdict]) -> dict[str, dict[str, list[Rows]]]:
    """By claim and number, what it was worked out of."""
    ways = {
        "transfer": _answers_of_models,
        "forgetting": _answers_of_models,
        "features": _features,
        "necessary": _edited,
        "sufficient": _edited,
        "dictionary": _edited,
    }
    return {
        verdict.key: {name: ways[verdict.key](claims, verdict.key, name) for name in verdict.estimates} for verdict in verdicts
    }


def _answers_of_models(claims: Claims, _claim: str, number: str) -> list[Rows]:
    evidence, roles = claims.evidence, claims.roles
    tasks, mode = claims.exposed() if number == "lost" else (evidence.far, None)
    after = roles.tuned if number == "gain" else roles.contrast
    before = roles.tuned if number == "behind" else roles.original
    modes = [mode] if mode else sorted({evidence.primary_mode(task) for task in tasks})
    where = {"split": ["report"], "task": tasks, "mode": modes}
    return [Rows(tables.EVAL_SAMPLES, run, where) for model in (after, before) if model for run in evidence.runs(model)]


def _features(claims: Claims, _claim: str, number: str) -> list[Rows]:
    evidence, roles = claims.evidence, claims.roles
    runs = [run for model in (roles.contrast, roles.tuned) if model for run in evidence.runs(model)]
    if number == "own":
        pairs = [PAIR + run for run in runs if PAIR + run in evidence.fits]
        nulls = [name for name, fit in evidence.fits.items() if fit.null]
        return [Rows(tables.FEATURES, "", {"fit": [*pairs, *nulls], "dead": [False]})]
    followed = [run for run in runs if run in {row["arm"] for row in evidence.resampled}]
    found = [Rows(tables.BOOTSTRAP, run, {"arm": [run]}) for run in followed]
    if number == "change_accuracy":
        found += [Rows(tables.CHECKPOINT_ACCURACY, run, {"role": ["train"]}) for run in followed]
    return found


def _edited(claims: Claims, claim: str, number: str) -> list[Rows]:
    evidence = claims.evidence
    tasks = evidence.named("heldout") if number == "heldout" else evidence.found_on
    controls = [SET, *(RIVALS if claim == "dictionary" else ["none"])]
    purpose = AMPLIFY_ORIGINAL if claim == "sufficient" or number == "amplified" else ZERO_TUNED
    return [Rows(tables.EDITED_SAMPLES, side_of(purpose), {"purpose": [purpose], "control": controls, "task": tasks})]


def traced(
    claims: Claims, verdicts: Sequence[Verdict], digests: Mapping[str, str], count: Callable[[Rows], int] = Rows.count
) -> dict[str, Any]:
    """``claims.json``: every claim with its criteria and numbers, each number with its rows, and the artifacts in which they
    lie with DVC's md5 of each (``digests``, by path; null where DVC does not know it)."""
    found = sources(claims, verdicts)
    every = [rows for numbers in found.values() for several in numbers.values() for rows in several]
    artifacts = {str(rows.path.parent) for rows in every}
    return {
        "artifacts": {path: digests.get(path) for path in sorted(artifacts)},
        "claims": {
            verdict.key: {
                "claim": verdict.claim,
                "verdict": verdict.status,
                "criteria": [asdict(criterion) for criterion in verdict.criteria],
                "numbers": {
                    name: estimate._asdict()
                    | {
                        "rows": [
                            {"table": str(rows.path), "where": dict(rows.where), "count": count(rows)}
                            for rows in found[verdict.key][name]
                        ]
                    }
                    for name, estimate in verdict.estimates.items()
                },
            }
            for verdict in verdicts
        },
    }
