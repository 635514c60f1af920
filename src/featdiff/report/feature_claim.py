"""The claim that the contrast adds many features of its own that are set early, and the tuned model few that keep changing.

Each part is one statistic with an interval, over training runs where there are several (rules: docs/method.md, section 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from featdiff.config.report import ReportParams
from featdiff.config.values import BASE
from featdiff.report.evidence import Evidence
from featdiff.report.quantities import (
    OwnFeatures,
    Place,
    Share,
    at_accuracy,
    at_share,
    early_checkpoint,
    null_rate,
    own_features,
    places,
    relative_overlap,
)
from featdiff.report.verdicts import Criterion, Verdict, at_least, decide, settled
from featdiff.report.words import count, interval, listed, number, percent, signed
from featdiff.stats import Floats, Interval, around, binomial, minus, with_runs


class Matched(NamedTuple):
    """Total change of both arms where their runs are alike in one respect."""

    alike: str
    contrast: list[Place]
    tuned: list[Place]
    ratio: Interval
    """Natural logarithm of the contrast's change over the tuned model's."""


class FeatureClaim:
    """Applies the rules of the claim to a study that has a contrast."""

    def __init__(self, evidence: Evidence, params: ReportParams) -> None:
        self.evidence, self.params = evidence, params
        assert evidence.roles.contrast is not None
        self.roles = evidence.roles.contrast, evidence.roles.tuned
        self.contrast, self.tuned = map(evidence.names.label, self.roles)

    def verdict(self, claim: str) -> Verdict:
        own, early, changes = self.own(), self.early_difference(), self.matched()
        criteria = [self._many(own), self._frozen(early), *(self._less(found, changes) for found in ("end", "accuracy"))]
        measured = {"own": own[0] if own else None, "overlap": early}
        measured |= {f"change_{found}": matched.ratio for found, matched in changes.items()}
        open_one = next((criterion for criterion in criteria if not criterion.holds), None)
        followed = min(len(self._followed(role)) for role in self.roles)
        weakest = "When features were set was followed in one training run per arm." if followed < 2 else ""
        said = f"Features of their own, {self.contrast} against {self.tuned}: {self._counts('both')} by the full rule, "
        said += f"{self._counts('norms')} by decoder norms alone. {criteria[1].text}. {criteria[2].text}."
        return Verdict(
            "features",
            claim,
            decide(criteria),
            said,
            f"It fails or stays open at this: {open_one.text}." if open_one else weakest,
            tuple(criteria),
            {name: estimate for name, estimate in measured.items() if estimate and np.isfinite(estimate[:3]).all()},
        )

    def _counts(self, rule: str) -> str:
        def side(shares: list[Share]) -> str:
            return listed([count(share.found) for share in shares])

        return "; ".join(f"{side(each.contrast)} against {side(each.tuned)} ({each.label})" for each in self._decisive(rule))

    def _decisive(self, rule: str) -> list[OwnFeatures]:
        found = own_features(self.evidence, rule)
        return [counts for counts in found if counts.label.endswith("batchtopk")] or found

    def _rate(self, shares: Sequence[Share]) -> Interval:
        """Share of own features over runs: exact binomial interval over features, and t over runs."""
        pooled = binomial(
            sum(share.found for share in shares), sum(share.n for share in shares), confidence=self.params.confidence
        )
        found = with_runs(pooled, [share.value for share in shares], confidence=self.params.confidence, within=(0.0, 1.0))
        return found._replace(n=len(shares))

    def own(self) -> tuple[Interval, Interval] | None:
        """Own features per live feature of the contrast, less ``own_features_ratio`` times those of the tuned model: with the
        null rate of each taken off, and as counted. Over the training runs of both, in the crosscoders of the base and one
        run, by the full rule; None where one of the two has fewer than two runs, or where there is no null pair."""
        pairs = next((found for found in own_features(self.evidence, "both") if found.label.startswith("pairs,")), None)
        nulls = [null_rate(self.evidence, "both", role) for role in self.roles]
        if pairs is None or min(len(pairs.contrast), len(pairs.tuned)) < 2:
            return None
        counted = [self._rate(shares) for shares in (pairs.contrast, pairs.tuned)]
        beyond = []
        for rate, null in zip(counted, nulls, strict=True):
            if null is None:
                return None
            found = minus(rate, binomial(null.found, null.n, confidence=self.params.confidence))
            # A model cannot have fewer features of its own than none; without this a high null rate would speak for the claim.
            beyond.append(
                found._replace(value=max(0.0, found.value), low=max(0.0, found.low), high=max(0.0, found.high), n=rate.n)
            )
        return self._many_times(beyond), self._many_times(counted)

    def _many_times(self, rates: Sequence[Interval]) -> Interval:
        contrast, tuned = rates
        times = self.params.own_features_ratio
        scaled = tuned._replace(value=times * tuned.value, low=times * tuned.low, high=times * tuned.high)
        return minus(contrast, scaled)

    def _many(self, own: tuple[Interval, Interval] | None) -> Criterion:
        """Null pairs alone cannot refute: it fails only where it does so without them as well."""
        p, nulls = self.params, [null_rate(self.evidence, "both", role) for role in self.roles]
        text = (
            f"features of its own per live feature, null pairs taken off: {self.contrast} has at least "
            f"{percent(p.min_own_share)} more than {number(p.own_features_ratio, 1)} times those of {self.tuned}"
        )
        if own is None:
            why = "no null pair" if None in nulls else "fewer than two training runs of one of them tell no interval"
            return Criterion(text, why, None)
        beyond, counted = own
        off = listed(
            [
                f"{self.evidence.names.label(r)} {percent(null and null.value)}"
                for r, null in zip(self.roles, nulls, strict=True)
            ]
        )
        judged, raw = at_least(beyond, p.min_own_share), at_least(counted, p.min_own_share)
        said = f"{number(beyond.value, 3)} {interval(beyond.low, beyond.high, 3)}, {count(beyond.n)} runs (null rates: {off})"
        return Criterion(text, said, settled(judged is True, judged is False and raw is False))

    def _followed(self, role: str) -> list[str]:
        followed = {row["arm"] for row in self.evidence.resampled}
        return [run for run in self.evidence.runs(role) if run in followed]

    def _over_runs(self, sides: Sequence[Sequence[Floats]]) -> Interval:
        """Difference of the two sides' means over runs, draw by draw, with t over the runs of each."""
        means = [np.mean(side, axis=0) for side in sides]
        draws_R = means[0] - means[1]
        found = around(float(draws_R[0]), draws_R[1:], confidence=self.params.confidence, n=sum(len(side) for side in sides))
        return with_runs(found, *([float(run[0]) for run in side] for side in sides), confidence=self.params.confidence)

    def _overlaps(self, role: str, corrected: bool) -> list[Floats]:
        """:func:`relative_overlap` of each run of ``role`` in which it was measured."""
        share = self.params.early_share
        found = [relative_overlap(self.evidence, run, share, corrected=corrected) for run in self._followed(role)]
        return [draws_R for draws_R in found if draws_R is not None and np.isfinite(draws_R[0])]

    def early_difference(self, *, corrected: bool = True) -> Interval | None:
        """How much more of its last top features the contrast has at its early checkpoint (:func:`relative_overlap`)."""
        sides = [self._overlaps(role, corrected) for role in self.roles]
        return self._over_runs(sides) if all(sides) else None

    def _frozen(self, early: Interval | None) -> Criterion:
        p, kept = self.params, [early_checkpoint(self.evidence, role, self.params.early_share)[0] for role in self.roles]
        text = (
            f"top features of {self.contrast} are set earlier: overlap of its early checkpoint with the last, between chance "
            f"(0) and one checkpoint read twice (1), at least {number(p.overlap_margin)} above that of {self.tuned}"
        )
        if early is None:
            return Criterion(text, "not measured" if all(kept) else "no checkpoint before the last was kept", None)
        levels = [
            number(float(np.mean([draws_R[0] for draws_R in self._overlaps(role, corrected=True)]))) for role in self.roles
        ]
        raw = self.early_difference(corrected=False)
        assert raw is not None  # what is measured with the ceiling is measured without
        said = (
            f"{' against '.join(levels)}, difference {signed(early.value)} {interval(early.low, early.high)}; "
            f"without the correction for reading noise {signed(raw.value)} {interval(raw.low, raw.high)}"
        )
        judged = {at_least(found, p.overlap_margin) for found in (early, raw)}
        return Criterion(text, said, judged.pop() if len(judged) == 1 else None)

    def matched(self) -> dict[str, Matched]:
        """Total change of features in both arms at the same share of training, ``early`` and at the ``end``, and at equal
        ``accuracy`` on the training tasks. What cannot be matched is absent."""
        sides = [[found for run in self._followed(role) if (found := places(self.evidence, run))] for role in self.roles]
        if not all(sides):
            return {}
        runs, split = [*sides[0], *sides[1]], len(sides[0])
        wanted = {"role": "train", "split": "report", "primary": True}
        base = [row["accuracy"] for row in self.evidence.accuracy[BASE] if wanted.items() <= row.items()]
        share = self.params.early_share
        chosen = {
            "early": (f"{percent(share)} of training", at_share(runs, share)),
            "end": ("the end of training", at_share(runs, 1.0)),
            "accuracy": ("equal accuracy on the training tasks", at_accuracy(runs, float(np.mean(base)) if base else 1.0)),
        }
        return {
            name: Matched(alike, at[:split], at[split:], self._ratio(at[:split], at[split:]))
            for name, (alike, at) in chosen.items()
            if at and all(place.change.min() > 0 for place in at)
        }

    def _ratio(self, *sides: Sequence[Place]) -> Interval:
        return self._over_runs([[np.log(place.change) for place in side] for side in sides])

    def _less(self, name: str, changes: dict[str, Matched]) -> Criterion:
        where = {"end": "at the end of training", "accuracy": "at equal accuracy on the training tasks"}[name]
        text = f"{self.tuned} changes features less {where}: total change of {self.contrast} over that of {self.tuned} above 1"
        if name not in changes:
            return Criterion(text, "cannot be told", None)
        low, value, high = np.exp([changes[name].ratio.low, changes[name].ratio.value, changes[name].ratio.high])
        return Criterion(text, f"{number(value)} {interval(low, high)}", settled(low > 1, high < 1))
