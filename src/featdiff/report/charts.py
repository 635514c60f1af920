"""The parts figures are made of: colours with one meaning each, axes over tasks, a plain Plotly figure.

Figures are dictionaries in Plotly's schema. Colours written ``var(--name)`` are CSS variables of the page, which its
script fills in, so that one figure serves the light and the dark theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from featdiff.report.evidence import ROLES
from featdiff.report.names import Names
from featdiff.tasks.task import TaskInfo

MANNER_COLOURS = {"steps": "#8a6a50", "foreign": "#b89a7e", "direct": "#e0cfbb", "none": "var(--hair)"}
MANNER_NAMES = {
    "steps": "step by step",
    "foreign": "in the teacher's foreign wording",
    "direct": "at once",
    "none": "not readable",
}
ROLE_NAMES = {
    "train": "trained on",
    "find": "features found on",
    "heldout": "held out",
    "control": "control",
    "reported": "reported only",
}
SET_COLOUR = "#b4489c"
"""Of the feature set and of models edited with it, and of nothing else."""
CLASS_COLOURS = {"shared": "#4fae9b", "mixed": "#c0a6d6", "new": "#a83a3a"}
"""Classes of features that are not one model's own; those have the colour of their model."""
INK, MUTED, HAIR, SURFACE = "var(--ink)", "var(--muted)", "var(--hair)", "var(--surface)"

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One plot: Plotly traces and layout, with its size in pixels."""

    key: str
    title: str
    data: list[Trace]
    layout: dict[str, Any]
    height: int = 300
    min_width: int = 0
    """Narrower screens scroll sideways."""

    def content(self) -> dict[str, Any]:
        return {"data": self.data, "layout": self.layout}


@dataclass(frozen=True)
class Panel:
    """Figures side by side under one legend and caption; ``tile`` is the least width of one, in pixels."""

    figures: list[Figure]
    caption: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Label and colour."""
    tile: int = 640


def tile_for(figures: int, most: int) -> int:
    """Least width of a tile that sets ``figures`` in at most ``most`` columns with the fewest places empty."""
    columns = min(range(min(2, figures), most + 1), key=lambda wanted: (-figures % wanted, -wanted))
    return {1: 640, 2: 400, 3: 260, 4: 215}[columns]


def models_legend(models: Iterable[str], names: Names) -> list[tuple[str, str]]:
    return [(names.label(model), names.colour(model)) for model in models]


def layout(x: dict[str, Any], y: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A quiet layout without legend; axes are hairlines."""
    quiet = {"gridcolor": HAIR, "zerolinecolor": MUTED, "linecolor": HAIR, "automargin": True, "fixedrange": True}
    return {
        "xaxis": quiet | {"showgrid": False, "zeroline": False} | x,
        "yaxis": quiet | {"zeroline": False} | y,
        "margin": {"l": 48, "r": 12, "t": 12, "b": 36},
        "showlegend": False,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
        "hovermode": "closest",
        **more,
    }


def title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 8}


def task_axis(tasks: Sequence[str]) -> dict[str, Any]:
    """A numeric axis with one place per task, so that points can be set beside each other."""
    return {"tickvals": list(range(len(tasks))), "ticktext": list(tasks), "range": [-0.6, len(tasks) - 0.4], "ticks": ""}


def role_bands(tasks: dict[str, TaskInfo], names: Sequence[str]) -> dict[str, Any]:
    """Layout parts that name the role above each run of tasks and part the runs by a dotted line."""
    shapes: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for role in ROLES:
        places = [i for i, name in enumerate(names) if tasks[name].role == role]
        if not places:
            continue
        middle = (places[0] + places[-1]) / 2
        notes.append(note(ROLE_NAMES[role], x=middle, y=1.0, xref="x", yref="paper", yanchor="bottom"))
        if places[0] > 0:
            shapes.append(line(places[0] - 0.5, places[0] - 0.5, 0, 1.06, yref="paper", dash="dot", colour=HAIR))
    return {"shapes": shapes, "annotations": notes, "margin": {"l": 48, "r": 12, "t": 30, "b": 36}}


def note(text: str, **place: Any) -> dict[str, Any]:
    return {"text": text, "showarrow": False, "font": {"size": 11, "color": MUTED}, **place}


def line(
    x0: float, x1: float, y0: float, y1: float, *, dash: str = "solid", colour: str = MUTED, **refs: Any
) -> dict[str, Any]:
    return {"type": "line", "x0": x0, "x1": x1, "y0": y0, "y1": y1, "line": {"width": 1, "dash": dash, "color": colour}, **refs}


def error_bars(values: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None]) -> dict[str, Any]:
    """Asymmetric error bars from interval ends; no bar where an end is missing."""
    up = [0.0 if high is None else high - value for value, high in zip(values, highs, strict=True)]
    down = [0.0 if low is None else value - low for value, low in zip(values, lows, strict=True)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2, "width": 2.5, "color": INK}


def matrix(x: Sequence[Any], y: Sequence[Any], z: Sequence[Sequence[float | None]], hover: str) -> Trace:
    """A heat map of shares with its numbers written in: one hue from clear to strong, readable over both themes."""
    return {
        "type": "heatmap",
        "x": list(x),
        "y": list(y),
        "z": z,
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "rgba(47,127,208,0.05)"], [1, "rgba(47,127,208,0.75)"]],
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "texttemplate": "%{z:.2f}",
        "textfont": {"color": INK, "size": 12},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def mixed(colour: str, alpha: float) -> str:
    """``#rrggbb`` with transparency."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def lines(
    key: str, heading: str, drawn: list[tuple[str, str, list[tuple[float, float]]]], x: str, y: str, zero: bool = True
) -> Figure:
    """A small line plot; ``drawn`` holds name, colour and (x, y) points of each line."""
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(points) < 12 else "lines",
            "name": name,
            "x": [point[0] for point in points],
            "y": [point[1] for point in points],
            "line": {"color": colour, "width": 2},
            "hovertemplate": f"{name}: %{{y:.4g}} at %{{x}}<extra></extra>",
        }
        for name, colour, points in drawn
    ]
    rangemode = {"rangemode": "tozero"} if zero else {}
    return Figure(key, heading, traces, layout({"title": title(x)}, {"title": title(y), "nticks": 6} | rangemode), 240)
