"""Is the dictionary needed to read the manner? AUC of every probe, and a sentence read off it by rule (docs/method.md, 11)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from featdiff.report.charts import INK, MUTED, SET_COLOUR, Figure, Panel, Trace, error_bars, layout, line, tile_for, title
from featdiff.report.evidence import Evidence, Row
from featdiff.report.words import interval, listed, number, percent, signed, things

DENSE, DIRECTION, SET = "dense", "mean_difference", "set"
"""By which `describe` calls these probes; the others are ``features_<k>`` and ``random_<k>``."""
LARGELY = 0.5
"""Where the shares of step-by-step answers of two models differ by this much, to tell the manner is to tell the models."""
AS_WELL, WORSE, OPEN = "as well", "not as well", "cannot be told"


def probes(evidence: Evidence) -> Panel | None:
    """AUC of every probe with its interval, one plot for each group of models."""
    groups = [(rows, f"probes-{number_}") for number_, rows in enumerate(_groups(evidence)) if not rows[0]["reason"]]
    figures = [_figure(evidence, rows, key) for rows, key in groups]
    caption = (
        "AUC at the last token of the prompt, find split, of logistic regressions asked about a task that they were not fitted "
        "on (features, direction and coefficients come from the other tasks): mean over tasks, with Student's t interval over "
        "them. Dotted: chance, and the whole residual stream. Random dictionary: never trained, each feature as often silent."
    )
    return Panel(figures, caption, [("the feature set", SET_COLOUR)], tile_for(len(figures), 3)) if figures else None


def _groups(evidence: Evidence) -> Iterator[list[Row]]:
    for _, rows in groupby(evidence.probes, key=lambda row: (row["of"], row["models"])):
        yield list(rows)


def _figure(evidence: Evidence, rows: list[Row], key: str) -> Figure:
    shown = rows[::-1]  # a category axis is filled from below
    auc = [row["auc"] for row in shown]
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "x": auc,
        "y": [_name(row) for row in shown],
        "error_x": error_bars(auc, [row["auc_low"] for row in shown], [row["auc_high"] for row in shown]),
        "marker": {"size": 8, "color": [SET_COLOUR if row["probe"] == SET else INK for row in shown]},
        "customdata": [[row["accuracy"], row["minus_dense"]] for row in shown],
        "hovertemplate": "%{y}: AUC %{x:.3f}, balanced accuracy %{customdata[0]:.3f}, "
        "minus the whole stream %{customdata[1]:+.3f}<extra></extra>",
    }
    marks = {0.5: MUTED} | {row["auc"]: INK for row in rows if row["probe"] == DENSE}
    look = layout({"title": title("AUC"), "range": [min(0.4, *auc), 1.03]}, {"type": "category", "ticks": ""})
    look["shapes"] = [line(at, at, 0, 1, yref="paper", dash="dot", colour=colour) for at, colour in marks.items()]
    first = rows[0]
    heading = f"{_heading(evidence, first)} (n = {first['n']}, {things(first['tasks'], 'task')})"
    return Figure(key, heading, [trace], look, 60 + 24 * len(rows))


def _heading(evidence: Evidence, row: Row) -> str:
    models = listed([evidence.names.label(model) for model in _models(evidence, row)])
    return f"Own answers of {models}" if row["of"] == "answers" else f"Texts that show the manner, read in {models}"


def _models(evidence: Evidence, row: Row) -> list[str]:
    return [model for part in row["models"].split(" + ") if (model := dict(evidence.roles)[part])]


def _name(row: Row) -> str:
    kind, _, count = row["probe"].partition("_")
    if kind in ("features", "random"):
        return things(int(count), "feature") + (" of a random dictionary" if kind == "random" else "")
    named = {DENSE: "whole stream", SET: f"the set ({row['columns']})", DIRECTION: "tuned − original, one direction"}
    return named[row["probe"]]


def sentences(evidence: Evidence, margin: float) -> list[str]:
    """For each group of models what its probes say. A probe reads the manner *as well* as the whole stream if the interval of
    its difference of AUC stays above −``margin``, *not as well* if it ends below 0; else it cannot be told."""
    return [f"{_heading(evidence, rows[0])}: {_sentence(evidence, rows, margin)}" for rows in _groups(evidence)]


def _sentence(evidence: Evidence, rows: list[Row], margin: float) -> str:
    first = rows[0]
    if first["reason"]:
        return (
            f"{first['reason']} ({percent(first['steps'])} of {first['n']} step by step; enough of both in "
            f"{things(first['tasks'], 'task')}), so no probe was asked."
        )
    held = {row["probe"]: row for row in rows}
    dense = held[DENSE]
    said = f"the whole residual stream reads it with AUC {number(dense['auc'])} {interval(dense['auc_low'], dense['auc_high'])}"
    if dense["auc_low"] <= 0.5:
        return f"{said}, not better than chance, so this says nothing of the dictionary."
    most = max(int(probe.partition("_")[2]) for probe in held if probe.startswith("features_"))
    asked = [f"features_{most}", f"random_{most}", *(probe for probe in (SET, DIRECTION) if probe in held)]
    stands = {probe: _standing(held[probe], margin) for probe in asked}
    parts = [f"{_name(held[probe])}: {_told(held[probe], stands[probe])}" for probe in asked]
    return f"{said}; {'; '.join(parts)}. {_needed(stands, most)}{_which_model(evidence, first)}"


def _standing(row: Row, margin: float) -> str:
    if row["minus_dense_low"] >= -margin:
        return AS_WELL
    return WORSE if row["minus_dense_high"] < 0 else OPEN


def _told(row: Row, standing: str) -> str:
    difference = f"difference {signed(row['minus_dense'])} {interval(row['minus_dense_low'], row['minus_dense_high'])}"
    return f"{standing} ({difference})"


def _needed(stands: dict[str, str], most: int) -> str:
    without = [stands[probe] for probe in (f"random_{most}", DIRECTION) if probe in stands]
    if AS_WELL in without:
        return "The dictionary is not needed to read it."
    if stands[f"features_{most}"] == AS_WELL and set(without) == {WORSE}:
        return "Of what was tried, only the dictionary reads it off so few numbers."
    return "Whether the dictionary is needed for that is undecided."


def _which_model(evidence: Evidence, row: Row) -> str:
    """That a probe over several models has largely to tell which one it reads, where their answers say so."""
    models = row["models"].split(" + ")
    alone = {other["models"]: other["steps"] for other in evidence.probes if other["of"] == row["of"]}
    shares = [alone[model] for model in models]
    if len(models) == 1 or max(shares) - min(shares) < LARGELY:
        return ""
    labels = [evidence.names.label(model) for model in _models(evidence, row)]
    steps = [f"{label} {percent(share)}" for label, share in zip(labels, shares, strict=True)]
    return f" Here the manner is largely which model it is (step by step: {listed(steps)})."
