"""``featdiff.pipeline.repro`` where stages are started ahead: real dvc, forked; launchers; stages of a few lines."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from featdiff.processes import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("git"), reason="forks and git are needed")
ROOT = Path(__file__).parents[1]
STEP = """
import os, pathlib, sys, time
from featdiff.pipeline.stage import _report
from featdiff.processes import signals
from featdiff.processes.turns import turn
signals.listen(); _report("")
name = os.environ["DVC_STAGE"]
def note(what):
    with open("times.txt", "a") as times:
        times.write(f"{name} {what} {time.time()}\\n")
note("asks")
if pathlib.Path(f"{name}.broken").exists():
    sys.exit(2)
try:
    with turn():
        note("begins")
        while not pathlib.Path(f"{name}.go").exists():
            time.sleep(0.05)
        if pathlib.Path(f"{name}.fails").exists():
            sys.exit(3)
        pathlib.Path(f"{name}.out").write_text(name)
        note("ends")
except signals.Stopped as stopped:
    note("stopped")
    _report(75)
    sys.exit(75)
"""
GRAPH = {"first": [], "a": ["first"], "b": ["first"], "c": ["first"], "d": ["first"], "last": ["a"]}


class Toy:
    """A repository of DVC with the stages of :data:`GRAPH`, which end when they are let go."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "FEATDIFF_"))}
        self.environment |= {
            "ACCELERATE_CONFIG": str(ROOT / "conf/accelerate/cpu.yaml"),
            "OMP_NUM_THREADS": "1",
            "SECONDS": "4",
        }
        (root / "stages").mkdir()
        shutil.copy(ROOT / "stages/run", root / "stages/run")
        (root / "stages/step.py").write_text(STEP, encoding="utf-8")
        stages = {
            name: {
                "cmd": "exec sh stages/run --one stages/step.py",
                "deps": ["stages/step.py", *(f"{each}.out" for each in above)],
                "outs": [f"{name}.out"],
            }
            for name, above in GRAPH.items()
        }
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
        for words in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
            subprocess.run(words, cwd=root, check=True, env=self.environment)

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "featdiff.pipeline.repro", "--jobs", "1"], cwd=self.root, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0,
        )  # fmt: skip

    def let_go(self, *names: str) -> None:
        for name in names:
            (self.root / f"{name}.go").touch()

    def times(self) -> dict[tuple[str, str], float]:
        path = self.root / "times.txt"
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        return {(name, what): float(when) for name, what, when in rows}

    def wait_for(self, name: str, what: str) -> None:
        wait_until(lambda: (name, what) in self.times())

    def processes(self) -> list[psutil.Process]:
        """Whatever works in the repository."""
        return [
            each
            for each in psutil.process_iter(["cwd", "status"])
            if each.info["cwd"] == str(self.root) and each.info["status"] != psutil.STATUS_ZOMBIE
        ]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    made = Toy(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


def test_the_next_stage_is_there_before_its_turn_and_begins_when_the_other_has_ended(toy: Toy) -> None:
    toy.let_go("first")
    process = toy.start()
    toy.wait_for("a", "begins")
    toy.wait_for("b", "asks")
    time.sleep(0.5)
    assert ("b", "begins") not in toy.times()
    toy.let_go("a")
    toy.wait_for("b", "begins")
    toy.let_go(*GRAPH)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    times = toy.times()
    order = sorted(GRAPH, key=lambda name: times[name, "begins"])
    for before, name in itertools.pairwise(order):
        assert times[name, "begins"] > times[before, "ends"], "one at a time"
    assert (order[:3], order.index("last") > 2) == (["first", "a", "b"], True)
    assert "(6 of 6)" in said
    again = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=toy.root, capture_output=True, text=True, check=True)
    assert "up to date" in again.stdout
    assert toy.processes() == []


def test_where_one_fails_the_one_that_waits_does_not_begin(toy: Toy) -> None:
    toy.let_go("first")
    (toy.root / "a.fails").touch()
    process = toy.start()
    toy.wait_for("b", "asks")
    toy.let_go("a")
    said, _ = process.communicate(timeout=200)
    assert process.returncode not in (0, 75), said
    times = toy.times()
    assert ("b", "stopped") in times
    assert {name for name, what in times if what == "begins"} == {"first", "a"}
    assert "a | failed after " in said
    assert "b |" not in said
    assert toy.processes() == []


def test_the_failure_of_one_that_waits_is_said_and_what_is_at_work_ends_by_itself(toy: Toy) -> None:
    toy.let_go("first")
    (toy.root / "b.broken").touch()
    process = toy.start()
    toy.wait_for("b", "asks")
    wait_until(lambda: "ERROR" in (toy.root / ".featdiff/logs/b.log").read_text(encoding="utf-8"))
    time.sleep(2)  # dvc ends, and is heard
    toy.let_go("a")
    said, _ = process.communicate(timeout=200)
    assert process.returncode not in (0, 75), said
    assert "b | failed after 0:00" in said
    assert "b | ERROR: failed to reproduce 'b'" in said
    assert ("a", "ends") in toy.times()
    assert ("c", "begins") not in toy.times()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_ends_the_one_at_work_and_the_one_that_waits(toy: Toy, number: int) -> None:
    toy.let_go("first")
    process = toy.start()
    toy.wait_for("a", "begins")
    toy.wait_for("b", "asks")
    process.send_signal(number)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 75, said
    assert {("a", "stopped"), ("b", "stopped")} <= toy.times().keys()
    assert ("b", "begins") not in toy.times()
    assert "b |" not in said
    assert toy.processes() == []


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_where_it_is_killed_nothing_is_left(toy: Toy, shell: str) -> None:
    if not (path := shutil.which(shell)):
        pytest.skip(f"{shell} is needed")
    toy.environment["SHELL"] = path  # in which dvc starts commands
    toy.let_go("first")
    process = toy.start()
    toy.wait_for("a", "begins")
    toy.wait_for("b", "asks")
    forks = [each for each in toy.processes() if "featdiff.processes.dvc" in each.cmdline()]
    assert len(forks) >= 2, "dvc is forked"
    process.kill()
    process.wait()
    wait_until(lambda: not toy.processes())
    assert ("b", "begins") not in toy.times()


@pytest.mark.parametrize("words", [["config", "core.analytics"], ["repro", "--single-item", "nothing"], ["no such command"]])
def test_a_forked_dvc_ends_and_says_what_one_of_its_own_does(tmp_path: Path, words: list[str]) -> None:
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    command = ["-m", "dvc", *words]
    alone = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    socket = warm.address(str(tmp_path), warm.DVC)
    server = subprocess.Popen([sys.executable, "-m", "featdiff.processes.dvc", socket], cwd=tmp_path)
    asking = f"""
import os, sys
from featdiff.processes import warm
child = warm.ask({command!r}, dict(os.environ, {warm.WARM}={str(tmp_path)!r}), warm.DVC)
sys.exit(os.waitstatus_to_exitcode(child.wait()))
"""
    try:
        wait_until(Path(socket).exists)
        time.sleep(0.2)
        forked = subprocess.run([sys.executable, "-c", asking], cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        server.kill()
        server.wait()
    assert (forked.returncode, forked.stdout, forked.stderr) == (alone.returncode, alone.stdout, alone.stderr)
