"""Accuracy over training, and against the KL divergence from the base: do the arms still differ when they are compared at
equal accuracy on math, or at equal divergence?

RL's Razor (Shenfeld et al., arXiv 2509.04259) says that forgetting follows the forward divergence on the training task,
whatever the method; arXiv 2607.01763 and 2607.04364 speak against it. Here every kept checkpoint of every run is one point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featdiff import stats
from featdiff.config.values import BASE
from featdiff.report.charts import Figure, Panel, Trace, error_bars, layout, line, title
from featdiff.report.evidence import Evidence
from featdiff.report.names import Names
from featdiff.report.tables import Cell, Table, label
from featdiff.report.trajectories import (
    BOOTSTRAP,
    DIRECTIONS,
    Measure,
    Point,
    accuracy,
    common_level,
    difference,
    losses,
    reach,
    trajectories,
)
from featdiff.report.words import MISSING, change, interval, listed, number, percent, short, signed, things
from featdiff.stats import Interval

FEWEST_RUNS, FEWEST_POINTS = 3, 8
"""Of fewer runs there is nothing to resample, and through fewer points a quadratic says nothing."""
ANSWERS = {"forward": "the base's answers", "reverse": "the checkpoint's own answers"}
"""Along which a divergence is taken."""


@dataclass(frozen=True)
class Comparison:
    """What figures and tables share: the runs, and the tasks on which they are compared."""

    runs: dict[str, list[Point]]
    math: list[str]
    away: list[str]
    losable: list[str]
    """Tasks away from math that the base answers better than a random guess does, by the whole interval."""
    tuned: list[str]
    """Runs of the tuned model and its repeats, as far as there are checkpoints of them."""
    contrast: list[str]

    @property
    def base(self) -> Point:
        return next(iter(self.runs.values()))[0]

    @property
    def lost_on(self) -> list[str]:
        """Tasks on which loss is measured: those where there is something to lose, or all away from math."""
        return self.losable or self.away

    def math_accuracy(self, point: Point) -> float:
        return point.accuracy(self.math)

    def math_kl(self, point: Point) -> float:
        return point.divergence(self.math)

    def shared(self, measure: Measure) -> float | None:
        """The largest value of ``measure`` that every run of the roles reaches (every run, where no role has checkpoints)."""
        return common_level([self.runs[run] for run in [*self.tuned, *self.contrast] or self.runs], measure)

    def at_shared(self, measure: Measure) -> dict[str, Point]:
        """Where each run first reaches that value; runs that do not are absent."""
        level = self.shared(measure)
        places = {run: None if level is None else reach(points, measure, level) for run, points in self.runs.items()}
        return {run: place for run, place in places.items() if place is not None}


def comparison(evidence: Evidence) -> Comparison | None:
    """None without checkpoints, or without tasks on either side."""
    asked = {row["task"] for row in evidence.checkpoints["samples"]}
    math, away = ([task for task in names if task in asked] for names in (evidence.named("train"), evidence.far))
    if not math or not away:
        return None
    base = {
        row["sample_id"]: row["correct"]
        for row in evidence.answers[BASE]
        if row["draw"] == 0 and row["mode"] == evidence.primary_mode(row["task"])
    }
    runs = trajectories(evidence.checkpoints, base)
    start = next(iter(runs.values()))[0]
    losable = [task for task in away if accuracy(start, [task]).low > evidence.tasks[task].chance]
    tuned, contrast = (
        [run for run in evidence.repeats.get(arm or "", [arm]) if run in runs]
        for arm in (evidence.roles.tuned, evidence.roles.contrast)
    )
    return Comparison(runs, math, away, losable, tuned, contrast)


def figures(evidence: Evidence, names: Names) -> dict[str, Panel | list[tuple[str, Panel]] | None]:
    """Accuracy over training (``forgetting``), and accuracy lost against the divergence (``forgetting-kl``), a panel for
    each of its directions; None where there is nothing to show."""
    found = comparison(evidence)
    if not found:
        return {"forgetting": None, "forgetting-kl": None}
    lost = [(f"{way.capitalize()} KL", _against_kl(found, names, way)) for way in DIRECTIONS]
    return {"forgetting": _over_training(found, names), "forgetting-kl": lost}


def _legend(found: Comparison, names: Names) -> list[tuple[str, str]]:
    return [(names.label(run), names.colour(run)) for run in found.runs]


def _scatter(points: Sequence[Point], x: list[float], y: list[Interval], names: Names, hover: str, width: float) -> Trace:
    """One run: a dot per point with its interval; a repeat has smaller dots and a dotted line."""
    run = points[0].run
    colour, first = names.colour(run), names.first(run) == run
    which = [
        f"checkpoint {point.checkpoint}" + ("" if point.step is None else f", update {point.step}")
        if point.checkpoint
        else "base"
        for point in points
    ]
    values, low, high = zip(*((value.value, value.low, value.high) for value in y), strict=True)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": names.label(run),
        "x": x,
        "y": list(values),
        "line": {"color": colour, "width": width, "dash": "solid" if first else "dot"},
        "marker": {"color": colour, "size": 7 if first else 5},
        "error_y": error_bars(values, low, high) | {"color": colour, "thickness": 0.7, "width": 0},
        "customdata": [
            [name, point.share, interval(value.low, value.high, 3), value.n]
            for name, point, value in zip(which, points, y, strict=True)
        ],
        "hovertemplate": f"{names.label(run)}, %{{customdata[0]}}, %{{customdata[1]:.0%}} of training<br>{hover}"
        "<extra></extra>",
    }


def _over_training(found: Comparison, names: Names) -> Panel:
    plots = []
    for key, heading, tasks in (("math", "on math", found.math), ("away", "away from math", found.away)):
        hover = "accuracy %{y:.3f} %{customdata[2]}, n = %{customdata[3]}"
        traces = [
            _scatter(points, [point.share for point in points], [accuracy(point, tasks) for point in points], names, hover, 1.5)
            for points in found.runs.values()
        ]
        start = found.base.accuracy(tasks)
        look = layout(
            {"title": title("share of training"), "tickformat": ".0%", "range": [-0.03, 1.03]},
            {"title": title("accuracy"), "range": [-0.03, 1.03]},
            shapes=[line(0, 1, start, start, xref="paper", dash="dash")],
        )
        plots.append(Figure(f"training-{key}", f"Accuracy {heading}", traces, look))
    asked = sum(len(found.base.right[task]) for task in found.away)
    caption = (
        f"Every kept checkpoint of every run, report split. Math: {listed(found.math)}; away from math: {listed(found.away)}, "
        f"{things(asked, 'question')}; tasks count the same. Bars: 95 % bootstrap interval over questions. Dashed: the base. "
        f"Dotted: repeats with another seed. {_dips(found, names)}"
    )
    return Panel(plots, caption.strip(), _legend(found, names), 400)


def _dips(found: Comparison, names: Names) -> str:
    """Whether the contrast model falls on the way and comes back, run by run."""
    said = []
    for run in found.contrast:
        base, *points = found.runs[run]
        lowest = min(points, key=lambda point: point.accuracy(found.away))
        fall, rise = difference([lowest], [base], found.away), difference([points[-1]], [lowest], found.away)
        end = "comes back, by" if rise.low > 0 else "does not come back clearly:"
        said.append(
            f"{names.label(run)} dips away from math ({change(fall)}, at {percent(lowest.share)} of training) and {end} "
            f"{change(rise)}."
            if fall.high < 0
            else f"{names.label(run)} does not dip clearly below the base away from math (lowest {change(fall)})."
        )
    if said:
        said.append("The lowest of several checkpoints is chosen by its outcome, which makes fall and rise look larger.")
    return " ".join(said)


def _against_kl(found: Comparison, names: Names, way: str) -> Panel:
    lost = {
        run: [difference([base], [point], found.lost_on) for point in points] for run, (base, *points) in found.runs.items()
    }
    plots, told = [], []
    for key, where, prompts in (("math", "math", found.math), ("away", "the tasks away from math", found.away)):
        hover = "lost %{y:.3f} %{customdata[2]}, n = %{customdata[3]}<br>" + f"{way} KL on {where} %{{x:.4f}}"
        by_run = losses(found.runs, found.lost_on, prompts, way)
        traces = [
            _scatter(found.runs[run][1:], [kl for kl, _ in pairs], lost[run], names, hover, 0.5)
            for run, pairs in by_run.items()
        ]
        look = layout(
            {"title": title(f"{way} KL on {where}, nats per token"), "rangemode": "tozero"},
            {"title": title("accuracy lost"), "zeroline": True},
        )
        plots.append(Figure(f"kl-{way}-{key}", f"KL on {where}", traces, look, 340))
        told.append(_association(by_run, where))
    values = [value for run in lost.values() for value in run]
    fallen = sum(value.low > 0 for value in values)
    tasks = f"{listed(found.losable)}, where the base beats a random guess by its whole interval"
    if not found.losable:
        tasks = "all tasks away from math (on none of them does the base beat a random guess by its whole interval)"
    caption = (
        f"One dot per kept checkpoint and run, joined within a run ({things(len(values), 'dot')}). Lost: accuracy of the base "
        f"minus the checkpoint's on {tasks}, with paired 95 % interval over questions; below zero is gain. KL: {way}, along "
        f"{ANSWERS[way]}. The base is right on {percent(found.base.accuracy(found.lost_on))} of these questions, more cannot "
        f"be lost; {fallen} of {things(len(values), 'checkpoint')} lie below it by the whole interval. {' '.join(told)}"
    )
    if not fallen:
        caption += (
            " Nothing was forgotten for certain: these numbers are about gain, and do not test what KL says of forgetting."
        )
    return Panel(plots, f"{caption} {_kl_alone(found, names)}", _legend(found, names), 400)


def _association(by_run: Mapping[str, Sequence[tuple[float, float]]], where: str) -> str:
    """Rank correlation and R² of loss and divergence in words, with intervals over runs."""
    count = sum(map(len, by_run.values()))
    if len(by_run) < FEWEST_RUNS or count < FEWEST_POINTS:
        return (
            f"{things(len(by_run), 'run')} and {things(count, 'checkpoint')} are too few to relate loss to KL on {where} "
            f"(at least {FEWEST_RUNS} and {FEWEST_POINTS})."
        )
    rank = stats.over_clusters(stats.rank_correlation, by_run, **BOOTSTRAP)
    fit = stats.over_clusters(stats.r_squared, by_run, **BOOTSTRAP)
    if rank is None or fit is None:
        return f"Loss, or KL on {where}, is the same at every checkpoint: there is nothing to relate."
    said = "more KL, more loss" if rank.low > 0 else "more KL, less loss" if rank.high < 0 else "no clear order"
    return (
        f"KL on {where}: Spearman's rank correlation with loss {signed(rank.value)} {interval(rank.low, rank.high)}, {said}; "
        f"R² of a quadratic {number(fit.value)} {interval(fit.low, fit.high)} (95 % bootstrap over {things(rank.n, 'run')})."
    )


def _kl_alone(found: Comparison, names: Names) -> str:
    """Whether the tuned and the contrast model differ where their divergence on math is the same: then KL is not all."""
    places = found.at_shared(found.math_kl)
    tuned, contrast = ([places[run] for run in runs if run in places] for runs in (found.tuned, found.contrast))
    if not tuned or not contrast:
        return "Whether KL alone explains the difference between arms is not tested: no two roles at equal forward KL on math."
    gap = difference(tuned, contrast, found.away)
    told = "does not explain" if gap.low > 0 or gap.high < 0 else "may explain"
    return (
        f"At equal forward KL on math ({short(found.math_kl(tuned[0]))} nats per token), away from math: "
        f"{names.label(found.tuned[0])} minus {names.label(found.contrast[0])} (means over {things(len(tuned), 'run')} and "
        f"{things(len(contrast), 'run')}) {change(gap)}. KL alone {told} the difference, as far as questions tell; training "
        "seeds are not in this interval. "
        "For KL alone: arXiv 2509.04259 (RL's Razor); against it: 2607.01763, 2607.04364."
    )


def tables(evidence: Evidence, names: Names) -> list[tuple[str, Table]]:
    """Every run at its end, at equal accuracy on math, and at equal divergence; empty without checkpoints."""
    found = comparison(evidence)
    if found is None:
        return []
    at_math, at_kl = found.at_shared(found.math_accuracy), found.at_shared(found.math_kl)
    rows = []
    for run, points in found.runs.items():
        places = (points[-1], at_math.get(run), at_kl.get(run))
        rows.append([label(names.label(run)), *(cell for place in places for cell in _cells(found, place))])
    head = ["run"]
    for where in ("at the end", "at equal math accuracy", "at equal KL"):
        head += [f"math, {where}", f"away from math, {where}", f"KL, {where}"]
    level, kl = found.shared(found.math_accuracy), found.shared(found.math_kl)
    caption = (
        f"Report split. Equal math accuracy: {number(level)}; equal KL: {short(kl)} nats per token. Each is the largest that "
        "every run of the tuned and the contrast model reaches, a dash where one of them never rises above the base. A run is "
        "read where it first rises to that level, on a straight line between neighbouring checkpoints, the first of which is "
        "the base; where in training that is stands beside its math accuracy. Intervals: 95 % bootstrap over questions, the "
        f"place on the line held fixed. KL: forward, on math prompts. {MISSING}: not reached."
    )
    return [("Arms at equal accuracy and at equal KL", Table(head, rows, caption))]


def _cells(found: Comparison, point: Point | None) -> list[Cell]:
    """Accuracy on math and away from it, and divergence on math."""
    if point is None:
        return [Cell(MISSING)] * 3
    away = accuracy(point, found.away)
    return [
        Cell(number(found.math_accuracy(point)), percent(point.share)),
        Cell(number(away.value), interval(away.low, away.high)),
        Cell(short(found.math_kl(point))),
    ]
