"""Runs as points, places at equal accuracy and equal divergence, and what the report says of them."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from featdiff.config.models import Arm, Roles
from featdiff.report.charts import Panel
from featdiff.report.evidence import Evidence
from featdiff.report.forgetting import figures, tables
from featdiff.report.names import Names
from featdiff.report.trajectories import (
    Point,
    accuracy,
    common_level,
    difference,
    losses,
    reach,
    trajectories,
)
from featdiff.tasks.task import TaskInfo

N = 40
TASKS = {"add": ("train", "math"), "sort": ("find", "words"), "last": ("heldout", "words"), "checksum": ("control", "words")}
ARMS = {
    "slow": Arm(method="grpo"),
    "fast": Arm(method="sft"),
    "slow_1": Arm(method="grpo", seed=1),
    "fast_1": Arm(method="sft", seed=1),
}
REPEATS = {"slow": ["slow", "slow_1"], "fast": ["fast", "fast_1"]}
BASE = {"add": 0.2, "sort": 0.5, "last": 0.5, "checksum": 0.0}


def right(share: float, shift: int = 0) -> list[bool]:
    """``share`` of N answers."""
    return [bool((i + shift) % N < round(share * N)) for i in range(N)]


def rows(runs: dict[str, list[tuple[float, float, float]]], steps: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Tables of ``checkpoints`` for runs that are given as (accuracy on math, away, forward KL on math) per checkpoint."""
    tables: dict[str, list[dict[str, Any]]] = {"samples": [], "accuracy": [], "divergence": []}
    for arm, points in runs.items():
        for number, (math, away, kl) in enumerate(points, 1):
            share = number / len(points)
            where = {"arm": arm, "checkpoint": number, "step": 10 * number if steps else None, "share": share}
            for task, (role, domain) in TASKS.items():
                level = math if domain == "math" else away if role != "control" else 0.0
                tables["samples"] += [
                    where | {"task": task, "role": role, "sample_id": f"{task}-{i}", "correct": answer, "manner": "steps"}
                    for i, answer in enumerate(right(level))
                ]
                own = kl if domain == "math" else kl / 2
                found = {"task": task, "role": role, "n": N, "forward_kl": own, "reverse_kl": 2 * own}
                tables["divergence"] += [where | found, where | found | {"task": None, "forward_kl": 99.0}]
    return tables


SLOW = [(0.4, 0.5, 0.1), (0.6, 0.5, 0.2), (0.8, 0.5, 0.4)]
FAST = [(0.8, 0.3, 0.4), (0.9, 0.1, 0.8), (1.0, 0.2, 1.2)]
RUNS = {"slow": SLOW, "fast": FAST, "slow_1": SLOW, "fast_1": FAST}
ANSWERS = {f"{task}-{i}": answer for task, share in BASE.items() for i, answer in enumerate(right(share))}


def points(runs: dict[str, list[tuple[float, float, float]]] = RUNS) -> dict[str, list[Point]]:
    return trajectories(rows(runs), ANSWERS)


def math(point: Point) -> float:
    return point.accuracy(["add"])


def evidence(
    runs: dict[str, list[tuple[float, float, float]]] = RUNS, contrast: str | None = "fast", base: dict[str, float] = BASE,
    steps: bool = True,
) -> Evidence:  # fmt: skip
    """The report's own object with the fields that this module reads; everything else is empty."""
    infos = {n: TaskInfo(n, role, domain, "generation", "organism", "strict", False, 0, role != "control")
             for n, (role, domain) in TASKS.items()}  # fmt: skip
    answers = [
        {"sample_id": f"{task}-{i}", "task": task, "mode": mode, "draw": draw, "correct": answer is (draw == 0)}
        for task, share in base.items() for i, answer in enumerate(right(share)) for mode, draw in (("greedy", 0), ("other", 1))
    ]  # fmt: skip
    primary = [{"task": task, "mode": "greedy", "primary": True} for task in TASKS]
    known = {
        "tasks": infos, "answers": {"base": answers}, "accuracy": {"base": primary}, "checkpoints": rows(runs, steps),
        "roles": Roles(original="base", tuned="slow", contrast=contrast), "repeats": REPEATS, "arms": ARMS,
    }  # fmt: skip
    found = Evidence(**{field.name: known.get(field.name, {}) for field in fields(Evidence)})
    for name, value in known.items():
        object.__setattr__(found, name, value)
    return found


def shown(found: Evidence) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    names = Names(Roles(original="base", tuned="slow", contrast="fast"), ARMS)
    return figures(found, names), tables(found, names)


def test_a_run_begins_with_the_base_and_has_its_checkpoints_in_order() -> None:
    shuffled = rows(RUNS)
    np.random.default_rng(0).shuffle(shuffled["samples"])
    np.random.default_rng(0).shuffle(shuffled["divergence"])
    runs = trajectories(shuffled, ANSWERS)
    assert runs.keys() == RUNS.keys()
    for run, wanted in RUNS.items():
        assert [point.checkpoint for point in runs[run]] == [0, 1, 2, 3]
        assert [point.step for point in runs[run]] == [0, 10, 20, 30]
        assert [point.share for point in runs[run]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert [math(point) for point in runs[run]] == pytest.approx([BASE["add"], *(a for a, _, _ in wanted)])
        assert [point.accuracy(["sort", "last"]) for point in runs[run]] == pytest.approx([0.5, *(b for _, b, _ in wanted)])
        assert [point.divergence(["add"]) for point in runs[run]] == pytest.approx([0, *(kl for _, _, kl in wanted)])
        assert runs[run][2].divergence(["add", "sort"], "reverse") == pytest.approx(1.5 * wanted[1][2])


def test_points_pair_loss_with_divergence() -> None:
    found = losses(points(), ["sort", "last"], ["add"], "forward")
    assert found["fast"] == [pytest.approx(pair) for pair in [(0.4, 0.2), (0.8, 0.4), (1.2, 0.3)]]
    assert found["slow"] == [pytest.approx(pair) for pair in [(0.1, 0.0), (0.2, 0.0), (0.4, 0.0)]]


def test_a_level_is_reached_between_two_checkpoints() -> None:
    runs = points()
    level = common_level(list(runs.values()), math)
    assert level == pytest.approx(0.8)
    slow, fast = (reach(runs[run], math, 0.7) for run in ("slow", "fast"))
    assert slow is not None
    assert fast is not None
    assert (slow.share, math(slow), slow.divergence(["add"])) == pytest.approx((2 / 3 + 1 / 6, 0.7, 0.3))
    assert (fast.share, math(fast), fast.divergence(["add"])) == pytest.approx((5 / 18, 0.7, 0.4 * 5 / 6))
    assert fast.accuracy(["sort"]) == pytest.approx(0.5 - 0.2 * 5 / 6)
    gap = difference([slow], [fast], ["sort", "last"])
    assert gap.value == pytest.approx(slow.accuracy(["sort", "last"]) - fast.accuracy(["sort", "last"]))
    assert gap.low < gap.value < gap.high
    assert gap.n == 2 * N
    exact = reach(runs["slow"], math, 0.6)
    assert exact is not None
    assert exact.share == pytest.approx(2 / 3)


def test_the_first_rise_counts_where_a_run_falls_again() -> None:
    run = points({"slow": [(0.8, 0.5, 0.1), (0.3, 0.5, 0.2), (0.9, 0.5, 0.3)]})["slow"]
    found = reach(run, math, 0.8)
    assert found is not None
    assert found.share == pytest.approx(1 / 3)


def test_what_no_run_reaches_is_none() -> None:
    runs = points()
    assert reach(runs["slow"], math, 0.81) is None
    assert reach(runs["slow"], math, 0.1) is None  # below where it starts
    stuck = points({"slow": SLOW, "fast": [(0.2, 0.5, 0.1), (0.1, 0.5, 0.1)]})
    assert common_level(list(stuck.values()), math) is None
    assert common_level([], math) is None


def test_the_table_compares_at_the_end_at_equal_accuracy_and_at_equal_divergence() -> None:
    _, [(_, table)] = shown(evidence())
    assert [len(row) for row in table.rows] == [len(table.head)] * 4
    slow, fast = ([cell.text for cell in row] for row in table.rows[:2])
    assert slow[0] == "slow"
    assert slow[1:] == ["0.80", "0.50", "0.4"] * 3
    assert fast[1:] == ["1.00", "0.20", "1.2", "0.80", "0.30", "0.4", "0.80", "0.30", "0.4"]
    assert "Equal math accuracy: 0.80; equal KL: 0.4" in table.caption


def test_a_run_without_a_role_that_does_not_reach_the_level_has_a_dash() -> None:
    other = {"slow": SLOW, "fast": FAST, "third": [(0.3, 0.5, 0.01)]}
    _, [(_, table)] = shown(evidence(other))
    assert [cell.text for cell in table.rows[2]] == ["third", "0.30", "0.50", "0.01", *["–"] * 6]


def panels_of(found: Any) -> list[Panel]:
    """Over training, against the forward divergence, against the reverse one."""
    panels, _ = shown(found)
    over, lost = panels["forgetting"], panels["forgetting-kl"]
    assert isinstance(over, Panel)
    assert isinstance(lost, list)
    assert [name for name, _ in lost] == ["Forward KL", "Reverse KL"]
    return [over, *(panel for _, panel in lost)]


def test_figures_show_every_checkpoint_of_every_run() -> None:
    over, forward, reverse = panels_of(evidence())
    math_plot, away_plot = over.figures
    assert [trace["y"] for trace in math_plot.data] == [pytest.approx([0.2, *(a for a, _, _ in RUNS[run])]) for run in RUNS]
    assert away_plot.data[1]["y"] == pytest.approx([0.5, 0.3, 0.1, 0.2])
    assert away_plot.layout["shapes"][0]["y0"] == pytest.approx(0.5)
    assert [trace["x"] for trace in forward.figures[0].data] == [pytest.approx([kl for _, _, kl in RUNS[run]]) for run in RUNS]
    assert forward.figures[1].data[1]["x"] == pytest.approx([0.2, 0.4, 0.6])
    assert reverse.figures[0].data[1]["x"] == pytest.approx([0.8, 1.6, 2.4])
    assert forward.figures[0].data[1]["y"] == pytest.approx([0.2, 0.4, 0.3])
    assert {trace["line"]["dash"] for trace in over.figures[0].data[2:]} == {"dot"}
    keys = [figure.key for panel in (over, forward, reverse) for figure in panel.figures]
    assert len(set(keys)) == len(keys)


def test_the_captions_say_whether_it_dips_and_what_divergence_explains() -> None:
    over, forward, _ = panels_of(evidence())
    assert "fast dips away from math" in over.caption
    assert "slow dips" not in over.caption
    points_of = [pair for run in losses(points(), ["sort", "last"], ["add"], "forward").values() for pair in run]
    from scipy.stats import spearmanr

    rank = spearmanr(*np.transpose(points_of)).statistic
    assert f"rank correlation with loss +{rank:.2f}" in forward.caption
    assert "over 4 runs" in forward.caption
    assert "6 of 12 checkpoints lie below it" in forward.caption
    assert "slow minus fast (means over 2 runs and 2 runs) +0.20" in forward.caption
    assert "does not explain the difference" in forward.caption


def test_where_nothing_can_be_lost_it_says_so() -> None:
    helpless = {"add": 0.2, "sort": 0.0, "last": 0.0, "checksum": 0.0}
    _, forward, _ = panels_of(evidence({"slow": [(0.8, 0.9, 0.4)], "fast": [(0.9, 0.0, 0.8)]}, base=helpless))
    assert "on none of them does the base beat a random guess" in forward.caption
    assert "Nothing was forgotten for certain" in forward.caption
    assert "2 runs and 2 checkpoints are too few" in forward.caption


def test_without_a_contrast_model_the_rest_is_shown() -> None:
    found = evidence(contrast=None, steps=False)
    _, [(_, table)] = shown(found)
    over, forward, _ = panels_of(found)
    assert "dips" not in over.caption
    assert "not tested" in forward.caption
    assert len(table.rows) == 4


def test_without_checkpoints_there_is_nothing_to_show() -> None:
    panels, found = shown(evidence({}))
    assert set(panels.values()) == {None}
    assert found == []


def test_accuracy_counts_tasks_alike() -> None:
    run = points()["fast"]
    found = accuracy(run[2], ["add", "sort"])
    assert found.value == pytest.approx((0.9 + 0.1) / 2)
    assert 0 <= found.low < found.value < found.high <= 1
