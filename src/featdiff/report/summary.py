"""The science of a run in one small JSON, for git and for comparing experiments."""

from __future__ import annotations

from typing import Any

from featdiff.report.evidence import MODELS, ROLES, Evidence
from featdiff.report.quantities import effects
from featdiff.report.verdicts import Judge, Verdict

DIGITS = 4


def summarise(evidence: Evidence, judge: Judge, verdicts: list[Verdict]) -> dict[str, Any]:
    """Verdicts, mean accuracy per model and role, crosscoder quality, the feature set, effects with interval and n."""
    right = {model: judge.outcomes.model(model) for model in MODELS}
    groups = {role: evidence.named(role) for role in ROLES if evidence.named(role)} | {"away_from_math": evidence.far}
    accuracy = {
        model: {role: _round(found.value) for role, tasks in groups.items() if (found := judge.estimate(tasks, right[model]))}
        for model in MODELS
    }
    return {
        "verdicts": {verdict.key: verdict.status for verdict in verdicts},
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
            purpose: _effects(evidence, purpose) for purpose in dict.fromkeys(row["purpose"] for row in evidence.effects)
        },
    }


def _effects(evidence: Evidence, purpose: str) -> dict[str, Any]:
    kept = ("effect", "low", "high", "random_low", "random_high")
    return {
        row["task"]: {"n": row["n"], "beyond_random": row["beyond_random"]} | {key: _round(row[key]) for key in kept}
        for row in effects(evidence, purpose, "set")
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def curated(summary: dict[str, Any]) -> dict[str, Any]:
    """The few numbers by which runs are compared: verdicts (1 supported, 0 undecided, −1 not), accuracies, set size."""
    worth = {"supported": 1, "undecided": 0, "not supported": -1}
    return {
        "verdict": {key: worth[status] for key, status in summary["verdicts"].items()},
        "accuracy": {model: means.get("away_from_math") for model, means in summary["accuracy"].items()},
        "set_size": summary["feature_set"]["size"],
    }
