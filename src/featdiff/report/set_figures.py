"""Figures of the feature set: scores, tuning of the edits, dose curves, effects against matched random sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, REPEAT, ZERO_TUNED, Purpose, purposes
from featdiff.report.charts import (
    HAIR,
    INK,
    MUTED,
    SET_COLOUR,
    SURFACE,
    Figure,
    Panel,
    Trace,
    error_bars,
    layout,
    line,
    mixed,
    role_bands,
    task_axis,
    tile_for,
    title,
)
from featdiff.report.evidence import Evidence, Row
from featdiff.report.quantities import effects
from featdiff.report.words import listed

SUBSETS = {"all": "All samples", "flipped": "Flipped samples"}
RANDOM, GREY = MUTED, "#858d99"


def edits(evidence: Evidence) -> list[Purpose]:
    """What was asked of the set, zeroing in other training runs of the tuned model last; empty where there is no set."""
    tested = {row["purpose"] for row in evidence.effects}
    asked = purposes(evidence.roles, evidence.runs(evidence.roles.tuned))
    return [purpose for purpose in asked if purpose.name in tested]


def claimed(evidence: Evidence) -> list[Purpose]:
    """Those of :func:`edits` in the models with a role."""
    return [purpose for purpose in edits(evidence) if not purpose.name.startswith(REPEAT)]


def replications(evidence: Evidence) -> list[Purpose]:
    """Zeroing in the tuned model, then in its other training runs; empty where it has none."""
    found = [purpose for purpose in edits(evidence) if purpose.name.startswith(REPEAT) or purpose.name == ZERO_TUNED]
    return found if len(found) > 1 else []


def heading(evidence: Evidence, purpose: Purpose) -> str:
    """``Zeroed in GRPO``."""
    return f"{'Amplified' if purpose.sign > 0 else 'Zeroed'} in {evidence.names.label(purpose.model)}"


def scores(evidence: Evidence, top: int = 25) -> Panel | None:
    """The highest scores per task, the selected features marked, the threshold as a line."""
    chosen, found = set(evidence.localize["features"]), evidence.localize
    names, roles, pale = evidence.names, evidence.roles, mixed(GREY, 0.6)
    figures = []
    for task in evidence.found_on:
        rows = sorted((row for row in evidence.scores if row["task"] == task), key=lambda row: -row["score"])[:top]
        if not rows:
            continue
        bound = found["threshold"] * rows[0]["score"]
        colours = [
            SET_COLOUR if row["feature_id"] in chosen else (names.colour(roles.tuned) if row["score"] >= bound else pale)
            for row in rows
        ]
        trace: Trace = {
            "type": "bar",
            "x": list(range(1, len(rows) + 1)),
            "y": [row["score"] for row in rows],
            "marker": {"color": colours},
            "text": [str(row["feature_id"]) for row in rows],
            "textposition": "none",
            "customdata": [row["frequency"] for row in rows],
            "hovertemplate": "feature %{text}: %{y:.3f}<br>above threshold in %{customdata:.0%} of resamples<extra></extra>",
        }
        look = layout({"title": title("rank"), "nticks": 6}, {"title": title("score"), "rangemode": "tozero", "nticks": 5})
        look["shapes"] = [line(0.4, len(rows) + 0.6, bound, bound, dash="dash", colour=INK)]
        label = f"{task}, {found['per_task'][task]['n_flipped']} flipped samples"
        figures.append(Figure(f"score-{task}", label, [trace], look, 220))
    caption = (
        f"Score: mean over flipped samples of the feature's value in {names.label(roles.tuned)} minus "
        f"{names.label(roles.original)} ({found['readout']} readout, positions: {found['positions']}). "
        f"Dashed: {found['threshold']:.0%} of the task's largest. The {top} highest are drawn."
    )
    legend = [
        ("in the set", SET_COLOUR),
        ("above the threshold here only", names.colour(roles.tuned)),
        ("below", pale),
    ]
    return Panel(figures, caption, legend, tile_for(len(figures), 3)) if figures else None


def effect_strips(evidence: Evidence) -> list[tuple[str, Panel]]:
    """Change in accuracy per task: the set, each random draw, reconstruction; one panel per subset of samples."""
    panels = []
    before, after = (evidence.names.label(model) for model in (evidence.roles.original, evidence.roles.tuned))
    for subset, label in SUBSETS.items():
        figures = [figure for purpose in claimed(evidence) if (figure := _strip(evidence, purpose, subset))]
        if not figures:
            continue
        caption = (
            "Report split; change in accuracy against the same questions unedited, with interval. "
            "The no-op (dose 0) is the zero line."
        )
        if subset == "flipped":
            caption += f" Flipped: {before} wrong, {after} right. They are chosen by their outcome: any damage lowers {after}, "
            caption += f"any change can only raise {before}."
            if any(task.options for task in evidence.tasks.values()):
                caption += " Dashed: 1/(K−1), what a random flip among K options gives."
        legend = [("feature set", SET_COLOUR), ("matched random sets, one ring per draw", RANDOM), ("reconstruction only", INK)]
        panels.append((label, Panel(figures, caption, legend, 640)))
    return panels


def _strip(evidence: Evidence, purpose: Purpose, subset: str) -> Figure | None:
    held = {
        control: effects(evidence, purpose.name, control, subset) for control in ("random", "reconstruction", "noop", "set")
    }
    names = [name for name in evidence.tasks if any(row["task"] == name for rows in held.values() for row in rows)]
    if not names:
        return None
    place = {name: i for i, name in enumerate(names)}
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [place[row["task"]] + _jitter(row["set_draw"]) for row in held["random"]],
            "y": [row["effect"] for row in held["random"]],
            "text": [f"{row['task']}, random set {row['set_draw'] + 1}" for row in held["random"]],
            "marker": {"symbol": "circle-open", "size": 6, "color": RANDOM, "opacity": 0.8},
            "hovertemplate": "%{text}: %{y:+.3f}<extra></extra>",
        },
        _marked(
            held["reconstruction"],
            place,
            "reconstruction",
            0.3,
            {"symbol": "x-thin", "size": 7, "line": {"width": 1.6, "color": INK}},
        ),
        _marked(
            held["set"],
            place,
            "set",
            0.0,
            {"symbol": "diamond", "size": 11, "color": SET_COLOUR, "line": {"width": 1, "color": SURFACE}},
        ),
    ]
    if held["set"]:
        traces[-1]["error_y"] = error_bars(*([row[key] for row in held["set"]] for key in ("effect", "low", "high"))) | {
            "color": SET_COLOUR
        }
    look = layout(
        task_axis(names), {"title": title("change in accuracy"), "tickformat": ".2~f"}, **role_bands(evidence.tasks, names)
    )
    look["yaxis"] |= {
        "zeroline": True,
        "zerolinecolor": MUTED,
        "gridcolor": HAIR,
        "range": _reach(held.values()),
    }
    if subset == "flipped" and purpose.name == AMPLIFY_ORIGINAL:
        floors = [(place[name], evidence.tasks[name].options) for name in names if evidence.tasks[name].options > 1]
        look["shapes"] += [line(i - 0.45, i + 0.45, 1 / (k - 1), 1 / (k - 1), dash="dash", colour=INK) for i, k in floors]
    return Figure(f"effect-{purpose.name}-{subset}", heading(evidence, purpose), traces, look, 300, 90 + 60 * len(names))


def replication(evidence: Evidence) -> Panel | None:
    """The set zeroed in every training run of the tuned model: change in accuracy per task over the band of random sets."""
    runs = replications(evidence)
    held = [effects(evidence, purpose.name, "set") for purpose in runs]
    tasks = [name for name in evidence.tasks if any(row["task"] == name for rows in held for row in rows)]
    if not tasks:
        return None
    place = {name: i for i, name in enumerate(tasks)}
    labels = [evidence.names.label(purpose.model) for purpose in runs]
    step = min(0.24, 0.75 / len(runs))
    traces: list[Trace] = []
    bands: list[dict[str, Any]] = []
    for i, (label, rows) in enumerate(zip(labels, held, strict=True)):
        shift = (i - (len(runs) - 1) / 2) * step
        marker = {"symbol": "circle" if i else "diamond", "size": 9, "color": SET_COLOUR}
        bars = error_bars(*([row[key] for row in rows] for key in ("effect", "low", "high")))
        traces.append(_marked(rows, place, label, shift, marker) | {"error_y": bars | {"color": SET_COLOUR}})
        for row in rows:
            if row["random_low"] is not None:
                x, ends = place[row["task"]] + shift, {"y0": row["random_low"], "y1": row["random_high"]}
                ink = {"fillcolor": mixed(GREY, 0.35), "line": {"width": 1, "color": mixed(GREY, 0.6)}, "layer": "below"}
                bands.append({"type": "rect", "x0": x - 0.4 * step, "x1": x + 0.4 * step, **ends, **ink})
    look = layout(
        task_axis(tasks), {"title": title("change in accuracy"), "tickformat": ".2~f"}, **role_bands(evidence.tasks, tasks)
    )
    look["shapes"] += bands
    look["yaxis"] |= {"zeroline": True, "zerolinecolor": MUTED, "range": _reach(held)}
    least = 90 + max(60, 26 * len(runs)) * len(tasks)
    figure = Figure("replication", "", traces, look, 300, least)
    caption = (
        "Report split, all samples; change in accuracy against the same run unedited, with interval. In each task from left to "
        f"right: {labels[0]}, in which the set was found (diamond), then {listed(labels[1:])} (circles), in which nothing was "
        "searched and nothing tuned. Grey: 5th to 95th percentile of the matched random sets in the same run."
    )
    return Panel([figure], caption, [("feature set", SET_COLOUR), ("matched random sets", RANDOM)])


def _reach(held: Iterable[list[Row]]) -> list[float]:
    """Ends of the axis: every effect with its interval, and never less than a tenth to either side."""
    ends = [end for rows in held for row in rows for end in (row["effect"], row["low"], row["high"]) if end is not None]
    low, high = min([-0.1, *ends]), max([0.1, *ends])
    return [low - 0.06 * (high - low), high + 0.06 * (high - low)]


def _jitter(draw: int) -> float:
    """A place beside the task's for each draw: even steps in a shuffled order."""
    return ((draw * 7) % 20 / 19 - 0.5) * 0.44


def _marked(rows: list[Row], place: dict[str, int], what: str, shift: float, marker: dict[str, Any]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [place[row["task"]] + shift for row in rows],
        "y": [row["effect"] for row in rows],
        "marker": marker,
        "customdata": [[row["task"], row["baseline"], row["accuracy"], row["low"], row["high"], row["n"]] for row in rows],
        "hovertemplate": f"%{{customdata[0]}}, {what}: %{{y:+.3f}} [%{{customdata[3]:.3f}}, %{{customdata[4]:.3f}}]<br>"
        "%{customdata[1]:.2f} → %{customdata[2]:.2f}, n = %{customdata[5]}<extra></extra>",
    }


def manner_before_after(evidence: Evidence) -> Panel | None:
    """Share of answers given step by step, before and after each edit."""
    figures = []
    for purpose in claimed(evidence):
        rows = [
            row
            for row in effects(evidence, purpose.name, "set")
            if row["steps"] is not None and evidence.tasks[row["task"]].scoring == "generation"
        ]
        rows.sort(key=lambda row: list(evidence.tasks).index(row["task"]))
        if not rows:
            continue
        names = [row["task"] for row in rows]
        own, quiet = evidence.names.colour(purpose.model), {"type": "scatter", "mode": "markers", "y": names}
        span = [value for row in rows for value in (row["steps_baseline"], row["steps"], None)]
        joined = quiet | {"mode": "lines", "x": span, "y": [name for name in names for _ in range(3)], "hoverinfo": "skip"}
        ends: list[Trace] = [
            joined | {"line": {"color": MUTED}},
            quiet | {"x": [row["steps_baseline"] for row in rows], "marker": {"size": 10, "color": own}},
            quiet | {"x": [row["steps"] for row in rows], "marker": {"size": 10, "symbol": "diamond", "color": SET_COLOUR}},
        ]
        for trace, word in zip(ends[1:], ("unedited", "edited"), strict=True):
            trace["hovertemplate"] = f"%{{y}}, {word}: %{{x:.0%}}<extra></extra>"
        look = layout(
            {"range": [-0.04, 1.04], "tickformat": ".0%", "dtick": 0.5, "showgrid": True},
            {"autorange": "reversed", "ticks": ""},
        )
        figures.append(Figure(f"steps-{purpose.name}", heading(evidence, purpose), ends, look, 90 + 24 * len(names)))
    caption = "Share of answers given step by step: unedited model (circle), edited (diamond). Report split, all samples."
    return Panel(figures, caption, [("edited", SET_COLOUR)], 260) if figures else None
