"""Figures of the crosscoders: fit, decoder norms, change of features over checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from featdiff.report.charts import (
    CLASS_COLOURS,
    HAIR,
    MUTED,
    SET_COLOUR,
    Figure,
    Panel,
    Trace,
    layout,
    lines,
    matrix,
    mixed,
    models_legend,
    title,
)
from featdiff.report.evidence import Evidence, FitFacts, Row, series
from featdiff.report.names import Names
from featdiff.report.quantities import early_checkpoint, early_overlap, total_change

MOST_POINTS = 3000
"""Features drawn one by one; of more, every so many-th is drawn and the caption says so."""
FIT_COLOURS = ("#17a2b8", "#4b4fb0", "#9aa61f", "#e07a6a", "#2f6f73", "#c79bd8", "#6f8f3f", "#7a4a3a", "#5aa0e0", "#d6b25e")
"""Of crosscoders in the order of the study, where a line stands for one of them and for no model."""


def curves(evidence: Evidence) -> Panel | None:
    """FVE (mean over models), L0 and dead share over the fit, one line per crosscoder; where there are more crosscoders than
    colours, the further ones are paler."""
    places = enumerate(evidence.fits)
    n = len(FIT_COLOURS)
    colours = {name: mixed(FIT_COLOURS[i % n], 0.5 ** (i // n)) for i, name in places}
    drawn: dict[str, list[tuple[str, str, list[tuple[float, float]]]]] = {"fve": [], "l0": [], "dead": []}
    for name, fit in evidence.fits.items():
        by_model = [points for key, points in fit.curves.items() if key.startswith("fve/")]
        if by_model:
            mean = [(group[0][0], float(np.mean([point[1] for point in group]))) for group in zip(*by_model, strict=False)]
            drawn["fve"].append((name, colours[name], mean))
        for key in ("l0", "dead"):
            if points := series(fit.curves, key):
                drawn[key].append((name, colours[name], points))
    labels = {"fve": "FVE, mean over models", "l0": "L0, features per token", "dead": "Dead features"}
    figures = [lines(f"fit-{key}", labels[key], drawn[key], "step", "", zero=key != "fve") for key in drawn if drawn[key]]
    return Panel(figures, "", list(colours.items()), 260) if figures else None


def nrn(evidence: Evidence) -> Panel | None:
    """Histogram of the relative decoder norm for each pair crosscoder, by class."""
    figures, names = [], evidence.names
    models: dict[str, None] = {}
    for name, fit in evidence.fits.items():
        if not fit.joint and (rows := _live(evidence, name)):
            figures.append(_histogram(f"nrn-{name}", _heading(name, fit), fit, rows, "NRN", lambda row: row["nrn"], names))
            models |= dict.fromkeys(names.first(model) for model in fit.models if model in evidence.models)
    caption = (
        "0: only in the first model. ½: shared. 1: only in the second. Without dead features; the count is on a log scale."
    )
    legend = [("shared", CLASS_COLOURS["shared"]), *_only(models, names)]
    return Panel(figures, caption, legend, 300) if figures else None


def mas(evidence: Evidence) -> Panel | None:
    """Shares of decoder norm in crosscoders of three models (each feature a point of a triangle) and of more (a histogram of
    the first model's share)."""
    figures, names, thinned, wide = [], evidence.names, False, False
    models: dict[str, None] = {}
    for name, fit in evidence.fits.items():
        if not fit.joint or not (rows := _live(evidence, name)):
            continue
        models |= dict.fromkeys(names.first(model) for model in fit.models)
        if len(fit.models) == 3:
            figures.append(_triangle(name, fit, rows, names))
            thinned |= any(sum(row["feature_class"] == label for row in rows) > MOST_POINTS for label in _classes(fit))
        else:
            wide, what = True, f"share of {names.label(fit.models[0])}"
            figures.append(_histogram(f"mas-{name}", _heading(name, fit), fit, rows, what, lambda row: row["mas"][0], names))
    caption = "A point in the middle has the same decoder norm in all three models; at a corner it belongs to one model alone."
    caption += " New: of the same norm in all models but the first, in which it is small."
    caption += " Of more than three models the share of the first is shown: near 0 a feature is new." if wide else ""
    caption += f" Of classes with more than {MOST_POINTS} features an even sample is drawn." if thinned else ""
    return Panel(figures, caption, [*CLASS_COLOURS.items(), *_only(models, names)], 320) if figures else None


def _live(evidence: Evidence, fit: str) -> list[Row]:
    return [row for row in evidence.features if row["fit"] == fit and not row["dead"]]


def _heading(name: str, fit: FitFacts) -> str:
    return f"{name} ({fit.config['loss']})"


def _only(models: dict[str, None], names: Names) -> list[tuple[str, str]]:
    return [(f"{label} only", colour) for label, colour in models_legend(models, names)]


def _classes(fit: FitFacts) -> list[str]:
    """Classes of the features of a crosscoder, the common ones first, to be drawn below the others."""
    return [*CLASS_COLOURS, *fit.models]


def _class_colour(label: str, names: Names) -> str:
    return CLASS_COLOURS.get(label) or names.colour(label)


def _histogram(
    key: str, heading: str, fit: FitFacts, rows: list[Row], quantity: str, value: Callable[[Row], float], names: Names
) -> Figure:
    edges = np.linspace(0, 1, 41)
    traces: list[Trace] = []
    for label in _classes(fit):
        held, _ = np.histogram([value(row) for row in rows if row["feature_class"] == label], edges)
        traces.append(
            {
                "type": "bar",
                "x": ((edges[:-1] + edges[1:]) / 2).tolist(),
                "y": [int(number) if number else None for number in held],
                "marker": {"color": _class_colour(label, names)},
                "hovertemplate": f"%{{y}} features at %{{x:.3f}}<extra>{names.label(label)}</extra>",
            }
        )
    x = {"range": [0, 1], "title": title(quantity), "dtick": 0.25}
    y = {"type": "log", "title": title("features"), "dtick": 1, "range": [-0.3, np.log10(len(rows)) + 0.1]}
    return Figure(key, heading, traces, layout(x, y, barmode="overlay", bargap=0.06), 260)


def _triangle(name: str, fit: FitFacts, rows: list[Row], names: Names) -> Figure:
    labels = [names.label(model) for model in fit.models]
    traces: list[Trace] = []
    for label in _classes(fit):
        held = [row for row in rows if row["feature_class"] == label]
        held = held[:: max(1, -(-len(held) // MOST_POINTS))]
        traces.append(
            {
                "type": "scatterternary",
                "mode": "markers",
                **{side: [round(row["mas"][i], 4) for row in held] for i, side in enumerate("abc")},
                "text": [f"feature {row['feature_id']}" for row in held],
                "marker": {
                    "color": _class_colour(label, names),
                    "size": 4.5 if label in CLASS_COLOURS else 6.5,
                    "opacity": 0.65,
                },
                "hovertemplate": "%{text}: "
                + ", ".join(f"{label} %{{{side}:.2f}}" for side, label in zip("abc", labels, strict=True))
                + "<extra></extra>",
            }
        )
    quiet = {"gridcolor": HAIR, "linecolor": MUTED, "tickfont": {"size": 10, "color": MUTED}, "dtick": 0.25, "min": 0}
    axes = {f"{side}axis": quiet | {"title": {"text": label}} for side, label in zip("abc", labels, strict=True)}
    look = layout({}, {}, ternary={"sum": 1, "bgcolor": "rgba(0,0,0,0)", **axes}, margin={"l": 40, "r": 40, "t": 34, "b": 34})
    return Figure(f"mas-{name}", _heading(name, fit), traces, look, 360)


def overlaps(evidence: Evidence) -> list[tuple[str, Panel]]:
    """Overlap of top-n features between checkpoints, one panel per n, one matrix per arm that the dictionary holds."""
    panels, names = [], evidence.names
    fixed = [row for row in evidence.overlap if row["method"] == "fixed" and row["a"]]
    for top in sorted({row["top"] for row in fixed}):
        figures = []
        for arm in dict.fromkeys(row["arm"] for row in fixed):
            cells = {(row["a"], row["b"]): row["overlap"] for row in fixed if (row["arm"], row["top"]) == (arm, top)}
            steps = sorted({step for pair in cells for step in pair})
            grid = [[cells.get((a, b)) for b in steps] for a in steps]
            trace = matrix(steps, steps, grid, "checkpoints %{y} and %{x}: %{z:.2f}")
            x = {"title": title("checkpoint"), "tickvals": steps, "ticks": ""}
            y = {"title": title("checkpoint"), "tickvals": steps, "autorange": "reversed", "ticks": "", "showgrid": False}
            figures.append(Figure(f"overlap-{arm}-{top}", names.label(arm), [trace], layout(x, y), 300))
        caption = f"Share of the {top} most changed features that two checkpoints have in common. One training run per arm."
        panels.append((f"top {top}", Panel(figures, caption, [], 280)))
    return panels


def overlap_against_size(evidence: Evidence, early_share: float) -> Panel | None:
    """Overlap of an early checkpoint with the last one against n, one figure per method, with the floor of each arm."""
    kept = {row["arm"]: early_checkpoint(evidence, row["arm"], early_share) for row in evidence.overlap}
    kept = {arm: (early, last) for arm, (early, last) in kept.items() if early}
    names, arms = evidence.names, list(kept)
    methods = {"fixed": "In one dictionary", "refit": "Crosscoder trained on per checkpoint"}
    figures = []
    for method, heading in methods.items():
        drawn = []
        for arm in arms:
            for a, b, colour in ((*kept[arm], names.colour(arm)), (0, 0, mixed(names.colour(arm), 0.45))):
                points = early_overlap(evidence, arm, a, b, method)
                label = f"{names.label(arm)}{'' if a else ', done twice'}"
                drawn.append((label, colour, [(float(top), value) for top, value in points.items()]))
        if any(points for *_, points in drawn):
            figures.append(lines(f"overlap-size-{method}", heading, drawn, "n", "overlap"))
    caption = (
        "Share of the top n features that the last checkpoint within the first "
        f"{early_share:.0%} of training has in common with the last of all. Pale: the last checkpoint done twice, with other "
        "tokens or another seed: no overlap can be read as higher than that."
    )
    return Panel(figures, caption, models_legend(arms, names), 320) if figures else None


def trajectories(evidence: Evidence, top: int = 10) -> Panel | None:
    """Total change over checkpoints, and the features of each arm that ended up changed most."""
    by_arm: dict[str, list[Row]] = {}
    for row in evidence.trajectories:
        by_arm.setdefault(row["arm"], []).append(row)
    if not by_arm:
        return None
    names = evidence.names
    sums = [
        (names.label(arm), names.colour(arm), [(float(a), b) for a, b in total_change(evidence, arm).items()]) for arm in by_arm
    ]
    figures = [lines("change-total", "Sum over features", sums, "checkpoint", "change")]
    chosen = set(evidence.localize["features"])
    for arm, rows in by_arm.items():
        last = max(row["checkpoint"] for row in rows)
        kept = {
            row["feature_id"]
            for row in rows
            if row["checkpoint"] == last and (row["rank"] <= top or row["feature_id"] in chosen)
        }
        tracks: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["feature_id"] in kept:
                tracks.setdefault(row["feature_id"], []).append((row["checkpoint"], row["change"]))
        colours = {feature: SET_COLOUR if feature in chosen else mixed(names.colour(arm), 0.55) for feature in tracks}
        ordered = sorted(tracks, key=lambda feature: feature in chosen)
        drawn = [(f"feature {feature}", colours[feature], sorted(tracks[feature])) for feature in ordered]
        figures.append(lines(f"change-{arm}", f"{names.label(arm)}, {top} most changed", drawn, "checkpoint", "change"))
    legend = models_legend(by_arm, names) + ([("feature of the set", SET_COLOUR)] if chosen else [])
    caption = (
        "Change: mean absolute difference to the base under the swap readout, times decoder norm. Checkpoint 0 is the base. "
        "The sum is over the features followed."
    )
    return Panel(figures, caption, legend, 260)
