"""A page on which any question can be read: the answers of every model, and under every edit, side by side.

It needs no server. The answers of one task are a script of their own, which the page fetches when that task is chosen, so that
it opens at once however many questions there are.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import Environment

from featdiff.intervention.purposes import SET, ZERO_TUNED
from featdiff.report.charts import SET_COLOUR
from featdiff.report.evidence import Evidence, Row
from featdiff.report.set_figures import edits

DATA = "browse"
UNEDITED = ("none", "noop")
"""Controls under which the answer is the model's own."""
MOST = 2000
"""Characters of a prompt or an answer that are shown."""


def sources(evidence: Evidence) -> list[Row]:
    """Columns of the page: every model, then every edit of which the answers are kept. ``before`` is the number of the column
    that an edit is held against, ``toward`` that of the model which it is to become like; ``shown`` from the start or not."""
    names, roles, columns = evidence.names, evidence.roles, list[Row]()
    for model in evidence.models:
        columns.append(
            {
                "key": [model],
                "label": names.label(model),
                "colour": names.colour(model),
                "shown": model in (roles.original, roles.tuned),
            }
        )
    numbers = {column["key"][0]: number for number, column in enumerate(columns)}
    controls = list(dict.fromkeys(row["control"] for row in evidence.edited if row["control"] not in UNEDITED))
    for edit in edits(evidence):
        for control in controls:
            if any((row["purpose"], row["control"]) == (edit.name, control) for row in evidence.edited):
                done = "amplified" if edit.sign > 0 else "zeroed"
                columns.append(
                    {
                        "key": [edit.name, control],
                        "label": f"{names.label(edit.model)}, {control.replace('_', ' ')} {done}",
                        "colour": SET_COLOUR if control == SET else "#777777",
                        "before": numbers[edit.model],
                        "toward": numbers[edit.toward],
                        "shown": (edit.name, control) == (ZERO_TUNED, SET),
                    }
                )
    return columns


def given_answers(evidence: Evidence) -> dict[str, dict[tuple[str, ...], Row]]:
    """By question the answer that counts of every model, and that under every edit."""
    given: dict[str, dict[tuple[str, ...], Row]] = {key: {} for key in evidence.questions}
    for model, rows in evidence.answers.items():
        for row in rows:
            if row["mode"] == evidence.primary_mode(row["task"]) and row["draw"] == 0:
                given[row["sample_id"]][(model,)] = row
    for row in evidence.edited:
        given[row["sample_id"]][row["purpose"], row["control"]] = row
    return given


def _answer(row: Row | None) -> list[Any] | int:
    """Text, 1 for right, 1 for unreadable; 0 where there is no answer."""
    if row is None:
        return 0
    text = row["completion"] or row["parsed"] or ""
    return [text[:MOST], int(row["correct"]), int(row["manner"] == "none")]


def shades(evidence: Evidence) -> dict[int, tuple[float, dict[str, Row]]]:
    """By feature of which tokens are kept, its largest value and its rows by question."""
    rows: dict[int, dict[str, Row]] = {}
    for row in evidence.token_values:
        rows.setdefault(row["feature_id"], {})[row["sample_id"]] = row
    described = {feature["feature_id"]: feature["largest"] for feature in evidence.described["features"]}
    return {k: (largest, rows[k]) for k, largest in described.items() if k in rows}


def _shaded(row: Row | None, largest: float) -> list[list[int]] | int:
    """Values at every token in percent of the largest, in the tuned model and the original; 0 where the feature is silent."""
    return [[round(100 * value / largest) for value in row[part]] for part in ("tuned", "original")] if row else 0


def pages(evidence: Evidence, environment: Environment) -> dict[str, str]:
    """``browse.html`` and, for each task, ``browse/<number>.js``."""
    columns, given, shaded = sources(evidence), given_answers(evidence), shades(evidence)
    tokens = {key: [row["answer_from"], row["tokens"]] for _, rows in shaded.values() for key, row in rows.items()}
    parts: dict[str, str] = {}
    listed = []
    for number, (name, task) in enumerate(evidence.tasks.items()):
        questions = [sample for sample in evidence.questions.values() if sample.task == name]
        listed.append({"name": name, "role": task.role, "n": len(questions)})
        part = {
            "questions": [[each.sample_id, each.prompt[:MOST], list(each.options), each.answer] for each in questions],
            "answers": [[_answer(given[each.sample_id].get(tuple(column["key"]))) for each in questions] for column in columns],
            "tokens": [tokens.get(each.sample_id, 0) for each in questions],
            "shades": [[_shaded(rows.get(each.sample_id), top) for each in questions] for top, rows in shaded.values()],
        }
        parts[f"{DATA}/{number}.js"] = f"featdiffPart({number}, {_json(part)});\n"
    index = {
        "tasks": listed,
        "columns": [{key: value for key, value in column.items() if key != "key"} for column in columns],
        "original": [column["key"] for column in columns].index([evidence.roles.original]),
        "tuned": [column["key"] for column in columns].index([evidence.roles.tuned]),
        "features": [[k, largest] for k, (largest, _) in shaded.items()],
    }
    page = environment.get_template("browse.html.j2").render(index=index, tasks=listed, features=list(shaded))
    return {"browse.html": page.lstrip()} | parts


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
