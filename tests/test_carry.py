"""A study that begins on one machine and ends on another, with only DVC's remote between the two."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from project import ROOT

pytestmark = pytest.mark.graph
STEPS, PATIENCE = 10, 240
WORK = f"""
import os, signal, sys, time
from pathlib import Path
folder = Path(".featdiff/scratch/big")
folder.mkdir(parents=True, exist_ok=True)
begun = max((int(path.name) for path in folder.iterdir()), default=0)
log = Path(os.environ["LOG"])
log.write_text(log.read_text() + f"big from {{begun}}\\n")
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
for step in range(begun + 1, {STEPS + 1}):
    while step == {STEPS} and os.path.exists(os.environ["HOLD"]) and not asked:
        time.sleep(0.05)
    if asked:
        sys.exit(75)
    (folder / str(step)).write_text("x" * step)
    (folder / str(step - 1)).unlink(missing_ok=True)
Path("big").mkdir(exist_ok=True)
Path("big/a").write_text("done")
Path("metrics").mkdir(exist_ok=True)
Path("metrics/big.json").write_text('{{"a": 1}}')
(folder / "{STEPS}").unlink()
"""


class Machine:
    """A clone of the repository at ``path``, which shares nothing with others but the remote. Its second stage does not end as
    long as there is a file ``hold``."""

    def __init__(self, path: Path, log: Path) -> None:
        self.path = path
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "GIT_", "FEATDIFF_"))}
        self.environment = clean | {
            "LOG": str(log),
            "HOLD": str(log.with_name("hold")),
            "PYTHONPATH": str(ROOT / "src"),
            "DVC_NO_ANALYTICS": "1",
        }
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
        self.running: list[subprocess.Popen[str]] = []

    def run(self, *words: str) -> str:
        done = subprocess.run(words, cwd=self.path, env=self.environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def carry(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "featdiff.pipeline.carry", *words]
        self.running.append(
            subprocess.Popen(
                command, cwd=self.path, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return self.running[-1]

    def ends(self, process: subprocess.Popen[str], status: int) -> str:
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == status, said
        return said


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine, Machine]]:
    """Three machines with one commit, whose dvc.lock is of another study, and a remote that has nothing."""
    log = tmp_path / "log"
    log.write_text("")
    first = Machine(tmp_path / "one", log)
    first.path.mkdir()
    shutil.copy(ROOT / "conf/profiles/organism.yaml", first.path / "params.yaml")
    (first.path / "work.py").write_text(WORK)
    small = {"cmd": "mkdir small && echo small >> $LOG && echo 1 > small/a", "outs": ["small"]}
    big = {"cmd": f"{sys.executable} work.py", "deps": ["small"], "outs": ["big"]}
    big["metrics"] = [{"metrics/big.json": {"cache": False}}]
    (first.path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"small": small, "big": big}}))
    outs = [{"path": "small", "md5": f"{'0' * 32}.dir"}]
    old = {"schema": "2.0", "stages": {"small": {"cmd": "another", "outs": outs}, "gone": {"cmd": "x", "outs": outs[:0]}}}
    (first.path / "dvc.lock").write_text(yaml.safe_dump(old))
    first.run("git", "init", "--quiet")
    first.run("dvc", "init", "--quiet")
    first.run("dvc", "remote", "add", "--quiet", "--default", "store", str(tmp_path / "remote"))
    (first.path / ".gitignore").write_text("/.featdiff/\n/small\n/big\n")
    first.run("git", "add", "--all")
    first.run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all")
    others = [Machine(tmp_path / name, log) for name in ("two", "three")]
    for other in others:
        first.run("git", "clone", "--quiet", str(first.path), str(other.path))
    yield first, *others
    for machine in (first, *others):
        for process in machine.running:
            process.kill()
            process.wait()


def kept(first: Machine) -> int:
    """The step from which another machine could go on."""
    folder = first.path.parent / "remote/going_on/organism/.featdiff/scratch/big"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_another_machine_goes_on_where_the_first_one_vanished(
    machines: tuple[Machine, Machine, Machine], number: signal.Signals
) -> None:
    first, second, third = machines
    log, hold = (first.path.parent / name for name in ("log", "hold"))
    hold.touch()
    process, deadline = first.carry("--every", "0.5"), time.monotonic() + PATIENCE
    while kept(first) < 3:
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.1)
    process.send_signal(number)
    first.ends(process, 75 if number == signal.SIGTERM else -number)
    place = first.path.parent / "remote/going_on/organism"
    assert list(yaml.safe_load((place / "dvc.lock").read_text())["stages"]) == ["small"], "what is there, and no other study's"
    if number == signal.SIGKILL:
        time.sleep(1.5)  # the stage hears of it and ends by itself
    hold.unlink()
    reached = kept(first)
    assert 3 <= reached < STEPS

    said = second.ends(second.carry(), 0)
    assert "going on after 1 finished stages" in said
    assert log.read_text().splitlines() == ["small", "big from 0", f"big from {reached}"]
    assert (second.path / "big/a").read_text() == "done"
    assert not any(path.is_file() for path in (place / ".featdiff").rglob("*")), "nothing is unfinished any more"

    assert "fetched 2 finished stages" in third.ends(third.carry("load"), 0)
    assert (third.path / "metrics/big.json").read_text() == '{"a": 1}'
    assert (third.path / "small/a").read_text() == "1\n"
    assert "up to date" in third.run("dvc", "status")


def test_a_remote_that_is_away_stops_no_stage_and_is_told_at_the_end(machines: tuple[Machine, Machine, Machine]) -> None:
    first = machines[0]
    (first.path.parent / "remote").write_text("a file where a folder should be")
    said = first.ends(first.carry("--every", "0.2"), 1)
    assert (first.path / "big/a").read_text() == "done"
    assert "featdiff: not carried: dvc push: ERROR: " in said
    assert "Traceback" not in said


def test_without_a_remote_it_is_one_line(machines: tuple[Machine, Machine, Machine]) -> None:
    first = machines[0]
    first.run("dvc", "remote", "remove", "--quiet", "store")
    for words in ([], ["load"]):
        said = first.ends(first.carry(*words), 2)
        assert said.count("\n") == 1
        assert "make remote URL=" in said
