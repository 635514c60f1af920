"""Lengths of change at which controls do what the set does, on planted curves."""

from typing import Any

import pytest

from featdiff.report.evidence import Evidence
from featdiff.report.selectivity import Curve, Selectivity, choice, crossing, curves, median_curve, selectivity

NORMS = [0.0, 0.1, 0.2, 0.4, 0.8]
SETTING = {"edit": "add", "positions": "prompt_last"}


def rows(
    control: str, draw: int, gains: list[float], start: float = 0.2, purpose: str = "amplify_original", **more: Any
) -> Any:
    """A curve at two tasks: one has twice the gain of the other's, the mean is the gain given. Its rows come out of order."""
    facts = {"purpose": purpose, "control": control, "set_draw": draw} | SETTING | more
    made = [
        facts | {"task": task, "dose": 10 * norm, "norm": norm, "accuracy": start + gain * share, "unread": norm}
        for norm, gain in zip(NORMS, gains, strict=True)
        for task, share in (("a", 2 / 3), ("b", 4 / 3))
    ]
    return made[::-1]


def evidence(*groups: list[dict[str, Any]], purpose: str = "amplify_original") -> Any:
    chosen = [
        {"control": "set", "set_draw": 0, "dose": 2.0} | SETTING,
        {"control": "random", "set_draw": 1, "dose": 4.0} | SETTING,
    ]
    known = Evidence.__new__(Evidence)
    vars(known).update(search=[row for group in groups for row in group], choice={"controls": {purpose: chosen}})
    return known


OWN = rows("set", 0, [0.0, 0.2, 0.6, 0.6, 0.5])
"""Half of its gain, .3, is reached at .1 + .1 · .1 / .4 = .125."""


@pytest.mark.parametrize(
    ("curve", "height", "at"),
    [
        ([(0, 0), (1, 0.2), (2, 0.6)], 0.4, 1.5),
        ([(0, 0), (1, 0.2), (2, 0.6)], 0.2, 1.0),
        ([(0, 0), (1, 0.6), (2, 0.1), (3, 0.6)], 0.3, 0.5),  # the first time
        ([(0, 0), (1, -0.4), (2, 0.4)], 0.2, 1.75),
        ([(0, 0), (1, 0.3)], 0.3, 1.0),
        ([(0, 0), (1, 0.2)], 0.3, None),
        ([(0, 0)], 0.1, None),
    ],
)
def test_a_crossing_is_the_first_and_lies_between_the_doses_tried(curve: Curve, height: float, at: float | None) -> None:
    assert crossing(curve, height) == (at if at is None else pytest.approx(at))


def test_a_curve_is_the_mean_gain_over_tasks_by_length_from_no_change() -> None:
    others = rows("set", 0, [9.0] * 5, positions="all") + rows("set", 0, [9.0] * 5, purpose="zero_tuned")
    found = curves(evidence(OWN, rows("random", 1, [0.0, 0.1, 0.1, 0.3, 0.2], start=0.4), others), "amplify_original")
    assert list(found) == ["set", "random"]
    assert found["set"] == [[pytest.approx(point) for point in zip(NORMS, [0.0, 0.2, 0.6, 0.6, 0.5], strict=True)]]
    assert [gain for _, gain in found["random"][0]] == pytest.approx([0.0, 0.1, 0.1, 0.3, 0.2])


def test_gain_is_what_is_lost_where_the_set_is_taken_away_and_shares_are_as_they_are() -> None:
    lost = evidence(rows("set", 0, [0.0, -0.2, -0.6, -0.6, -0.6], start=0.8, purpose="zero_tuned"), purpose="zero_tuned")
    (curve,) = curves(lost, "zero_tuned")["set"]
    assert [gain for _, gain in curve] == pytest.approx([0.0, 0.2, 0.6, 0.6, 0.6])
    (unread,) = curves(lost, "zero_tuned", "unread")["set"]
    assert [share for _, share in unread] == pytest.approx(NORMS)


def test_the_choice_of_a_control() -> None:
    made = evidence(OWN)
    assert choice(made, "amplify_original", "random", 1)["dose"] == 4.0
    assert choice(made, "amplify_original", "random") == choice(made, "zero_tuned", "set") == {}


def test_the_median_curve_is_of_gains_at_each_dose() -> None:
    drawn = [[(0.0, 0.0), (0.1, gain), (0.2, 1 - gain)] for gain in (0.1, 0.5, 0.2)]
    assert median_curve(drawn) == [(0, 0), (pytest.approx(0.1), pytest.approx(0.2)), (0.2, 0.8)]


def test_selectivity_is_the_ratio_of_lengths_at_half_of_the_gain_of_the_set() -> None:
    drawn = [rows("random", i, [0.0, 0.0, 0.1, gain, 0.6]) for i, gain in enumerate((0.3, 0.1, 0.6))]
    found = selectivity(evidence(OWN, *drawn), "amplify_original")
    assert found == {"random": (pytest.approx(0.4 / 0.125), True)}, "the median control has .3 at .4"


def test_controls_that_never_do_as_much_give_a_lower_bound() -> None:
    pushes = [rows("random_direction", i, [0.0, 0.0, 0.0, 0.1, gain]) for i, gain in enumerate((0.29, 0.1, 0.9))]
    found = selectivity(evidence(OWN, rows("random", 0, [0.0, 0.6, 0.6, 0.6, 0.6]), *pushes), "amplify_original")
    assert found["random_direction"] == Selectivity(pytest.approx(0.8 / 0.125), reached=False)
    assert found["random"] == (pytest.approx(0.05 / 0.125), True)


def test_a_set_without_gain_or_that_was_not_tried_has_no_selectivity() -> None:
    nothing, random = rows("set", 0, [0.0, -0.1, 0.0, 0.0, -0.2]), rows("random", 0, [0.0, 0.6, 0.6, 0.6, 0.6])
    assert selectivity(evidence(nothing, random), "amplify_original") == {}
    assert selectivity(evidence(random), "amplify_original") == {}
    assert selectivity(evidence(OWN), "amplify_original") == {}
