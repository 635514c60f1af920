"""Tables of the page: plain cells with a note for interval or n, built from the artifacts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, purposes
from featdiff.report.charts import ROLE_NAMES
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence, Row
from featdiff.report.model_figures import MODE_NAMES, report_rows
from featdiff.report.quantities import effects
from featdiff.report.words import MISSING, count, interval, moved, number, percent, signed
from featdiff.tasks.task import GENERATION


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table; ``note`` is set small beside it."""

    text: str
    note: str = ""
    mark: Literal["", "good", "bad", "text", "label"] = ""


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[Cell]]
    caption: str = ""


GRADED = {
    "strict": "Generated answers count, in rewards too, by the strict rule: a marked answer that names one value; the "
    "flexible rule, which takes the last value of the text, is shown beside it.",
    "flexible": "Generated answers count, in rewards too, by the flexible rule: the last value of the text, which can be "
    "gamed; the strict rule, which asks for a marked answer that names one value, is shown beside it.",
}
"""Which rule of grading was in force, in words (featdiff.tasks.verify)."""


def label(text: str, note: str = "") -> Cell:
    """The name of a row."""
    return Cell(text, note, "label")


def accuracy(evidence: Evidence, claims: Claims) -> Table:
    """Every task under its own scoring rule in one run of each model, with what the arms that have a role gained or lost over
    all their runs."""
    models, original, names = evidence.compared, evidence.roles.original, evidence.names
    labels, changed = [names.label(model) for model in models], [model for model in evidence.roles.models if model != original]
    graded = {name: task.grading for name, task in evidence.tasks.items() if task.scoring == GENERATION}
    shares = ("strict", "flexible", "parse_failures") if graded else ()
    rows = []
    for name, task in evidence.tasks.items():
        mode = task.primary_mode
        held = {model: report_rows(evidence, model, mode).get(name) for model in models}
        cells = [label(name, f"{ROLE_NAMES[task.role]}; {MODE_NAMES.get(mode, mode).lower()}")]
        cells += [_level(row) for row in held.values()]
        for model in changed:
            found = claims.difference([name], model, original)
            cells.append(Cell(signed(found.value), interval(found.low, found.high)) if found else Cell(MISSING))
        for key in shares:
            written = percent if key == "parse_failures" else number
            shown = " / ".join(written(row[key] if row else None) for row in held.values())
            cells.append(Cell(shown if name in graded else MISSING))
        cells.append(Cell(count(max((row["n"] for row in held.values() if row), default=None))))
        rows.append(cells)
    head = ["task", *labels, *(f"{names.label(model)} − {names.label(original)}" for model in changed)]
    head += [f"{name}, {' / '.join(labels)}" for name in ("strict", "flexible", "not readable")] if graded else []
    caption = "Report split, each task under its own scoring rule. Differences are paired by question, over all training runs."
    return Table([*head, "n"], rows, " ".join([caption, *(GRADED[rule] for rule in sorted(set(graded.values())))]))


def _level(row: Row | None) -> Cell:
    return Cell(number(row["accuracy"]), interval(row["low"], row["high"])) if row else Cell(MISSING)


def audit(evidence: Evidence) -> Table:
    """What one run of every arm was given: the comparison is fair where the first rows agree. An arm that was trained elsewhere
    says less of itself."""
    audits = {arm: evidence.models[arm].audit for arm in evidence.repeats}
    rows = []
    for key, name in (
        ("base_manifest", "start: the same base"),
        ("problems_sha256", "the same problems and solutions"),
        ("problems", "the same problems"),
    ):
        given = [audit.get(key) for audit in audits.values()]
        shown = [MISSING if value is None else count(value) if key == "problems" else value[:12] for value in given]
        same = len({value for value in given if value is not None}) < 2
        rows.append([label(name), *map(Cell, shown), Cell("yes" if same else "no", mark="good" if same else "bad")])
    for key, name in (("samples_seen", "samples seen"), ("tokens_seen", "tokens seen"), ("updates", "updates")):
        rows.append([label(name), *(Cell(count(audit.get(key))) for audit in audits.values()), Cell("reported")])
    given = [audit.get("precision") for audit in audits.values()]
    same = len({value for value in given if value is not None}) < 2
    named = [Cell(value or MISSING, mark="text") for value in given]
    rows.append([label("precision of training"), *named, Cell("yes" if same else "no", mark="good" if same else "bad")])
    steps = [", ".join(map(str, audit.get("checkpoints") or [])) or MISSING for audit in audits.values()]
    rows.append([label("checkpoints at update"), *(Cell(text, mark="text") for text in steps), Cell("reported")])
    rewards = [[number(audit.get(f"reward_{end}")) for end in ("first", "last")] for audit in audits.values()]
    moves = [moved(*ends) if ends != [MISSING] * 2 else MISSING for ends in rewards]
    rows.append([label("reward, first → last"), *map(Cell, moves), Cell("reported")])
    return Table(["", *map(evidence.names.label, audits), "equal"], rows)


def crosscoders(evidence: Evidence) -> Table:
    rows = []
    for name, fit in evidence.fits.items():
        fve = " / ".join(number(fit.metrics["fve"].get(model), 3) for model in fit.models)
        rows.append(
            [
                label(name, " · ".join(map(evidence.names.label, fit.models))),
                Cell(fit.config["loss"] + ", imported" * ("source" in fit.config)),
                Cell(fve),
                Cell(number(fit.metrics["l0"], 1)),
                Cell(percent(fit.metrics["dead_share"])),
                Cell(count(fit.config["n_features"])),
                Cell(str(fit.config["seed"])),
            ]
        )
    head = ["crosscoder", "loss", "FVE of each model", "L0", "dead", "features", "seed"]
    return Table(head, rows, "On tokens held out of the fit. FVE: fraction of variance explained.")


def classes(evidence: Evidence) -> Table:
    """How many features of each crosscoder belong to one model alone, to all tuned models, are shared, or dead."""
    counts = Counter((row["fit"], row["feature_class"]) for row in evidence.features)
    rows = []
    for name, fit in evidence.fits.items():
        total = sum(n for (found, _), n in counts.items() if found == name)
        shared, new, mixed, dead = (
            Cell(count(counts[name, kind]), percent(counts[name, kind] / total)) for kind in ("shared", "new", "mixed", "dead")
        )
        own = [f"{evidence.names.label(model)} {count(counts[name, model])}" for model in fit.models]
        rows.append([label(name, fit.config["loss"]), shared, Cell(", ".join(own), mark="text"), new, mixed, dead])
    head = ["crosscoder", "shared", "one model's alone", "new in all but the first", "mixed", "dead"]
    caption = "L1 is known to split shared features into one-model ones (arXiv 2504.02922): compare its rows with BatchTopK's."
    return Table(head, rows, caption)


def flipped(evidence: Evidence) -> Table:
    """Tasks that features were sought on, and what came of each."""
    found = evidence.localize
    rows = []
    for name in evidence.tasks:
        if name in found["skipped"]:
            rows.append(
                [
                    label(name),
                    Cell(MISSING),
                    Cell(MISSING),
                    Cell(MISSING),
                    Cell(f"left out: {found['skipped'][name]}", mark="text"),
                ]
            )
        elif name in found["per_task"]:
            task = found["per_task"][name]
            cells = [Cell(count(task["n_flipped"])), Cell(number(task["max_score"], 3)), Cell(count(len(task["selected"])))]
            rows.append([label(name), *cells, Cell("took part")])
    return Table(["task", "flipped samples", "largest score", "features above threshold", ""], rows)


def selection(evidence: Evidence) -> Table:
    """The feature set: stability, class, decoder norms, and score on every task as a share of the task's largest."""
    found, tasks = evidence.localize, evidence.found_on
    peak = {task: found["per_task"][task]["max_score"] for task in tasks}
    chosen = set(found["features"])
    score = {(row["feature_id"], row["task"]): row["score"] for row in evidence.scores if row["feature_id"] in chosen}
    known = {row["feature_id"]: row for row in evidence.features if row["fit"] == found["fit"] and row["feature_id"] in chosen}
    rows = []
    for feature in found["features"]:
        facts = known[feature]
        norm = " / ".join(map(number, facts["mas"])) if facts["mas"] is not None else number(facts["nrn"])
        shares = [Cell(percent(_ratio(score.get((feature, task)), peak[task]))) for task in tasks]
        frequency = found["frequency"].get(str(feature))
        rows.append(
            [
                label(str(feature)),
                Cell(percent(frequency)),
                Cell(facts["feature_class"]),
                Cell(norm),
                Cell(percent(facts["firing_rate"])),
                *shares,
            ]
        )
    fit = evidence.fits[found["fit"]]
    norm_name = f"MAS {' / '.join(map(evidence.names.label, fit.models))}" if fit.joint else "NRN"
    head = ["feature", "in the set, share of resamples", "class", norm_name, "fires on tokens", *tasks]
    return Table(head, rows, "Columns named after tasks: score as a share of the task's largest.")


def _ratio(value: float | None, peak: float) -> float | None:
    return None if value is None or not peak else value / peak


def effect(evidence: Evidence, purpose: str) -> Table | None:
    """The set's effect per task with the matched random sets beside it; None where no set was tested."""
    edits = {edit: {row["task"]: row for row in effects(evidence, purpose, edit)} for edit in ("set", "reconstruction")}
    subset = {row["task"]: row for row in effects(evidence, purpose, "set", "flipped")}
    rows = []
    for name in evidence.tasks:
        if (row := edits["set"].get(name)) is None:
            continue
        task, part = evidence.tasks[name], subset.get(name)
        floor = (
            f"; a random flip gives +{number(1 / (task.options - 1))}"
            if task.options > 1 and purpose == AMPLIFY_ORIGINAL
            else ""
        )
        steps = moved(percent(row["steps_baseline"]), percent(row["steps"])) if task.scoring == "generation" else MISSING
        beyond = row["beyond_random"]
        rows.append(
            [
                label(name, ROLE_NAMES[task.role]),
                Cell(moved(number(row["baseline"]), number(row["accuracy"])), f"n = {count(row['n'])}"),
                Cell(signed(row["effect"]), interval(row["low"], row["high"])),
                Cell(interval(row["random_low"], row["random_high"]) or MISSING),
                Cell(MISSING) if beyond is None else Cell("beyond all" if beyond else "within", mark="good" if beyond else ""),
                _effect_cell(edits["reconstruction"].get(name)),
                Cell(signed(part["effect"]), f"{interval(part['low'], part['high'])}, n = {part['n']}{floor}")
                if part
                else Cell(MISSING),
                Cell(steps),
                Cell(moved(percent(row["unread_toward"]), percent(row["unread"]))),
                Cell(percent(row["alike"])),
            ]
        )
    head = ["task", "accuracy", "change", "random sets, 5th to 95th percentile", "against random", "reconstruction only"]
    asked = purposes(evidence.roles, evidence.runs(evidence.roles.tuned))
    other = evidence.names.label(next(each.toward for each in asked if each.name == purpose))
    head += ["change, flipped only", "step by step", f"not readable, {other} and edited", f"like an answer of {other}"]
    return Table(head, rows) if rows else None


def _effect_cell(row: Row | None) -> Cell:
    return Cell(signed(row["effect"]), interval(row["low"], row["high"])) if row else Cell(MISSING)
