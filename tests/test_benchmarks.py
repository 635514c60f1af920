"""The benchmarks' contestants really do the work, and take turns."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featdiff.artifacts.artifact import write_json
from project import ROOT

TINY = {"models": 2, "width": 8, "features": 32, "batch": 16, "k": 3, "aux_k": 4, "block": 3, "rows": 300, "lr": 1e-2}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.__main__")


def test_a_case_times_each_contestant_in_turns_and_learns(bench: Any) -> None:
    dead = bench.steps(dead=0.25, dead_after=16, lr=1e-9)
    contestants = {"featdiff": bench.steps(), "limit": bench.GEMM, "l1": bench.steps(l1=0.1), "dead": dead}
    case = bench.Case("tiny", TINY | {"dead_after": 10**9}, contestants, rounds=60)
    found = bench.run("tiny", case)
    assert list(found) == list(contestants)
    assert found["featdiff"]["ratio"] == 1.0
    assert all(one["milliseconds"] > 0 and one["least_ratio"] <= one["ratio"] <= one["most_ratio"] for one in found.values())
    assert found["featdiff"]["found"]["fve"] > 0.05
    assert found["featdiff"]["found"]["dead"] == 0.0
    assert found["dead"]["found"]["dead"] >= 0.25
    text = bench.table({"step": found})
    assert bench.CASES["step"].title in text
    assert "| limit |" in text


def test_the_title_stands_before_all_contestants_of_its_case(bench: Any) -> None:
    """Results are kept in alphabetical order, in which some labels come before ours."""
    one = {"milliseconds": 1.0, "ratio": 1.0, "least_ratio": 1.0, "most_ratio": 1.0, "found": {}}
    results = {name: dict.fromkeys(sorted(case.contestants), one) for name, case in bench.CASES.items()}
    labels = {case.title: list(case.contestants) for case in bench.CASES.values()}
    found: dict[str, list[str]] = {}
    for line in bench.table(results).splitlines()[2:]:
        title, label = (cell.strip() for cell in line.split("|")[1:3])
        title = title or next(reversed(found))
        found.setdefault(title, []).append(label)
    assert found == labels


def test_a_contestant_that_stops_is_named_with_what_it_said(bench: Any) -> None:
    without_k = {name: value for name, value in TINY.items() if name != "k"}
    case = bench.Case("tiny", without_k | {"dead_after": 1}, {"featdiff": bench.steps()})
    with pytest.raises(SystemExit, match=r"(?s)featdiff stopped: .*KeyError: 'k'"):
        bench.run("tiny", case)


def test_work_that_grows_says_how_much_it_was_and_what_memory_it_took(bench: Any) -> None:
    harvest, fit = (bench.growing(way)["featdiff"] for way in ("harvest", "fit"))
    large = {"tokens": 300_000, "batch": 30_000, "shard": 65_536, "warm": 40_000}
    contestants = {"featdiff": harvest._replace(changes={"tokens": 1500}), "fit": fit._replace(changes=large)}
    numbers = bench.GROWTH | {"width": 8, "features": 32, "batch": 64, "shard": 512, "warm": 600}
    found = bench.run("tiny", bench.Case("tiny", numbers, contestants, rounds=2))
    assert [one["found"]["tokens"] for one in found.values()] == [1500, 300_000]
    took = [one["found"]["peak_mib"] - one["found"]["start_mib"] for one in found.values()]
    assert took[0] >= 0
    assert took[1] > 262_144 * 2 * 8 * 2 / 2**20, "less than the buffer of rows alone"


def test_answers_that_differ_in_one_token_are_not_equal(bench: Any) -> None:
    ours = [[[1, 2], [3]], [[1, 2], []]]
    assert bench.agreement(ours, ours) == {"equal": 4, "of": 4}
    assert bench.agreement(ours, [[[1, 2], [3]], [[1, 5], [2]]]) == {"equal": 2, "of": 4}
    with pytest.raises(ValueError, match="shorter"):
        bench.agreement(ours, ours[:1])


def test_planted_rows_are_the_same_for_all_and_of_mean_square_one(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pace = importlib.import_module("pace")
    one, two = (pace.planted_rows(12, 500) for _ in range(2))
    assert torch.equal(one, two)
    assert float(one.square().mean()) == pytest.approx(1.0, abs=1e-5)
    assert pace.explained(one, one) == 1.0
    assert pace.explained(one, one.mean(0).expand_as(one)) == pytest.approx(0.0, abs=1e-5)


def test_every_figure_of_the_page_comes_from_the_results(bench: Any) -> None:
    page, results = bench.PAGE.read_text(encoding="utf-8"), json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    assert results["cases"].keys() == bench.CASES.keys()
    assert bench.table(results["cases"]) in page
    assert bench.study_table(results["study"]) in page


def test_the_profile_names_operations_of_the_step(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.CASES["step"]._replace(numbers=TINY | {"dead_after": 10**9})
    monkeypatch.setitem(bench.CASES, "step", case)
    found = importlib.import_module("benchmarks.profiling").table("step")
    assert "aten::addmm" in found
    assert "aten::randint" not in found


def test_the_studys_times_are_those_of_its_last_whole_run(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(number: int, stage: str, pipeline: str, started: float, seconds: float) -> None:
        folder = tmp_path / f"{number:03d}"
        folder.mkdir()
        run = {"status": "FINISHED", "profile": "organism", "stage": stage, "pipeline": {"id": pipeline}, "started": started}
        write_json(folder / "run.json", run | {"ended": started + seconds, "observed": {"wall_seconds": seconds}})

    monkeypatch.setattr("featdiff.tracking.record.runs_folder", lambda: tmp_path)
    with pytest.raises(SystemExit, match="no run of the whole study"):
        bench.study()
    stages = ["prepare a", "report a", "base b", "arm b", "arm b", "report b"]
    for number, (stage, pipeline) in enumerate(map(str.split, stages)):
        record(number, stage, pipeline, 100.0 * number, 10.0 * (number + 1))
    record(6, "report", "c", 600.0, 5.0)
    found = bench.study()
    assert found["kinds"] == {
        "base": {"stages": 1, "seconds": 30.0},
        "arm": {"stages": 2, "seconds": 90.0},
        "report": {"stages": 1, "seconds": 60.0},
    }
    assert (found["between"], found["whole"]) == (70.0 + 60.0 + 50.0, 360.0)
    assert "| arm | 2 | 90 |" in bench.study_table(found)
