"""The rules applied to sets that are known to be false."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from featdiff.report.battery import errors
from featdiff.report.calibration import FALSE, as_set, error_rates, false_sets
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence, Row
from featdiff.report.quantities import effects
from featdiff.report.selectivity import choice
from synthetic_study import STUDY

Studied = Callable[..., Evidence]


def judged(evidence: Evidence) -> list[Row]:
    return false_sets(Claims(evidence, STUDY.report, STUDY.seed))


@pytest.fixture(scope="module")
def fooled(studied: Studied) -> Evidence:
    """A study in which the set found with shuffled identities does what the set does, and no other control anything."""
    return studied(n=60, works=("set", "shuffled"), random_sets=21)


@pytest.fixture(scope="module")
def rows(fooled: Evidence) -> list[Row]:
    return judged(fooled)


def test_a_control_that_does_what_the_set_does_is_an_error_and_others_are_none(rows: list[Row]) -> None:
    assert len(rows) == 2 * (21 + 5 + 3), "every false set under both claims"
    for row in rows:
        assert (row["status"] == "supported") is (row["control"] == "shuffled"), row
        assert bool(row["failed"]) is (row["control"] != "shuffled"), row
    rates = {(row["claim"], row["control"]): row for row in error_rates(rows, 0.95)}
    assert {control for _, control in rates} == set(FALSE)
    for (_, control), row in rates.items():
        wrong = control == "shuffled"
        assert row["n"] == row["supported"] + row["undecided"] + row["not supported"]
        assert (row["supported"], row["high"] == 1.0) == (wrong, wrong)


def test_the_interval_is_exact_binomial() -> None:
    counted = [("supported", 1), ("undecided", 4), ("not supported", 15)]
    made = [{"claim": "necessary", "control": "random", "status": status} for status, n in counted for _ in range(n)]
    (row,) = error_rates(made, 0.95)
    assert {status: row[status] for status, _ in counted} == dict(counted)
    assert (row["n"], row["high"]) == (20, pytest.approx(0.2487, abs=1e-4))
    (none,) = error_rates(made[1:], 0.95)
    assert none["high"] == pytest.approx(1 - 0.025 ** (1 / 19))
    assert error_rates([], 0.95) == []
    assert errors([]) is None


def test_a_false_set_is_held_against_the_other_draws_under_its_own_setting(fooled: Evidence) -> None:
    found = as_set(fooled, "random", 3)
    for purpose in ("zero_tuned", "amplify_original"):
        drawn = effects(found, purpose, "random")
        assert {row["set_draw"] for row in drawn} == set(range(21)) - {3}
        own = effects(found, purpose, "set")
        assert [row["accuracy"] for row in own] == [
            row["accuracy"] for row in effects(fooled, purpose, "random") if row["set_draw"] == 3
        ]
        for row in own:
            others = [each["effect"] for each in drawn if each["task"] == row["task"]]
            sign = 1 if purpose == "amplify_original" else -1
            assert row["beyond_random"] is (sign * row["effect"] > max(sign * value for value in others))
            assert row["p_random"] == (1 + sum(sign * value >= sign * row["effect"] for value in others)) / 21
        assert choice(found, purpose, "set") == choice(fooled, purpose, "random", 3) | {"control": "set", "set_draw": 0}
    right = {(row["purpose"], row["sample_id"]): row["correct"] for row in found.edited if row["control"] == "set"}
    assert right == {(row["purpose"], row["sample_id"]): row["correct"] for row in fooled.outcomes["random", 3]}


def test_where_nothing_was_tested_there_is_nothing_to_judge(fooled: Evidence, studied: Studied) -> None:
    assert judged(studied(n=20, status="empty_intersection")) == []
    one_model = [row for row in fooled.effects if row["purpose"] == "zero_tuned"]
    assert judged(replace(fooled, effects=one_model)) == [], "tried in one of the two models only"
