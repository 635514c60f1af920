"""How often are the rules about the set wrong? They are applied to sets that are known to be false (ours).

Every control takes the place of the found set in turn: random features and directions that are as long, shared features, the
original's own, the set found with shuffled identities. Each keeps the setting that the search chose for it, and is held against
the remaining draws under all rules. A control that comes out as supported is an error of the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from featdiff import stats
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, RANDOM, RANDOM_DIRECTION, SET, ZERO_TUNED, against_draws, sign_of
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence, Row
from featdiff.report.set_claims import SetClaims

FALSE = (RANDOM, RANDOM_DIRECTION, "shared", "base_specific", "shuffled")
"""Controls that no rule should take for the set."""
PURPOSES = {"necessary": ZERO_TUNED, "sufficient": AMPLIFY_ORIGINAL}


def false_sets(claims: Claims) -> list[Row]:
    """One row per false set and claim: ``control set_draw claim status failed``, the last being the first criterion that did
    not hold. Empty where no set was tested."""
    evidence, rows = claims.evidence, []
    for control, number in _controls(evidence):
        judged = SetClaims(claims.of(as_set(evidence, control, number)))
        for verdict in (judged.necessary(), judged.sufficient()):
            failed = next((criterion.text for criterion in verdict.criteria if not criterion.holds), "")
            facts = {"control": control, "set_draw": number, "claim": verdict.key}
            rows.append(facts | {"status": verdict.status, "failed": failed})
    return rows


def _controls(evidence: Evidence) -> Iterator[tuple[str, int]]:
    """Every false set that was tried in both models."""
    if not evidence.effects:
        return
    tried = [{(r["control"], r["set_draw"]) for r in evidence.effects if r["purpose"] == name} for name in PURPOSES.values()]
    yield from sorted(key for key in set.intersection(*tried) if key[0] in FALSE)


def as_set(evidence: Evidence, control: str, number: int) -> Evidence:
    """``evidence`` as if the search had found this control. Of answers it has those under the set alone: what was answered
    without an edit is the same (:meth:`featdiff.report.paired.Outcomes.under`)."""

    def moved(rows: list[Row]) -> list[Row]:
        others = [row for row in rows if row["control"] != SET]
        return [
            row | {"control": SET, "set_draw": 0} if row["set_draw"] == number and row["control"] == control else row
            for row in others
        ]

    effects = moved(evidence.effects)
    drawn: dict[tuple[Any, ...], list[float]] = {}
    for row in effects:
        if row["control"] == RANDOM:
            drawn.setdefault((row["purpose"], row["task"], row["subset"]), []).append(row["effect"])
    for i, row in enumerate(effects):
        if row["control"] == SET and (draws := drawn.get((row["purpose"], row["task"], row["subset"]))):
            effects[i] = row | against_draws(row["effect"], draws, sign_of(row["purpose"]))
    chosen = {purpose: moved(listed) for purpose, listed in evidence.choice["controls"].items()}
    edited = moved(evidence.outcomes.get((control, number), []))
    choice = evidence.choice | {"controls": chosen}
    return replace(evidence, effects=effects, search=moved(evidence.search), choice=choice, edited=edited)


def error_rates(rows: list[Row], confidence: float) -> list[Row]:
    """By claim and kind of control: how many came out ``supported``, ``undecided`` and ``not supported``, and up to which share
    of such sets could be supported (exact binomial)."""
    counted: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counted.setdefault((row["claim"], row["control"]), Counter())[row["status"]] += 1
    found = []
    for (claim, control), counts in counted.items():
        n = counts.total()
        found.append(
            {
                "claim": claim,
                "control": control,
                "n": n,
                **{status: counts[status] for status in ("supported", "undecided", "not supported")},
                "high": stats.binomial(counts["supported"], n, confidence).high,
            }
        )
    return found
