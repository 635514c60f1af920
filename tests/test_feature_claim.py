"""The claim about features: counts against null pairs, early sets, matched change."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featdiff.report.evidence import Evidence, load
from featdiff.report.feature_claim import FeatureClaim
from featdiff.report.feature_tables import matched_change, nulls
from featdiff.report.quantities import (
    Place,
    Share,
    at_accuracy,
    at_share,
    early_checkpoint,
    halves_disagree,
    null_rate,
    null_rates,
    own_features,
    relative_overlap,
    stability,
)
from featdiff.report.verdicts import Verdict
from synthetic_study import STUDY, Plan, write_study

PARAMS = STUDY.report
OWN, EARLY, END, ACCURACY = range(4)
"""Places of the criteria."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    folder, plan = tmp_path_factory.mktemp("full"), Plan(n=30)
    write_study(folder, plan)
    return load(lambda name, *_: folder / name, plan.study)


def judged(evidence: Evidence) -> Verdict:
    return FeatureClaim(evidence, PARAMS).verdict("claim")


def changed(evidence: Evidence, fit: str, every: int = 1, **changes: object) -> Evidence:
    """The same study with other facts of every so many-th feature of one crosscoder."""
    rows = [
        row | changes if row["fit"] == fit and row["feature_id"] % every == 0 and not row["dead"] else row
        for row in evidence.features
    ]
    return replace(evidence, features=rows)


def owned(evidence: Evidence, fit: str, by: str, every: int) -> Evidence:
    """As if every so many-th feature of ``fit`` were called the model ``by``'s own, and no other."""
    shared = changed(evidence, fit, feature_class="shared", scaling_owner=None, specific=False)
    return changed(shared, fit, every, feature_class=by, scaling_owner=by, specific=True)


def test_the_pattern_supports_the_claim(full: Evidence) -> None:
    verdict = judged(full)
    assert verdict.status == "supported"
    assert [criterion.holds for criterion in verdict.criteria] == [True] * 4
    assert set(verdict.estimates) == {"own", "overlap", "change_early", "change_end", "change_accuracy"}
    assert "one training run" in verdict.weakest_link


def test_without_any_difference_the_claim_is_refuted(full: Evidence) -> None:
    for fit in ("pair_sft", "pair_sft_1", "pair_grpo", "pair_grpo_1"):
        full = owned(full, fit, fit.removeprefix("pair_"), 15)
    verdict = judged(full)
    assert verdict.status == "not supported"
    assert verdict.criteria[OWN].holds is False


def test_swapped_arms_turn_the_claim_round(full: Evidence) -> None:
    other = {"sft": "grpo", "grpo": "sft"}
    verdict = judged(replace(full, resampled=[row | {"arm": other[row["arm"]]} for row in full.resampled]))
    assert verdict.status == "not supported"
    assert [criterion.holds for criterion in verdict.criteria] == [True, False, False, False]


def test_runs_that_differ_take_the_certainty_away(full: Evidence) -> None:
    """One run of the contrast has no feature of its own: the mean is as large as ever it was, its interval is not."""
    assert judged(owned(full, "pair_sft_1", "sft_1", 10**6)).criteria[OWN].holds is None
    alone = judged(replace(full, repeats={arm: [arm] for arm in full.arms}))
    assert alone.criteria[OWN].holds is None
    assert "fewer than two training runs" in alone.criteria[OWN].text


def test_counts_are_of_every_run_by_the_full_rule_and_l1_does_not_decide(full: Evidence) -> None:
    found = {counts.label: counts for counts in own_features(full, "both")}
    assert set(found) == {"joint_topk, batchtopk", "joint_l1, l1", "pairs, batchtopk"}
    pairs = found["pairs, batchtopk"]
    assert (len(pairs.contrast), len(pairs.tuned)) == (2, 2)
    assert "l1" not in judged(full).evidence
    taken = full
    for fit in found | dict.fromkeys(["pair_sft", "pair_sft_1"]):
        taken = changed(taken, fit, specific=False, scaling_owner=None)
    assert [share.found for share in own_features(taken, "both")[-1].contrast] == [0, 0]
    assert own_features(taken)[-1].contrast == own_features(full)[-1].contrast
    assert judged(taken).criteria[OWN].holds is False, "latent scaling took them all back"


def test_untested_features_count_on_neither_side(full: Evidence) -> None:
    half = changed(full, "pair_sft", 2, tested=False)
    before, after = (own_features(evidence, "both")[-1].contrast[0] for evidence in (full, half))
    assert after.n == pytest.approx(before.n / 2, abs=15)
    assert after.value == pytest.approx(before.value, abs=0.02)
    assert own_features(half, "norms")[-1].contrast == own_features(full, "norms")[-1].contrast


def test_null_pairs_are_a_rate_per_model_and_never_refute_alone(full: Evidence) -> None:
    assert {name: rate.found for name, rate in null_rates(full, "both").items()} == {"null_base": 0, "null_sft": 0}
    one = changed(full, "null_sft", 10**6, feature_class="sft_1", scaling_owner="sft_1", specific=True)
    assert null_rates(one, "both")["null_sft"].found == 1
    assert judged(one).status == "supported", "one false positive among hundreds"
    every = owned(owned(full, "null_base", "again", 1), "null_sft", "sft", 1)
    assert null_rates(every, "both")["null_base"].value == 0.5
    verdict = judged(every)
    assert verdict.criteria[OWN].holds is None
    assert verdict.status == "undecided"


def test_a_null_rate_is_taken_off(full: Evidence) -> None:
    """Own features at the rate of the twins of that arm are none; those of the other arm keep theirs."""
    claim = FeatureClaim(full, PARAMS).own()
    with_null = FeatureClaim(owned(full, "null_sft", "sft", 10), PARAMS).own()
    assert claim is not None
    assert with_null is not None
    assert claim[0].value - with_null[0].value == pytest.approx(0.05, abs=0.005)
    assert with_null[1] == claim[1], "the counts themselves stay"
    assert with_null[0].high - with_null[0].low > claim[0].high - claim[0].low


def test_a_high_null_rate_of_the_tuned_model_is_no_evidence_for_the_claim(full: Evidence) -> None:
    few = owned(owned(full, "pair_sft", "sft", 200), "pair_sft_1", "sft_1", 200)
    assert judged(few).criteria[OWN].holds is False
    assert judged(owned(few, "null_base", "again", 1)).criteria[OWN].holds is not True


def test_twins_of_an_arm_come_before_the_base_with_itself(full: Evidence) -> None:
    marked = owned(full, "null_sft", "sft", 10)
    live = null_rates(full, "both")
    assert null_rate(marked, "both", "sft") == Share(null_rates(marked, "both")["null_sft"].found, live["null_sft"].n)
    assert null_rate(marked, "both", "grpo") == live["null_base"]
    none = replace(full, fits={name: fit for name, fit in full.fits.items() if not fit.null})
    assert null_rate(none, "both", "grpo") is None
    assert "no null pair" in judged(none).criteria[OWN].text


def test_early_is_within_the_share_of_each_arms_own_training(full: Evidence) -> None:
    assert early_checkpoint(full, "sft", 0.4) == (2, 5)
    assert early_checkpoint(full, "sft", 0.1) == (1, 5)
    slow = [row | {"share": row["share"] ** 3} if row["arm"] == "grpo" else row for row in full.checkpoints["accuracy"]]
    assert early_checkpoint(replace(full, checkpoints=full.checkpoints | {"accuracy": slow}), "grpo", 0.4) == (3, 5)
    assert early_checkpoint(replace(full, checkpoints={"accuracy": []}), "sft", 0.4) == (0, 0)


def test_overlap_lies_between_chance_and_one_checkpoint_read_twice(full: Evidence) -> None:
    found = relative_overlap(full, "sft", 0.4)
    assert found is not None
    assert found[0] == pytest.approx((0.95 - 0.12 - 0.04) / (0.95 - 0.04))
    assert len(found) == 51
    raw = relative_overlap(full, "sft", 0.4, corrected=False)
    assert raw is not None
    assert raw[0] == pytest.approx((0.95 - 0.12 - 0.04) / (1 - 0.04))
    blind = replace(full, resampled=[row | {"ceiling": 0.03} for row in full.resampled])
    assert judged(blind).criteria[EARLY].holds is None


def test_an_interval_over_texts_decides_and_further_runs_widen_it(full: Evidence) -> None:
    claim = FeatureClaim(full, PARAMS)
    single = claim.early_difference()
    assert single is not None
    assert single.value == pytest.approx(0.33 / 0.91)
    assert single.n == 2, "runs of both"
    repeat = [
        row | {"arm": "sft_1", "overlap": row["overlap"] - 0.3 * (row["checkpoint"] < 5)}
        for row in full.resampled
        if row["arm"] == "sft"
    ]
    several = replace(full, resampled=full.resampled + repeat)
    wide = FeatureClaim(several, PARAMS).early_difference()
    assert wide is not None
    assert wide.value < single.value
    assert wide.high - wide.low > 3 * (single.high - single.low)
    assert judged(several).criteria[EARLY].holds is None


def test_a_difference_that_only_the_correction_for_noise_makes_is_none(full: Evidence) -> None:
    """The contrast is read with much noise: by its ceiling it has hardly moved, as seen it has moved as much as the other."""
    noisy = [
        row | {"overlap": row["overlap"] - 0.38, "ceiling": 0.55} if row["arm"] == "sft" else row for row in full.resampled
    ]
    verdict = judged(replace(full, resampled=noisy))
    assert verdict.estimates["overlap"].low > 0.1
    assert verdict.criteria[EARLY].holds is None


def test_without_an_earlier_checkpoint_nothing_is_said_of_when_features_were_set(full: Evidence) -> None:
    def last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"checkpoint": 1} for row in rows if row["checkpoint"] == 5]

    alone = {"accuracy": last(full.checkpoints["accuracy"])}
    verdict = judged(replace(full, checkpoints=alone, resampled=last(full.resampled)))
    assert verdict.criteria[EARLY].holds is None
    assert "no checkpoint before the last was kept" in verdict.criteria[EARLY].text
    assert verdict.status == "undecided"


def place(number: int, share: float, accuracy: float, change: float) -> Place:
    return Place(number, share, accuracy, np.array([change]))


def test_runs_are_matched_by_share_of_training_and_by_accuracy() -> None:
    fast = [place(1, 0.2, 0.8, 5), place(2, 0.6, 0.9, 6), place(3, 1.0, 0.95, 7)]
    slow = [place(1, 0.5, 0.3, 1), place(2, 1.0, 0.8, 2)]
    assert [found.checkpoint for found in at_share([fast, slow], 0.55)] == [2, 1]
    assert [found.checkpoint for found in at_share([fast, slow], 1.0)] == [3, 2]
    assert [found.change[0] for found in at_accuracy([fast, slow], 0.1)] == [5, 2]
    assert at_accuracy([fast, slow], 0.8) == []
    assert at_accuracy([], 0.1) == []


def test_change_is_compared_at_each_matched_point(full: Evidence) -> None:
    found = FeatureClaim(full, PARAMS).matched()
    assert list(found) == ["early", "end", "accuracy"]
    totals = {
        arm: next(row["change"] for row in full.resampled if (row["arm"], row["checkpoint"], row["draw"]) == (arm, 5, 0))
        for arm in ("sft", "grpo")
    }
    assert found["end"].ratio.value == pytest.approx(math.log(totals["sft"] / totals["grpo"]))
    assert found["early"].ratio.value > found["end"].ratio.value, "this contrast saturates"
    table = matched_change(full, PARAMS)
    assert table is not None
    assert [row[0].text for row in table.rows] == [matched.alike for matched in found.values()]
    unmatched = replace(full, accuracy=full.accuracy | {"base": [row | {"accuracy": 1.0} for row in full.accuracy["base"]]})
    verdict = judged(unmatched)
    assert verdict.criteria[ACCURACY].holds is None
    assert verdict.criteria[END].holds is True


def test_halves_of_the_tokens_say_how_sure_a_call_is(full: Evidence) -> None:
    some = changed(changed(full, "pair_sft", halves_agree=True), "pair_sft", 10, halves_agree=False)
    assert halves_disagree(some, "pair_sft").value == pytest.approx(0.1, abs=0.01)
    table = nulls(some, PARAMS)
    assert table is not None
    shown = {row[0].text: [cell.text.replace("\u202f", "") for cell in row[1:]] for row in table.rows}
    assert shown["null_base"][0] == "0%"
    assert shown["pair_sft"][0] == "–"


def test_stability_is_read_where_the_search_wrote_it(full: Evidence) -> None:
    assert stability(full) == (0.97, 0.83, 0.14, 0.8)
    assert stability(replace(full, localize=full.localize | {"seeds": {}})) == (None, None, None, None)


def test_a_study_without_dynamics_leaves_the_claim_open(tmp_path: Path, full: Evidence) -> None:
    verdict = judged(replace(full, resampled=[], overlap=[], trajectories=[]))
    assert verdict.status == "undecided"
    assert [criterion.holds for criterion in verdict.criteria] == [True, None, None, None]
    assert matched_change(replace(full, resampled=[]), PARAMS) is None
