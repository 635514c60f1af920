"""Rules of the verdicts: what makes a claim supported, not supported, undecided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence, load
from featdiff.report.verdicts import Criterion, Verdict, at_least, decide
from featdiff.stats import Interval
from synthetic_study import STUDY, Plan, write_study

PARAMS, SEED = STUDY.report, STUDY.seed
ALONE = ("sft", "grpo")
"""One training run per arm."""


def study(folder: Path, plan: Plan) -> Evidence:
    write_study(folder, plan)
    return load(lambda name, *_: folder / name, plan.study)


def judged(evidence: Evidence) -> dict[str, Verdict]:
    return {verdict.key: verdict for verdict in Claims(evidence, PARAMS, SEED).verdicts()}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return study(tmp_path_factory.mktemp("full"), Plan())


def test_a_claim_is_the_conjunction_of_its_criteria() -> None:
    yes, no, unknown = (Criterion("", holds) for holds in (True, False, None))
    assert decide([yes, yes]) == "supported"
    assert decide([yes, no, unknown]) == "not supported"
    assert decide([yes, unknown]) == "undecided"
    assert decide([]) == "undecided"


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.2, 0.1, 0.3, True),
        (0.01, -0.02, 0.04, False),
        (0.03, 0.01, 0.08, None),
        (0.06, -0.01, 0.2, None),
        (-0.3, -0.4, -0.2, False),
    ],
)
def test_at_least_needs_size_and_interval(value: float, low: float, high: float, expected: bool | None) -> None:
    assert at_least(Interval(value, low, high, 100, 2), 0.05) is expected


def test_a_study_with_every_part_of_the_pattern_supports_every_claim(full: Evidence) -> None:
    verdicts = judged(full)
    assert {key: verdict.status for key, verdict in verdicts.items()} == dict.fromkeys(
        ("transfer", "forgetting", "features", "necessary", "sufficient"), "supported"
    )
    assert "n\u00a0=\u00a0720" in verdicts["transfer"].evidence
    assert "sampled answers" in verdicts["forgetting"].evidence, "greedily this base has nothing to lose"
    assert "causal" in verdicts["necessary"].evidence
    assert verdicts["necessary"].weakest_link.startswith("Smallest on largest")


def test_same_seed_same_intervals(full: Evidence) -> None:
    assert judged(full) == judged(full)


def test_rl_without_transfer_is_not_supported(tmp_path: Path) -> None:
    verdict = judged(study(tmp_path, Plan(arms=ALONE, n=60, rl_transfers=False, status="too_few_flipped")))["transfer"]
    assert verdict.status == "not supported"


@pytest.mark.parametrize(
    ("status", "words"), [("too_few_flipped", "4 flipped samples"), ("empty_intersection", "No feature reaches")]
)
def test_without_a_feature_set_both_interventions_are_undecided(tmp_path: Path, status: str, words: str) -> None:
    verdicts = judged(study(tmp_path, Plan(arms=ALONE, n=60, status=status)))
    for key in ("necessary", "sufficient"):
        assert verdicts[key].status == "undecided"
        assert words in verdicts[key].evidence
        assert "causal" not in verdicts[key].evidence


def test_a_set_that_does_nothing_is_not_supported_and_never_called_causal(tmp_path: Path) -> None:
    verdicts = judged(study(tmp_path, Plan(arms=ALONE, n=60, set_works=False)))
    for key in ("necessary", "sufficient"):
        assert verdicts[key].status == "not supported"
        assert "causal" not in verdicts[key].evidence


def test_a_set_that_changes_none_of_a_few_answers_is_undecided(tmp_path: Path) -> None:
    """Ten questions a task of which none changed leave an effect that counts possible; enough of them exclude it."""
    found = {}
    for n in (10, 60):
        made = study(tmp_path / str(n), Plan(arms=ALONE, n=n, set_works=False))
        plain = {(row["purpose"], row["sample_id"]): row["correct"] for row in made.edited if row["control"] == "none"}
        edited = [row | {"correct": plain[row["purpose"], row["sample_id"]]} for row in made.edited]
        found[n] = judged(replace(made, edited=edited))["necessary"]
    assert {n: verdict.status for n, verdict in found.items()} == {10: "undecided", 60: "not supported"}
    assert not any(criterion.holds is False for criterion in found[10].criteria)
    words = found[10].evidence.replace("\u00a0", " ").replace("\u202f", " ")
    assert "No answer changed; 72 questions of which none changed would exclude a change of 0.05" in words


def test_a_set_found_on_one_task_cannot_be_called_task_agnostic(tmp_path: Path) -> None:
    verdicts = judged(study(tmp_path, Plan(arms=ALONE, n=60, find=("reverse",))))
    assert verdicts["necessary"].status == "undecided"
    assert "more than one task" in verdicts["necessary"].weakest_link


def test_one_random_set_as_good_as_the_set_takes_the_verdict_away(full: Evidence) -> None:
    """Beyond most random sets is not beyond all: with every found task matched by a draw, the claim falls."""
    effects = [
        row | {"beyond_random": False}
        if row["control"] == "set" and row["role"] == "find" and row["purpose"] == "zero_tuned"
        else row
        for row in full.effects
    ]
    verdicts = judged(replace(full, effects=effects))
    assert verdicts["necessary"].status == "not supported"
    assert verdicts["sufficient"].status == "supported"


def test_the_word_causal_needs_the_percentile_of_the_random_sets(full: Evidence) -> None:
    effects = [row | {"random_low": -1.0} for row in full.effects]
    verdict = judged(replace(full, effects=effects))["necessary"]
    assert "causal" not in verdict.evidence


def test_an_edit_of_factor_one_that_changes_something_leaves_the_claim_open(full: Evidence) -> None:
    effects = [row | {"effect": 0.01} if row["control"] == "noop" else row for row in full.effects]
    assert judged(replace(full, effects=effects))["necessary"].status == "undecided"


def test_a_large_set_is_not_a_small_one(full: Evidence) -> None:
    many = full.localize | {"features": list(range(100))}
    assert judged(replace(full, localize=many))["necessary"].status == "not supported"


def test_forgetting_is_undecided_where_the_base_never_knew(full: Evidence) -> None:
    answers = full.answers | {"base": [row | {"correct": False} for row in full.answers["base"]]}
    verdict = judged(replace(full, answers=answers))["forgetting"]
    assert verdict.status == "undecided"
    assert "at chance" in verdict.evidence


def test_a_contrast_that_answers_like_the_tuned_model_did_not_forget(full: Evidence) -> None:
    answers = full.answers | {"sft": full.answers["grpo"], "sft_1": full.answers["grpo_1"]}
    verdict = judged(replace(full, answers=answers))["forgetting"]
    assert verdict.status == "not supported"


def edited(evidence: Evidence, control: str, purpose: str = "", **changes: object) -> Evidence:
    """The same study with other numbers under one control, of one purpose or all."""
    effects = [
        row | (changes if row["control"] == control and purpose in ("", row["purpose"]) else {}) for row in evidence.effects
    ]
    return replace(evidence, effects=effects)


def test_a_set_that_ought_to_do_nothing_must_do_little(full: Evidence) -> None:
    assert judged(full)["sufficient"].status == "supported"
    shared = edited(full, "shared", effect=0.6)
    assert judged(shared)["sufficient"].status == "not supported"
    assert judged(shared)["necessary"].status == "supported"


def test_a_mean_effect_like_those_of_random_sets_is_not_supported(full: Evidence) -> None:
    verdict = judged(edited(full, "random", effect=-0.95))["necessary"]
    assert verdict.status == "not supported"
    assert any("p = 1.000" in criterion.text for criterion in verdict.criteria)


def test_tests_of_single_tasks_are_corrected_for_their_number(full: Evidence) -> None:
    verdict = judged(edited(full, "set", p_mcnemar=0.02))["necessary"]
    assert any("McNemar" in criterion.text and criterion.holds is None for criterion in verdict.criteria)
    assert verdict.status == "undecided"
    assert "is found with 80%" in verdict.evidence.replace("\u202f", "").replace("\u00a0", "")
    verdict = judged(edited(full, "set", p_mcnemar=0.012))["necessary"]
    assert verdict.status == "supported"


def test_the_weakest_link_names_an_unstable_set_and_a_simple_direction_that_does_as_much(tmp_path: Path) -> None:
    unstable = study(tmp_path / "unstable", Plan(n=40, jaccard=0.2))
    assert "not stable" in judged(unstable)["necessary"].weakest_link
    stable = study(tmp_path / "stable", Plan(n=40))
    assert "direction" not in judged(stable)["necessary"].weakest_link
    assert "mean difference -0.95" in judged(edited(stable, "mean_difference", effect=-0.95))["necessary"].weakest_link.replace(
        "−", "-"
    )


def right(evidence: Evidence, model: str, share: float) -> dict[str, list[dict[str, object]]]:
    """Answers in which ``model`` solves that share of its questions, the first ones of each task."""
    rows = evidence.answers[model]
    return evidence.answers | {model: [row | {"correct": int(row["sample_id"][-5:]) < share * 120} for row in rows]}


def test_training_runs_that_differ_take_the_certainty_away(full: Evidence) -> None:
    """A repeat that gains nothing makes the gain of the first run the luck of a seed; without repeats nobody would know."""
    lucky = replace(full, answers=right(full, "grpo_1", 0.05))
    verdict = judged(lucky)["transfer"]
    assert verdict.status == "undecided"
    assert "2 training runs of GRPO, one by one: +0." in verdict.evidence
    alone = judged(replace(lucky, repeats={arm: [arm] for arm in lucky.arms}))["transfer"]
    assert alone.status == "supported"
    assert "One training run per arm" in alone.evidence
    assert "not training seeds" in alone.weakest_link


def test_a_difference_holds_every_run_and_one_run_is_the_paired_bootstrap(full: Evidence) -> None:
    claims = Claims(full, PARAMS, SEED)
    found, each = claims.difference(full.far, "grpo", "base"), claims.each_run(full.far, "grpo", "base")
    assert found is not None
    assert list(each) == ["grpo", "grpo_1"]
    assert found.value == pytest.approx(np.mean(list(each.values())))
    single = claims.difference(full.far, "rft", "base")
    assert single == claims.estimate(full.far, claims.outcomes.model("rft"), claims.outcomes.model("base"))
    back = claims.difference(full.far, "base", "grpo")
    assert back is not None
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=0.01)


def test_the_set_has_to_act_in_the_repeats_of_the_tuned_model(full: Evidence) -> None:
    (found,) = Claims(full, PARAMS, SEED).replications()
    assert (found.model, found.beyond, found.draws) == ("grpo_1", {"found_on": 20, "heldout": 20}, 20)
    assert "Zeroed in other training runs of GRPO: GRPO, seed 1 −0.9" in judged(full)["necessary"].evidence

    plain = {
        row["sample_id"]: row["correct"] for row in full.edited if (row["purpose"], row["control"]) == ("repeat_grpo_1", "none")
    }
    inert = [row | {"correct": plain[row["sample_id"]]} if row["purpose"] == "repeat_grpo_1" else row for row in full.edited]
    verdict = judged(replace(full, edited=inert))["necessary"]
    assert verdict.status == "not supported", "a set of one run only is no property of the method"
    assert "acts in other training runs of GRPO" in verdict.weakest_link

    verdict = judged(edited(full, "random", "repeat_grpo_1", effect=-0.97))["necessary"]
    assert verdict.status == "undecided"
    assert "beyond 0 and" in verdict.evidence

    never = [row for row in full.effects if not row["purpose"].startswith("repeat_")]
    verdict = judged(replace(full, effects=never))["necessary"]
    assert verdict.status == "supported"
    assert "in one training run of GRPO only" in verdict.weakest_link
    assert judged(replace(full, effects=never))["sufficient"].status == "supported"


def test_without_a_contrast_its_claims_are_open_and_the_others_decided(tmp_path: Path) -> None:
    verdicts = judged(study(tmp_path, Plan(arms=("sft", "grpo", "grpo_1"), n=60, contrast=None)))
    for key in ("forgetting", "features"):
        assert verdicts[key].status == "undecided"
        assert "no contrast model" in verdicts[key].evidence
    assert {verdicts[key].status for key in ("transfer", "necessary", "sufficient")} == {"supported"}


def test_roles_decide_who_is_meant(full: Evidence) -> None:
    """With the parts of the two arms exchanged the claims speak of the other one, and fail."""
    turned = replace(full, roles=full.roles.model_copy(update={"tuned": "sft", "contrast": "grpo"}))
    verdicts = judged(turned)
    assert verdicts["transfer"].claim == "SFT on math improves tasks far from math"
    assert verdicts["transfer"].status == "not supported"
    assert verdicts["forgetting"].status == "not supported"
    assert verdicts["features"].status == "not supported"
