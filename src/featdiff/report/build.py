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

from featdiff.config.models import METHODS
from featdiff.config.published import Published
from featdiff.config.report import ReportParams
from featdiff.config.values import BASE
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, SET, ZERO_TUNED, Purpose
from featdiff.report import (
    battery,
    browse,
    crosscoder_figures,
    depth,
    dose_figures,
    feature_cards,
    feature_tables,
    forgetting,
    model_figures,
    probe_figures,
    published,
    set_figures,
    tables,
)
from featdiff.report.charts import MANNER_NAMES, SET_COLOUR, Panel
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence, Row
from featdiff.report.verdicts import Verdict
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
    runs: list[tuple[str, float]]
    """Label and level of the other training runs."""


@dataclass(frozen=True)
class Arm:
    """How one arm was trained."""

    label: str
    colour: str
    how: str
    runs: int


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
    evidence: Evidence,
    claims: Claims,
    verdicts: list[Verdict],
    rates: list[Row],
    params: ReportParams,
    profile: str,
    trace: Mapping[str, Any],
    parents: Mapping[str, str],
    paper: Published | None,
) -> dict[str, str]:
    """The report by file name: ``index.html`` with everything, and every figure once more by itself under ``figures/``, where
    all share one script. ``rates``: how often the rules are wrong. ``trace``: rows behind the numbers of verdicts
    (:mod:`featdiff.report.sources`). ``parents``: hashes of the artifacts it was made from. ``paper``: published figures, where
    ``params`` names a model of them."""
    environment = _environment()
    found = evidence.localize["status"] == "found"
    panels, cards = figures(evidence, params) | {"stitched": depth.figure(claims)}, feature_cards.cards(evidence)
    edits = {edit: set_figures.heading(evidence, edit) for edit in set_figures.edits(evidence)}
    index = environment.get_template("template.html.j2").render(
        params=params,
        profile=profile,
        seed=claims.seed,
        evidence=evidence,
        verdicts=verdicts,
        bars=headline(evidence, claims),
        base=evidence.models[BASE],
        roles={role: model and evidence.names.label(model) for role, model in evidence.roles},
        colours={role: model and evidence.names.colour(model) for role, model in evidence.roles},
        arms=arms(evidence),
        reason=next(verdict.evidence for verdict in verdicts if verdict.key == "necessary"),
        tables={
            "accuracy": tables.accuracy(evidence, claims),
            "audit": tables.audit(evidence),
            "crosscoders": tables.crosscoders(evidence),
            "classes": tables.classes(evidence),
            "specific": battery.specific(evidence),
            "nulls": feature_tables.nulls(evidence, params),
            "change": feature_tables.matched_change(evidence, params),
            "flipped": tables.flipped(evidence),
            "selection": tables.selection(evidence) if found else None,
            "tokens": feature_cards.token_table(evidence),
        },
        trajectory_tables=forgetting.tables(evidence, evidence.names),
        effect_tables=[(edits[edit], tables.effect(evidence, edit.name)) for edit in set_figures.claimed(evidence)],
        control_tables=[(name, battery.controls(evidence, edit.name)) for edit, name in edits.items()],
        battery={
            "replication": battery.replication(evidence),
            "singles": battery.singles(evidence),
            "sweep": battery.sweep(evidence),
            "seeds": battery.seeds(evidence),
            "errors": battery.errors(rates),
        },
        sensitivity_tables=battery.sensitivity(evidence),
        cards={"open": cards[: feature_cards.MOST_OPEN], "folded": cards[feature_cards.MOST_OPEN :]},
        manner_tables=feature_cards.manner_tables(evidence),
        probe_sentences=probe_figures.sentences(evidence, params.min_effect),
        beside=published.beside(claims, paper),
        paper=paper,
        panels=panels,
        examples=examples(evidence, claims, params.max_samples_shown),
        trace=trace,
        parents=parents,
    )
    alone = environment.get_template("figure.html.j2")
    library = f'window.plotlyPacked = "{environment.globals["plotly"]}";'
    return (
        {"index.html": index.lstrip(), "figures/plotly.js": library}
        | browse.pages(evidence, environment)
        | {f"figures/{name}.html": alone.render(name=name, panel=panel).lstrip() for name, panel in panels.items() if panel}
    )


def figures(evidence: Evidence, params: ReportParams) -> dict[str, Panel | list[tuple[str, Panel]] | None]:
    """Every figure of the report by name: a panel, labelled panels of which one shows at a time, or nothing to show."""
    return {
        "accuracy": model_figures.accuracy(evidence),
        "manner": model_figures.manner(evidence),
        "training": model_figures.training(evidence),
        **forgetting.figures(evidence, evidence.names),
        "curves": crosscoder_figures.curves(evidence),
        "nrn": crosscoder_figures.nrn(evidence),
        "mas": crosscoder_figures.mas(evidence),
        "trajectories": crosscoder_figures.trajectories(evidence),
        "overlaps": crosscoder_figures.overlaps(evidence),
        "overlap-size": crosscoder_figures.overlap_against_size(evidence, params.early_share),
        "scores": set_figures.scores(evidence),
        "features": feature_cards.figures(evidence),
        "probes": probe_figures.probes(evidence),
        "tuning": dose_figures.tuning(evidence),
        "lengths": dose_figures.lengths(evidence),
        "effects": set_figures.effect_strips(evidence),
        "replication": set_figures.replication(evidence),
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
        "browse_style": Markup((HERE / "browse.css").read_text(encoding="utf-8")),
        "browse_script": Markup((HERE / "browse.js").read_text(encoding="utf-8")),
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


def arms(evidence: Evidence) -> list[Arm]:
    """Every arm once, those with a role first."""
    names = evidence.names
    return [
        Arm(names.label(model), names.colour(model), _how(evidence.arms[model].method), len(evidence.runs(model)))
        for model in evidence.compared
        if model in evidence.arms
    ]


def headline(evidence: Evidence, claims: Claims) -> list[Bar]:
    """Mean accuracy away from math: the models with a role and the two edits of the feature set, each with the other training
    runs of its arm."""
    names, outcomes, tuned = evidence.names, claims.outcomes, evidence.runs(evidence.roles.tuned)
    groups = [
        (names.colour(model), {names.label(run): outcomes.model(run) for run in evidence.runs(model)})
        for model in evidence.roles.models
    ]
    edits = set_figures.edits(evidence)
    for kind in ([edit for edit in edits if edit.sign < 0 and edit.model in tuned], [edit for edit in edits if edit.sign > 0]):
        groups.append((SET_COLOUR, {_edited(evidence, edit): outcomes.edited(edit.name, "set") for edit in kind}))
    bars = []
    for colour, runs in groups:
        levels = [(label, level) for label, right in runs.items() if (level := claims.estimate(evidence.far, right))]
        if levels:
            (label, level), *others = levels
            bars.append(Bar(label, colour, level, [(name, other.value) for name, other in others]))
    return bars


def _edited(evidence: Evidence, edit: Purpose) -> str:
    return f"{evidence.names.label(edit.model)}, set {'amplified' if edit.sign > 0 else 'zeroed'}"


def examples(evidence: Evidence, claims: Claims, most: int) -> list[Example]:
    """Up to ``most`` questions away from math, by turns, first those that the tuned model solves and the original fails."""
    flipped, names, given = claims.outcomes.flipped(), evidence.names, browse.given_answers(evidence)
    queues = []
    for task in evidence.far:
        ids = [key for key, sample in evidence.questions.items() if sample.task == task and given[key]]
        queues.append(sorted(ids, key=lambda key: (key not in flipped, key)))
    turns = [queue[i] for i in range(most) for queue in queues if i < len(queue)]
    shown: list[tuple[tuple[str, ...], str, str]] = [
        ((model,), names.label(model), names.colour(model)) for model in evidence.roles.models
    ]
    shown += [
        ((edit.name, SET), _edited(evidence, edit), SET_COLOUR)
        for edit in set_figures.edits(evidence)
        if edit.name in (ZERO_TUNED, AMPLIFY_ORIGINAL)
    ]
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
                for source, label, colour in shown
                for row in filter(None, [given[key].get(source)])
            ],
        )
        for key in turns[:most]
    ]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + " …"


def _how(method: str) -> str:
    """What a method is, as the class of its numbers says."""
    said = str(METHODS[method].__doc__).strip().rstrip(".")
    return said[0].lower() + said[1:]
