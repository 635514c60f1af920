"""The claims of the study, each decided by its rules on the tables of one study (the rules: docs/method.md, section 16)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from featdiff.config.report import ReportParams
from featdiff.report.evidence import Evidence
from featdiff.report.feature_claim import FeatureClaim
from featdiff.report.paired import Outcomes
from featdiff.report.set_claims import SetClaims
from featdiff.report.verdicts import Criterion, Verdict, at_least, decide, reversed_sign
from featdiff.report.words import change, listed, number, percent, signed, things
from featdiff.stats import (
    CHANGES,
    SHARES,
    Interval,
    mean_over_strata,
    with_runs,
)


class Claims:
    """Applies the rules to one study; the same seed gives the same intervals. Its words call the models by their labels."""

    def __init__(self, evidence: Evidence, params: ReportParams, seed: int) -> None:
        self.evidence, self.params, self.seed = evidence, params, seed
        self.outcomes, self.roles = Outcomes(evidence), evidence.roles
        self.original, self.tuned, self.contrast = (
            evidence.names.label(role) if role else "the contrast"
            for role in (self.roles.original, self.roles.tuned, self.roles.contrast)
        )

    def of(self, evidence: Evidence) -> Claims:
        """The same rules on the same models under other edits."""
        found = copy(self)
        found.evidence, found.outcomes = evidence, self.outcomes.under(evidence)
        return found

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

    def verdicts(self) -> list[Verdict]:
        """Of every claim, in the order of the study."""
        return [self.transfer(), self.forgetting(), self.features(), *SetClaims(self).verdicts()]

    def transfer(self) -> Verdict:
        """The tuned model improves on tasks far from math: tuned − original on the same questions."""
        tasks, p, roles = self.evidence.far, self.params, self.roles
        gain = self.difference(tasks, roles.tuned, roles.original)
        single = {task: self.difference([task], roles.tuned, roles.original) for task in tasks}
        above = [task for task, found in single.items() if found and found.low > 0]
        criteria = (
            Criterion(
                f"mean gain over tasks of at least {number(p.min_effect)}, interval above zero",
                change(gain),
                at_least(gain, p.min_effect),
            ),
            Criterion(
                "the gain is above zero on at least half of the tasks taken one by one",
                f"{len(above)} of {len(tasks)}",
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
        tasks, mode = self.exposed()
        rule = f"sampled answers (greedily, {original} has nothing to lose)" if mode else "the tasks' own scoring rule"
        lost = self.difference(tasks, contrast, self.roles.original, mode) if tasks else None
        own = self.difference(evidence.far, contrast, self.roles.original)
        behind = self.difference(evidence.far, contrast, self.roles.tuned)
        criteria = (
            Criterion(
                f"{self.contrast} loses at least {number(p.min_effect)} where {original} has something to lose "
                f"(accuracy {number(p.something_to_lose)} above chance)",
                f"{change(lost)}, by {rule}" if tasks else "no such task",
                at_least(reversed_sign(lost), p.min_effect),
            ),
            Criterion(
                f"{self.contrast} ends at least {number(p.min_effect)} below {tuned} on the tasks away from math",
                change(behind),
                at_least(reversed_sign(behind), p.min_effect),
            ),
            Criterion(
                f"by the tasks' own rule {self.contrast} does not rise {number(p.min_effect)} above {original} on them",
                change(own),
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

    def exposed(self) -> tuple[list[str], str | None]:
        """Tasks away from math on which the original has something to lose, and by which answers: those that count (None), or
        sampled ones where there are no such tasks."""
        if tasks := self._something_to_lose(None):
            return tasks, None
        return self._something_to_lose("sampled"), "sampled"

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


def _measured(**estimates: Interval | None) -> dict[str, Interval]:
    return {name: estimate for name, estimate in estimates.items() if estimate is not None}


def _without_contrast(key: str, claim: str) -> Verdict:
    said = "This study has no contrast model (roles.contrast), so there is nothing to hold the tuned one against."
    return Verdict(key, claim, "undecided", said, "No contrast model.", ())
