"""Figures of the search for settings: what was tried for the set, and accuracy against the length of the change for the set and
everything that it is held against."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from featdiff.intervention.purposes import RANDOM, RANDOM_DIRECTION, RIVALS, SET, ZERO_TUNED
from featdiff.report.charts import SET_COLOUR, Figure, Panel, Trace, layout, line, matrix, mixed, tile_for, title
from featdiff.report.evidence import Evidence
from featdiff.report.selectivity import Curve, choice, curves, median_curve
from featdiff.report.set_figures import claimed, heading

COLOURS = {RANDOM: "#858d99", RANDOM_DIRECTION: "#4fae9b"}
LABELS = {RANDOM: "random sets", RANDOM_DIRECTION: "random directions"}
DASHES = dict(zip(RIVALS, ("solid", "dash", "dot", "dashdot"), strict=True))
INK = "#b08d3c"
"""Of what does without learned features."""


def tuning(evidence: Evidence) -> Panel | None:
    """Mean accuracy on the tune split, over the tasks features were found on, for every edit of the set that was tried."""
    figures, asked = [], {purpose.name: purpose for purpose in claimed(evidence)}
    tried = [row for row in evidence.search if row["control"] == SET and row["dose"] > 0]
    pairs = dict.fromkeys((row["purpose"], row["edit"]) for row in tried)
    for purpose, edit in sorted(pairs, key=lambda pair: (pair[0] != ZERO_TUNED, pair[1])):
        rows = [row for row in tried if (row["purpose"], row["edit"]) == (purpose, edit)]
        positions, doses = list(dict.fromkeys(row["positions"] for row in rows)), sorted({row["dose"] for row in rows})
        grid = [
            [_mean(row["accuracy"] for row in rows if (row["positions"], row["dose"]) == (place, dose)) for dose in doses]
            for place in positions
        ]
        trace = matrix([f"{dose:g}" for dose in doses], positions, grid, "%{y}, dose %{x}: mean accuracy %{z:.3f}")
        x = {"type": "category", "title": title("dose"), "ticks": ""}
        look = layout(x, {"autorange": "reversed", "ticks": "", "showgrid": False})
        chosen = choice(evidence, purpose, SET)
        if chosen["edit"] == edit and chosen["positions"] in positions and chosen["dose"] in doses:
            i, j = doses.index(chosen["dose"]), positions.index(chosen["positions"])
            frame = {"type": "rect", "x0": i - 0.5, "x1": i + 0.5, "y0": j - 0.5, "y1": j + 0.5}
            look["shapes"] = [frame | {"line": {"color": SET_COLOUR, "width": 3}}]
        label = f"{heading(evidence, asked[purpose])}: {edit}"
        figures.append(Figure(f"tuning-{purpose}-{edit}", label, [trace], look, 110 + 38 * len(positions)))
    tasks, least = {row["task"] for row in tried}, min((row["n"] for row in tried), default=0)
    caption = (
        f"Tune split, mean over {len(tasks)} tasks, n = {least} per task. Framed: the choice, the gentlest that has most of "
        "the largest effect, made for all tasks at once."
    )
    return Panel(figures, caption, [("chosen", SET_COLOUR)], tile_for(len(figures), 3)) if figures else None


def _mean(values: Iterable[float]) -> float | None:
    held = list(values)
    return float(np.mean(held)) if held else None


def lengths(evidence: Evidence) -> Panel | None:
    """Gain in the direction of the claim against ‖Δh‖ / ‖h‖: the set, the spread of random sets and directions, the directions
    that tell the models apart."""
    figures = []
    for purpose in claimed(evidence):
        drawn = curves(evidence, purpose.name)
        if SET not in drawn:
            continue
        traces: list[Trace] = []
        for control, colour in COLOURS.items():
            if control in drawn:
                traces += _spread(drawn[control], colour, LABELS[control])
        for name in RIVALS:
            for curve in drawn.get(name, []):
                traces.append(_line(curve, INK, name.replace("_", " "), DASHES[name]))
        traces.append(_line(drawn[SET][0], SET_COLOUR, "the set", width=2.5))
        chosen = choice(evidence, purpose.name, SET)
        at = [row["norm"] for row in evidence.tried_with.get((purpose.name, SET), []) if row["chosen"]]
        look = layout({"title": title("‖Δh‖ / ‖h‖"), "rangemode": "tozero"}, {"title": title("change, claimed way")})
        look["shapes"] = [line(at[0], at[0], 0, 1, yref="paper", dash="dot", colour=SET_COLOUR)] if at else []
        label = f"{heading(evidence, purpose)}: {chosen['edit']} at {chosen['positions'].replace('_', ' ')}"
        figures.append(Figure(f"lengths-{purpose.name}", label, traces, look, 280))
    caption = (
        "Tune split, tasks used for finding. Change of mean accuracy in the direction of the claim against the length of the "
        "change of the residual stream, relative to its own, at the last token of the prompt. Bands: 5th to 95th percentile, "
        "line inside: median. All controls are as long as the set at the same dose. Dotted: the dose chosen for the set."
    )
    legend = [("feature set", SET_COLOUR), *((LABELS[name], colour) for name, colour in COLOURS.items())]
    directions = "mean difference, first component (dashed), mean change of the set (dotted)"
    legend.append((f"{directions}, features of a random dictionary (dots and dashes)", INK))
    return Panel(figures, caption, legend, tile_for(len(figures), 2)) if figures else None


def _line(curve: Curve, colour: str, name: str, dash: str = "solid", width: float = 1.5) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [norm for norm, _ in curve],
        "y": [gain for _, gain in curve],
        "line": {"color": colour, "width": width, "dash": dash},
        "marker": {"size": 5, "color": colour},
        "hovertemplate": f"{name}: %{{y:+.2f}} at %{{x:.2f}}<extra></extra>",
    }


def _spread(drawn: list[Curve], colour: str, name: str) -> list[Trace]:
    middle = median_curve(drawn)
    at = [norm for norm, _ in middle]
    low, high = np.quantile([[gain for _, gain in curve] for curve in drawn], [0.05, 0.95], axis=0).tolist()
    band = {"type": "scatter", "x": at + at[::-1], "y": [*high, *low[::-1]], "fill": "toself", "mode": "lines"}
    return [
        band | {"hoverinfo": "skip", "fillcolor": mixed(colour, 0.25), "line": {"width": 0}},
        _line(middle, colour, f"{len(drawn)} {name}, median"),
    ]
