"""Tables behind the claim about features: null pairs, and change at matched points of training."""

from __future__ import annotations

import numpy as np

from featdiff.config.report import ReportParams
from featdiff.report.evidence import Evidence
from featdiff.report.feature_claim import FeatureClaim
from featdiff.report.quantities import Place, Share, halves_disagree, null_rates
from featdiff.report.tables import Cell, Table, label
from featdiff.report.words import MISSING, count, interval, listed, number, percent, short
from featdiff.stats import binomial


def nulls(evidence: Evidence, params: ReportParams) -> Table | None:
    """How often the full rule errs: null pairs, and every crosscoder judged on two halves of the held-out tokens."""

    def cell(share: Share | None) -> Cell:
        if share is None or not share.n:
            return Cell(MISSING)
        found = binomial(share.found, share.n, confidence=params.confidence)
        return Cell(percent(found.value), f"{interval(found.low, found.high, 3)}, {count(share.found)} of {count(share.n)}")

    rates = null_rates(evidence, "both")
    rows = [[label(fit), cell(rates.get(fit)), cell(halves_disagree(evidence, fit))] for fit in evidence.fits]
    caption = (
        "Null pairs (a model with itself, two training runs of one arm): how often one of the two models is given a feature "
        "that cannot be its own, per live feature and model, with the exact binomial interval. This rate is taken off the "
        "counts of the claim. Halves: features that the full rule calls specific on one half of the held-out tokens and not "
        "on the other. It holds misses as well as errors, so it is taken off nothing and says how sure one call is."
    )
    return Table(["crosscoder", "called own in a null pair", "halves of the tokens disagree"], rows, caption) if rows else None


def matched_change(evidence: Evidence, params: ReportParams) -> Table | None:
    """Total change of features in contrast and tuned model at matched points of training."""
    if evidence.roles.contrast is None:
        return None
    claim = FeatureClaim(evidence, params)
    rows = []
    for found in claim.matched().values():
        low, value, high = np.exp([found.ratio.low, found.ratio.value, found.ratio.high])
        sides = [_side(side) for side in (found.contrast, found.tuned)]
        rows.append([label(found.alike), *sides, Cell(number(value), interval(low, high))])
    head = ["compared at", claim.contrast, claim.tuned, "ratio"]
    caption = (
        "Sum over features of the mean change since the base, in the fixed dictionary, at the nearest kept checkpoint of each "
        "training run; beside it the share of training and the accuracy on the training tasks there. The interval is over "
        "texts, and over runs where there are several."
    )
    return Table(head, rows, caption) if rows else None


def _side(places: list[Place]) -> Cell:
    change = short(float(np.mean([place.change[0] for place in places])))
    at = listed([f"{percent(place.share)} of training, accuracy {number(place.accuracy)}" for place in places])
    return Cell(change, at)
