"""What a paper printed of the same base model, beside what came out here (ours). No verdict reads any of it."""

from __future__ import annotations

from typing import NamedTuple

from featdiff import stats
from featdiff.config.published import Published, PublishedTask
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, SET, ZERO_TUNED
from featdiff.report.claims import Claims
from featdiff.report.quantities import effects
from featdiff.report.selectivity import choice
from featdiff.report.tables import Cell, Table, label
from featdiff.report.words import MISSING, count, interval, number, signed
from featdiff.stats import Interval

NOT_ASKED, NO_MODEL, NO_SET, NONE_FLIPPED = (
    "not asked here",
    "no contrast model here",
    "no feature set here",
    "no flipped sample",
)
"""Why a published figure has none beside it."""


class Pair(NamedTuple):
    """A published figure and ours, as shares of one."""

    task: str
    """Our name."""
    paper: PublishedTask
    printed: float
    questions: int | None
    """On how many it was measured, where that is known."""
    ours: Interval | str
    """Or why there is none."""
    confidence: float

    @property
    def difference(self) -> Interval | None:
        """Ours − published. Where it is known on how many questions the published share was measured, it has the binomial
        interval of that count, and the two samples are taken as independent; else it is taken as exact, and the interval is
        that of ours, moved."""
        if isinstance(self.ours, str):
            return None
        theirs = Interval(self.printed, self.printed, self.printed, 0)
        if self.questions:
            found = stats.binomial(round(self.printed * self.questions), self.questions, self.confidence)
            theirs = found._replace(value=self.printed)
        return stats.minus(self.ours, theirs)


class Beside(NamedTuple):
    """Everything that the page shows of it."""

    accuracy: list[tuple[str, Table]]
    changes: list[tuple[str, Table]]
    printed: int
    """Published figures."""
    measured: int
    """Those that have one of ours beside them."""
    equal: int
    """Those of the measured in whose interval of the difference zero lies."""


def beside(claims: Claims, published: Published | None) -> Beside | None:
    """Accuracy of the models by role, and the change of accuracy on flipped samples under the set, against the figures of
    ``report.paper_model``; None where no paper is named."""
    name = claims.params.paper_model
    if published is None or name is None:
        return None
    accuracy, changes = _accuracy(claims, published, name), _changes(claims, published, name)
    pairs = [pair for each, *_ in (*accuracy.values(), *changes.values()) for pair in each]
    apart = [found for pair in pairs if (found := pair.difference)]
    return Beside(
        [(title, _table(*each)) for title, each in accuracy.items()],
        [(title, _table(*each)) for title, each in changes.items()],
        len(pairs),
        len(apart),
        sum(found.low <= 0 <= found.high for found in apart),
    )


Tab = tuple[list[Pair], bool, str]
"""Pairs of one table, whether they are changes, and its caption."""


def _accuracy(claims: Claims, published: Published, name: str) -> dict[str, Tab]:
    evidence, confidence, tabs = claims.evidence, claims.params.confidence, {}
    for role, figures in published.models[name].accuracy:
        model: str | None = getattr(evidence.roles, role)
        right = claims.outcomes.model(model) if model else {}
        pairs = []
        for task, per_cent in figures.items():
            ours = claims.estimate([task], right) if task in evidence.tasks else None
            paper = published.tasks[task]
            found = ours or (NOT_ASKED if model else NO_MODEL)
            pairs.append(Pair(task, paper, per_cent / 100, paper.questions, found, confidence))
        shown = evidence.names.label(model) if model else role
        caption = f"Per cent of right answers, report split; here {shown}, one run, each task under its own scoring rule."
        tabs[shown] = (pairs, False, caption)
    return tabs


def _changes(claims: Claims, published: Published, name: str) -> dict[str, Tab]:
    evidence, found, tabs = claims.evidence, published.models[name], {}
    names, roles = evidence.names, evidence.roles
    for purpose, model, done, figures in (
        (ZERO_TUNED, roles.tuned, "zeroed", found.zeroed),
        (AMPLIFY_ORIGINAL, roles.original, "amplified", found.amplified),
    ):
        rows = {row["task"]: row for row in effects(evidence, purpose, SET, "flipped")}
        pairs = []
        for task, points in figures.items():
            ours: Interval | str = NO_SET if not evidence.effects else NONE_FLIPPED
            if task not in evidence.tasks:
                ours = NOT_ASKED
            elif row := rows.get(task):
                ours = Interval(row["effect"], row["low"], row["high"], row["n"])
            pairs.append(Pair(task, published.tasks[task], points / 100, None, ours, claims.params.confidence))
        how = choice(evidence, purpose, SET)
        edit = f"{how['edit']} at {how['positions'].replace('_', ' ')}, dose {how['dose']:g}" if how else "nothing"
        caption = (
            f"Change of accuracy in points, on samples that {names.label(roles.original)} fails and {names.label(roles.tuned)} "
            f"solves; how many the paper had is not known. Published: {found.features} features {done}. Here: "
            f"{evidence.set_size}, {edit}."
        )
        tabs[f"{names.label(model)}, set {done}"] = (pairs, True, caption)
    return tabs


def _table(pairs: list[Pair], changes: bool, caption: str) -> Table:
    write, rows = signed if changes else number, []
    for pair in pairs:
        asked = "" if changes else f"n = {count(pair.questions)}" if pair.questions else "n not stated"
        cells = [label(pair.paper.name, pair.task), Cell(write(100 * pair.printed, 1), asked)]
        if isinstance(pair.ours, str) or pair.difference is None:
            cells += [Cell(MISSING, str(pair.ours)), Cell(MISSING)]
        else:
            value, low, high, n, _ = pair.ours
            cells.append(Cell(write(100 * value, 1), f"{interval(100 * low, 100 * high, 1)}, n = {count(n)}"))
            value, low, high, *_ = pair.difference
            cells.append(Cell(signed(100 * value, 1), interval(100 * low, 100 * high, 1)))
        rows.append(cells)
    return Table(["task", "published", "here", "here − published"], rows, caption)
