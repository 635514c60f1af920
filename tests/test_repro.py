"""``featdiff.pipeline.repro``: real dvc, stages of a few lines that say when they began and ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from featdiff.artifacts.dvc import locked
from featdiff.config.params import load_study
from featdiff.pipeline.repro import ONE_READ, Output, Stages, affected, order, side_by_side, with_one_read

STAGE = """
import os, pathlib, sys, time
name, seconds, *inputs = sys.argv[1:]
def note(what):
    with open("times.txt", "a") as times:
        times.write(f"{name} {what} {time.time()}\\n")
note("begins")
pathlib.Path(f"{name}.share").write_text(os.environ.get("FEATDIFF_SHARE", "none"))
print(f"{name} speaks", flush=True)
print("10%", end="\\r", file=sys.stderr)
if pathlib.Path(f"{name}.fails").exists():
    raise SystemExit(3)
try:
    time.sleep(float(seconds))
except KeyboardInterrupt:
    note("stopped")
    raise SystemExit(75)
pathlib.Path(f"{name}.out").write_text("".join(pathlib.Path(each).read_text() for each in inputs) + name)
note("ends")
"""
GRAPH = {"first": [], "left": ["first"], "right": ["first"], "last": ["left", "right"], "aside": ["first"]}


class Toy:
    """A repository of DVC with the stages of :data:`GRAPH`."""

    def __init__(self, root: Path, seconds: float = 1.0) -> None:
        self.root = root
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
        self.environment |= {"PYTHONUNBUFFERED": "1", "FEATDIFF_WARM": ""}
        (root / "stage.py").write_text(STAGE, encoding="utf-8")
        (root / "text").write_text("0", encoding="utf-8")
        stages = {}
        for name, above in GRAPH.items():
            inputs = [f"{each}.out" for each in above] or ["text"]
            command = " ".join([sys.executable, "stage.py", name, str(seconds), *inputs])
            stages[name] = {"cmd": command, "deps": ["stage.py", *inputs], "outs": [f"{name}.out"]}
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
        for words in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
            subprocess.run(words, cwd=root, check=True, env=self.environment)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "featdiff.pipeline.repro", "--jobs", "2", *words], cwd=self.root, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored, and stays so
        )  # fmt: skip

    def run(self) -> tuple[int, str]:
        process = self.start()
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def times(self) -> dict[tuple[str, str], float]:
        path = self.root / "times.txt"
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        return {(name, what): float(when) for name, what, when in rows}

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 60
        while not {(name, "begins") for name in names} <= self.times().keys():
            assert time.monotonic() < deadline, self.times()
            time.sleep(0.05)

    def finished_by_dvc(self) -> str:
        command = [sys.executable, "-m", "dvc", "repro"]
        return subprocess.run(command, cwd=self.root, env=self.environment, check=True, text=True, capture_output=True).stdout


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    if not shutil.which("git"):
        pytest.skip("git is needed")
    return Toy(tmp_path)


def test_stages_that_do_not_wait_for_each_other_run_side_by_side_and_dvc_has_nothing_left_to_do(toy: Toy) -> None:
    status, said = toy.run()
    assert status == 0, said
    times = toy.times()
    assert max(times["left", "begins"], times["right", "begins"]) < min(times["left", "ends"], times["right", "ends"])
    assert times["last", "begins"] > max(times["left", "ends"], times["right", "ends"])
    assert {name for name, what in times if what == "ends"} == set(GRAPH)
    assert "left | left speaks" in said
    assert "git add" not in said
    assert re.search(r"left \| done in \d+:\d\d", said)
    assert "(5 of 5)" in said
    assert (toy.root / "last.out").read_text(encoding="utf-8") == "0firstleft0firstrightlast"
    assert [output.label for output in sorted(locked(toy.root))] == sorted(GRAPH)
    assert "up to date" in toy.finished_by_dvc()
    (toy.root / "times.txt").unlink()
    status, said = toy.run()
    assert (status, toy.times()) == (0, {}), said
    assert said.splitlines() == ["featdiff: every stage is up to date"]


def test_a_stage_to_be_spread_begins_when_nothing_else_could_and_has_all_cores(toy: Toy) -> None:
    path, spread = toy.root / "dvc.yaml", ("right", "aside")
    plain = path.read_text(encoding="utf-8")
    graph = yaml.safe_load(plain)
    for name in spread:
        graph["stages"][name]["meta"] = {"spread": True}
    path.write_text(yaml.safe_dump(graph), encoding="utf-8")
    status, said = toy.run()
    assert status == 0, said
    times = toy.times()
    begun = [name for name, what in sorted(times, key=times.__getitem__) if what == "begins"]
    assert begun[:3] == ["first", "left", "right"], "although there is room for right beside left"
    for name in spread:
        others = [other for other in begun if other != name]
        assert all(
            times[other, "ends"] < times[name, "begins"] or times[other, "begins"] > times[name, "ends"] for other in others
        )
    shares = {name: (toy.root / f"{name}.share").read_text(encoding="utf-8") for name in begun}
    assert shares == {name: "2" if name in spread else "none" for name in begun}
    path.write_text(plain, encoding="utf-8")
    assert toy.run() == (0, "featdiff: every stage is up to date\n"), "how a stage is started is no part of what it is"


def test_only_what_waits_for_a_change_runs_again(toy: Toy) -> None:
    assert toy.run()[0] == 0
    (toy.root / "times.txt").unlink()
    (toy.root / "left.out").unlink()
    (toy.root / "left.out").write_text("another", encoding="utf-8")
    status, said = toy.run()
    assert status == 0, said
    assert toy.times() == {}, "left comes from DVC's run cache, and so nothing below it has changed"
    assert (toy.root / "left.out").read_text(encoding="utf-8") == "0firstleft"


def test_after_a_failure_what_is_at_work_ends_and_nothing_begins(toy: Toy) -> None:
    (toy.root / "left.fails").touch()
    status, said = toy.run()
    assert status != 0
    times = toy.times()
    assert ("right", "ends") in times
    assert not {("last", "begins"), ("aside", "begins")} & times.keys()
    assert "left | failed after 0:0" in said
    assert "all that it said: .featdiff/logs/left.log" in said
    assert "left | ERROR: failed to reproduce 'left'" in said, "in the words of dvc"
    (toy.root / "left.fails").unlink()
    (toy.root / "times.txt").unlink()
    assert toy.run()[0] == 0
    assert {name for name, _ in toy.times()} == {"left", "last", "aside"}, "what was done is done"


def test_what_dvc_cannot_read_is_one_line(toy: Toy) -> None:
    path = toy.root / "dvc.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("- first.out", "- last.out"), encoding="utf-8")
    status, said = toy.run()
    assert status == 2
    assert said.count("\n") == 1
    assert said.startswith("featdiff: dvc: ")
    assert toy.times() == {}


def test_how_many_have_a_core_for_each_of_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.delenv("ACCELERATE_CONFIG", raising=False)
    monkeypatch.setattr("featdiff.pipeline.repro.os.cpu_count", lambda: 9)
    study = load_study()
    asked = {threads: side_by_side(study.model_copy(update={"threads": threads})) for threads in (1, 2, 16, None)}
    assert asked == {1: 9, 2: 4, 16: 1, None: 1}
    for hardware, most in (("cpu_2ranks", 4), ("gpu", 1), ("nowhere", 1)):
        monkeypatch.setenv("ACCELERATE_CONFIG", f"conf/accelerate/{hardware}.yaml")
        assert side_by_side(study.model_copy(update={"threads": 1})) == most, hardware


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_reaches_every_stage_at_work(toy: Toy, number: int) -> None:
    process = toy.start()
    try:
        toy.wait_for("left", "right")
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert {("left", "stopped"), ("right", "stopped")} <= toy.times().keys()
    assert said.splitlines()[-1] == "featdiff: stopped; what was computed is kept: say it again"
    assert toy.run()[0] == 0


def dvcs(toy: Toy) -> list[psutil.Process]:
    """Those that are at work on a stage of ``toy``."""
    return [
        each
        for each in psutil.process_iter(["cmdline", "cwd"])
        if "--single-item" in (each.info["cmdline"] or []) and each.info["cwd"] == str(toy.root)
    ]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_where_it_is_killed_no_dvc_goes_on(toy: Toy) -> None:
    process = toy.start()
    toy.wait_for("left", "right")
    assert len(dvcs(toy)) == 2
    process.kill()
    process.wait()
    wait_until(lambda: not dvcs(toy))
    time.sleep(2)  # stages of this toy have no launcher that would end them
    assert toy.run()[0] == 0


def test_ctrl_z_stops_every_stage_and_fg_lets_them_go_on(tmp_path: Path) -> None:
    toy = Toy(tmp_path, seconds=3.0)
    process = toy.start()
    try:
        toy.wait_for("left", "right")
        process.send_signal(signal.SIGTSTP)
        wait_until(lambda: {each.status() for each in [psutil.Process(process.pid), *dvcs(toy)]} == {psutil.STATUS_STOPPED})
        assert len(dvcs(toy)) == 2
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said


@pytest.fixture
def growing(tmp_path: Path) -> tuple[Path, Output]:
    path = tmp_path / "log"
    path.touch()
    return path, Output(path)


def test_a_log_is_followed_by_whole_lines_and_of_a_bar_its_newest_state(growing: tuple[Path, Output]) -> None:
    path, output = growing
    with path.open("ab", buffering=0) as log:
        log.write(b"one\nsteps:  1%|\r")
        assert (output.lines(), output.bar) == (["one"], "steps:  1%|")
        log.write("\rsteps:  50%|█".encode()[:-1])  # half of a character
        output.lines()
        assert output.bar == "steps:  50%|"
        log.write("█".encode()[-1:] + b"\rsteps: 100%|\n\n  \nlast")
        assert output.lines() == ["steps: 100%|"]
        assert output.bar == "last"


def test_what_most_waits_for_goes_first_and_then_what_waited_for_most() -> None:
    graph = {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"b"}, "e": {"a"}, "f": {"b", "c", "d"}}
    assert sorted(graph, key=order(graph).__getitem__) == ["a", "b", "d", "c", "f", "e"]
    assert affected(graph, {"c"}) == {"c", "f"}
    assert affected(graph, set()) == set()


def test_crosscoders_wait_for_the_one_read_of_all_of_them_and_others_do_not() -> None:
    graph = {
        "base": set(), "arm@a": {"base"}, "activations_base": {"base"}, "activations@a": {"arm@a"}, "evaluate@a": {"arm@a"},
        "pair@a": {"activations_base", "activations@a"}, "crosscoder@null": {"activations_base"}, "report": {"pair@a"},
    }  # fmt: skip
    alone = Stages(graph, {"pair@a"}, set(), set())
    assert with_one_read(alone) == alone, "one alone has nobody to share with"
    found, changed, *_ = with_one_read(alone._replace(changed={"arm@a", "crosscoder@null"}))
    assert changed == {"arm@a", "crosscoder@null", ONE_READ}
    assert found[ONE_READ] == {"activations_base", "activations@a"}
    assert {stage for stage, above in found.items() if ONE_READ in above} == {"pair@a", "crosscoder@null"}
    assert {stage: above - {ONE_READ} for stage, above in found.items() if stage != ONE_READ} == graph
    places = order(found)
    assert places[ONE_READ] < min(places["pair@a"], places["crosscoder@null"])
