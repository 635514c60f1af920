"""The pages themselves: figures, tables and words put into HTML files that open from disk without a network."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from featdiff.config.params import ReportParams
from featdiff.report import battery, crosscoder_figures, feature_cards, model_figures, paper, set_figures, tables
from featdiff.report.charts import MANNER_NAMES, MODEL_COLOURS, MODEL_NAMES, SET_COLOUR, Panel
from featdiff.report.evidence import MODELS, Evidence
from featdiff.report.verdicts import Judge, Verdict
from featdiff.report.words import compact, count, interval, listed, number, percent, signed, things
from featdiff.stats import Interval

HERE = Path(__file__).parent
MOST_CHARS = 1200


@dataclass(frozen=True)
class Bar:
    """One bar of the headline chart."""

    label: str
    colour: str
    level: Interval


@dataclass(frozen=True)
class Answer:
    label: str
    colour: str
    text: str
    correct: bool
    manner: str


@dataclass(frozen=True)
class Example:
    task: str
    prompt: str
    options: tuple[str, ...]
    reference: str
    answers: list[Answer]


def render(
    evidence: Evidence, judge: Judge, verdicts: list[Verdict], params: ReportParams, profile: str, parents: Mapping[str, str]
) -> dict[str, str]:
    """The report as HTML documents by file name: ``index.html`` with everything, and every figure once more by itself
    under ``figures/``. ``parents`` are the hashes of the artifacts it was made from."""
    environment = _environment()
    found = evidence.localize["status"] == "found"
    panels, cards = figures(evidence, params), feature_cards.cards(evidence)
    index = environment.get_template("template.html.j2").render(
        params=params,
        profile=profile,
        seed=judge.seed,
        evidence=evidence,
        verdicts=verdicts,
        bars=headline(evidence, judge),
        base=evidence.models["base"],
        tables={
            "accuracy": tables.accuracy(evidence, judge),
            "audit": tables.audit(evidence),
            "crosscoders": tables.crosscoders(evidence),
            "classes": tables.classes(evidence),
            "specific": battery.specific(evidence),
            "flipped": tables.flipped(evidence),
            "selection": tables.selection(evidence) if found else None,
            "tokens": feature_cards.token_table(evidence),
        },
        effect_tables=[
            (label, table) for purpose, label in set_figures.PURPOSES.items() if (table := tables.effect(evidence, purpose))
        ],
        control_tables=[
            (name, table) for purpose, name in set_figures.PURPOSES.items() if (table := battery.controls(evidence, purpose))
        ],
        battery={"singles": battery.singles(evidence), "sweep": battery.sweep(evidence), "seeds": battery.seeds(evidence)},
        sensitivity_tables=battery.sensitivity(evidence),
        cards={"open": cards[: feature_cards.MOST_OPEN], "folded": cards[feature_cards.MOST_OPEN :]},
        manner_tables=feature_cards.manner_tables(evidence),
        paper_tables=_published(evidence, params),
        panels=panels,
        examples=examples(evidence, judge, params.max_samples_shown),
        parents=parents,
    )
    alone = environment.get_template("figure.html.j2")
    return {"index.html": index.lstrip()} | {
        f"figures/{name}.html": alone.render(name=name, panel=panel).lstrip() for name, panel in panels.items() if panel
    }


def figures(evidence: Evidence, params: ReportParams) -> dict[str, Panel | list[tuple[str, Panel]] | None]:
    """Every figure of the report by name: a panel, labelled panels of which one shows at a time, or nothing to show."""
    return {
        "accuracy": model_figures.accuracy(evidence),
        "manner": model_figures.manner(evidence),
        "training": model_figures.training(evidence),
        "curves": crosscoder_figures.curves(evidence),
        "nrn": crosscoder_figures.nrn(evidence),
        "mas": crosscoder_figures.mas(evidence),
        "trajectories": crosscoder_figures.trajectories(evidence),
        "overlaps": crosscoder_figures.overlaps(evidence),
        "overlap-size": crosscoder_figures.overlap_against_size(evidence, params.early_share),
        "scores": set_figures.scores(evidence),
        "features": feature_cards.figures(evidence),
        "tuning": set_figures.tuning(evidence),
        "doses": set_figures.doses(evidence),
        "effects": set_figures.effect_strips(evidence),
        "steps": set_figures.manner_before_after(evidence),
    }


def _environment() -> Environment:
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    writers = (number, signed, percent, count, compact, listed)
    environment.filters |= {writer.__name__: writer for writer in writers} | {"json": _embedded}
    environment.globals |= {
        "interval": interval,
        "things": things,
        "style": Markup((HERE / "style.css").read_text(encoding="utf-8")),
        "script": Markup((HERE / "page.js").read_text(encoding="utf-8")),
        "plotly": base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
    }
    return environment


def _embedded(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)
    return Markup(text.replace("<", "\\u003c"))


def _plain(value: Any) -> Any:
    """A number of numpy as Python's own."""
    return value.item()


def headline(evidence: Evidence, judge: Judge) -> list[Bar]:
    """Mean accuracy away from math: the three models, and the two edits of the feature set."""
    levels = [(MODEL_NAMES[model], MODEL_COLOURS[model], judge.outcomes.model(model)) for model in MODELS]
    levels += [
        ("GRPO, set zeroed", SET_COLOUR, judge.outcomes.edited("zero_grpo", "set")),
        ("base, set amplified", SET_COLOUR, judge.outcomes.edited("amplify_base", "set")),
    ]
    found = [(label, colour, judge.estimate(evidence.far, right)) for label, colour, right in levels]
    return [Bar(label, colour, level) for label, colour, level in found if level]


def _published(evidence: Evidence, params: ReportParams) -> list[tables.Table]:
    if params.paper_model is None:
        return []
    return [paper.accuracies(evidence, params.paper_model), paper.interventions(evidence, params.paper_model)]


def examples(evidence: Evidence, judge: Judge, most: int) -> list[Example]:
    """Up to ``most`` questions away from math, tasks in turn, those first that GRPO solves and the base fails."""
    flipped = judge.outcomes.flipped()
    given: dict[str, dict[str, dict[str, Any]]] = {}
    for model in MODELS:
        for row in evidence.answers[model]:
            if row["mode"] == evidence.primary_mode(row["task"]) and row["draw"] == 0:
                given.setdefault(row["sample_id"], {})[model] = row
    for row in evidence.edited:
        if row["arm"] == "set":
            given.setdefault(row["sample_id"], {})[row["purpose"]] = row
    queues = []
    for task in evidence.far:
        ids = [key for key, sample in evidence.questions.items() if sample.task == task and key in given]
        queues.append(sorted(ids, key=lambda key: (key not in flipped, key)))
    turns = [queue[i] for i in range(most) for queue in queues if i < len(queue)]
    shown = [(model, MODEL_NAMES[model], MODEL_COLOURS[model]) for model in MODELS]
    shown += [("zero_grpo", "GRPO, set zeroed", SET_COLOUR), ("amplify_base", "base, set amplified", SET_COLOUR)]
    return [
        Example(
            task=evidence.questions[key].task,
            prompt=evidence.questions[key].prompt[:MOST_CHARS],
            options=evidence.questions[key].options,
            reference=evidence.questions[key].answer,
            answers=[
                Answer(
                    label,
                    colour,
                    _cut(row["completion"] or row["parsed"] or ""),
                    row["correct"],
                    MANNER_NAMES.get(row["manner"], ""),
                )
                for arm, label, colour in shown
                for row in filter(None, [given[key].get(arm)])
            ],
        )
        for key in turns[:most]
    ]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + " …"
