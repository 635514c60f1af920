"""The features of the set one by one: a card with contexts, effect on the next token and positions, and tables over all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from featdiff.report.charts import Figure, Panel, Trace, error_bars, layout, models_legend
from featdiff.report.evidence import Evidence, Row
from featdiff.report.tables import Cell, Table
from featdiff.report.words import MISSING, interval, listed, moved, number, percent, signed

ORIGINAL, TUNED = "original", "tuned"
"""By which `describe` calls the two models that it reads."""
POSITIONS = {
    "prompt": "prompt<br>before",
    "prompt_last": "its last<br>token",
    "answer_first": "answer,<br>first",
    "answer_rest": "answer,<br>rest",
}
VERDICTS: dict[str, tuple[str, Literal["", "good", "bad"]]] = {
    "token": ("detects the token", "bad"),
    "context": ("needs its context", "good"),
    "undecided": ("undecided", ""),
    "untested": ("not tested", ""),
}
LEAST_CHANGE = 0.005
"""Smallest change of a probability that is named."""
MOST_CHIPS = 6
DEEPEST = 72
MOST_OPEN = 8
"""Cards open to view; the others unfold."""
MARKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


@dataclass(frozen=True)
class Piece:
    """Tokens of a context that are shown alike."""

    text: str
    tuned: int = 0
    """Depth of the shading in percent: the value in the tuned model."""
    original: int = 0
    """The same for the original."""
    said: bool = False
    """Part of an answer, not of a prompt."""
    note: str = ""


@dataclass(frozen=True)
class Context:
    source: str
    tuned: str
    """Largest value."""
    original: str
    """Value there."""
    pieces: list[Piece]


@dataclass(frozen=True)
class Chip:
    """A token with a number."""

    token: str
    note: str


@dataclass(frozen=True)
class Card:
    """One feature."""

    feature: int
    tags: list[str]
    shaded: bool
    """Whether the page of answers can shade tokens by it."""
    facts: list[str]
    contexts: list[Context]
    """The strongest of the corpus and of each task, by value."""
    further: list[Context]
    """The next ones, to unfold."""
    chips: list[tuple[str, list[Chip]]]
    """Labelled groups of tokens."""
    panel: Panel
    order: dict[str, float]
    """Numbers by which cards are sorted on the page."""
    twins: list[Card] = field(default_factory=list)
    """Features that tell the same: of their own, and folded away under this one."""


def visible(token: str) -> str:
    """A token as it can be seen: blanks and line ends as signs."""
    return token.translate(MARKS) or "∅"


def _read_in(evidence: Evidence) -> dict[str, str]:
    """The two models that are read, by what `describe` calls them."""
    return {ORIGINAL: evidence.roles.original, TUNED: evidence.roles.tuned}


def cards(evidence: Evidence) -> list[Card]:
    """One card per feature of the set, in the order of the set; features that are alike (`describe`) stand under the first."""
    known = {row["feature_id"]: row for row in evidence.features if row["fit"] == evidence.localize["fit"]}
    leaders: dict[int, Card] = {}
    for feature in evidence.described["features"]:
        card = _card(feature, known[feature["feature_id"]], evidence)
        leader = next((leaders[k] for k in feature["alike"] if k in leaders), None)
        if leader is None:
            leaders[card.feature] = card
        else:
            leader.twins.append(card)
    return list(leaders.values())


def _card(feature: Row, facts: Row, evidence: Evidence) -> Card:
    k, labels = feature["feature_id"], {key: evidence.names.label(model) for key, model in _read_in(evidence).items()}
    rows = [row for row in evidence.contexts if row["feature_id"] == k]
    rows.sort(key=lambda row: (row["rank"], row["source"] != "corpus", -row[TUNED][row["peak"]]))
    norm = f"MAS {' / '.join(map(number, facts['mas']))}" if facts["mas"] else f"NRN {number(facts['nrn'])}"
    return Card(
        feature=k,
        tags=[evidence.names.label(facts["feature_class"]), norm, _verdict(feature["lexical"])],
        shaded=any(row["feature_id"] == k for row in evidence.token_values),
        facts=_facts(feature, labels),
        contexts=[_context(row, feature["largest"], labels) for row in rows if row["rank"] == 1],
        further=[_context(row, feature["largest"], labels) for row in rows if row["rank"] > 1],
        chips=[(label, chips) for label, chips in _chips(feature) if chips],
        panel=Panel(_figures(feature, evidence), "", models_legend(_read_in(evidence).values(), evidence.names), 250),
        order={
            "largest": feature["largest"],
            "corpus": feature["corpus_rate"][TUNED],
            "last": (last["value"]["value"] if (last := _at(feature, TUNED, "prompt_last")) and last["value"] else 0.0),
        },
    )


def _facts(feature: Row, labels: dict[str, str]) -> list[str]:
    """What the numbers say, in a few sentences."""
    rates = feature["corpus_rate"]
    before, after = labels[ORIGINAL], labels[TUNED]
    said = [f"Fires on {percent(rates[TUNED])} of the corpus in {after}, on {percent(rates[ORIGINAL])} in {before}."]
    if last := [row for model in labels if (row := _at(feature, model, "prompt_last"))]:
        rate = moved(*(percent(row["rate"]["value"]) for row in last))
        value = moved(*(number(row["value"]["value"]) for row in last))
        said.append(f"At the last prompt token: {rate} of prompts, mean value {value} ({before} → {after}).")
    where = "where it is silent" if feature["lexical"]["silent"] else "at a silent place (it fires in every text)"
    ratios = [
        f"“{visible(row['token'])}” {percent(row['ratio']['value'])} [{percent(row['ratio']['low'])}, "
        f"{percent(row['ratio']['high'])}], n = {row['ratio']['n']}"
        for row in feature["lexical"]["tokens"]
        if row["ratio"]
    ]
    if ratios:
        said.append(
            f"Its top tokens put into neutral text, {where}, reach of its value in its own contexts: {'; '.join(ratios)}."
        )
    return said


def _verdict(lexical: Row) -> str:
    """The verdict in words, naming the tokens that it detects."""
    alone = [visible(row["token"]) for row in lexical["tokens"] if row["verdict"] == "token"]
    return f"detects {listed(alone)}" if alone else VERDICTS[lexical["verdict"]][0]


def _at(feature: Row, model: str, position: str, task: str | None = None) -> Row | None:
    wanted = (model, position, task)
    return next((row for row in feature["positions"] if (row["model"], row["position"], row["task"]) == wanted), None)


def _context(row: Row, largest: float, labels: dict[str, str]) -> Context:
    """Runs of tokens that look alike become one piece: most tokens of a sparse feature are silent."""

    def shown(i: int) -> Piece:
        after, before = row[TUNED][i], row[ORIGINAL][i]
        note = f"{labels[TUNED]} {number(after)}, {labels[ORIGINAL]} {number(before)}" if after or before else ""
        start = row["answer_from"]
        return Piece("", _share(after, largest), _share(before, largest), start is not None and i >= start, note)

    pieces = []
    for look, run in groupby(range(len(row["tokens"])), key=shown):
        text = "".join(row["tokens"][i].replace("\n", "⏎") for i in run)
        pieces.append(Piece(text, look.tuned, look.original, look.said, look.note))
    source = row["source"] if row["quantile"] is None else f"{row['source']}, {percent(row['quantile'])} quantile"
    return Context(source, number(row[TUNED][row["peak"]]), number(row[ORIGINAL][row["peak"]]), pieces)


def _share(value: float, largest: float) -> int:
    """Percent for a share of the largest value: never 0 for what fires, and text stays readable at the most."""
    return 0 if value <= 0 else max(8, min(DEEPEST, round(DEEPEST * value / largest)))


def _chips(feature: Row) -> Iterator[tuple[str, list[Chip]]]:
    for key, label in (("more_likely", "made more likely"), ("less_likely", "made less likely")):
        rows = [row for row in feature[key] if abs(row["change"]["value"]) >= LEAST_CHANGE][:MOST_CHIPS]
        yield label, [Chip(visible(row["token"]), moved(number(row["before"]), number(row["after"]))) for row in rows]
    for key, label in (("promoted", "promoted directly"), ("suppressed", "suppressed directly")):
        yield label, [Chip(visible(row["token"]), signed(row["logit"], 1)) for row in feature[key][:MOST_CHIPS]]


def figures(evidence: Evidence) -> Panel | None:
    """The figures of all cards."""
    drawn = [figure for feature in evidence.described["features"] for figure in _figures(feature, evidence)]
    models = _read_in(evidence)
    caption = (
        f"The own answers of {evidence.names.label(models[TUNED])} on the find split: mean over answers with interval, every "
        "task counting the same."
    )
    return Panel(drawn, caption, models_legend(models.values(), evidence.names), 260) if drawn else None


def _figures(feature: Row, evidence: Evidence) -> list[Figure]:
    k = feature["feature_id"]
    tasks = [task for task in evidence.tasks if _at(feature, TUNED, "prompt_last", task)]
    by_position = {label: (place, None) for place, label in POSITIONS.items()}
    by_task: dict[str, tuple[str, str | None]] = {task: ("prompt_last", task) for task in tasks}
    return [
        _bars(f"feature-{k}-rate", f"{k}: firing rate", feature, by_position, "rate", evidence),
        _bars(f"feature-{k}-value", f"{k}: mean value", feature, by_position, "value", evidence),
        _bars(f"feature-{k}-tasks", f"{k}: value at the last prompt token", feature, by_task, "value", evidence),
        _histogram(feature, evidence),
    ]


def _histogram(feature: Row, evidence: Evidence) -> Figure:
    """How often each value is taken in the corpus, on a log scale; silent tokens are left out."""
    spread, names = feature["histogram"], evidence.names
    bins = len(spread[TUNED])
    places = [spread["upper"] * (i + 0.5) / bins for i in range(bins)]
    traces: list[Trace] = [
        {
            "type": "bar",
            "name": names.label(model),
            "x": places,
            "y": spread[role],
            "marker": {"color": names.colour(model)},
            "opacity": 0.6,
            "hovertemplate": f"{names.label(model)}: %{{y}} tokens near %{{x:.2f}}<extra></extra>",
        }
        for role, model in _read_in(evidence).items()
    ]
    k = feature["feature_id"]
    y = {"type": "log", "dtick": 1}
    return Figure(
        f"feature-{k}-histogram", f"{k}: values in the corpus, tokens", traces, layout({}, y, barmode="overlay", bargap=0), 190
    )


def _bars(key: str, heading: str, feature: Row, places: dict[str, Any], quantity: str, evidence: Evidence) -> Figure:
    """Original and tuned model side by side at every place (label → position and task)."""
    traces: list[Trace] = []
    names = evidence.names
    for role, model in _read_in(evidence).items():
        rows = {label: _at(feature, role, *place) for label, place in places.items()}
        held = {label: row[quantity] for label, row in rows.items() if row and row[quantity]}
        values, lows, highs = ([row[end] for row in held.values()] for end in ("value", "low", "high"))
        traces.append(
            {
                "type": "bar",
                "name": names.label(model),
                "x": list(held),
                "y": values,
                "error_y": error_bars(values, lows, highs),
                "marker": {"color": names.colour(model)},
                "customdata": [row["n"] for row in held.values()],
                "hovertemplate": f"{names.label(model)}: %{{y:.3f}}, n = %{{customdata}}<extra></extra>",
            }
        )
    y = {"rangemode": "tozero", "nticks": 5} | ({"tickformat": ".0%"} if quantity == "rate" else {})
    return Figure(key, heading, traces, layout({"ticks": ""}, y, bargap=0.35, bargroupgap=0.1), 190)


def token_table(evidence: Evidence) -> Table | None:
    """Is each feature more than a detector of its tokens?"""
    rows = []
    for feature in evidence.described["features"]:
        for row in feature["lexical"]["tokens"]:
            verdict, mark = VERDICTS[row["verdict"]]
            rows.append(
                [
                    Cell(str(feature["feature_id"]), mark="label"),
                    Cell(visible(row["token"])),
                    _measured(row["original"], counted=True),
                    _measured(row["planted"], counted=True),
                    *(_measured(row[name], share=True) for name in ("ratio", "rate", "natural")),
                    Cell(verdict, mark=mark),
                ]
            )
    head = ["feature", "top token", "value in its own contexts", "value where planted", "planted ÷ own"]
    head += ["planting wakes it", "fires on it in the corpus", ""]
    caption = (
        "Top tokens: those at the feature's strongest contexts, in answers and in the corpus. Planted: in place of a random "
        "token of corpus texts in which the feature is silent. "
        f"Read in {evidence.names.label(evidence.roles.tuned)}."
    )
    return Table(head, rows, caption) if rows else None


def manner_tables(evidence: Evidence) -> list[tuple[str, Table]]:
    """Does a feature tell the manner of answering? For texts that show it, and for the models' own answers."""
    features = [*evidence.described["features"], {"feature_id": "set", **evidence.described["set"]}]
    captions = {
        "texts": "Corpus texts whose prompt holds an earlier question, answered in the manner that the text goes on in: here "
        "the manner can be known. Precision: share of texts in steps among those where it fires at the last prompt token.",
        "answers": "The model's own sampled answers (find split) to prompts that show no manner. Where it is drawn by lot, "
        "AUROC is 0.5 however well a feature stands for it. Within tasks: over pairs of questions of one task.",
    }
    models, labels = _read_in(evidence), {"texts": "Texts that show the manner", "answers": "Own answers"}
    tables = []
    for what, label in labels.items():
        rows = [
            [
                Cell(str(feature["feature_id"]), evidence.names.label(models[role]), "label"),
                Cell(percent(judged["fires"] / judged["prompts"]), f"n = {judged['prompts']}"),
                *(_measured(judged[name], share=True) for name in ("steps", "precision", "recall")),
                *(_measured(judged[name]) for name in ("auroc", "auroc_within_tasks")),
            ]
            for feature in features
            for role, judged in feature["manner"][what].items()
        ]
        head = ["feature", "fires", "answered in steps", "precision", "recall", "AUROC", "AUROC within tasks"]
        if rows:
            tables.append((label, Table(head, rows, captions[what])))
    return tables


def _measured(found: Row | None, *, share: bool = False, counted: bool = False) -> Cell:
    """A number with its interval, as a share or as it is, and where it is ``counted`` with its n."""
    if found is None:
        return Cell(MISSING)
    if share:
        return Cell(percent(found["value"]), f"[{percent(found['low'])}, {percent(found['high'])}]")
    return Cell(number(found["value"]), interval(found["low"], found["high"]) + (f", n = {found['n']}" if counted else ""))
