"""Published figures of the study under test (Shi et al., ACL 2026, arXiv 2604.25011), beside ours."""

from __future__ import annotations

import re

from featdiff.report.charts import MODEL_NAMES
from featdiff.report.evidence import MODELS, Evidence
from featdiff.report.model_figures import report_rows
from featdiff.report.quantities import effects
from featdiff.report.tables import Cell, Table
from featdiff.report.words import MISSING, interval, number, signed

SUITES = {
    "MATH500": "math500",
    "AIME24": "aime24",
    "AIME25": "aime25",
    "OBQA": "openbookqa",
    "CSQA": "commonsenseqa",
    "HeadQA": "headqa",
    "SciQ": "sciq",
    "ARC-C": "arcchallenge",
    "LogiQA": "logiqa",
    "PIQA": "piqa",
}

_ACCURACY_OF = ("MATH500", "AIME24", "AIME25", "OBQA", "CSQA", "SciQ", "ARC-C")
ACCURACY = {
    "Qwen3-4B": {
        "base": (26.0, 13.3, 0.0, 23.6, 20.1, 78.5, 36.0),
        "sft": (68.4, 13.3, 13.3, 25.8, 19.6, 51.8, 34.4),
        "grpo": (77.0, 26.7, 20.0, 27.2, 50.5, 89.5, 39.3),
    },
    "Qwen2.5-7B": {
        "base": (40.0, 10.0, 3.3, 28.4, 77.6, 86.9, 41.9),
        "sft": (69.2, 13.3, 10.0, 26.4, 30.1, 79.4, 37.0),
        "grpo": (71.4, 20.0, 13.3, 32.8, 76.1, 90.7, 42.5),
    },
}

_EFFECTS_OF = ("OBQA", "CSQA", "HeadQA", "SciQ", "ARC-C", "LogiQA", "PIQA")
EFFECTS = {
    "Qwen3-4B": {
        "zero_grpo": (-46.2, -43.9, -21.2, -14.0, -33.3, -24.5, -17.6),
        "amplify_base": (36.3, 36.0, 21.2, 38.0, 33.3, 23.3, 28.2),
    },
    "Qwen2.5-7B": {
        "zero_grpo": (-21.9, -24.4, -23.8, -44.4, -20.0, -24.0, -11.8),
        "amplify_base": (12.5, 24.4, 14.3, 55.6, 40.0, 24.0, 32.9),
    },
}


def task_of(evidence: Evidence, suite: str) -> str | None:
    """Our task for one of the paper's suites, whatever its spelling (``arc_challenge`` for ARC-C)."""
    return next((name for name in evidence.tasks if re.sub(r"[^a-z0-9]", "", name.lower()) == SUITES[suite]), None)


def accuracies(evidence: Evidence, paper_model: str) -> Table:
    """Accuracy in the paper and here (%), by suite."""
    rows = []
    for i, suite in enumerate(_ACCURACY_OF):
        cells = [Cell(suite, mark="label")]
        task = task_of(evidence, suite)
        for model in MODELS:
            ours = report_rows(evidence, model, evidence.primary_mode(task)).get(task) if task else None
            cells.append(Cell(number(ACCURACY[paper_model][model][i], 1)))
            cells.append(
                Cell(
                    number(100 * ours["accuracy"], 1), f"{interval(100 * ours['low'], 100 * ours['high'], 1)}, n = {ours['n']}"
                )
                if ours
                else Cell(MISSING)
            )
        rows.append(cells)
    head = ["%", *(f"{MODEL_NAMES[model]}, {who}" for model in MODELS for who in ("paper", "here"))]
    return Table(head, rows, f"Accuracy of {paper_model} as published, and here.")


def interventions(evidence: Evidence, paper_model: str) -> Table:
    """Change on flipped samples in the paper and here (points), by suite."""
    rows = []
    for i, suite in enumerate(_EFFECTS_OF):
        cells = [Cell(suite, mark="label")]
        task = task_of(evidence, suite)
        for purpose, published in EFFECTS[paper_model].items():
            ours = next((row for row in effects(evidence, purpose, "set", "flipped") if row["task"] == task), None)
            cells.append(Cell(signed(published[i], 1)))
            cells.append(
                Cell(signed(100 * ours["effect"], 1), f"{interval(100 * ours['low'], 100 * ours['high'], 1)}, n = {ours['n']}")
                if ours
                else Cell(MISSING)
            )
        rows.append(cells)
    head = ["points", "RL zeroed, paper", "GRPO zeroed, here", "base amplified, paper", "base amplified, here"]
    return Table(head, rows, "Change in accuracy on the samples that base fails and RL solves.")
