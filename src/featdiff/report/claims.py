"""The claims of the study, each decided by its rules on the tables of one study (the rules: docs/method.md, section 16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featdiff.config.params import ReportParams
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, REPEAT, ZERO_TUNED
from featdiff.report.evidence import Evidence
from featdiff.report.feature_claim import FeatureClaim
from featdiff.report.paired import Outcomes
from featdiff.report.quantities import (
    CONTROLS,
    DIRECTIONS,
    clear,
    effects,
    mean_effects,
    past_percentile,
)
from featdiff.report.verdicts import Criterion, Verdict, at_least, decide, reversed_sign, settled, told
from featdiff.report.words import change, interval, listed, number, percent, signed, things
from featdiff.stats import (
    CHANGES,
    SHARES,
    Interval,
    detectable,
    draws_p,
    holm,
    mean_over_strata,
    samples_to_detect,
    with_runs,
)

FEWEST_DRAWS = 20
"""A 95th percentile of fewer random sets is no percentile."""


@dataclass(frozen=True)
class Replication:
    """The set that was found in one training run, zeroed in another."""

    model: str
    effect: dict[str, Interval | None]
    """Mean change of accuracy on the tasks ``found_on`` and on those ``heldout``."""
    beyond: dict[str, int]
    """Than how many of ``draws`` matched random sets it costs more, on the same tasks."""
    draws: int
    p: float
    """Of the effect on ``found_on`` against these random sets."""


class Claims:
    """Applies the rules to one study; the same seed gives the same intervals. Its words call the models by their labels."""

    def __init__(self, evidence: Evidence, params: ReportParams, seed: int) -> None:
        self.evidence, self.params, self.seed = evidence, params, seed
        self.outcomes, self.roles = Outcomes(evidence), evidence.roles
        self.original, self.tuned, self.contrast = (
            evidence.names.label(role) if role else "the contrast"
            for role in (self.roles.original, self.roles.tuned, self.roles.contrast)
        )

    def estimate(
        self, tasks: Sequence[str], after: dict[str, float], before: dict[str, float] | None = None
    ) -> Interval | None:
        """Mean over ``tasks`` of a level, or of a paired difference, with an interval over questions."""
        numbers, p = self.outcomes.by_task(tasks, after, before), self.params
        within = SHARES if before is None else CHANGES
        return mean_over_strata(numbers, resamples=p.bootstrap, confidence=p.confidence, seed=self.seed, within=within)

    def difference(self, tasks: Sequence[str], after: str, before: str, mode: str | None = None) -> Interval | None:
        """Mean over ``tasks`` of the accuracy of the model ``after`` minus that of ``before``, over all training runs of both
        on the same questions, with an interval over questions and runs (:func:`featdiff.stats.with_runs`)."""
        sides = [self.evidence.runs(model) for model in (after, before)]
        estimate = self.estimate(tasks, *(self.outcomes.runs(side, mode) for side in sides))
        if estimate is None:
            return None
        means = [[self._mean(tasks, self.outcomes.model(run, mode)) for run in side] for side in sides]
        return with_runs(estimate, *means, confidence=self.params.confidence, within=CHANGES)

    def _mean(self, tasks: Sequence[str], right: dict[str, float]) -> float:
        return float(np.mean([values.mean() for values in self.outcomes.by_task(tasks, right).values() if len(values)]))

    def each_run(self, tasks: Sequence[str], after: str, before: str, mode: str | None = None) -> dict[str, float]:
        """The same difference of each training run of ``after`` to the mean over those of ``before``."""
        start = self._mean(tasks, self.outcomes.runs(self.evidence.runs(before), mode))
        return {run: self._mean(tasks, self.outcomes.model(run, mode)) - start for run in self.evidence.runs(after)}

    def _runs(self, tasks: Sequence[str], after: str, before: str, mode: str | None = None) -> str:
        """How many runs stand behind a difference, and what each says; a sentence."""
        each = self.each_run(tasks, after, before, mode) if tasks else {}
        if len(each) < 2:
            return " One training run per arm."
        label = self.evidence.names.label(after)
        return f" {len(each)} training runs of {label}, one by one: {listed([*map(signed, each.values())])}."

    def edit_effect(self, purpose: str, tasks: Sequence[str]) -> Interval | None:
        """Mean paired change under the feature set, all samples of the report split."""
        return self.estimate(tasks, self.outcomes.edited(purpose, "set"), self.outcomes.edited(purpose, "none"))

    def verdicts(self) -> list[Verdict]:
        return [self.transfer(), self.forgetting(), self.features(), self.necessary(), self.sufficient()]

    def transfer(self) -> Verdict:
        """The tuned model improves on tasks far from math: tuned − original on the same questions."""
        tasks, p, roles = self.evidence.far, self.params, self.roles
        gain = self.difference(tasks, roles.tuned, roles.original)
        single = {task: self.difference([task], roles.tuned, roles.original) for task in tasks}
        above = [task for task, found in single.items() if found and found.low > 0]
        criteria = (
            Criterion(
                f"mean gain over tasks of at least {number(p.min_effect)}, interval above zero: {change(gain)}",
                at_least(gain, p.min_effect),
            ),
            Criterion(
                f"the gain is above zero on at least half of the tasks taken one by one: {len(above)} of {len(tasks)}",
                True if tasks and 2 * len(above) >= len(tasks) else None,
            ),
        )
        return Verdict(
            "transfer",
            f"{self.tuned} on math improves tasks far from math",
            decide(criteria),
            f"{self.tuned} − {self.original} on {things(len(tasks), 'task')} away from math: {change(gain)} questions; "
            f"above zero on {len(above)} of {len(tasks)}." + self._runs(tasks, roles.tuned, roles.original),
            self._weak_transfer(single),
            criteria,
            _measured(gain=gain),
        )

    def _weak_transfer(self, single: dict[str, Interval | None]) -> str:
        bound, roles = self.params.min_effect, self.roles
        learned = self.difference(self.evidence.named("train"), roles.tuned, roles.original)
        if at_least(learned, bound) is not True:
            return f"{self.tuned} hardly learned its own training tasks ({change(learned)}): transfer could not show."
        unread = self._unread(roles.original) - self._unread(roles.tuned)
        if unread >= bound:
            return (
                f"Part of a gain may be format: {percent(unread)} more of the answers of {self.original} than of those of "
                f"{self.tuned} could not be read."
            )
        least = min(((task, found) for task, found in single.items() if found), key=lambda pair: pair[1].value, default=None)
        if least and at_least(least[1], bound) is not True:
            return f"On {least[0]} alone {self.tuned} − {self.original} is {change(least[1])}."
        if len(runs := self.evidence.runs(roles.tuned)) == 1:
            return "One training run per arm: the interval covers questions, not training seeds."
        return f"{len(runs)} training runs tell little of how much training seeds differ; the interval is wide for that reason."

    def _unread(self, model: str) -> float:
        shares = [
            row["parse_failures"]
            for run in self.evidence.runs(model)
            for row in self.evidence.accuracy[run]
            if row["task"] in self.evidence.far
            and row["split"] == "report"
            and row["primary"]
            and row["parse_failures"] is not None
        ]
        return float(np.mean(shares)) if shares else 0.0

    def forgetting(self) -> Verdict:
        """The contrast, trained on the same problems, forgets: contrast − original where the original has something to lose,
        and contrast − tuned.

        Where the original is at chance under the tasks' own rule, sampled answers are asked instead: a model that
        knows how and seldom shows it has something to lose only there."""
        evidence, p, contrast, (original, tuned) = self.evidence, self.params, self.roles.contrast, (self.original, self.tuned)
        claim = f"{self.contrast} on the same problems forgets tasks far from math"
        if contrast is None:
            return _without_contrast("forgetting", claim)
        mode, tasks = None, self._something_to_lose(None)
        rule = "the tasks' own scoring rule"
        if not tasks:
            mode, tasks = "sampled", self._something_to_lose("sampled")
            rule = f"sampled answers (greedily, {original} has nothing to lose)"
        lost = self.difference(tasks, contrast, self.roles.original, mode) if tasks else None
        own = self.difference(evidence.far, contrast, self.roles.original)
        behind = self.difference(evidence.far, contrast, self.roles.tuned)
        criteria = (
            Criterion(
                f"{self.contrast} loses at least {number(p.min_effect)} where {original} has something to lose "
                f"(accuracy {number(p.something_to_lose)} above chance): "
                + (f"{change(lost)}, by {rule}" if tasks else "no such task"),
                at_least(reversed_sign(lost), p.min_effect),
            ),
            Criterion(
                f"{self.contrast} ends at least {number(p.min_effect)} below {tuned} on the tasks away from math: "
                f"{change(behind)}",
                at_least(reversed_sign(behind), p.min_effect),
            ),
            Criterion(
                f"by the tasks' own rule {self.contrast} does not rise {number(p.min_effect)} above {original} on them: "
                f"{change(own)}",
                None if own is None else at_least(own, p.min_effect) is not True,
            ),
        )
        if not tasks:
            said = (
                f"{original} is at chance on every task away from math, so nothing can be forgotten visibly; "
                f"{self.contrast} − {tuned} is {change(behind)}."
            )
            weak = f"{original} has nothing to lose: {self.contrast} below {tuned} shows a lack of transfer, not forgetting."
        else:
            said = (
                f"{self.contrast} − {original} on {things(len(tasks), 'task')} where {original} has something to lose: "
                f"{change(lost)} questions, by {rule}; {self.contrast} − {tuned} on all tasks away from math: {change(behind)}."
                + self._runs(tasks, contrast, self.roles.original, mode)
            )
            weak = (
                f"Seen only in sampled answers, in which {original} shows what it seldom shows greedily; "
                f"greedily {self.contrast} − {original} is {change(own)}."
                if mode
                else "How foreign the wording of the solutions is decides much (prepare.teacher)."
            )
        return Verdict("forgetting", claim, decide(criteria), said, weak, criteria, _measured(lost=lost, behind=behind))

    def _something_to_lose(self, mode: str | None) -> list[str]:
        levels = self.outcomes.by_task(self.evidence.far, self.outcomes.model(self.roles.original, mode))
        return [
            task
            for task, values in levels.items()
            if len(values) and values.mean() >= self.evidence.tasks[task].chance + self.params.something_to_lose
        ]

    def features(self) -> Verdict:
        """The contrast adds many features of its own that freeze early; the tuned model changes few and keeps changing them."""
        claim = f"{self.contrast} adds many specialised features that freeze early, {self.tuned} few that keep changing"
        if self.roles.contrast is None:
            return _without_contrast("features", claim)
        return FeatureClaim(self.evidence, self.params).verdict(claim)

    def necessary(self) -> Verdict:
        """Zeroing the set in the tuned model lowers accuracy beyond every matched random set, and in its repeats too."""
        claim = f"A small task-agnostic set of features is necessary: zeroing it in {self.tuned} takes the gain away"
        return self._intervention("necessary", claim, ZERO_TUNED, -1)

    def sufficient(self) -> Verdict:
        """Amplifying the set in the original raises accuracy beyond every matched random set."""
        claim = f"The same set is sufficient: amplifying it in {self.original} gives the gain"
        return self._intervention("sufficient", claim, AMPLIFY_ORIGINAL, 1)

    def replications(self) -> list[Replication]:
        """What zeroing the set does in the other training runs of the tuned model; empty where none was edited."""
        found = []
        for model in self.evidence.runs(self.roles.tuned)[1:]:
            purpose = f"{REPEAT}{model}"
            if not effects(self.evidence, purpose, "set"):
                continue
            on = {"found_on": self.evidence.found_on, "heldout": self.evidence.named("heldout")}
            means = {group: mean_effects(self.evidence, purpose, tasks) for group, tasks in on.items()}
            draws = {group: list(mean.get("random", {}).values()) for group, mean in means.items()}
            found.append(
                Replication(
                    model,
                    {group: self.edit_effect(purpose, tasks) for group, tasks in on.items()},
                    {group: sum(draw > means[group]["set"][0] for draw in drawn) for group, drawn in draws.items()},
                    len(draws["found_on"]),
                    draws_p(means["found_on"]["set"][0], draws["found_on"], -1),
                )
            )
        return found

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
        repeats = f"in other training runs of {self.tuned}"
        criterion = Criterion(
            f"the same set, as it is, acts {repeats} (at least {number(p.min_effect)}, p at most {number(p.alpha)} against "
            f"random sets): {sum(act)} of {len(act)}",
            settled(all(act), 2 * sum(size is False for size in sizes) >= len(sizes)),
        )
        return criterion, f" Zeroed {repeats}: {'; '.join(words)}."

    def _intervention(self, key: str, claim: str, purpose: str, sign: int) -> Verdict:
        evidence, p = self.evidence, self.params
        rows = {row["task"]: row for row in effects(evidence, purpose, "set")}
        if reason := nothing_to_edit(evidence, rows):
            return Verdict(key, claim, "undecided", reason, "No feature set was tested.", ())
        found, heldout = evidence.found_on, evidence.named("heldout")
        beyond = {
            group: [task for task in tasks if task in rows and clear(rows[task], sign)]
            for group, tasks in (("found", found), ("heldout", heldout))
        }
        on_found, on_heldout = self.edit_effect(purpose, found), self.edit_effect(purpose, heldout)
        draws = len({row["set_draw"] for row in effects(evidence, purpose, "random")})
        share = evidence.set_size / evidence.n_features
        noop = [row["effect"] for row in effects(evidence, purpose, "noop")]
        tested, held = (estimate if sign > 0 else reversed_sign(estimate) for estimate in (on_found, on_heldout))
        seen = told(tested, p.min_effect)
        criteria = [
            Criterion(
                f"mean effect on the tasks it was found on at least {number(p.min_effect)}: {change(on_found)}",
                at_least(tested, p.min_effect),
            ),
            Criterion(
                f"beyond each of {draws} matched random sets on all tasks it was found on: "
                f"{len(beyond['found'])} of {len(found)}",
                settled(len(beyond["found"]) == len(found), seen and 2 * len(beyond["found"]) < len(found)),
            ),
            Criterion(
                f"the same on at least {p.min_heldout} held out from the selection: {len(beyond['heldout'])} of {len(heldout)}",
                settled(bool(heldout) and len(beyond["heldout"]) >= p.min_heldout, told(held, p.min_effect)),
            ),
            Criterion(
                f"at least {FEWEST_DRAWS} different matched random sets: {draws}", True if draws >= FEWEST_DRAWS else None
            ),
            self._chance(purpose, sign, seen),
            self._per_task(rows, found, sign),
            self._does_nothing(purpose, sign, seen),
            Criterion(f"found on more than one task: {things(len(found), 'task')}", True if len(found) > 1 else None),
            Criterion(
                f"small, at most {percent(p.small_set)} of the features: {evidence.set_size} of {evidence.n_features}",
                share <= p.small_set,
            ),
            Criterion(
                "the edit with factor 1 changes nothing: " + ("holds on every task" if noop and not any(noop) else "not shown"),
                True if noop and not any(noop) else None,
            ),
        ]
        verb = "Zeroing" if sign < 0 else "Amplifying"
        said = (
            f"{verb} {things(evidence.set_size, 'feature')} ({percent(share)}) changes accuracy by {change(on_found)} "
            f"questions on the {things(len(found), 'task')} it was found on and {change(on_heldout)} on "
            f"{things(len(heldout), 'held-out task')}; beyond all {draws} matched random sets on "
            f"{len(beyond['found'])} of {len(found)} and {len(beyond['heldout'])} of {len(heldout)}."
        )
        repeated = self.replications() if sign < 0 else []
        if repeated:  # a criterion that is open for want of runs would bar all who have but one
            criterion, sentence = self._replicated(repeated)
            criteria.append(criterion)
            said += sentence
        status = decide(criteria)
        if status != "supported":
            said += self._resolution(purpose, found)
        if status == "supported" and all(past_percentile(rows[task], sign) for task in found):
            said += " The effect is causal in the sense of this study: beyond the 95th percentile of matched random sets."
        alone = sign < 0 and not repeated
        weakest = self._weakest(criteria, purpose, sign, alone=alone) or _weakest_effect(rows, [*found, *heldout], sign)
        return Verdict(key, claim, status, said, weakest, tuple(criteria), _measured(found_on=on_found, heldout=on_heldout))

    def _chance(self, purpose: str, sign: int, seen: bool) -> Criterion:
        means = mean_effects(self.evidence, purpose, self.evidence.found_on)
        if "random" not in means:
            return Criterion("mean effect against matched random sets: none drawn", None)
        p = draws_p(means["set"][0], list(means["random"].values()), sign)
        text = f"mean effect against matched random sets, p at most {number(self.params.alpha)}: p = {number(p, 3)}"
        return Criterion(text, settled(p <= self.params.alpha, seen and p > 0.5))

    def _per_task(self, rows: dict[str, dict[str, Any]], tasks: list[str], sign: int) -> Criterion:
        adjusted = holm({task: rows[task]["p_mcnemar"] for task in tasks if task in rows})
        sure = [task for task, p in adjusted.items() if p <= self.params.alpha and sign * rows[task]["effect"] > 0]
        text = (
            f"changes answers on every task it was found on (McNemar, Holm over tasks, p at most {number(self.params.alpha)}): "
            f"{len(sure)} of {len(adjusted)}"
        )
        return Criterion(text, True if adjusted and len(sure) == len(adjusted) else None)

    def _does_nothing(self, purpose: str, sign: int, seen: bool) -> Criterion:
        """Shared features and the original's own must not do what the set does."""
        means, share = mean_effects(self.evidence, purpose, self.evidence.found_on), self.params.control_share
        called = dict(zip(CONTROLS, ("shared", f"{self.original}'s own"), strict=True))
        held = {called[name]: means[name][0] for name in CONTROLS if name in means}
        words = listed([f"{name} {signed(value)}" for name, value in held.items()])
        text = f"as many shared features, or {self.original}'s own, do at most {percent(share)} of it: {words}"
        within = [sign * value <= share * sign * means["set"][0] for value in held.values()]
        return Criterion(text, all(within) if held and seen else None)

    def _resolution(self, purpose: str, tasks: Sequence[str]) -> str:
        """What effect the questions at hand could have shown, or how many would show one."""
        p = self.params
        numbers = self.outcomes.by_task(tasks, self.outcomes.edited(purpose, "set"), self.outcomes.edited(purpose, "none"))
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

    def _weakest(self, criteria: Sequence[Criterion], purpose: str, sign: int, *, alone: bool) -> str:
        if open_one := next((criterion for criterion in criteria if not criterion.holds), None):
            return f"It fails or stays open at this: {open_one.text}."
        links = []
        agreement = (self.evidence.localize.get("seeds") or {}).get("mean_jaccard")
        if agreement is not None and agreement < self.params.stable_jaccard:
            links.append(
                f"The set is not stable: other crosscoder seeds find sets with a Jaccard index of {number(agreement)}."
            )
        means = mean_effects(self.evidence, purpose, self.evidence.found_on)
        simple = {name: means[name][0] for name in DIRECTIONS if name in means}
        best = max(simple, key=lambda name: sign * simple[name], default=None)
        if best and sign * simple[best] >= sign * means["set"][0] - self.params.min_effect:
            words = f"{best.replace('_', ' ')} {signed(simple[best])}"
            links.append(f"A simple direction does as much without a dictionary: {words}.")
        if alone:
            links.append(f"The set was tested in one training run of {self.tuned} only.")
        return " ".join(links)


def _measured(**estimates: Interval | None) -> dict[str, Interval]:
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _without_contrast(key: str, claim: str) -> Verdict:
    said = "This study has no contrast model (roles.contrast), so there is nothing to hold the tuned one against."
    return Verdict(key, claim, "undecided", said, "No contrast model.", ())


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
    matched = f"matched random sets 5th to 95th percentile {interval(least['random_low'], least['random_high'])}"
    return (
        f"Smallest on {least['task']}: {signed(least['effect'])} {interval(least['low'], least['high'])}, "
        f"n = {least['n']} ({matched})."
    )
