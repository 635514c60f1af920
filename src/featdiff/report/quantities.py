"""Quantities that both verdicts and figures read off the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from featdiff.config.dictionary import AGAIN, PAIR
from featdiff.report.evidence import Evidence
from featdiff.stats import Floats


def effects(evidence: Evidence, purpose: str, control: str, subset: str = "all") -> list[dict[str, Any]]:
    """Rows of the effects table for the set (``set``) or one of its controls."""
    return evidence.effects_of.get((purpose, control, subset), [])


CONTROLS = ("shared", "base_specific")
"""Sets that ought to do nothing."""


def mean_effects(evidence: Evidence, purpose: str, tasks: list[str]) -> dict[str, dict[int, float]]:
    """Mean over ``tasks`` of the change of accuracy (all samples of the report split), by control and set drawn."""
    values: dict[str, dict[int, list[float]]] = {}
    for (name, control, subset), rows in evidence.effects_of.items():
        for row in rows if (name, subset) == (purpose, "all") else []:
            if row["task"] in tasks:
                values.setdefault(control, {}).setdefault(row["set_draw"], []).append(row["effect"])
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


class Share(NamedTuple):
    """How many of how many."""

    found: int
    n: int

    @property
    def value(self) -> float:
        return self.found / max(1, self.n)


class OwnFeatures(NamedTuple):
    """Features of its own of each training run of two arms, among the live features of its crosscoder."""

    label: str
    """Which crosscoders were counted, and their loss."""
    contrast: list[Share]
    tuned: list[Share]


def _live(evidence: Evidence, fit: str, rule: str) -> list[dict[str, Any]]:
    """Features of a crosscoder that ``rule`` can judge: those that fire, on the tested rows where latent scaling is asked."""
    return [row for row in evidence.features if row["fit"] == fit and (not row["dead"] if rule == "norms" else row["tested"])]


def own_features(evidence: Evidence, rule: str = "norms") -> list[OwnFeatures]:
    """Features that ``rule`` calls the contrast's or the tuned model's own: within each crosscoder that holds both, and, last,
    over all training runs of both in the crosscoders of the base and one run. Empty without a contrast."""
    contrast, tuned = evidence.roles.contrast, evidence.roles.tuned
    if contrast is None:
        return []

    def share(fit: str, model: str) -> Share:
        live = _live(evidence, fit, rule)
        return Share(sum(owner(row, rule) == model for row in live), len(live))

    found = [
        OwnFeatures(f"{name}, {fit.config['loss']}", [share(name, contrast)], [share(name, tuned)])
        for name, fit in evidence.fits.items()
        if {contrast, tuned} <= set(fit.models)
    ]
    ours, theirs = (
        [share(PAIR + run, run) for run in evidence.runs(model) if PAIR + run in evidence.fits] for model in (contrast, tuned)
    )
    if ours and theirs:
        found.append(OwnFeatures(f"pairs, {evidence.fits[PAIR + tuned].config['loss']}", ours, theirs))
    return found


def null_rates(evidence: Evidence, rule: str) -> dict[str, Share]:
    """Of each null pair, how often ``rule`` calls a live feature one of its two models' own, of the twice as many times that it
    could: the rate at which a model is given a feature that is not its own."""
    rates = {}
    for name, fit in evidence.fits.items():
        if fit.null:
            live = _live(evidence, name, rule)
            rates[name] = Share(sum(owner(row, rule) is not None for row in live), 2 * len(live))
    return rates


def null_rate(evidence: Evidence, rule: str, model: str) -> Share | None:
    """The null rate that holds for ``model``, from null pairs of the loss of its own crosscoder: two training runs of its arm,
    else a model with itself, else whatever null pairs there are. None where there is none."""
    loss = evidence.fits[PAIR + model].config["loss"] if PAIR + model in evidence.fits else None
    rates = {name: rate for name, rate in null_rates(evidence, rule).items() if evidence.fits[name].config["loss"] == loss}
    twins = [rate for name, rate in rates.items() if evidence.fits[name].models[0] in evidence.runs(model)]
    itself = [rate for name, rate in rates.items() if AGAIN in evidence.fits[name].models]
    chosen = twins or itself or list(rates.values())
    return Share(sum(rate.found for rate in chosen), sum(rate.n for rate in chosen)) if chosen else None


def halves_disagree(evidence: Evidence, fit: str) -> Share:
    """Of the features of a crosscoder that both halves of the held-out tokens tested, those that the full rule calls specific
    on one half and not on the other."""
    judged = [row["halves_agree"] for row in evidence.features if row["fit"] == fit and row["halves_agree"] is not None]
    return Share(judged.count(False), len(judged))


class Stability(NamedTuple):
    """Agreement of the sets that crosscoder seeds find, mean over pairs of seeds; 1 is the same."""

    effect: float | None
    """Cosine of the mean changes that the sets make."""
    subspace: float | None
    """Cosine of the principal angles between the spans of their decoder rows."""
    subspace_random: float | None
    """What random subspaces of the same sizes give."""
    ids: float | None
    """Jaccard index of features matched one by one."""


def stability(evidence: Evidence) -> Stability:
    """All None where the search was made with one seed, or not at all."""
    seeds = evidence.localize.get("seeds") or {}
    pairs = seeds.get("subspace", {}).values()
    random = sum(pair["decoder_random"] for pair in pairs) / len(pairs) if pairs else None
    return Stability(seeds.get("mean_effect"), seeds.get("mean_subspace"), random, seeds.get("mean_jaccard"))


def course(evidence: Evidence, arm: str) -> dict[int, float]:
    """Share of training at every kept checkpoint of ``arm``, the last of which is 1."""
    return {row["checkpoint"]: row["share"] for row in evidence.checkpoints["accuracy"] if row["arm"] == arm}


def early_checkpoint(evidence: Evidence, arm: str, early_share: float) -> tuple[int, int]:
    """The last checkpoint of ``arm`` within the first ``early_share`` of its training, or its first (0 where there are not
    two), and the last of all."""
    shares = course(evidence, arm)
    early = [number for number, share in shares.items() if share <= early_share + 1e-9]
    last = max(shares, default=0)
    return (max(early, default=1) if last > 1 else 0), last


def relative_overlap(evidence: Evidence, arm: str, early_share: float, *, corrected: bool = True) -> Floats | None:
    """Overlap of the early checkpoint's most changed features with the last one's, on the way from chance (0) to one checkpoint
    read twice (1), mean over n; of the sample first, then of each resample. None where it was not measured.

    The noise of reading lowers an overlap; taking it out by the ceiling raises it too much. Without ``corrected`` the way leads
    to complete overlap instead: the truth lies between the two."""
    early, last = early_checkpoint(evidence, arm, early_share)
    rows = [row for row in evidence.resampled if (row["arm"], row["checkpoint"]) == (arm, early)] if 0 < early < last else []
    if not rows:
        return None
    overlap, ceiling, chance = (np.array([row[key] for row in rows]) for key in ("overlap", "ceiling", "chance"))
    ceiling = ceiling if corrected else np.ones_like(ceiling)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(ceiling > chance, (overlap - chance) / (ceiling - chance), np.nan)


class Place(NamedTuple):
    """A checkpoint at which runs are compared."""

    checkpoint: int
    share: float
    """Of training."""
    accuracy: float
    """Mean over the tasks trained on."""
    change: Floats
    """Sum over features of the mean change since the base, of the sample first, then of each resample."""


def places(evidence: Evidence, arm: str) -> list[Place]:
    """Every kept checkpoint of ``arm`` whose features were followed."""
    draws: dict[int, list[float]] = {}
    for row in evidence.resampled:
        if row["arm"] == arm:
            draws.setdefault(row["checkpoint"], []).append(row["change"])
    right: dict[int, list[float]] = {}
    for row in evidence.checkpoints["accuracy"]:
        if (row["arm"], row["role"]) == (arm, "train"):
            right.setdefault(row["checkpoint"], []).append(row["accuracy"])
    shares = course(evidence, arm)
    return [
        Place(number, shares[number], sum(right[number]) / len(right[number]), np.array(change))
        for number, change in sorted(draws.items())
        if number in right
    ]


def at_share(runs: Sequence[Sequence[Place]], share: float) -> list[Place]:
    """Of each run the checkpoint nearest to ``share`` of its training."""
    return [min(run, key=lambda place: abs(place.share - share)) for run in runs]


def at_accuracy(runs: Sequence[Sequence[Place]], base: float) -> list[Place]:
    """Of each run the checkpoint whose accuracy is nearest to the largest that every run reaches, the first of equals. Empty
    where that is not above the ``base``."""
    level = min((max(place.accuracy for place in run) for run in runs), default=base)
    return [min(run, key=lambda place: abs(place.accuracy - level)) for run in runs] if level > base else []


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
