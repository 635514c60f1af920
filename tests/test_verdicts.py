"""Rules of the verdicts: what makes a claim supported, not supported, undecided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from featdiff.intervention.purposes import RIVALS
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence, Row
from featdiff.report.selectivity import selectivity
from featdiff.report.set_claims import SetClaims
from featdiff.report.verdicts import Criterion, Verdict, at_least, decide
from featdiff.stats import Interval
from synthetic_study import STUDY

Studied = Callable[..., Evidence]
PARAMS, SEED = STUDY.report, STUDY.seed
ALONE = ("sft", "grpo")
"""One training run per arm."""


def judged(evidence: Evidence) -> dict[str, Verdict]:
    return {verdict.key: verdict for verdict in Claims(evidence, PARAMS, SEED).verdicts()}


def of_set(evidence: Evidence) -> dict[str, Verdict]:
    """The three claims about the set."""
    return {verdict.key: verdict for verdict in SetClaims(Claims(evidence, PARAMS, SEED)).verdicts()}


def criterion(evidence: Evidence, key: str, words: str) -> Criterion:
    """The one criterion of a claim about the set that ``words`` are in."""
    (found,) = [each for each in of_set(evidence)[key].criteria if words in each.text]
    return found


@pytest.fixture(scope="module")
def full(studied: Studied) -> Evidence:
    return studied()


def table_of(evidence: Evidence, table: str, rows: list[Row]) -> Evidence:
    """The same study with another table."""
    fields: dict[str, Any] = {table: rows}
    return replace(evidence, **fields)


def changed(evidence: Evidence, control: str, purpose: str = "", table: str = "effects", **changes: Any) -> Evidence:
    """The same study with other numbers under one control, of one purpose or all."""
    rows = [
        row | (changes if row["control"] == control and purpose in ("", row["purpose"]) else {})
        for row in getattr(evidence, table)
    ]
    return table_of(evidence, table, rows)


def without(evidence: Evidence, table: str, *controls: str) -> Evidence:
    """The same study without the rows of some controls."""
    return table_of(evidence, table, [row for row in getattr(evidence, table) if row["control"] not in controls])


def barely_asked(evidence: Evidence, purpose: str) -> Evidence:
    """As if eight questions of each task had been asked, and the set had changed no answer: nothing is told."""
    rows = [row for row in answered(evidence, "set", "none", purpose=purpose).edited if int(row["sample_id"][-5:]) < 8]
    return replace(evidence, edited=rows)


def answered(evidence: Evidence, control: str, like: str, share: float = 1.0, purpose: str = "") -> Evidence:
    """As if that share of the questions had been answered under ``control`` as they were under ``like``, the first ones of each
    task."""
    held = {(row["purpose"], row["sample_id"]): row["correct"] for row in evidence.edited if row["control"] == like}

    def moved(row: Row) -> Row:
        wanted = row["control"] == control and purpose in ("", row["purpose"])
        early = int(row["sample_id"][-5:]) < share * len(evidence.questions) / len(evidence.tasks)
        return row | {"correct": held[row["purpose"], row["sample_id"]]} if wanted and early else row

    return replace(evidence, edited=[moved(row) for row in evidence.edited])


def test_a_claim_is_the_conjunction_of_its_criteria() -> None:
    yes, no, unknown = (Criterion("", "", holds) for holds in (True, False, None))
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
    keys = ("transfer", "forgetting", "features", "necessary", "sufficient", "dictionary")
    assert {key: verdict.status for key, verdict in verdicts.items()} == dict.fromkeys(keys, "supported")
    assert "n\u00a0=\u00a0720" in verdicts["transfer"].evidence
    assert "sampled answers" in verdicts["forgetting"].evidence, "greedily this base has nothing to lose"
    for key in ("necessary", "sufficient"):
        assert "causal" in verdicts[key].evidence
        assert verdicts[key].weakest_link.startswith("Smallest on largest")
    assert all(each.holds for verdict in verdicts.values() for each in verdict.criteria)


def test_same_seed_same_intervals(full: Evidence) -> None:
    assert judged(full) == judged(full)


def test_rl_without_transfer_is_not_supported(studied: Studied) -> None:
    verdicts = judged(studied(arms=ALONE, n=60, rl_transfers=False, status="too_few_flipped"))
    assert verdicts["transfer"].status == "not supported"


@pytest.mark.parametrize(
    ("status", "words"), [("too_few_flipped", "4 flipped samples"), ("empty_intersection", "No feature reaches")]
)
def test_without_a_feature_set_its_claims_are_undecided(studied: Studied, status: str, words: str) -> None:
    for verdict in of_set(studied(arms=ALONE, n=60, status=status)).values():
        assert verdict.status == "undecided"
        assert words in verdict.evidence
        assert "causal" not in verdict.evidence


def test_a_set_that_does_nothing_is_not_supported_and_never_called_causal(studied: Studied) -> None:
    for verdict in of_set(studied(arms=ALONE, n=60, works=())).values():
        assert verdict.status == "not supported"
        assert "causal" not in verdict.evidence


def test_a_set_that_changes_none_of_a_few_answers_is_undecided(studied: Studied) -> None:
    """Ten questions a task of which none changed leave an effect that counts possible; enough of them exclude it."""
    inert = {n: answered(studied(arms=ALONE, n=n, works=()), "set", "none") for n in (10, 60)}
    found = {n: of_set(replace(each, effects=_unmoved(each)))["necessary"] for n, each in inert.items()}
    assert {n: verdict.status for n, verdict in found.items()} == {10: "undecided", 60: "not supported"}
    words = found[10].evidence.replace("\u00a0", " ").replace("\u202f", " ")
    assert "No answer changed; 72 questions of which none changed would exclude a change of 0.05" in words


def _unmoved(evidence: Evidence) -> list[Row]:
    """Effects of a set that changes no answer, and brings none of the other model's."""
    same: dict[str, Any] = {"effect": 0.0, "low": 0.0, "high": 0.0, "beyond_random": False, "p_mcnemar": 1.0, "alike": 1.0}
    return changed(evidence, "set", **same).effects


def test_a_set_found_on_one_task_cannot_be_called_task_agnostic(studied: Studied) -> None:
    verdict = of_set(studied(arms=ALONE, n=60, find=("reverse",)))["necessary"]
    assert verdict.status == "undecided"
    assert "more than one task" in verdict.weakest_link


SIGNS = pytest.mark.parametrize(
    ("key", "purpose", "sign"), [("necessary", "zero_tuned", -1), ("sufficient", "amplify_original", 1)]
)


@SIGNS
def test_the_effect_has_to_be_of_a_size(full: Evidence, key: str, purpose: str, sign: int) -> None:
    words = "mean effect on the tasks it was found on"
    assert criterion(full, key, words).holds is True
    assert of_set(full)[key].estimates["found_on"].value * sign > 0.8
    assert criterion(answered(full, "set", "none", purpose=purpose), key, words).holds is False
    assert criterion(barely_asked(full, purpose), key, words).holds is None


@SIGNS
def test_random_sets_as_long_must_not_do_as_much(full: Evidence, key: str, purpose: str, sign: int) -> None:
    alike = changed(full, "random", purpose, effect=sign * 0.97)
    found = criterion(alike, key, "mean effect against")
    assert found.holds is False
    assert "p = 1.000" in found.text
    assert of_set(alike)[key].status == "not supported"
    assert criterion(barely_asked(alike, purpose), key, "mean effect against").holds is None, (
        "where no effect is told, losing to chance is noise"
    )
    few = replace(full, effects=[row for row in full.effects if row["control"] != "random" or row["set_draw"] < 19])
    assert criterion(few, key, "at least 20 random sets").holds is None


@SIGNS
def test_random_sets_that_do_not_act_where_the_set_does_tell_nothing(full: Evidence, key: str, purpose: str, sign: int) -> None:
    assert criterion(full, key, "random sets act").holds is True
    silent = changed(full, "random", purpose, "search", acting=0.5)
    assert criterion(silent, key, "random sets act").holds is None
    assert of_set(silent)[key].status == "undecided"
    assert criterion(changed(silent, "set", purpose, "search", acting=0.5), key, "random sets act").holds is True
    assert criterion(without(full, "search", "random"), key, "random sets act").holds is None


@SIGNS
def test_it_has_to_act_on_a_task_held_out(full: Evidence, key: str, purpose: str, sign: int) -> None:
    within = changed(full, "set", purpose, beyond_random=False)
    assert criterion(within, key, "held out from the selection").holds is False
    assert criterion(barely_asked(within, purpose), key, "held out from the selection").holds is None


@SIGNS
def test_sets_that_ought_to_do_nothing_must_do_little(full: Evidence, key: str, purpose: str, sign: int) -> None:
    shared = changed(full, "shared", purpose, effect=sign * 0.6)
    assert criterion(shared, key, "shared features").holds is False
    assert [of_set(shared)[each].status == "supported" for each in ("necessary", "sufficient")].count(True) == 1
    assert criterion(without(full, "effects", "shared", "base_specific"), key, "shared features").holds is None


@SIGNS
def test_tests_of_single_tasks_are_corrected_for_their_number(full: Evidence, key: str, purpose: str, sign: int) -> None:
    unsure = changed(full, "set", purpose, p_mcnemar=0.02)
    assert criterion(unsure, key, "McNemar").holds is None
    assert "is found with 80%" in of_set(unsure)[key].evidence.replace("\u202f", "").replace("\u00a0", "")
    assert criterion(changed(full, "set", purpose, p_mcnemar=0.012), key, "McNemar").holds is True


@SIGNS
def test_an_edit_of_dose_0_that_changes_something_leaves_the_claim_open(
    full: Evidence, key: str, purpose: str, sign: int
) -> None:
    assert criterion(changed(full, "noop", purpose, effect=0.01), key, "dose 0").holds is None


def test_a_large_set_is_not_a_small_one(full: Evidence) -> None:
    many = replace(full, localize=full.localize | {"features": list(range(100))})
    assert criterion(many, "necessary", "small").holds is False


def unmeasured(evidence: Evidence) -> Evidence:
    """As if the set had been taken away on held-out tasks only."""
    rows = [row for row in evidence.effects if row["role"] != "find" or row["purpose"] != "zero_tuned"]
    return replace(evidence, effects=rows)


def test_answers_have_to_return_to_those_of_the_original(full: Evidence) -> None:
    broken = changed(full, "set", "zero_tuned", alike=0.79)
    assert criterion(broken, "necessary", "return").holds is False
    assert of_set(broken)["necessary"].status == "not supported"
    assert of_set(broken)["sufficient"].status == "supported", "nothing is taken away there"
    assert criterion(unmeasured(full), "necessary", "return").holds is None


def test_a_drop_that_is_made_of_broken_answers_is_called_damage(full: Evidence) -> None:
    broken = changed(full, "set", "zero_tuned", unread=0.3)
    found = criterion(broken, "necessary", "damage:")
    assert found.holds is False
    assert "made of damage" in found.text
    assert of_set(broken)["necessary"].status == "not supported"
    assert "no damage" in of_set(broken)["necessary"].weakest_link
    assert criterion(changed(broken, "set", unread_toward=0.26), "necessary", "damage:").holds is True
    assert criterion(unmeasured(full), "necessary", "damage:").holds is None


def gaining(evidence: Evidence, norm: float | None, far: float = 1.0) -> Evidence:
    """As if random sets came to the gain of the set at a length ``norm`` of their change, or never, tried up to ``far``."""
    key = ("task", "purpose", "dose")
    own = {tuple(row[k] for k in key): row["accuracy"] for row in evidence.search if row["control"] == "set"}

    def moved(row: Row) -> Row:
        start, best = (own[row["task"], row["purpose"], dose] for dose in (0.0, 2.0))
        reached = norm is not None and row["norm"] >= norm
        return row | {"accuracy": best if reached else start, "norm": row["norm"] * far}

    rows = [moved(row) if row["control"].startswith("random") else row for row in evidence.search]
    return replace(evidence, search=rows)


def test_controls_have_to_need_a_longer_change(full: Evidence) -> None:
    """The set has half of its gain at a length of about 0.1; random sets and directions at 0.2, never up to 1.6, never up to
    0.16."""
    words = "selective"
    assert criterion(full, "sufficient", words).holds is True
    soon = gaining(full, 0.2)
    assert {each.reached for each in selectivity(soon, "amplify_original").values()} == {True}
    assert criterion(soon, "sufficient", words).holds is False
    assert of_set(soon)["sufficient"].status == "not supported"
    late = criterion(gaining(full, None), "sufficient", words)
    assert late.holds is True
    assert "more than" in late.text
    assert criterion(gaining(full, None, far=0.1), "sufficient", words).holds is None, "they were not tried any further"
    assert criterion(without(full, "search", "random", "random_direction"), "sufficient", words).holds is None


def test_a_model_that_pushes_of_no_meaning_tip_shows_nothing(full: Evidence) -> None:
    words = "random directions no longer"
    tipped = changed(full, "random_direction", "amplify_original", effect=0.6)
    assert criterion(tipped, "sufficient", words).holds is False
    assert of_set(tipped)["sufficient"].status == "not supported"
    assert of_set(tipped)["necessary"].status == "supported"
    assert criterion(without(full, "effects", "random_direction"), "sufficient", words).holds is None


@pytest.mark.parametrize(("purpose", "where"), [("zero_tuned", "taken away"), ("amplify_original", "amplified")])
@pytest.mark.parametrize("rival", ["mean_difference", "random_dictionary"])
def test_the_set_has_to_do_more_than_what_needs_no_learned_features(
    full: Evidence, purpose: str, where: str, rival: str
) -> None:
    called, sign = rival.replace("_", " "), 1 if where == "amplified" else -1
    best = changed(full, rival, purpose, effect=0.88 * sign)
    assert called in criterion(best, "dictionary", where).text
    as_good = answered(best, rival, "set", purpose=purpose)
    assert criterion(as_good, "dictionary", where).holds is False
    assert of_set(as_good)["dictionary"].status == "not supported"
    assert called in of_set(as_good)["dictionary"].weakest_link
    nearly = answered(best, rival, "set", 0.92, purpose)
    assert criterion(nearly, "dictionary", where).holds is None
    untried = without(full, "effects", *RIVALS)
    assert [each.holds for each in of_set(untried)["dictionary"].criteria] == [None, None]


def test_the_set_has_to_act_in_the_repeats_of_the_tuned_model(full: Evidence) -> None:
    words = "acts in other training runs of GRPO"
    (found,) = SetClaims(Claims(full, PARAMS, SEED)).replications()
    assert (found.model, found.beyond, found.draws) == ("grpo_1", {"found_on": 20, "heldout": 20}, 20)
    assert "Taken away from other training runs of GRPO: GRPO, seed 1 −0." in of_set(full)["necessary"].evidence
    inert = answered(full, "set", "none", purpose="repeat_grpo_1")
    assert criterion(inert, "necessary", words).holds is False
    assert of_set(inert)["necessary"].status == "not supported", "a set of one run only is no property of the method"
    matched = changed(full, "random", "repeat_grpo_1", effect=-0.97)
    assert criterion(matched, "necessary", words).holds is None
    assert "beyond 0 and" in of_set(matched)["necessary"].evidence
    never = replace(full, effects=[row for row in full.effects if not row["purpose"].startswith("repeat_")])
    verdicts = of_set(never)
    assert {verdict.status for verdict in verdicts.values()} == {"supported"}
    assert "in one training run of GRPO only" in verdicts["necessary"].weakest_link
    assert not any(words in each.text for each in verdicts["necessary"].criteria)


def test_the_word_causal_needs_the_percentile_of_the_random_sets(full: Evidence) -> None:
    verdict = of_set(replace(full, effects=[row | {"random_low": -1.0} for row in full.effects]))["necessary"]
    assert verdict.status == "supported"
    assert "causal" not in verdict.evidence


def test_the_weakest_link_names_sets_of_other_seeds_that_change_something_else(full: Evidence) -> None:
    seeds = full.localize["seeds"] | {"mean_effect": 0.5}
    unstable = replace(full, localize=full.localize | {"seeds": seeds})
    assert "change something else: mean cosine of their changes 0.50" in of_set(unstable)["necessary"].weakest_link


def test_forgetting_is_undecided_where_the_base_never_knew(full: Evidence) -> None:
    answers = full.answers | {"base": [row | {"correct": False} for row in full.answers["base"]]}
    verdict = judged(replace(full, answers=answers))["forgetting"]
    assert verdict.status == "undecided"
    assert "at chance" in verdict.evidence


def test_a_contrast_that_answers_like_the_tuned_model_did_not_forget(full: Evidence) -> None:
    answers = full.answers | {"sft": full.answers["grpo"], "sft_1": full.answers["grpo_1"]}
    verdict = judged(replace(full, answers=answers))["forgetting"]
    assert verdict.status == "not supported"


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


def test_without_a_contrast_its_claims_are_open_and_the_others_decided(studied: Studied) -> None:
    verdicts = judged(studied(arms=("sft", "grpo", "grpo_1"), n=60, contrast=None))
    for key in ("forgetting", "features"):
        assert verdicts[key].status == "undecided"
        assert "no contrast model" in verdicts[key].evidence
    assert {verdicts[key].status for key in ("transfer", "necessary", "sufficient", "dictionary")} == {"supported"}


def test_roles_decide_who_is_meant(full: Evidence) -> None:
    """With the parts of the two arms exchanged the claims speak of the other one, and fail."""
    turned = replace(full, roles=full.roles.model_copy(update={"tuned": "sft", "contrast": "grpo"}))
    verdicts = judged(turned)
    assert verdicts["transfer"].claim == "SFT on math improves tasks far from math"
    assert verdicts["transfer"].status == "not supported"
    assert verdicts["forgetting"].status == "not supported"
    assert verdicts["features"].status == "not supported"
