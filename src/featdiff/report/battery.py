"""Tables of the controls: what other sets, directions and choices do where the found set does its work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from featdiff.intervention.purposes import sign_of
from featdiff.report.charts import MODEL_NAMES
from featdiff.report.evidence import Evidence, Row
from featdiff.report.quantities import CONTROLS, DIRECTIONS, RULES, likelihood_change, mean_effects, owner
from featdiff.report.tables import Cell, Table, label
from featdiff.report.words import MISSING, count, interval, number, percent, signed

NAMES = {
    "set": "the feature set",
    "random": "matched random sets, 5th to 95th percentile",
    "shared": "shared features, as many",
    "base_specific": "the base's own features, as many",
    "shuffled": "set found with shuffled identities",
    "mean_difference": "mean difference GRPO − base",
    "first_component": "first component of the differences",
    "random_direction": "random direction of that length",
    "reconstruction": "reconstruction only",
    "noop": "the edit with factor 1",
}
READOUTS = {"found by": "found with", "edited by": "tested with"}


def specific(evidence: Evidence) -> Table:
    """Features that each rule calls one model's own, null pairs (where all of them are errors) last."""
    rows = []
    for name, fit in sorted(evidence.fits.items(), key=lambda item: item[1].null):
        live = [row for row in evidence.features if row["fit"] == name and not row["dead"]]
        counts = [Counter(filter(None, (owner(row, rule) for row in live))) for rule in RULES]
        cells = [
            Cell(", ".join(f"{MODEL_NAMES.get(model, model)} {n}" for model, n in sorted(found.items())) or "0", mark="text")
            for found in counts
        ]
        wrong = sum(counts[-1].values()) if fit.null else 0
        cells[-1] = replace(cells[-1], mark="bad" if wrong else "text")
        rows.append([label(name, "null pair" if fit.null else fit.config["loss"]), *cells, Cell(count(len(live)))])
    return Table(
        ["crosscoder", "by decoder norms", "by latent scaling", "by both (the full rule)", "live features"],
        rows,
        "Features called one model's own. In a null pair (a model with itself, two SFT runs that differ in their seed) every "
        "one is an error of the rule.",
    )


def controls(evidence: Evidence, purpose: str) -> Table | None:
    """Mean change of accuracy under every arm on tasks of each kind, and what it costs in free text."""
    groups = {
        "found on": evidence.found_on,
        "held out": evidence.named("heldout"),
        "trained on": evidence.named("train"),
    }
    means = {name: mean_effects(evidence, purpose, tasks) for name, tasks in groups.items() if tasks}
    if not any("set" in arms for arms in means.values()):
        return None
    spilled: dict[str, list[Row]] = {}
    for row in evidence.collateral:
        if row["purpose"] == purpose:
            spilled.setdefault(row["arm"], []).append(row)
    rows = []
    for arm, name in NAMES.items():
        if not any(arm in arms for arms in means.values()):
            continue
        cells = [_spread(list(arms.get(arm, {}).values())) for arms in means.values()]
        cells += [_spread(likelihood_change(evidence, purpose, arm, part)) for part in ("start_nats", "rest_nats")]
        note = "uses no dictionary" if arm in DIRECTIONS else "ought to do nothing" if arm in CONTROLS else ""
        rows.append([label(name, note), *cells, _nats(spilled.get(arm, []))])
    likelihood = ["first token of the right worked answer, nats", "the rest of it, nats per token"]
    head = ["edited", *(f"change on tasks {name}" for name in means), *likelihood, "free text, nats per token"]
    return Table(
        head,
        rows,
        "Mean change of accuracy over tasks, report split. Likelihood, where answers are generated: mean change over all tasks "
        "of the negative log-likelihood of the right answer, worked in the base's own wording where that is known: of its "
        "first token (how it is answered), and of the rest given that start (whether it can be gone through with). Free text: "
        "change of the mean negative log-likelihood of texts of the corpus with the edit at every token, the worst case.",
    )


def _spread(values: list[float]) -> Cell:
    if len(values) > 1:
        return Cell(interval(*np.quantile(values, [0.05, 0.95])))
    return Cell(signed(values[0])) if values else Cell(MISSING)


def _nats(rows: list[Row]) -> Cell:
    if len(rows) > 1:
        return Cell(interval(*np.quantile([row["change"] for row in rows], [0.05, 0.95])))
    return Cell(signed(rows[0]["change"]), interval(rows[0]["low"], rows[0]["high"])) if rows else Cell(MISSING)


def singles(evidence: Evidence) -> Table | None:
    """What each feature of the set does alone, and what the set does without it."""
    purposes = {"zero_grpo": "zeroed in GRPO", "amplify_base": "amplified in base"}
    found = {purpose: mean_effects(evidence, purpose, evidence.found_on) for purpose in purposes}
    if not any("alone" in arms for arms in found.values()):
        return None
    rows = [[label("the whole set"), *(cell for arms in found.values() for cell in (_one(arms, "set", 0), Cell(MISSING)))]]
    rows += [
        [label(str(feature)), *(_one(arms, arm, i) for arms in found.values() for arm in ("alone", "without"))]
        for i, feature in enumerate(evidence.localize["features"])
    ]
    head = ["feature", *(f"{name}, {how}" for name in purposes.values() for how in ("alone", "all but it"))]
    return Table(head, rows, "Mean change of accuracy on the tasks it was found on, report split.")


def _one(arms: dict[str, dict[int, float]], arm: str, draw: int) -> Cell:
    value = arms.get(arm, {}).get(draw)
    return Cell(MISSING) if value is None else Cell(signed(value))


def sweep(evidence: Evidence) -> Table | None:
    """The set at other thresholds, and its size by chance."""
    rows = [
        [
            label(percent(row["threshold"]), "in force" if row["threshold"] == evidence.localize["threshold"] else ""),
            Cell(count(row["size"])),
            Cell(number(row["expected_independent"])),
            Cell(number(row["expected_shuffled"])),
            Cell(number(row["p_shuffled"], 3)),
            Cell(number(row["jaccard"])),
        ]
        for row in evidence.sweep
    ]
    head = [
        "threshold",
        "features",
        "by chance, tasks independent",
        "by chance, identities shuffled",
        "p",
        "Jaccard with the set",
    ]
    return Table(head, rows, "p: share of shuffles of base and GRPO that give as many features.") if rows else None


def seeds(evidence: Evidence) -> Table | None:
    """How far other seeds of the crosscoder find the same set."""
    stability = evidence.localize.get("seeds")
    if not stability or not stability["jaccard"]:
        return None
    rows = [
        [label(pair), *(Cell(count(len(stability["sets"][fit]))) for fit in pair.split(" · ")), Cell(number(value))]
        for pair, value in stability["jaccard"].items()
    ]
    rows.append([label("mean"), Cell(MISSING), Cell(MISSING), Cell(number(stability["mean_jaccard"]))])
    head = ["crosscoders", "features, first", "second", "Jaccard, matched"]
    return Table(head, rows, "Features of two seeds are the same where each is the other's best match by decoder cosine.")


def sensitivity(evidence: Evidence) -> list[tuple[str, Table]]:
    """Would the conclusion survive other choices? One table per purpose."""
    purposes = {"zero_grpo": "Zeroing in GRPO", "amplify_base": "Amplifying in base"}
    head = ["choice", "features", "dose", "change", "largest of the random sets", "beyond them"]
    caption = "Mean change of accuracy on the tasks used for finding, tune split."
    tables = []
    for purpose, name in purposes.items():
        rows = [row for row in evidence.sensitivity if row["purpose"] == purpose]
        if rows:
            tables.append((name, Table(head, list(_choices(rows, sign_of(purpose))), caption)))
    return tables


def _choices(rows: Iterable[Row], sign: int) -> Iterable[list[Cell]]:
    for row in rows:
        name = label(f"{READOUTS[row['varied']]} {row['choice'].replace('_', ' ')}")
        if row["effect"] is None:
            yield [name, Cell("0"), Cell(MISSING), Cell("nothing found"), Cell(MISSING), Cell(MISSING)]
            continue
        beyond = sign * (row["effect"] - row["random"]) > 0 and sign * row["effect"] > 0
        shown = [Cell(number(row["dose"], 1)), Cell(signed(row["effect"])), Cell(signed(row["random"]))]
        yield [name, Cell(count(row["size"])), *shown, Cell("yes" if beyond else "no", mark="good" if beyond else "bad")]
