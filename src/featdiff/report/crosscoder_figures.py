"""Figures of the crosscoders: fit, decoder norms, change of features over checkpoints."""

from __future__ import annotations

import numpy as np

from featdiff.report.charts import (
    HAIR,
    INK,
    MODEL_COLOURS,
    MODEL_NAMES,
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
from featdiff.report.evidence import MODELS, Evidence, series
from featdiff.report.quantities import early_checkpoint, early_overlap, total_change

MOST_POINTS = 3000
"""Features drawn one by one; of more, every so many-th is drawn and the caption says so."""


def curves(evidence: Evidence) -> Panel | None:
    """FVE (mean over models), L0 and dead share over the fit, one line per crosscoder."""
    spare = iter([INK, "#7b6bb5", "#1b9e77", "#e0bd4a", SET_COLOUR] * len(evidence.fits))
    colours: dict[str, str] = {}
    for name, fit in evidence.fits.items():
        own = MODEL_COLOURS.get(fit.models[-1], INK)
        colours[name] = next(spare) if fit.joint or own in colours.values() else own
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
    figures = []
    edges = np.linspace(0, 1, 41)
    for name, fit in evidence.fits.items():
        rows = [row for row in evidence.features if row["fit"] == name and row["nrn"] is not None and not row["dead"]]
        if fit.joint or not rows:
            continue
        traces: list[Trace] = []
        for label in ("base", "shared", *fit.models[1:]):
            held, _ = np.histogram([row["nrn"] for row in rows if row["feature_class"] == label], edges)
            traces.append(
                {
                    "type": "bar",
                    "x": ((edges[:-1] + edges[1:]) / 2).tolist(),
                    "y": [int(value) if value else None for value in held],
                    "marker": {"color": _class_colour(label)},
                    "hovertemplate": f"%{{y}} features at %{{x:.3f}}<extra>{label}</extra>",
                }
            )
        x = {"range": [0, 1], "title": title("NRN"), "dtick": 0.25}
        y = {"type": "log", "title": title("features"), "dtick": 1, "range": [-0.3, np.log10(len(rows)) + 0.1]}
        figures.append(
            Figure(f"nrn-{name}", f"{name} ({fit.config['loss']})", traces, layout(x, y, barmode="overlay", bargap=0.06), 260)
        )
    caption = "0: only in the base. ½: shared. 1: only in the tuned model. Dead features left out; the count is on a log scale."
    legend = [("base only", MODEL_COLOURS["base"]), ("shared", _class_colour("shared")), *models_legend(("sft", "grpo"))]
    return Panel(figures, caption, legend, 300) if figures else None


def _class_colour(label: str) -> str:
    return MODEL_COLOURS.get(label, "#4fae9b" if label == "shared" else "#c0a6d6")


def mas(evidence: Evidence) -> Panel | None:
    """Each feature of a three-model crosscoder in the triangle of its three decoder norms."""
    figures, thinned = [], False
    for name, fit in evidence.fits.items():
        rows = [row for row in evidence.features if row["fit"] == name and row["mas_base"] is not None and not row["dead"]]
        if not rows:
            continue
        traces: list[Trace] = []
        for label in ("shared", "mixed", *MODELS):
            held = [row for row in rows if row["feature_class"] == label]
            stride = -(-len(held) // MOST_POINTS) if held else 1
            thinned |= stride > 1
            held = held[::stride]
            traces.append(
                {
                    "type": "scatterternary",
                    "mode": "markers",
                    "a": [round(row["mas_base"], 4) for row in held],
                    "b": [round(row["mas_sft"], 4) for row in held],
                    "c": [round(row["mas_grpo"], 4) for row in held],
                    "text": [f"feature {row['feature_id']}" for row in held],
                    "marker": {
                        "color": _class_colour(label),
                        "size": 4.5 if label in ("shared", "mixed") else 6.5,
                        "opacity": 0.65,
                    },
                    "hovertemplate": "%{text}: base %{a:.2f}, SFT %{b:.2f}, GRPO %{c:.2f}<extra></extra>",
                }
            )
        quiet = {"gridcolor": HAIR, "linecolor": MUTED, "tickfont": {"size": 10, "color": MUTED}, "dtick": 0.25, "min": 0}
        axes = {
            f"{side}axis": quiet | {"title": {"text": MODEL_NAMES[model]}} for side, model in zip("abc", MODELS, strict=True)
        }
        look = layout(
            {}, {}, ternary={"sum": 1, "bgcolor": "rgba(0,0,0,0)", **axes}, margin={"l": 40, "r": 40, "t": 34, "b": 34}
        )
        figures.append(Figure(f"mas-{name}", f"{name} ({fit.config['loss']})", traces, look, 360))
    caption = "A point in the middle has the same decoder norm in all three models; at a corner it belongs to one model alone."
    caption += f" Of classes with more than {MOST_POINTS} features an even sample is drawn." if thinned else ""
    legend = [("shared", _class_colour("shared")), ("mixed", _class_colour("mixed")), *models_legend(MODELS)]
    return Panel(figures, caption, legend, 320) if figures else None


def overlaps(evidence: Evidence) -> list[tuple[str, Panel]]:
    """Overlap of top-n features between checkpoints, one panel per n, one matrix per arm."""
    panels = []
    for top in sorted({row["top"] for row in evidence.overlap}):
        figures = []
        for arm in ("sft", "grpo"):
            wanted = {"arm": arm, "top": top, "method": "fixed"}
            cells = {
                (row["a"], row["b"]): row["overlap"] for row in evidence.overlap if row["a"] and wanted.items() <= row.items()
            }
            steps = sorted({step for pair in cells for step in pair})
            grid = [[cells.get((a, b)) for b in steps] for a in steps]
            trace = matrix(steps, steps, grid, "checkpoints %{y} and %{x}: %{z:.2f}")
            x = {"title": title("checkpoint"), "tickvals": steps, "ticks": ""}
            y = {"title": title("checkpoint"), "tickvals": steps, "autorange": "reversed", "ticks": "", "showgrid": False}
            figures.append(Figure(f"overlap-{arm}-{top}", MODEL_NAMES[arm], [trace], layout(x, y), 300))
        caption = f"Share of the {top} most changed features that two checkpoints have in common. One training run per arm."
        panels.append((f"top {top}", Panel(figures, caption, [], 280)))
    return panels


def overlap_against_size(evidence: Evidence, early_share: float) -> Panel | None:
    """Overlap of an early checkpoint with the last one against n, one figure per method, with the floor of each arm."""
    early, last = early_checkpoint(evidence, early_share)
    if not early:
        return None
    names = {"fixed": "In one dictionary", "refit": "Crosscoder trained on per checkpoint"}
    figures = []
    for method, name in names.items():
        drawn = []
        for arm in ("sft", "grpo"):
            for a, b, colour in ((early, last, MODEL_COLOURS[arm]), (0, 0, mixed(MODEL_COLOURS[arm], 0.45))):
                points = early_overlap(evidence, arm, a, b, method)
                label = f"{MODEL_NAMES[arm]}{'' if a else ', done twice'}"
                drawn.append((label, colour, [(float(top), value) for top, value in points.items()]))
        if any(points for *_, points in drawn):
            figures.append(lines(f"overlap-size-{method}", name, drawn, "n", "overlap"))
    caption = (
        f"Share of the top n features that checkpoint {early} has in common with the last. Pale: the last checkpoint done "
        "twice, with other tokens or another seed: no overlap can be read as higher than that."
    )
    return Panel(figures, caption, models_legend(("sft", "grpo")), 320) if figures else None


def trajectories(evidence: Evidence, top: int = 10) -> Panel | None:
    """Total change over checkpoints, and the features of each arm that ended up changed most."""
    totals = {arm: list(total_change(evidence, arm).items()) for arm in ("sft", "grpo")}
    if not any(totals.values()):
        return None
    sums = [(MODEL_NAMES[arm], MODEL_COLOURS[arm], [(float(a), b) for a, b in points]) for arm, points in totals.items()]
    figures = [lines("change-total", "Sum over features", sums, "checkpoint", "change")]
    chosen = set(evidence.localize["features"])
    last = max(row["checkpoint"] for row in evidence.trajectories)
    for arm in ("sft", "grpo"):
        rows = [row for row in evidence.trajectories if row["arm"] == arm]
        kept = {
            row["feature_id"]
            for row in rows
            if row["checkpoint"] == last and (row["rank"] <= top or row["feature_id"] in chosen)
        }
        tracks: dict[int, list[tuple[float, float]]] = {}
        for row in rows:
            if row["feature_id"] in kept:
                tracks.setdefault(row["feature_id"], []).append((row["checkpoint"], row["change"]))
        colours = {feature: SET_COLOUR if feature in chosen else mixed(MODEL_COLOURS[arm], 0.55) for feature in tracks}
        ordered = sorted(tracks, key=lambda feature: feature in chosen)
        heading = f"{MODEL_NAMES[arm]}, {top} most changed"
        drawn = [(f"feature {feature}", colours[feature], sorted(tracks[feature])) for feature in ordered]
        figures.append(lines(f"change-{arm}", heading, drawn, "checkpoint", "change"))
    legend = models_legend(("sft", "grpo")) + ([("feature of the set", SET_COLOUR)] if chosen else [])
    caption = (
        "Change: mean absolute difference to the base under the swap readout, times decoder norm. Checkpoint 0 is the base. "
        "The sum is over the features followed."
    )
    return Panel(figures, caption, legend, 260)
