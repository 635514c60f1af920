"""Tables of the controls: what other sets, directions and choices do where the found set does its work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from featdiff.intervention.purposes import RIVALS
from featdiff.report.charts import ROLE_NAMES
from featdiff.report.evidence import Evidence, Row
from featdiff.report.quantities import CONTROLS, RULES, effects, likelihood_change, mean_effects, owner, stability
from featdiff.report.set_figures import claimed, heading, replications
from featdiff.report.tables import Cell, Table, label
from featdiff.report.words import MISSING, count, interval, listed, number, percent, signed

NAMES = {
    "set": "the feature set",
    "random": "random sets that act there, 5th to 95th percentile",
    "random_direction": "random directions, 5th to 95th percentile",
    "shared": "shared features, as many",
    "base_specific": "the original's own features, as many",
    "shuffled": "set found with shuffled identities",
    "mean_difference": "mean difference of the models",
    "first_component": "first component of the differences",
    "set_change": "mean change of the set, one direction",
    "random_dictionary": "set found in a random dictionary",
    "reconstruction": "reconstruction only",
    "noop": "the edit at dose 0",
}
READOUTS = {"found by": "found with", "found in": "found in the crosscoder", "edited by": "tested with"}


def specific(evidence: Evidence) -> Table:
    """Features that each rule calls one model's own, null pairs (where all of them are errors) last."""
    rows = []
    for name, fit in sorted(evidence.fits.items(), key=lambda item: item[1].null):
        live = [row for row in evidence.features if row["fit"] == name and not row["dead"]]
        counts = [Counter(filter(None, (owner(row, rule) for row in live))) for rule in RULES]
        cells = [
            Cell(", ".join(f"{evidence.names.label(model)} {n}" for model, n in sorted(found.items())) or "0", mark="text")
            for found in counts
        ]
        wrong = sum(counts[-1].values()) if fit.null else 0
        cells[-1] = replace(cells[-1], mark="bad" if wrong else "text")
        rows.append([label(name, "null pair" if fit.null else fit.config["loss"]), *cells, Cell(count(len(live)))])
    return Table(
        ["crosscoder", "by decoder norms", "by latent scaling", "by both (the full rule)", "live features"],
        rows,
        "Features called one model's own, or new in all models but the first. In a null pair (a model with itself, two runs "
        "of one arm that differ in their seed) every one is an error of the rule.",
    )


def controls(evidence: Evidence, purpose: str) -> Table | None:
    """Mean change of accuracy under the set and every control on tasks of each kind, and what it costs in free text."""
    groups = {
        "found on": evidence.found_on,
        "held out": evidence.named("heldout"),
        "trained on": evidence.named("train"),
    }
    means = {name: mean_effects(evidence, purpose, tasks) for name, tasks in groups.items() if tasks}
    if not any("set" in found for found in means.values()):
        return None
    spilled: dict[str, list[Row]] = {}
    for row in evidence.collateral:
        if row["purpose"] == purpose:
            spilled.setdefault(row["control"], []).append(row)
    rows = []
    for control, name in NAMES.items():
        if not any(control in found for found in means.values()):
            continue
        cells = [_spread(list(found.get(control, {}).values())) for found in means.values()]
        cells += [_spread(likelihood_change(evidence, purpose, control, part)) for part in ("start_nats", "rest_nats")]
        note = "uses no learned features" if control in RIVALS else "ought to do nothing" if control in CONTROLS else ""
        rows.append([label(name, note), *_moved(evidence, purpose, control), *cells, _nats(spilled.get(control, []))])
    likelihood = ["first token of the right worked answer, nats", "the rest of it, nats per token"]
    head = ["edited", "dose", "‖Δh‖ / ‖h‖", "before it was made as long", *(f"change on tasks {name}" for name in means)]
    head += [*likelihood, "free text, nats per token"]
    return Table(
        head,
        rows,
        "All but the set's own parts change the residual stream as much as the set at the same dose, and have a dose of their "
        "own, chosen by the same search (tune split). ‖Δh‖ / ‖h‖: at the last token of the prompt, mean over questions; before "
        "it was made as long: relative to the set. Mean change of accuracy over tasks, report split. Likelihood, where answers "
        "are generated: mean change over all tasks "
        "of the negative log-likelihood of the right answer, worked in the base's own wording where that is known: of its "
        "first token (how it is answered), and of the rest given that start (whether it can be gone through with). Free text: "
        "change of the mean negative log-likelihood of texts of the corpus with the edit at every token, the worst case.",
    )


def _moved(evidence: Evidence, purpose: str, control: str) -> list[Cell]:
    """Dose, relative length of the change, and what it was before it was made as long as the set's, as chosen."""
    chosen = [row for row in evidence.tried_with.get((purpose, control), []) if row["chosen"]]
    if not chosen:
        return [Cell(MISSING)] * 3
    return [_range([row[column] for row in chosen], digits) for column, digits in (("dose", 3), ("norm", 2), ("unscaled", 2))]


def _range(values: list[float], digits: int) -> Cell:
    low, high = np.quantile(values, [0.05, 0.95])
    return Cell(number(low, digits) if low == high else f"{number(low, digits)} to {number(high, digits)}")


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
    means = {purpose: mean_effects(evidence, purpose.name, evidence.found_on) for purpose in claimed(evidence)}
    means = {purpose: found for purpose, found in means.items() if "alone" in found}
    if not means:
        return None
    rows = [[label("the whole set"), *(cell for found in means.values() for cell in (_one(found, "set", 0), Cell(MISSING)))]]
    rows += [
        [label(str(feature)), *(_one(found, control, i) for found in means.values() for control in ("alone", "without"))]
        for i, feature in enumerate(evidence.localize["features"])
    ]
    head = ["feature", *(f"{heading(evidence, purpose)}, {how}" for purpose in means for how in ("alone", "all but it"))]
    return Table(head, rows, "Mean change of accuracy on the tasks it was found on, report split.")


def _one(means: dict[str, dict[int, float]], control: str, draw: int) -> Cell:
    value = means.get(control, {}).get(draw)
    return Cell(MISSING) if value is None else Cell(signed(value))


def replication(evidence: Evidence) -> Table | None:
    """The set zeroed in every training run of the tuned model, by task and on average."""
    runs = replications(evidence)
    if not runs:
        return None
    held = [{row["task"]: row for row in effects(evidence, purpose.name, "set")} for purpose in runs]
    rows = [
        [label(task, ROLE_NAMES[info.role]), *(_against_random(found.get(task)) for found in held)]
        for task, info in evidence.tasks.items()
        if any(task in found for found in held)
    ]
    for group, tasks in (("the tasks it was found on", evidence.found_on), ("held-out tasks", evidence.named("heldout"))):
        if tasks:
            means = [mean_effects(evidence, purpose.name, tasks) for purpose in runs]
            rows.append([label("mean", group), *map(_mean_against_random, means)])
    return Table(
        ["task", *(evidence.names.label(purpose.model) for purpose in runs)],
        rows,
        "Change in accuracy with the set zeroed, report split, with interval over questions; beside it the 5th to 95th "
        "percentile of the matched random sets in the same run. Green: beyond every one of them.",
    )


def _against_random(row: Row | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    drawn = interval(row["random_low"], row["random_high"]) or MISSING
    shown = f"{interval(row['low'], row['high'])}; random {drawn}"
    return Cell(signed(row["effect"]), shown, "good" if row["beyond_random"] else "")


def _mean_against_random(means: dict[str, dict[int, float]]) -> Cell:
    drawn = list(means.get("random", {}).values())
    if "set" not in means or not drawn:
        return _one(means, "set", 0)
    value = means["set"][0]
    shown = f"random {interval(*np.quantile(drawn, [0.05, 0.95]))}"
    return Cell(signed(value), shown, "good" if value < min(drawn) else "")


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
    before, after = (evidence.names.label(model) for model in (evidence.roles.original, evidence.roles.tuned))
    return Table(head, rows, f"p: share of shuffles of {before} and {after} that give as many features.") if rows else None


def seeds(evidence: Evidence) -> Table | None:
    """How far the sets that other seeds of the crosscoder find agree: in effect, in subspace, in ids."""
    found = evidence.localize.get("seeds")
    if not found or not found["jaccard"]:
        return None
    rows = []
    for pair, value in found["jaccard"].items():
        effect, spans = found["effect"][pair], found["subspace"][pair]
        sizes = [Cell(count(len(found["sets"][fit]))) for fit in pair.split(" · ")]
        agree = [Cell(number(effect[key])) for key in ("mean_change", "per_question")]
        agree += [Cell(number(spans[key]), f"random {number(spans[f'{key}_random'])}") for key in ("decoder", "change")]
        rows.append([label(pair), *sizes, *agree, Cell(number(value))])
    mean, gap = stability(evidence), Cell(MISSING)
    means = [Cell(number(mean.effect)), gap, Cell(number(mean.subspace), f"random {number(mean.subspace_random)}"), gap]
    rows.append([label("mean"), gap, gap, *means, Cell(number(mean.ids))])
    along = listed([f"{fit} {number(cosine)}" for fit, cosine in found["mean_difference"].items()])
    return Table(
        [
            "crosscoders", "features, first", "second", "effect: cosine of the mean changes", "of each question's",
            "subspace: decoder rows", "changes", "ids: Jaccard, matched",
        ],
        rows,
        "Effect: what transplanting each seed's own set adds to the original's residual stream on flipped samples. Subspace: "
        "mean cosine of the principal angles between the spans of decoder rows, and between those of the components that hold "
        "90 % of the changes; beside it, random subspaces of the same sizes. Ids: features of two seeds are the same where "
        f"each is the other's best match by decoder cosine. Cosine of each mean change with the mean difference: {along}.",
    )  # fmt: skip


def errors(rates: list[Row]) -> Table | None:
    """What the rules make of sets that are false by construction (featdiff.report.calibration)."""
    rows = [
        [
            label(NAMES[row["control"]].split(",")[0], row["claim"]),
            Cell(count(row["n"])),
            Cell(count(row["supported"]), f"at most {percent(row['high'])}", "bad" if row["supported"] else "good"),
            Cell(count(row["undecided"])),
            Cell(count(row["not supported"])),
        ]
        for row in rates
    ]
    head = ["in place of the set", "how many", "supported", "undecided", "not supported"]
    caption = (
        "Every control takes the place of the set under all rules, with the setting that the search chose for it, held against "
        "the remaining draws. Supported is an error of the rules; beside it the upper end of the exact binomial interval."
    )
    return Table(head, rows, caption) if rows else None


def sensitivity(evidence: Evidence) -> list[tuple[str, Table]]:
    """Would the conclusion survive other choices? One table per purpose."""
    head = ["choice", "features", "dose", "change", "random sets as long, median", "largest", "beyond them"]
    caption = "Mean change of accuracy on the tasks used for finding, tune split."
    tables = []
    for purpose in claimed(evidence):
        rows = [row for row in evidence.sensitivity if row["purpose"] == purpose.name]
        if rows:
            tables.append((heading(evidence, purpose), Table(head, list(_choices(rows, purpose.sign)), caption)))
    return tables


def _choices(rows: Iterable[Row], sign: int) -> Iterable[list[Cell]]:
    for row in rows:
        name = label(f"{READOUTS[row['varied']]} {row['choice'].replace('_', ' ')}")
        if row["effect"] is None:
            yield [name, Cell("0"), Cell(MISSING), Cell("nothing found"), *[Cell(MISSING)] * 3]
            continue
        if row["random"] is None:
            yield [
                name,
                Cell(count(row["size"])),
                Cell(number(row["dose"], 3)),
                Cell(signed(row["effect"])),
                *[Cell(MISSING)] * 3,
            ]
            continue
        beyond = sign * (row["effect"] - row["random"]) > 0 and sign * row["effect"] > 0
        shown = [Cell(number(row["dose"], 3)), *(Cell(signed(row[key])) for key in ("effect", "median", "random"))]
        yield [name, Cell(count(row["size"])), *shown, Cell("yes" if beyond else "no", mark="good" if beyond else "bad")]
