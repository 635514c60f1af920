"""A verdict per claim: rules written before the numbers, applied to tables.

A claim is a conjunction of criteria; each holds, fails, or stays open where the data cannot tell. All hold:
supported. One fails: not supported. Otherwise: undecided. That an effect was not seen is no failure where one of
the size that counts could have been missed (:func:`told`). Thresholds are in the section ``report`` of
params.yaml. The word causal is used of an effect only where it lies beyond the 95th percentile of matched random sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from featdiff.config.params import ReportParams
from featdiff.report.evidence import Evidence
from featdiff.report.paired import Outcomes
from featdiff.report.quantities import (
    CONTROLS,
    DIRECTIONS,
    clear,
    early_checkpoint,
    early_overlap,
    effects,
    mean_effects,
    null_rates,
    own_features,
    past_percentile,
    total_change,
)
from featdiff.report.words import change, interval, listed, number, percent, short, signed, things
from featdiff.stats import CHANGES, SHARES, Interval, detectable, draws_p, holm, mean_over_strata, samples_to_detect

Status = Literal["supported", "not supported", "undecided"]

FEWEST_DRAWS = 20
"""A 95th percentile of fewer random sets is no percentile."""


@dataclass(frozen=True)
class Criterion:
    """One condition of a claim, in words with its numbers. ``holds`` is None where the data cannot tell."""

    text: str
    holds: bool | None


@dataclass(frozen=True)
class Verdict:
    key: str
    claim: str
    status: Status
    evidence: str
    """One sentence or two with numbers, n and interval."""
    weakest_link: str
    criteria: tuple[Criterion, ...]


def decide(criteria: Sequence[Criterion]) -> Status:
    """The conjunction of ``criteria`` under three values; without criteria nothing is decided."""
    if any(criterion.holds is False for criterion in criteria):
        return "not supported"
    return "supported" if criteria and all(criterion.holds for criterion in criteria) else "undecided"


def settled(yes: bool, no: bool) -> bool | None:
    """True, False, or open."""
    return True if yes else False if no else None


def at_least(estimate: Interval | None, bound: float) -> bool | None:
    """Whether an effect is ``bound`` or more and not zero: True if the mean reaches it and the interval is above
    zero, False if the interval ends below ``bound``, None between."""
    if estimate is None:
        return None
    return settled(estimate.value >= bound and estimate.low > 0, estimate.high < bound)


def told(estimate: Interval | None, bound: float) -> bool:
    """Whether the questions tell of an effect at all: that there is one, or that it is less than ``bound``. Where they do
    not, a comparison with controls that comes out against a claim is noise, and leaves it open."""
    return estimate is not None and (estimate.low > 0 or estimate.high < bound)


class Judge:
    """Applies the rules to one study; the same seed gives the same intervals."""

    def __init__(self, evidence: Evidence, params: ReportParams, seed: int) -> None:
        self.evidence, self.params, self.seed = evidence, params, seed
        self.outcomes = Outcomes(evidence)

    def estimate(
        self, tasks: Sequence[str], after: dict[str, float], before: dict[str, float] | None = None
    ) -> Interval | None:
        """Mean over ``tasks`` of a level, or of a paired difference."""
        numbers, p = self.outcomes.by_task(tasks, after, before), self.params
        within = SHARES if before is None else CHANGES
        return mean_over_strata(numbers, resamples=p.bootstrap, confidence=p.confidence, seed=self.seed, within=within)

    def edit_effect(self, purpose: str, tasks: Sequence[str]) -> Interval | None:
        """Mean paired change under the feature set, all samples of the report split."""
        return self.estimate(tasks, self.outcomes.edited(purpose, "set"), self.outcomes.edited(purpose, "none"))

    def verdicts(self) -> list[Verdict]:
        return [self.transfer(), self.forgetting(), self.features(), self.necessary(), self.sufficient()]

    def transfer(self) -> Verdict:
        """RL on math improves tasks far from math: GRPO − base on the same questions."""
        tasks, p = self.evidence.far, self.params
        base, grpo = self.outcomes.model("base"), self.outcomes.model("grpo")
        gain = self.estimate(tasks, grpo, base)
        single = {task: self.estimate([task], grpo, base) for task in tasks}
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
            "RL on math improves tasks far from math",
            decide(criteria),
            f"GRPO − base on {things(len(tasks), 'task')} away from math: {change(gain)} questions; "
            f"above zero on {len(above)} of {len(tasks)}.",
            self._weak_transfer(single),
            criteria,
        )

    def _weak_transfer(self, single: dict[str, Interval | None]) -> str:
        bound = self.params.min_effect
        learned = self.estimate(self.evidence.named("train"), self.outcomes.model("grpo"), self.outcomes.model("base"))
        if at_least(learned, bound) is not True:
            return f"GRPO hardly learned its own training tasks ({change(learned)}): transfer could not show."
        unread = self._unread("base") - self._unread("grpo")
        if unread >= bound:
            return (
                f"Part of a gain may be format: {percent(unread)} more of the base's answers than of GRPO's could not be read."
            )
        least = min(((task, found) for task, found in single.items() if found), key=lambda pair: pair[1].value, default=None)
        if least and at_least(least[1], bound) is not True:
            return f"On {least[0]} alone GRPO − base is {change(least[1])}. One training run per arm."
        return "One training run per arm: the interval covers questions, not training seeds."

    def _unread(self, model: str) -> float:
        shares = [
            row["parse_failures"]
            for row in self.evidence.accuracy[model]
            if row["task"] in self.evidence.far
            and row["split"] == "report"
            and row["primary"]
            and row["parse_failures"] is not None
        ]
        return float(np.mean(shares)) if shares else 0.0

    def forgetting(self) -> Verdict:
        """SFT on the same problems forgets: SFT − base where the base has something to lose, and SFT − GRPO.

        Where the base is at chance under the tasks' own rule, sampled answers are asked instead: a model that
        knows how and seldom shows it has something to lose only there."""
        evidence, p = self.evidence, self.params
        mode, tasks = None, self._something_to_lose(None)
        rule = "the tasks' own scoring rule"
        if not tasks:
            mode, tasks = "sampled", self._something_to_lose("sampled")
            rule = "sampled answers (greedily, the base has nothing to lose)"
        lost = self.estimate(tasks, self.outcomes.model("sft", mode), self.outcomes.model("base", mode)) if tasks else None
        own = self.estimate(evidence.far, self.outcomes.model("sft"), self.outcomes.model("base"))
        behind = self.estimate(evidence.far, self.outcomes.model("sft"), self.outcomes.model("grpo"))
        criteria = (
            Criterion(
                f"SFT loses at least {number(p.min_effect)} where the base has something to lose "
                f"(accuracy {number(p.something_to_lose)} above chance): "
                + (f"{change(lost)}, by {rule}" if tasks else "no such task"),
                at_least(_reversed(lost), p.min_effect),
            ),
            Criterion(
                f"SFT ends at least {number(p.min_effect)} below GRPO on the tasks away from math: {change(behind)}",
                at_least(_reversed(behind), p.min_effect),
            ),
            Criterion(
                f"by the tasks' own rule SFT does not rise {number(p.min_effect)} above the base on them: {change(own)}",
                None if own is None else at_least(own, p.min_effect) is not True,
            ),
        )
        if not tasks:
            said = (
                "The base is at chance on every task away from math, so nothing can be forgotten visibly; "
                f"SFT − GRPO is {change(behind)}."
            )
            weak = "A base with nothing to lose: SFT below GRPO shows a lack of transfer, not forgetting."
        else:
            said = (
                f"SFT − base on {things(len(tasks), 'task')} where the base has something to lose: {change(lost)} questions, "
                f"by {rule}; SFT − GRPO on all tasks away from math: {change(behind)}."
            )
            weak = (
                "Seen only in sampled answers, in which the base shows what it seldom shows greedily; "
                f"greedily SFT − base is {change(own)}."
                if mode
                else "One training run; how foreign the teacher's wording is decides much (prepare.teacher)."
            )
        return Verdict("forgetting", "SFT on the same problems forgets them", decide(criteria), said, weak, criteria)

    def _something_to_lose(self, mode: str | None) -> list[str]:
        levels = self.outcomes.by_task(self.evidence.far, self.outcomes.model("base", mode))
        return [
            task
            for task, values in levels.items()
            if len(values) and values.mean() >= self.evidence.tasks[task].chance + self.params.something_to_lose
        ]

    def features(self) -> Verdict:
        """SFT adds many features of its own that freeze early; RL changes few and keeps changing them."""
        p = self.params
        pairs = own_features(self.evidence)
        counted = [pair for pair in pairs if pair[0].endswith("batchtopk")] or pairs
        early, last = early_checkpoint(self.evidence, p.early_share)
        kept = {arm: list(early_overlap(self.evidence, arm, early, last).values()) for arm in ("sft", "grpo")}
        moved = {arm: total_change(self.evidence, arm).get(last) for arm in ("sft", "grpo")}
        more = [sft >= p.own_features_ratio * max(1, grpo) for _, sft, grpo in counted]
        fewer = [sft <= grpo for _, sft, grpo in counted]
        scaled = {label: (sft, grpo) for label, sft, grpo in own_features(self.evidence, "both")}
        full = [scaled[label] for label, _, _ in counted]
        survives = [sft >= p.own_features_ratio * max(1, grpo) for sft, grpo in full]
        full_words = listed([f"{scaled[label][0]} against {scaled[label][1]} ({label})" for label, _, _ in counted])
        errors = null_rates(self.evidence, "both")
        spread = [a - b for a, b in zip(kept["sft"], kept["grpo"], strict=False)]
        words = listed([f"{sft} against {grpo} ({label})" for label, sft, grpo in counted])
        frozen, moving = (float(np.mean(kept[arm])) if kept[arm] else None for arm in ("sft", "grpo"))
        criteria = (
            Criterion(
                f"SFT has at least {number(p.own_features_ratio, 1)} times as many features of its own as GRPO: {words}",
                None if not counted or (not all(more) and not all(fewer)) else all(more),
            ),
            Criterion(
                f"the same where latent scaling has to agree: {full_words}",
                None if not full else True if all(survives) else False if not any(survives) else None,
            ),
            Criterion(
                "null pairs have no such feature: " + (listed([f"{name} {percent(rate)}" for name, rate in errors.items()])),
                None if not errors else not any(errors.values()),
            ),
            Criterion(
                f"SFT's top features are set early: overlap of checkpoint {early or 'none'} with the last at least "
                f"{number(p.frozen_overlap)}: {number(frozen)}",
                None if frozen is None else frozen >= p.frozen_overlap,
            ),
            Criterion(
                f"GRPO's keep changing: its overlap at least {number(p.overlap_margin)} lower than SFT's at every size: "
                f"{number(moving)}",
                None if not spread or (min(spread) < p.overlap_margin and max(spread) > 0) else min(spread) >= p.overlap_margin,
            ),
            Criterion(
                f"GRPO changes less: sum of mean changes over the features followed {short(moved['grpo'])}, "
                f"SFT {short(moved['sft'])}",
                None if moved["sft"] is None or moved["grpo"] is None else moved["grpo"] < moved["sft"],
            ),
        )
        open_one = next((criterion for criterion in criteria if not criterion.holds), None)
        return Verdict(
            "features",
            "SFT adds many specialised features that freeze early; RL changes few and keeps changing them",
            decide(criteria),
            f"Features of one arm alone, SFT against GRPO: {words}; where latent scaling has to agree: {full_words}. "
            + (
                f"Overlap of checkpoint {early} with the last (top-n sets, mean over n): SFT {number(frozen)}, "
                f"GRPO {number(moving)}; "
                if early
                else "No checkpoint before the last was kept: when features were set cannot be told; "
            )
            + f"total change SFT {short(moved['sft'])}, GRPO {short(moved['grpo'])}.",
            (f"It fails or stays open at this: {open_one.text}. " if open_one else "") + "One training run per arm.",
            criteria,
        )

    def necessary(self) -> Verdict:
        """Zeroing the set in GRPO lowers accuracy beyond every matched random set."""
        return self._intervention(
            "necessary", "A small task-agnostic set of features is necessary: zeroing it in GRPO hurts", "zero_grpo", -1
        )

    def sufficient(self) -> Verdict:
        """Amplifying the set in the base raises accuracy beyond every matched random set."""
        return self._intervention(
            "sufficient", "The same set is sufficient: amplifying it in the base helps", "amplify_base", 1
        )

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
        draws = len({row["draw"] for row in effects(evidence, purpose, "random")})
        share = evidence.set_size / evidence.n_features
        noop = [row["effect"] for row in effects(evidence, purpose, "noop")]
        tested, held = (estimate if sign > 0 else _reversed(estimate) for estimate in (on_found, on_heldout))
        seen = told(tested, p.min_effect)
        criteria = (
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
        )
        verb = "Zeroing" if sign < 0 else "Amplifying"
        said = (
            f"{verb} {things(evidence.set_size, 'feature')} ({percent(share)}) changes accuracy by {change(on_found)} "
            f"questions on the {things(len(found), 'task')} it was found on and {change(on_heldout)} on "
            f"{things(len(heldout), 'held-out task')}; beyond all {draws} matched random sets on "
            f"{len(beyond['found'])} of {len(found)} and {len(beyond['heldout'])} of {len(heldout)}."
        )
        status = decide(criteria)
        if status != "supported":
            said += self._resolution(purpose, found)
        if status == "supported" and all(past_percentile(rows[task], sign) for task in found):
            said += " The effect is causal in the sense of this study: beyond the 95th percentile of matched random sets."
        weakest = self._weakest(criteria, purpose, sign) or _weakest_effect(rows, [*found, *heldout], sign)
        return Verdict(key, claim, status, said, weakest, criteria)

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
        """Shared and base-specific sets must not do what the set does."""
        means, share = mean_effects(self.evidence, purpose, self.evidence.found_on), self.params.control_share
        held = {name.replace("_", "-"): means[name][0] for name in CONTROLS if name in means}
        words = listed([f"{name} {signed(value)}" for name, value in held.items()])
        text = f"as many shared or base-specific features do at most {percent(share)} of it: {words}"
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

    def _weakest(self, criteria: Sequence[Criterion], purpose: str, sign: int) -> str:
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
        return " ".join(links)


def _reversed(estimate: Interval | None) -> Interval | None:
    """The same difference taken the other way round."""
    return estimate and estimate._replace(value=-estimate.value, low=-estimate.high, high=-estimate.low)


def nothing_to_edit(evidence: Evidence, rows: dict[str, Any]) -> str:
    """Why there is no feature set to test; empty if there is one."""
    localize = evidence.localize
    if localize["status"] == "too_few_flipped":
        skipped = "; ".join(f"{task}: {reason}" for task, reason in localize["skipped"].items())
        return f"No features could be sought: too few samples that the base fails and GRPO solves ({skipped})."
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
        f"n = {least['n']} ({matched}). One training run per arm."
    )
