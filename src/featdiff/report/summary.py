"""The science of a run in one small JSON, for git and for comparing experiments."""

from __future__ import annotations

import csv
from io import StringIO
from typing import Any

import numpy as np

from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, ZERO_TUNED
from featdiff.report.claims import Claims
from featdiff.report.evidence import ROLES, Evidence, Row
from featdiff.report.quantities import effects, mean_effects, stability
from featdiff.report.selectivity import selectivity
from featdiff.report.set_claims import SetClaims
from featdiff.report.verdicts import Verdict
from featdiff.stats import Interval

DIGITS = 4
EFFECTS = ("effect", "low", "high", "random_low", "random_high")


def summarise(evidence: Evidence, claims: Claims, verdicts: list[Verdict], rates: list[Row]) -> dict[str, Any]:
    """Claims with verdicts and the numbers that decide them, mean accuracy per model and role of task, crosscoder quality, the
    feature set, effects with interval and n, and what the set does in repeats."""
    groups = {role: evidence.named(role) for role in ROLES if evidence.named(role)} | {"away_from_math": evidence.far}
    right = {model: claims.outcomes.model(model) for model in evidence.models}
    accuracy = {
        model: {role: _round(found.value) for role, tasks in groups.items() if (found := claims.estimate(tasks, answers))}
        for model, answers in right.items()
    }
    return {
        "verdicts": {verdict.key: verdict.status for verdict in verdicts},
        "claims": {verdict.key: verdict.claim for verdict in verdicts},
        "estimates": {
            verdict.key: {name: _interval(estimate) for name, estimate in verdict.estimates.items()} for verdict in verdicts
        },
        "runs": dict(evidence.repeats),
        "accuracy": accuracy,
        "crosscoders": {
            name: {
                "fve": {model: _round(value) for model, value in fit.metrics["fve"].items()},
                "l0": _round(fit.metrics["l0"]),
                "dead_share": _round(fit.metrics["dead_share"]),
            }
            for name, fit in evidence.fits.items()
        },
        "feature_set": {
            "status": evidence.localize["status"],
            "size": evidence.set_size,
            "share": _round(evidence.set_size / evidence.n_features),
            "expected_by_chance": _round(evidence.localize["expected_intersection"]),
        },
        "effects": {
            purpose: _effects(evidence, purpose)
            for purpose, model in {row["purpose"]: row["model"] for row in evidence.effects}.items()
            if model in evidence.roles.models
        },
        "selectivity": {
            purpose: {name: {"ratio": _round(each.ratio), "reached": each.reached} for name, each in ratios.items()}
            for purpose in (ZERO_TUNED, AMPLIFY_ORIGINAL)
            if (ratios := selectivity(evidence, purpose))
        },
        "errors": [{key: _round(value) if key == "high" else value for key, value in row.items()} for row in rates],
        "replication": {
            each.model: {
                name: {"beyond": each.beyond[name], "draws": each.draws, **_interval(found)}
                for name, found in each.effect.items()
                if found
            }
            for each in SetClaims(claims).replications()
        },
    }


def _effects(evidence: Evidence, purpose: str) -> dict[str, Any]:
    return {
        row["task"]: {"n": row["n"], "beyond_random": row["beyond_random"]} | {key: _round(row[key]) for key in EFFECTS}
        for row in effects(evidence, purpose, "set")
    }


def _interval(estimate: Interval) -> dict[str, Any]:
    return {"n": estimate.n} | {key: _round(getattr(estimate, key)) for key in ("value", "low", "high")}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


WORTH = {"supported": 1, "undecided": 0, "not supported": -1}
"""Verdicts as numbers."""
PURPOSES = (("necessity", "necessary", ZERO_TUNED, 5), ("sufficiency", "sufficient", AMPLIFY_ORIGINAL, 95))


def headline(claims: Claims, summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers by which studies are compared, under names that do not depend on those of the arms.

    They are verdicts (1 supported, 0 undecided, −1 not), accuracy away from math by role, change of accuracy when the set is
    taken away and amplified, how far random sets get (percentile of the draws in the claimed direction), how selective
    amplifying is against them, size of the set, cosine of what the sets of several seeds change, fraction of variance explained
    in the tuned model, and its training runs. What a study did not measure is left out."""
    evidence, roles = claims.evidence, claims.evidence.roles
    found: dict[str, Any] = {
        "verdict": {key: WORTH[status] for key, status in summary["verdicts"].items()},
        "accuracy": {
            role: summary["accuracy"][model].get("away_from_math")
            for role, model in (("original", roles.original), ("contrast", roles.contrast), ("tuned", roles.tuned))
            if model is not None
        },
    }
    for name, claim, purpose, percentile in PURPOSES:
        measured = summary["estimates"].get(claim, {})
        on, draws = measured.get("found_on", {}), mean_effects(evidence, purpose, evidence.found_on).get("random", {})
        found[name] = {
            "found": on.get("value"),
            "low": on.get("low"),
            "high": on.get("high"),
            "heldout": measured.get("heldout", {}).get("value"),
            "controls": _round(float(np.percentile(list(draws.values()), percentile))) if draws else None,
        }
    found["set"] = {
        "selectivity": summary["selectivity"].get(AMPLIFY_ORIGINAL, {}).get("random", {}).get("ratio"),
        "size": summary["feature_set"]["size"],
        "stability": _round(stability(evidence).effect),
        "fve": summary["crosscoders"][evidence.localize["fit"]]["fve"][roles.tuned],
        "runs": len(evidence.runs(roles.tuned)),
    }
    return {group: {key: value for key, value in values.items() if value is not None} for group, values in found.items()}


def plots(summary: dict[str, Any]) -> dict[str, str]:
    """CSV files by name, for ``dvc plots``: the verdicts as numbers, and for each purpose the change of accuracy by task, under
    the set and (5th and 95th percentile) under random ones."""
    verdicts = [{"claim": key, "verdict": WORTH[status]} for key, status in summary["verdicts"].items()]
    files = {"plots/verdicts.csv": _csv(["claim", "verdict"], verdicts)}
    for _, _, purpose, _ in PURPOSES:
        tasks = summary["effects"].get(purpose, {}).items()
        files[f"plots/{purpose}.csv"] = _csv(["task", *EFFECTS], [{"task": task} | row for task, row in tasks])
    return files


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    stream = StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
