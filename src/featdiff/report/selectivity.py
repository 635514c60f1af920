"""How much further controls have to move the residual stream than the set to do the same (ours).

A curve is the gain on the tune split, in the direction of the claim, against ‖Δh‖ / ‖h‖ at the last token of the prompt. It
starts at no change, and is read where it first comes to a height, linearly between the doses tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from featdiff.intervention.purposes import RANDOM, RANDOM_DIRECTION, SET, sign_of
from featdiff.report.evidence import Evidence, Row

Curve = list[tuple[float, float]]
"""Points (‖Δh‖ / ‖h‖, gain), by ascending length."""


def curves(evidence: Evidence, purpose: str, column: str = "accuracy") -> dict[str, list[Curve]]:
    """One curve per control and draw, at the edit and positions chosen for the set: the mean over tasks of ``column``,
    ``accuracy`` as change in the direction of the claim."""
    chosen = choice(evidence, purpose, SET)
    sign = sign_of(purpose) if column == "accuracy" else 1
    means: dict[tuple[str, int], dict[tuple[float, float], list[float]]] = {}
    for row in [row for (of, _), rows in evidence.tried_with.items() if of == purpose for row in rows]:
        if chosen and row["positions"] == chosen["positions"] and row["edit"] == chosen["edit"]:
            points = means.setdefault((row["control"], row["set_draw"]), {})
            points.setdefault((row["dose"], row["norm"]), []).append(row[column])
    found: dict[str, list[Curve]] = {}
    for (control, _), points in means.items():
        curve = [(norm, float(np.mean(values))) for (_, norm), values in sorted(points.items())]
        start = curve[0][1] if column == "accuracy" else 0.0
        found.setdefault(control, []).append([(norm, sign * value - sign * start) for norm, value in curve])
    return found


def choice(evidence: Evidence, purpose: str, control: str, number: int = 0) -> Row:
    """Edit, positions and dose chosen for a control; empty where it has none."""
    listed = evidence.choice.get("controls", {}).get(purpose, [])
    return next((row for row in listed if (row["control"], row["set_draw"]) == (control, number)), {})


def median_curve(drawn: Sequence[Curve]) -> Curve:
    """Median gain of several curves with the same doses."""
    return [
        (float(np.median([n for n, _ in points])), float(np.median([g for _, g in points])))
        for points in zip(*drawn, strict=False)
    ]


def crossing(curve: Curve, height: float) -> float | None:
    """The length at which ``curve`` first comes to ``height``; None where it never does."""
    for (low, before), (high, after) in pairwise(curve):
        if after >= height:
            return low + (high - low) * (height - before) / (after - before) if after > before else high
    return None


class Selectivity(NamedTuple):
    """Ratio of the lengths at which a median control and the set have half of the set's largest gain."""

    ratio: float
    reached: bool
    """Whether the median control comes to it at all; if not, ``ratio`` is that of the longest change tried, a lower bound."""


def selectivity(evidence: Evidence, purpose: str) -> dict[str, Selectivity]:
    """Against random sets and against random directions; empty where the set has no gain."""
    drawn = curves(evidence, purpose)
    if SET not in drawn:
        return {}
    [own] = drawn[SET]
    half = max(gain for _, gain in own) / 2
    at = crossing(own, half) if half > 0 else None
    if not at:
        return {}
    found = {}
    for control in (RANDOM, RANDOM_DIRECTION):
        if control in drawn:
            middle = median_curve(drawn[control])
            reached = crossing(middle, half)
            found[control] = Selectivity((reached or middle[-1][0]) / at, reached is not None)
    return found
