"""Quantities that both verdicts and figures read off the tables."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from featdiff.config.params import PAIR
from featdiff.report.evidence import Evidence


def effects(evidence: Evidence, purpose: str, control: str, subset: str = "all") -> list[dict[str, Any]]:
    """Rows of the effects table for the set (``set``) or one of its controls."""
    wanted = (purpose, control, subset)
    return [row for row in evidence.effects if (row["purpose"], row["control"], row["subset"]) == wanted]


CONTROLS = ("shared", "base_specific")
"""Sets that ought to do nothing."""
DIRECTIONS = ("mean_difference", "first_component")
"""What a dictionary has to beat."""


def mean_effects(evidence: Evidence, purpose: str, tasks: list[str]) -> dict[str, dict[int, float]]:
    """Mean over ``tasks`` of the change of accuracy (all samples of the report split), by control and set drawn."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in evidence.effects:
        if (row["purpose"], row["subset"]) == (purpose, "all") and row["task"] in tasks:
            values.setdefault(row["control"], {}).setdefault(row["set_draw"], []).append(row["effect"])
    return {name: {draw: sum(found) / len(found) for draw, found in draws.items()} for name, draws in values.items()}


def likelihood_change(evidence: Evidence, purpose: str, control: str, part: str) -> list[float]:
    """Mean over the tasks answered by generation of the change in nats of ``part`` (``start_nats`` or ``rest_nats``), by
    set drawn."""
    values: dict[int, list[float]] = {}
    for row in effects(evidence, purpose, control):
        if row[part] is not None:
            values.setdefault(row["set_draw"], []).append(row[part])
    return [sum(found) / len(found) for found in values.values()]


def clear(row: dict[str, Any], sign: int) -> bool:
    """Whether the set's effect has the claimed sign, an interval without zero, and lies beyond every random draw."""
    edge = row["low"] if sign > 0 else row["high"]
    return bool(row["beyond_random"]) and edge is not None and sign * edge > 0


def past_percentile(row: dict[str, Any], sign: int) -> bool:
    """Whether the effect lies beyond the 95th percentile of the matched random sets in the claimed direction."""
    bound = row["random_high"] if sign > 0 else row["random_low"]
    return bound is not None and sign * (row["effect"] - bound) > 0


RULES = ("norms", "scaling", "both")
"""What calls a feature one model's own: decoder norms, latent scaling, or the full rule that needs both."""


def owner(row: dict[str, Any], rule: str) -> str | None:
    """Whose own a feature is under ``rule`` (``new``: that of all tuned models); None for shared, mixed and dead ones."""
    by_norm = row["feature_class"] if row["feature_class"] not in ("shared", "mixed", "dead") else None
    if rule == "norms":
        return by_norm
    return row["scaling_owner"] if rule == "scaling" or row["specific"] else None


class OwnFeatures(NamedTuple):
    """How many features of its own each training run of two arms has."""

    label: str
    """Which crosscoders were counted, and their loss."""
    contrast: list[int]
    tuned: list[int]


def own_features(evidence: Evidence, rule: str = "norms") -> list[OwnFeatures]:
    """Features that ``rule`` calls the contrast's or the tuned model's own: within each crosscoder that holds both, and over
    all training runs of both in the crosscoders of the base and one run. Empty without a contrast."""
    contrast, tuned = evidence.roles.contrast, evidence.roles.tuned
    if contrast is None:
        return []
    counts = Counter((row["fit"], owner(row, rule)) for row in evidence.features)
    found = [
        OwnFeatures(f"{name}, {fit.config['loss']}", [counts[name, contrast]], [counts[name, tuned]])
        for name, fit in evidence.fits.items()
        if {contrast, tuned} <= set(fit.models)
    ]
    pairs = [[f"{PAIR}{run}" for run in evidence.runs(model)] for model in (contrast, tuned)]
    ours, theirs = ([counts[fit, fit.removeprefix(PAIR)] for fit in fits if fit in evidence.fits] for fits in pairs)
    if ours and theirs:
        found.append(OwnFeatures(f"pairs, {evidence.fits[PAIR + tuned].config['loss']}", ours, theirs))
    return found


def null_rates(evidence: Evidence, rule: str) -> dict[str, float]:
    """Share of live features of each null pair that ``rule`` calls one model's own: all of them errors."""
    rates = {}
    for name, fit in evidence.fits.items():
        if fit.null:
            live = [row for row in evidence.features if row["fit"] == name and not row["dead"]]
            rates[name] = sum(owner(row, rule) is not None for row in live) / max(1, len(live))
    return rates


def early_checkpoint(evidence: Evidence, early_share: float) -> tuple[int, int]:
    """The last checkpoint within the first ``early_share`` of training (0 where there are not two), and the last of all."""
    last = max((row["b"] for row in evidence.overlap), default=0)
    return (max(1, int(early_share * last + 1e-9)) if last > 1 else 0), last


def early_overlap(evidence: Evidence, arm: str, early: int, last: int, method: str = "fixed") -> dict[int, float]:
    """Overlap of the early checkpoint's top-n features with the last one's, by ascending n; 0 and 0 for the floor."""
    wanted = {"arm": arm, "method": method, "a": early, "b": last}
    rows = [row for row in evidence.overlap if wanted.items() <= row.items()]
    return {row["top"]: row["overlap"] for row in sorted(rows, key=lambda row: row["top"])}


def total_change(evidence: Evidence, arm: str) -> dict[int, float]:
    """Sum over features of the mean change since the base, by checkpoint."""
    total: dict[int, float] = {}
    for row in evidence.trajectories:
        if row["arm"] == arm:
            total[row["checkpoint"]] = total.get(row["checkpoint"], 0.0) + row["change"]
    return dict(sorted(total.items()))
