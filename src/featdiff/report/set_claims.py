"""The claims about the feature set: it is necessary, it is sufficient, and the dictionary was needed to find it (the rules:
docs/method.md, section 16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, RANDOM, RANDOM_DIRECTION, REPEAT, RIVALS, SET, ZERO_TUNED
from featdiff.report.evidence import Evidence, Row
from featdiff.report.quantities import CONTROLS, clear, effects, mean_effects, past_percentile, stability
from featdiff.report.selectivity import choice, selectivity
from featdiff.report.verdicts import Criterion, Verdict, at_least, decide, reversed_sign, settled, told
from featdiff.report.words import change, interval, listed, number, percent, signed, things
from featdiff.stats import Interval, detectable, draws_p, holm, samples_to_detect

if TYPE_CHECKING:
    from featdiff.report.claims import Claims

FEWEST_DRAWS = 20
"""A 95th percentile of fewer random sets is no percentile."""
ACTS = 0.9
"""Share of the questions on which the set acts that the median control must act on."""


@dataclass(frozen=True)
class Replication:
    """The set that was found in one training run, taken away from another."""

    model: str
    effect: dict[str, Interval | None]
    """Mean change of accuracy on the tasks ``found_on`` and on those ``heldout``."""
    beyond: dict[str, int]
    """Than how many of ``draws`` random sets it costs more, on the same tasks."""
    draws: int
    p: float
    """Of the effect on ``found_on`` against these random sets."""


class SetClaims:
    """Applies the rules about the set to one study."""

    def __init__(self, claims: Claims) -> None:
        self.claims, self.evidence, self.params = claims, claims.evidence, claims.params
        self.original, self.tuned = claims.original, claims.tuned
        self.found, self.heldout = self.evidence.found_on, self.evidence.named("heldout")

    def verdicts(self) -> list[Verdict]:
        """Necessary, sufficient, and whether the dictionary was needed."""
        return [self.necessary(), self.sufficient(), self.dictionary()]

    def necessary(self) -> Verdict:
        """Taken away from the tuned model, the set takes the gain with it: the answers return to those of the original and are
        not merely broken, beyond random sets as long, and in its repeats too."""
        claim = f"A small task-agnostic set of features is necessary: without it {self.tuned} answers like {self.original}"
        return self._tested("necessary", claim, ZERO_TUNED, -1, [self._returns(), self._unbroken()])

    def sufficient(self) -> Verdict:
        """Amplified in the original, the set gives it the gain, at a length of change at which controls do nothing."""
        claim = f"The same set is sufficient: amplifying it in {self.original} gives the gain"
        return self._tested("sufficient", claim, AMPLIFY_ORIGINAL, 1, self._selective())

    def dictionary(self) -> Verdict:
        """The set does more than what needs no learned features, so that a crosscoder was needed to find it."""
        claim = "The dictionary is needed: the set does more than the best single direction or random dictionary"
        rows = {row["task"]: row for row in effects(self.evidence, ZERO_TUNED, SET)}
        if reason := nothing_to_edit(self.evidence, rows):
            return Verdict("dictionary", claim, "undecided", reason, "No feature set was tested.", ())
        margin, criteria, said, measured = self.params.dictionary_margin, [], [], {}
        for purpose, sign, where in ((ZERO_TUNED, -1, "taken away"), (AMPLIFY_ORIGINAL, 1, "amplified")):
            means = mean_effects(self.evidence, purpose, self.found)
            known = [name for name in RIVALS if name in means]
            if not known:
                criteria.append(
                    Criterion(f"{where}, more than the best direction or random dictionary", "none was tried", None)
                )
                continue
            best = max(known, key=lambda name: sign * means[name][0])
            outcomes = self.claims.outcomes
            ahead = self.claims.estimate(self.found, outcomes.edited(purpose, SET), outcomes.edited(purpose, best))
            words = f"{best.replace('_', ' ')} {signed(means[best][0])}, the set {signed(means[SET][0])}"
            ahead = ahead if sign > 0 else reversed_sign(ahead)
            criteria.append(
                Criterion(
                    f"{where}, at least {number(margin)} more than the best of them",
                    f"{change(ahead)} ({words})",
                    at_least(ahead, margin),
                )
            )
            said.append(f"{where.capitalize()}: {words}, difference {change(ahead)}")
            measured[where] = ahead
        status = decide(criteria)
        weak = "Its rivals were found with the tuned model at hand as well, on the same questions."
        if failed := next((criterion for criterion in criteria if not criterion.holds), None):
            weak = f"It fails or stays open at this: {failed.text}."
        estimates = {name: found for name, found in measured.items() if found is not None}
        return Verdict("dictionary", claim, status, ". ".join(said) + ".", weak, tuple(criteria), estimates)

    def replications(self) -> list[Replication]:
        """What taking the set away does in the other training runs of the tuned model; empty where none was edited."""
        found = []
        for model in self.evidence.runs(self.evidence.roles.tuned)[1:]:
            purpose = f"{REPEAT}{model}"
            if not effects(self.evidence, purpose, SET):
                continue
            on = {"found_on": self.found, "heldout": self.heldout}
            means = {group: mean_effects(self.evidence, purpose, tasks) for group, tasks in on.items()}
            draws = {group: list(mean.get("random", {}).values()) for group, mean in means.items()}
            found.append(
                Replication(
                    model,
                    {group: self._effect(purpose, tasks) for group, tasks in on.items()},
                    {group: sum(draw > means[group][SET][0] for draw in drawn) for group, drawn in draws.items()},
                    len(draws["found_on"]),
                    draws_p(means["found_on"][SET][0], draws["found_on"], -1),
                )
            )
        return found

    def _effect(self, purpose: str, tasks: Sequence[str], control: str = SET) -> Interval | None:
        """Mean paired change under a control, all samples of the report split."""
        outcomes = self.claims.outcomes
        return self.claims.estimate(tasks, outcomes.edited(purpose, control), outcomes.edited(purpose, "none"))

    def _mean(self, column: str, tasks: Sequence[str]) -> float | None:
        """Mean over tasks of a column of the effects of taking the set away."""
        held = [row[column] for row in effects(self.evidence, ZERO_TUNED, SET) if row["task"] in tasks]
        return float(np.mean(held)) if held else None

    def _returns(self) -> Criterion:
        least, found, heldout = self.params.returned, self._mean("alike", self.found), self._mean("alike", self.heldout)
        text = (
            f"the answers return to those of {self.original}: at least {percent(least)} are its answer on the question, or "
            f"readable in its manner"
        )
        return Criterion(
            text, f"{percent(found)} where it was found, {percent(heldout)} held out", None if found is None else found >= least
        )

    def _unbroken(self) -> Criterion:
        broken, own = self._mean("unread", self.found), self._mean("unread_toward", self.found)
        text = f"no damage: unread answers at most {number(self.params.unread_margin)} above those of {self.original}"
        if broken is None or own is None:
            return Criterion(text, "not measured", None)
        holds = broken - own <= self.params.unread_margin
        said = f"{percent(broken)} against {percent(own)}" + ("" if holds else ": the drop is made of damage")
        return Criterion(text, said, holds)

    def _selective(self) -> list[Criterion]:
        """How much longer a change controls need, and whether the original is tipped by pushes that mean nothing."""
        ratios, p = selectivity(self.evidence, AMPLIFY_ORIGINAL), self.params
        bounds = {name: ("" if each.reached else "more than ") + number(each.ratio, 1) for name, each in ratios.items()}
        words = listed([f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items()])
        text = (
            f"selective: the median control needs a change at least {number(p.selectivity, 1)} times as long for half of the "
            "set's gain"
        )
        # A control that never came to it was tried up to this length only: it may, further out.
        enough = all(each.ratio >= p.selectivity for each in ratios.values())
        short = any(each.reached and each.ratio < p.selectivity for each in ratios.values())
        means = mean_effects(self.evidence, AMPLIFY_ORIGINAL, self.found)
        pushes = list(means.get(RANDOM_DIRECTION, {}).values())
        pushed = f"{signed(float(np.mean(pushes)))}, largest {signed(max(pushes))}" if pushes else "none tried"
        bound = p.control_share * means[SET][0] if SET in means else 0.0
        return [
            Criterion(text, words or "not measured", settled(bool(ratios) and enough, short)),
            Criterion(
                f"random directions no longer, each where it does most, give at most {percent(p.control_share)} of it on "
                "average",
                pushed,
                float(np.mean(pushes)) <= bound if pushes and bound > 0 else None,
            ),
        ]

    def _replicated(self, found: Sequence[Replication]) -> tuple[Criterion, str]:
        """Whether the set, as it is, acts in the repeats: as large and as unlike random sets as it has to be where it was
        found. It fails where half of the repeats or more show that it does not."""
        p = self.params
        sizes = [at_least(reversed_sign(each.effect["found_on"]), p.min_effect) for each in found]
        act = [size is True and each.p <= p.alpha for size, each in zip(sizes, found, strict=True)]
        words = [
            f"{self.evidence.names.label(each.model)} {change(each.effect['found_on'])} on the tasks it was found on and "
            f"{change(each.effect['heldout'])} on those held out, beyond {each.beyond['found_on']} and "
            f"{each.beyond['heldout']} of {each.draws} random sets"
            for each in found
        ]
        repeats = f"other training runs of {self.tuned}"
        criterion = Criterion(
            f"the same set, as it is, acts in {repeats} (at least {number(p.min_effect)}, p at most {number(p.alpha)} against "
            "random sets)",
            f"{sum(act)} of {len(act)}",
            settled(all(act), 2 * sum(size is False for size in sizes) >= len(sizes)),
        )
        return criterion, f" Taken away from {repeats}: {'; '.join(words)}."

    def _tested(self, key: str, claim: str, purpose: str, sign: int, further: Sequence[Criterion]) -> Verdict:
        evidence, p, found, heldout = self.evidence, self.params, self.found, self.heldout
        rows = {row["task"]: row for row in effects(evidence, purpose, SET)}
        if reason := nothing_to_edit(evidence, rows):
            return Verdict(key, claim, "undecided", reason, "No feature set was tested.", ())
        beyond = [task for task in heldout if task in rows and clear(rows[task], sign)]
        on_found, on_heldout = self._effect(purpose, found), self._effect(purpose, heldout)
        share = evidence.set_size / evidence.n_features
        noop = [row["effect"] for row in effects(evidence, purpose, "noop")]
        tested, held = (estimate if sign > 0 else reversed_sign(estimate) for estimate in (on_found, on_heldout))
        seen = told(tested, p.min_effect)
        criteria = [
            Criterion(
                f"mean effect on the tasks it was found on at least {number(p.min_effect)}",
                change(on_found),
                at_least(tested, p.min_effect),
            ),
            self._chance(purpose, sign, seen),
            self._acting(purpose),
            Criterion(
                f"beyond every random set on at least {p.min_heldout} task held out from the selection",
                f"{len(beyond)} of {len(heldout)}",
                settled(bool(heldout) and len(beyond) >= p.min_heldout, told(held, p.min_effect)),
            ),
            self._per_task(rows, found, sign),
            self._does_nothing(purpose, sign, seen),
            *further,
            Criterion("found on more than one task", things(len(found), "task"), True if len(found) > 1 else None),
            Criterion(
                f"small, at most {percent(p.small_set)} of the features",
                f"{evidence.set_size} of {evidence.n_features}",
                share <= p.small_set,
            ),
            Criterion(
                "the edit at dose 0 changes nothing",
                "on every task" if noop and not any(noop) else "not shown",
                True if noop and not any(noop) else None,
            ),
        ]
        chosen = choice(evidence, purpose, SET)
        verb = "Taking away" if sign < 0 else "Amplifying"
        said = (
            f"{verb} {things(evidence.set_size, 'feature')} ({percent(share)}; {chosen.get('edit')}, dose "
            f"{chosen.get('dose', 0):g}) changes accuracy by {change(on_found)} questions on the "
            f"{things(len(found), 'task')} it was found on and {change(on_heldout)} on "
            f"{things(len(heldout), 'held-out task')}."
        )
        repeated = self.replications() if sign < 0 else []
        if repeated:  # a criterion that is open for want of runs would bar all who have but one
            criterion, sentence = self._replicated(repeated)
            criteria.append(criterion)
            said += sentence
        status = decide(criteria)
        if status != "supported":
            said += self._resolution(purpose, found) + (self._most() if sign < 0 else "")
        if status == "supported" and all(past_percentile(rows[task], sign) for task in found):
            said += " The effect is causal in the sense of this study: beyond the 95th percentile of random sets as long."
        weakest = self._weakest(criteria, alone=sign < 0 and not repeated) or _weakest_effect(rows, [*found, *heldout], sign)
        estimates = {name: each for name, each in (("found_on", on_found), ("heldout", on_heldout)) if each is not None}
        return Verdict(key, claim, status, said, weakest, tuple(criteria), estimates)

    def _chance(self, purpose: str, sign: int, seen: bool) -> Criterion:
        means = mean_effects(self.evidence, purpose, self.found)
        drawn = list(means.get("random", {}).values())
        if len(drawn) < FEWEST_DRAWS:
            return Criterion(f"at least {FEWEST_DRAWS} random sets to compare with", str(len(drawn)), None)
        p = draws_p(means[SET][0], drawn, sign)
        alpha = number(self.params.alpha)
        text = f"mean effect against {len(drawn)} random sets no longer, each where it does most, p at most {alpha}"
        largest = signed(sign * max(sign * value for value in drawn))
        return Criterion(
            text,
            f"p = {number(p, 3)}, largest of them {largest}",
            settled(p <= self.params.alpha, seen and p > self.params.alpha),
        )

    def _acting(self, purpose: str) -> Criterion:
        """Random sets that change nothing could not refute anything. They are as long as the set, and so act where it does."""
        tried = self.evidence.tried_with
        acting = {each: [row["acting"] for row in tried.get((purpose, each), []) if row["chosen"]] for each in (SET, RANDOM)}
        if not all(acting.values()):
            return Criterion("random sets act", "none tried", None)
        own, drawn = (float(np.median(acting[control])) for control in (SET, RANDOM))
        where = f"the questions on which the set does ({percent(own)})"
        return Criterion(f"random sets act on at least {percent(ACTS)} of {where}", percent(drawn), drawn >= ACTS * own or None)

    def _per_task(self, rows: dict[str, Row], tasks: list[str], sign: int) -> Criterion:
        adjusted = holm({task: rows[task]["p_mcnemar"] for task in tasks if task in rows})
        sure = [task for task, p in adjusted.items() if p <= self.params.alpha and sign * rows[task]["effect"] > 0]
        text = (
            f"changes answers on every task it was found on (McNemar, Holm over tasks, p at most {number(self.params.alpha)})"
        )
        return Criterion(text, f"{len(sure)} of {len(adjusted)}", True if adjusted and len(sure) == len(adjusted) else None)

    def _does_nothing(self, purpose: str, sign: int, seen: bool) -> Criterion:
        """Shared features and the original's own, made as long, must not do what the set does."""
        means, share = mean_effects(self.evidence, purpose, self.found), self.params.control_share
        called = dict(zip(CONTROLS, ("shared", f"{self.original}'s own"), strict=True))
        held = {called[name]: means[name][0] for name in CONTROLS if name in means}
        words = listed([f"{name} {signed(value)}" for name, value in held.items()])
        text = f"as many shared features, or {self.original}'s own, as long, do at most {percent(share)} of it"
        within = [sign * value <= share * sign * means[SET][0] for value in held.values()]
        return Criterion(text, words or "not measured", all(within) if held and seen else None)

    def _resolution(self, purpose: str, tasks: Sequence[str]) -> str:
        """What effect the questions at hand could have shown, or how many would show one."""
        p, outcomes = self.params, self.claims.outcomes
        numbers = outcomes.by_task(tasks, outcomes.edited(purpose, SET), outcomes.edited(purpose, "none"))
        pooled = np.concatenate([*numbers.values(), np.empty(0)])
        if len(pooled) < 2:
            return ""
        spread = float(pooled.std(ddof=1))
        enough = things(samples_to_detect(p.min_effect, spread, confidence=p.confidence, power=p.power), "question")
        if spread == 0:
            alike = "All answers changed alike" if pooled.any() else "No answer changed"
            return f" {alike}; {enough} of which none changed would exclude a change of {number(p.min_effect)}."
        least = detectable(spread, len(pooled), confidence=p.confidence, power=p.power)
        return (
            f" With {things(len(pooled), 'question')} of this spread, a change of {number(least)} is found with "
            f"{percent(p.power)} probability; {number(p.min_effect)} takes {enough}."
        )

    def _most(self) -> str:
        """What the whole stream of the original takes away at the hooked layer, in a sentence; empty if none was stitched."""
        evidence, outcomes = self.evidence, self.claims.outcomes
        right = outcomes.stitched("original").get(evidence.hooked)
        found = right and self.claims.estimate(evidence.far, right, outcomes.model(evidence.roles.tuned))
        if not found:
            return ""
        return (
            f" With the whole stream of {self.original} in place of its own at this layer and every position, the accuracy of "
            f"{self.tuned} away from math changes by {change(found)} questions: what lies above is in no set of features here."
        )

    def _weakest(self, criteria: Sequence[Criterion], *, alone: bool) -> str:
        if open_one := next((criterion for criterion in criteria if not criterion.holds), None):
            return f"It fails or stays open at this: {open_one.text}."
        links = [f"The set was tested in one training run of {self.tuned} only."] if alone else []
        stable = stability(self.evidence)
        if stable.effect is not None and stable.effect < self.params.stable_effect:
            links.append(
                "Sets that other crosscoder seeds find change something else: mean cosine of their changes "
                f"{number(stable.effect)}, of the spanned subspaces {number(stable.subspace)}."
            )
        return " ".join(links)


def nothing_to_edit(evidence: Evidence, rows: dict[str, Any]) -> str:
    """Why there is no feature set to test; empty if there is one."""
    localize = evidence.localize
    if localize["status"] == "too_few_flipped":
        skipped = "; ".join(f"{task}: {reason}" for task, reason in localize["skipped"].items())
        names, roles = evidence.names, evidence.roles
        solved = f"{names.label(roles.original)} fails and {names.label(roles.tuned)} solves"
        return f"No features could be sought: too few samples that {solved} ({skipped})."
    if localize["status"] == "empty_intersection":
        tasks = [f"{task} {len(found['selected'])}" for task, found in localize["per_task"].items()]
        return (
            f"No feature reaches {percent(localize['threshold'])} of the largest score on every task at once "
            f"(features that do so per task: {', '.join(tasks)})."
        )
    return "" if rows else "The table of effects holds no row for the feature set."


def _weakest_effect(rows: dict[str, dict[str, Any]], tasks: list[str], sign: int) -> str:
    least = min((rows[task] for task in tasks if task in rows), key=lambda row: sign * row["effect"])
    matched = f"random sets 5th to 95th percentile {interval(least['random_low'], least['random_high'])}"
    return (
        f"Smallest on {least['task']}: {signed(least['effect'])} {interval(least['low'], least['high'])}, "
        f"n = {least['n']} ({matched})."
    )
