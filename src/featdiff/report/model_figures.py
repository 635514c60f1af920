"""Figures of the models: accuracy by task, manner of answering, training."""

from __future__ import annotations

from featdiff.report.charts import (
    INK,
    MANNER_COLOURS,
    MANNER_NAMES,
    SURFACE,
    Figure,
    Panel,
    Trace,
    error_bars,
    layout,
    line,
    lines,
    mixed,
    models_legend,
    role_bands,
    task_axis,
    title,
)
from featdiff.report.evidence import Evidence, Row, series
from featdiff.report.words import percent

MODE_NAMES = {
    "greedy": "Greedy",
    "sampled": "Sampled",
    "option_text": "Option text",
    "option_text_norm": "Option text, per character",
    "option_letter": "Option letter",
}
GROUP = 0.8
"""Width of the bars of one task together, in places of the axis."""


def report_rows(evidence: Evidence, model: str, mode: str) -> dict[str, Row]:
    """Accuracy rows of the report split by task."""
    rows = [row for row in evidence.accuracy[model] if row["split"] == "report" and row["mode"] == mode]
    return {row["task"]: row for row in rows}


def modes(evidence: Evidence) -> list[str]:
    """Scoring rules in use, in the order of ``MODE_NAMES``."""
    used = {row["mode"] for row in evidence.accuracy[evidence.roles.original]}
    return [mode for mode in MODE_NAMES if mode in used]


def accuracy(evidence: Evidence) -> list[tuple[str, Panel]]:
    """Grouped bars with intervals: each task under its own scoring rule where rules differ, then every rule."""
    own = {name: evidence.primary_mode(name) for name in evidence.tasks}
    panels = []
    if len(set(own.values())) > 1:
        rows = {
            model: {name: row for name, mode in own.items() if (row := report_rows(evidence, model, mode).get(name))}
            for model in evidence.accuracy
        }
        panels.append(("Each task's own rule", _bars(evidence, "own", rows)))
    for mode in modes(evidence):
        rows = {model: report_rows(evidence, model, mode) for model in evidence.accuracy}
        panels.append((MODE_NAMES[mode], _bars(evidence, mode, rows)))
    return panels


def _bars(evidence: Evidence, key: str, rows_of: dict[str, dict[str, Row]]) -> Panel:
    tasks = [name for name in evidence.tasks if name in rows_of[evidence.roles.original]]
    models, names = evidence.compared, evidence.names
    width = GROUP / len(models)
    traces: list[Trace] = []
    rings: list[Trace] = []
    for i, model in enumerate(models):
        shift, colour = (i - (len(models) - 1) / 2) * width, names.colour(model)
        for run in evidence.runs(model):
            rows = [rows_of[run][name] for name in tasks if name in rows_of[run]]
            values = [row["accuracy"] for row in rows]
            trace: Trace = {
                "name": names.label(run),
                "x": [tasks.index(row["task"]) + shift for row in rows],
                "y": values,
                "customdata": [[row["task"], row["low"], row["high"], row["n"], _either_rule(row)] for row in rows],
                "hovertemplate": f"{names.label(run)}, %{{customdata[0]}}: %{{y:.3f}} [%{{customdata[1]:.3f}}, "
                "%{customdata[2]:.3f}], n = %{customdata[3]}%{customdata[4]}<extra></extra>",
            }
            if run == model:
                bars = error_bars(values, [row["low"] for row in rows], [row["high"] for row in rows])
                traces.append(trace | {"type": "bar", "width": width * 0.92, "marker": {"color": colour}, "error_y": bars})
            else:
                ring = {"size": 6, "color": SURFACE, "opacity": 0.85, "line": {"width": 1.5, "color": colour}}
                rings.append(trace | {"type": "scatter", "mode": "markers", "marker": ring})
    chance = [(tasks.index(name), evidence.tasks[name].chance) for name in tasks if evidence.tasks[name].options]
    marks = role_bands(evidence.tasks, tasks)
    marks["shapes"] += [line(place - 0.42, place + 0.42, level, level, dash="dot", colour=INK) for place, level in chance]
    y = {"range": [0, 1.02], "title": title("accuracy"), "dtick": 0.25}
    least = 90 + 21 * max(3, len(models)) * len(tasks)
    figure = Figure(f"accuracy-{key}", "", traces + rings, layout(task_axis(tasks), y, **marks), 320, least)
    counts = sorted({row["n"] for rows in rows_of.values() for row in rows.values()})
    caption = f"Report split, n = {' to '.join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))} questions per bar."
    caption += " Rings: other training runs of the same arm, which differ from it in their seed alone." if rings else ""
    caption += " Dotted: a random guess among the options." if chance else ""
    return Panel([figure], caption, models_legend(models, names))


def _either_rule(row: Row) -> str:
    """Accuracy of generated answers by either rule of grading, and how many could not be read."""
    if row["mode"] not in ("greedy", "sampled"):
        return ""
    return f"<br>strict {row['strict']:.3f}, flexible {row['flexible']:.3f}, not readable {percent(row['parse_failures'])}"


def manner(evidence: Evidence) -> Panel | None:
    """How answers were given, as shares of all answers, one plot per model."""
    figures, names = [], evidence.names
    for model in evidence.compared:
        rows = report_rows(evidence, model, "greedy")
        tasks = [name for name in evidence.tasks if name in rows]
        if not tasks:
            return None
        shares = {key: [rows[name][key] or 0.0 for name in tasks] for key in ("steps", "foreign", "direct")}
        shares["none"] = [max(0.0, 1 - sum(parts)) for parts in zip(*shares.values(), strict=True)]
        traces: list[Trace] = [
            {
                "type": "bar",
                "orientation": "h",
                "x": values,
                "y": tasks,
                "marker": {"color": MANNER_COLOURS[key]},
                "hovertemplate": f"%{{y}}: {MANNER_NAMES[key]} %{{x:.0%}}<extra>{names.label(model)}</extra>",
            }
            for key, values in shares.items()
        ]
        x = {"range": [0, 1.02], "tickformat": ".0%", "tickvals": [0, 0.5, 1]}
        y = {"autorange": "reversed", "ticks": "", "showgrid": False}
        look = layout(x, y, barmode="stack", bargap=0.25)
        figures.append(Figure(f"manner-{model}", names.label(model), traces, look, 90 + 22 * len(tasks)))
    legend = [(MANNER_NAMES[key], colour) for key, colour in MANNER_COLOURS.items()]
    return Panel(figures, "Greedy answers on the report split.", legend, 240)


def training(evidence: Evidence) -> Panel | None:
    """The training curve of the base and of every arm, the other runs of an arm paler: its reward where it has one, else
    its loss."""
    figures, names = [], evidence.names
    for model in evidence.compared:
        quantity = "reward" if series(evidence.models[model].curves, "reward") else "loss"
        drawn = []
        for run in reversed(evidence.runs(model)):
            colour = names.colour(run) if run == model else mixed(names.colour(run), 0.45)
            if points := series(evidence.models[run].curves, quantity):
                drawn.append((names.label(run), colour, points))
        if drawn:
            figures.append(lines(f"training-{model}", f"{names.label(model)}: {quantity}", drawn, "step", quantity))
    return Panel(figures, "", [], 260) if figures else None
