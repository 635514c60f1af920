"""Figures of the models: accuracy by task, manner of answering, training."""

from __future__ import annotations

from featdiff.report.charts import (
    INK,
    MANNER_COLOURS,
    MANNER_NAMES,
    MODEL_COLOURS,
    MODEL_NAMES,
    Figure,
    Panel,
    Trace,
    error_bars,
    layout,
    line,
    lines,
    models_legend,
    role_bands,
    task_axis,
    title,
)
from featdiff.report.evidence import MODELS, Evidence, Row, series
from featdiff.report.words import percent

MODE_NAMES = {
    "greedy": "Greedy",
    "sampled": "Sampled",
    "option_text": "Option text",
    "option_text_norm": "Option text, per character",
    "option_letter": "Option letter",
}


def report_rows(evidence: Evidence, model: str, mode: str) -> dict[str, Row]:
    """Accuracy rows of the report split by task."""
    rows = [row for row in evidence.accuracy[model] if row["split"] == "report" and row["mode"] == mode]
    return {row["task"]: row for row in rows}


def modes(evidence: Evidence) -> list[str]:
    """Scoring rules in use, in the order of ``MODE_NAMES``."""
    used = {row["mode"] for row in evidence.accuracy["base"]}
    return [mode for mode in MODE_NAMES if mode in used]


def accuracy(evidence: Evidence) -> list[tuple[str, Panel]]:
    """Grouped bars with intervals: each task under its own scoring rule where rules differ, then every rule."""
    own = {name: evidence.primary_mode(name) for name in evidence.tasks}
    panels = []
    if len(set(own.values())) > 1:
        rows = {
            model: {name: row for name, mode in own.items() if (row := report_rows(evidence, model, mode).get(name))}
            for model in MODELS
        }
        panels.append(("Each task's own rule", _bars(evidence, "own", rows)))
    for mode in modes(evidence):
        panels.append(
            (MODE_NAMES[mode], _bars(evidence, mode, {model: report_rows(evidence, model, mode) for model in MODELS}))
        )
    return panels


def _bars(evidence: Evidence, key: str, rows_of: dict[str, dict[str, Row]]) -> Panel:
    names = [name for name in evidence.tasks if name in rows_of["base"]]
    width, traces = 0.26, []
    for i, model in enumerate(MODELS):
        rows = [rows_of[model][name] for name in names if name in rows_of[model]]
        values = [row["accuracy"] for row in rows]
        traces.append(
            {
                "type": "bar",
                "name": MODEL_NAMES[model],
                "x": [names.index(row["task"]) + (i - 1) * width for row in rows],
                "y": values,
                "width": width * 0.92,
                "marker": {"color": MODEL_COLOURS[model]},
                "error_y": error_bars(values, [row["low"] for row in rows], [row["high"] for row in rows]),
                "customdata": [[row["task"], row["low"], row["high"], row["n"], _either_rule(row)] for row in rows],
                "hovertemplate": f"{MODEL_NAMES[model]}, %{{customdata[0]}}: %{{y:.3f}} [%{{customdata[1]:.3f}}, "
                "%{customdata[2]:.3f}], n = %{customdata[3]}%{customdata[4]}<extra></extra>",
            }
        )
    chance = [(names.index(name), evidence.tasks[name].chance) for name in names if evidence.tasks[name].options]
    marks = role_bands(evidence.tasks, names)
    marks["shapes"] += [line(place - 0.42, place + 0.42, level, level, dash="dot", colour=INK) for place, level in chance]
    y = {"range": [0, 1.02], "title": title("accuracy"), "dtick": 0.25}
    figure = Figure(f"accuracy-{key}", "", traces, layout(task_axis(names), y, **marks), 320, 90 + 62 * len(names))
    counts = sorted({row["n"] for rows in rows_of.values() for row in rows.values()})
    caption = f"Report split, n = {' to '.join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))} questions per bar."
    caption += " Dotted: a random guess among the options." if chance else ""
    return Panel([figure], caption, models_legend(MODELS))


def _either_rule(row: Row) -> str:
    """Accuracy of generated answers by either rule of grading, and how many could not be read."""
    if row["mode"] not in ("greedy", "sampled"):
        return ""
    return f"<br>strict {row['strict']:.3f}, flexible {row['flexible']:.3f}, not readable {percent(row['parse_failures'])}"


def manner(evidence: Evidence) -> Panel | None:
    """How answers were given, as shares of all answers, one plot per model."""
    figures = []
    for model in MODELS:
        rows = report_rows(evidence, model, "greedy")
        names = [name for name in evidence.tasks if name in rows]
        if not names:
            return None
        shares = {key: [rows[name][key] or 0.0 for name in names] for key in ("steps", "foreign", "direct")}
        shares["none"] = [max(0.0, 1 - sum(parts)) for parts in zip(*shares.values(), strict=True)]
        traces: list[Trace] = [
            {
                "type": "bar",
                "orientation": "h",
                "x": values,
                "y": names,
                "marker": {"color": MANNER_COLOURS[key]},
                "hovertemplate": f"%{{y}}: {MANNER_NAMES[key]} %{{x:.0%}}<extra>{MODEL_NAMES[model]}</extra>",
            }
            for key, values in shares.items()
        ]
        x = {"range": [0, 1.02], "tickformat": ".0%", "tickvals": [0, 0.5, 1]}
        y = {"autorange": "reversed", "ticks": "", "showgrid": False}
        look = layout(x, y, barmode="stack", bargap=0.25)
        figures.append(Figure(f"manner-{model}", MODEL_NAMES[model], traces, look, 90 + 22 * len(names)))
    legend = [(MANNER_NAMES[key], colour) for key, colour in MANNER_COLOURS.items()]
    return Panel(figures, "Greedy answers on the report split.", legend, 240)


def training(evidence: Evidence) -> Panel | None:
    """Loss of pretraining and SFT, reward of GRPO."""
    figures = []
    for model, name, label in (
        ("base", "loss", "Pretraining loss"),
        ("sft", "loss", "SFT loss"),
        ("grpo", "reward", "GRPO reward"),
    ):
        points = series(evidence.models[model].curves, name)
        if points:
            figures.append(
                lines(f"training-{model}", label, [(MODEL_NAMES[model], MODEL_COLOURS[model], points)], "step", name)
            )
    return Panel(figures, "", [], 260) if figures else None
