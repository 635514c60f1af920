"""Signals to everything that a person or a machine can signal: the step in hand is finished, its checkpoint written, and the
status is 75. A stand-in stage under the real dvc, launcher and accelerate, with steps of any length.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from forge import running, start_repro, wait_for

from project import ROOT, Project

STEPS = 3
STAGE = f"""
import sys, time
import torch
from featdiff.processes.ranks import rank
from featdiff.pipeline.stage import stage

with stage("base", out="models/base") as run:
    length, scratch = float(open("length").read()), run.scratch()
    found = scratch.load()
    print("from", found.step if found else 0, flush=True)
    with scratch.loop():
        for step in range(found.step + 1 if found else 1, {STEPS} + 1):
            if rank() == 0:
                print("step", step, flush=True)
            time.sleep(length)
            if scratch.due():
                scratch.save(step, {{"step": torch.tensor(step)}})
    if rank() == 0:
        (run.out / "result").write_text("made in full")
"""
GRAPH = """
stages:
  base:
    cmd: exec sh stages/run stages/base.py
    deps: [stages/base.py]
    params: [base]
    outs: [models/base]
"""
LENGTHS = (0.1, 3.0, 10.0)
TARGETS = ("group", "dvc", "launcher", "rank")


class Stand(Project):
    """A repository of one stage, under DVC."""

    def start_dvc(self) -> subprocess.Popen[bytes]:
        return start_repro(self.path, self.environment, self.path / "log.txt")

    def said(self) -> str:
        return (self.path / "log.txt").read_text(errors="replace")

    def checkpoint(self) -> int:
        """The newest complete one's step; 0 for none."""
        kept = (self.path / ".featdiff/scratch/models/base").glob("*/checkpoints/0*/manifest.json")
        return max((int(path.parent.name) for path in kept), default=0)

    def pid(self, wanted: str) -> int:
        """Of the launcher, accelerate's launcher or a rank of the running stage."""
        for pid, environment in sorted(running(self.path).items()):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            name = ""
            if "stages/base.py" in command[1:3]:
                name = f"rank {environment.get('RANK', '0')}"
            elif "featdiff.processes.launch" in command:
                name = "launcher"
            elif "featdiff.processes.accelerated" in command:  # it becomes the rank where there is one only
                name = "accelerate" if "2ranks" in environment.get("ACCELERATE_CONFIG", "") else "rank 0"
            if name == wanted:
                return pid
        raise AssertionError(f"no {wanted} among the processes of {self.path}")


def stand(path: Path, length: float) -> Stand:
    project = Stand(path)
    (path / "stages").mkdir(parents=True)
    (path / "stages/base.py").write_text(STAGE, encoding="utf-8")
    (path / "dvc.yaml").write_text(GRAPH, encoding="utf-8")
    (path / "length").write_text(str(length), encoding="utf-8")
    for name in ("stages/run", "params.yaml", "src", "conf"):
        source = ROOT / ("conf/profiles/organism.yaml" if name == "params.yaml" else name)
        (path / name).symlink_to(source) if source.is_dir() else (path / name).write_bytes(source.read_bytes())
    project.environment["DVC_NO_ANALYTICS"] = "1"
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=path, env=project.environment, check=True, capture_output=True)
    return project


def ask_twice(project: Stand, number: signal.Signals) -> None:
    """Send it to the launcher of a stage at work, and again a second later."""
    wait_for(lambda: "step 1\n" in project.said())
    launcher = project.pid("launcher")
    for _ in range(2):
        time.sleep(1)
        os.kill(launcher, number)


class Cell(NamedTuple):
    number: signal.Signals
    target: str

    @property
    def heard(self) -> bool:
        """dvc pays no heed to an interrupt of its own while a command runs: the stage goes on."""
        return self != (signal.SIGINT, "dvc")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
CELLS = [Cell(number, target) for number in SIGNALS for target in TARGETS]


@pytest.mark.parametrize("cells", [CELLS[:8], CELLS[8:]], ids=["TERM and INT", "HUP and KILL"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_step_in_hand_is_finished_and_kept_whatever_is_signalled(tmp_path: Path, length: float, cells: list[Cell]) -> None:
    """All cells of one length side by side: they sleep most of the time."""
    stands = {cell: stand(tmp_path / f"{cell.number.name}-{cell.target}", length) for cell in cells}
    processes, steps = {}, {}
    for cell, project in stands.items():
        processes[cell] = project.start_dvc()
        wait_for(lambda project=project: "step 1\n" in project.said())
        time.sleep(min(0.35, length / 2))
        process = processes[cell]
        steps[cell] = project.said().count("\nstep ")
        if cell.target == "group":
            os.killpg(process.pid, cell.number)
        elif cell.target == "dvc":
            process.send_signal(cell.number)
        else:
            os.kill(project.pid("launcher" if cell.target == "launcher" else "rank 0"), cell.number)
    for cell, project in stands.items():
        assert (processes[cell].wait(STEPS * length + 30) == 0) != cell.heard, (cell, project.said())
        wait_for(lambda project=project: not running(project.path), length + 30)
        said, kept = project.said(), project.checkpoint()
        if not cell.heard:
            continue
        if cell == (signal.SIGKILL, "rank"):
            assert "was killed (out of memory?)" in said, (cell, said)
        else:
            assert steps[cell] <= kept <= steps[cell] + 1, (cell, said)  # the step that was running, or the next
            assert said.count("nothing was published; start it again with dvc repro") == 1, (cell, said)
            if (cell.target in ("launcher", "rank") and cell.number != signal.SIGKILL) or cell == (signal.SIGINT, "group"):
                assert "exited with 75" in said, (cell, said)
        assert "Traceback" not in said, (cell, said)
        assert not (project.path / "models/base").exists()
    for cell, project in stands.items():  # and on to the end, which has nothing to do with the length
        if not cell.heard or length > min(LENGTHS):
            continue
        kept = project.checkpoint()
        (project.path / "length").write_text("0.1", encoding="utf-8")
        again = project.start_dvc()
        assert again.wait(120) == 0, (cell, project.said())
        assert f"from {kept}\n" in project.said(), cell
        assert (project.path / "models/base/result").read_text() == "made in full"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("target", ["group", "launcher", "accelerate", "rank 0", "rank 1"])
def test_with_two_ranks_as_well(tmp_path: Path, number: signal.Signals, target: str) -> None:
    project = stand(tmp_path / "two", 2.0)
    project.environment["ACCELERATE_CONFIG"] = "conf/accelerate/cpu_2ranks.yaml"
    process = project.start_dvc()
    wait_for(lambda: "step 1\n" in project.said())
    time.sleep(0.35)
    if target == "group":
        os.killpg(process.pid, number)
    else:
        os.kill(project.pid(target), number)
    process.wait(60)
    wait_for(lambda: not running(project.path), 60)
    said = project.said()
    assert project.checkpoint() in (1, 2), said
    assert "nothing was published; start it again with dvc repro" in said
    if target != "group" or number == signal.SIGINT:
        assert "exited with 75" in said
    assert project.start_dvc().wait(120) == 0, project.said()


@pytest.mark.parametrize("target", ["group", "launcher"])
def test_a_second_signal_ends_at_once(tmp_path: Path, target: str) -> None:
    project = stand(tmp_path / "stand", 60.0)
    process = project.start_dvc()
    wait_for(lambda: "step 1\n" in project.said())
    for _ in range(2):
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT) if target == "group" else os.kill(project.pid("launcher"), signal.SIGTERM)
    began = time.monotonic()
    process.wait(30)
    wait_for(lambda: not running(project.path))
    assert time.monotonic() - began < 10
    assert "once more stops at once" in project.said()
    assert "exited with 75" in project.said()
    assert project.checkpoint() == 0


def test_a_second_signal_ends_a_rank_that_heeds_none(tmp_path: Path) -> None:
    project = stand(tmp_path / "two", 60.0)
    project.environment["ACCELERATE_CONFIG"] = "conf/accelerate/cpu_2ranks.yaml"
    script = project.path / "stages/base.py"
    deaf = "if rank() == 1: __import__('signal').pthread_sigmask(0, range(1, 32))\n            time.sleep(length)"
    script.write_text(STAGE.replace("time.sleep(length)", deaf), encoding="utf-8")
    process = project.start_dvc()
    ask_twice(project, signal.SIGTERM)
    began = time.monotonic()
    process.wait(30)
    wait_for(lambda: not running(project.path))
    assert time.monotonic() - began < 10


def test_ranks_whose_launcher_is_killed_finish_their_step_before_dvc_is_told(tmp_path: Path) -> None:
    project = stand(tmp_path / "two", 2.0)
    project.environment["ACCELERATE_CONFIG"] = "conf/accelerate/cpu_2ranks.yaml"
    process = project.start_dvc()
    wait_for(lambda: "step 3\n" in project.said())  # they have met, which they do where it is
    os.kill(project.pid("accelerate"), signal.SIGKILL)
    assert process.wait(60) != 0
    assert not running(project.path)
    assert project.checkpoint() == 3, project.said()


def test_a_terminal_that_hangs_up_twice_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    """Once as its window closes, and once more as its session leader ends, which takes a while on a busy machine."""
    project = stand(tmp_path / "stand", 3.0)
    process = project.start_dvc()
    ask_twice(project, signal.SIGHUP)
    assert process.wait(60) != 0
    assert "once more stops at once" in project.said()
    assert project.checkpoint() == 1


def test_a_closed_terminal_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    """The terminal's own hang-up reaches dvc and the launcher, and writing to it fails from then on."""
    project = stand(tmp_path / "stand", 3.0)
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, and rightly nothing would stop
        os.chdir(project.path)
        os.execve(sys.executable, [sys.executable, "-m", "dvc", "repro"], project.environment)
    said = b""
    while b"step 1" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    os.waitpid(child, 0)
    wait_for(lambda: not running(project.path))
    assert project.checkpoint() in (1, 2)
    [record] = (project.path / ".featdiff/runs").glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "KILLED"


@pytest.mark.parametrize("hardware", ["cpu", "cpu_2ranks"])
def test_ctrl_z_pauses_the_ranks_and_fg_lets_them_go_on(tmp_path: Path, hardware: str) -> None:
    project = stand(tmp_path / "stand", 1.0)
    project.environment["ACCELERATE_CONFIG"] = f"conf/accelerate/{hardware}.yaml"
    process = project.start_dvc()
    wait_for(lambda: "step 2\n" in project.said())  # several ranks have met
    os.killpg(process.pid, signal.SIGTSTP)
    time.sleep(0.5)
    before = project.said()
    time.sleep(2)
    assert project.said() == before, "a paused stage makes no steps"
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0, project.said()


def test_the_next_repro_waits_for_a_stage_that_outlived_its_dvc(tmp_path: Path) -> None:
    project = stand(tmp_path / "stand", 12.0)
    first = project.start_dvc()
    wait_for(lambda: "step 1\n" in project.said())
    first.kill()
    first.wait()
    (project.path / "length").write_text("0.1", encoding="utf-8")
    second = project.start_dvc()
    assert second.wait(120) == 0, project.said()
    assert "which was asked to stop, finishes its step; waiting for it" in project.said()
    assert "from 1\n" in project.said()


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_a_stage_ends_with_its_dvc_whatever_shell_dvc_starts_commands_in(tmp_path: Path, shell: str) -> None:
    project = stand(tmp_path / "stand", 0.5)
    project.environment["SHELL"] = str(shutil.which(shell) or pytest.skip(f"{shell} is needed"))
    dvc = project.start_dvc()
    wait_for(lambda: "step 1\n" in project.said())
    dvc.kill()
    dvc.wait()
    wait_for(lambda: not running(project.path), 60)
    assert "base: stopped by SIGTERM; nothing was published" in project.said()


def test_a_stage_whose_dvc_ends_while_it_looks_for_a_python_does_not_begin(tmp_path: Path) -> None:
    project = stand(tmp_path / "stand", 0.1)
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text("import os, time\n'DVC_STAGE' in os.environ and time.sleep(2)", encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(slow), project.environment.get("PYTHONPATH")]))
    project.environment |= {"PYTHONPATH": path}
    dvc = project.start_dvc()
    wait_for(lambda: any(b"stages/run" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running(project.path)))
    dvc.kill()
    dvc.wait()
    assert running(project.path), "the stage is on its way"
    wait_for(lambda: not running(project.path), 60)
    assert "from 0" not in project.said(), "nobody would have told it to stop"
    assert not (project.path / "models/base").exists()
    del project.environment["PYTHONPATH"]
    assert project.start_dvc().wait(60) == 0, project.said()


def test_a_process_that_a_stage_leaves_behind_does_not_hold_up_its_end(tmp_path: Path) -> None:
    project = stand(tmp_path / "stand", 0.1)
    script = project.path / "stages/base.py"
    script.write_text(f"import subprocess\nsubprocess.Popen(['sleep', '600'])\n{STAGE}", encoding="utf-8")
    assert project.start_dvc().wait(60) == 0, project.said()
    assert not running(project.path)


@pytest.mark.parametrize("hardware", ["cpu", "cpu_2ranks"])
def test_bad_input_keeps_its_status_through_the_launcher(tmp_path: Path, hardware: str) -> None:
    project = stand(tmp_path / "stand", 0.1)
    project.environment["ACCELERATE_CONFIG"] = f"conf/accelerate/{hardware}.yaml"
    project.set({"base.pretraining.steps": -1})
    done = project.run("-m", "featdiff.processes.launch", "stages/base.py")
    assert done.returncode == 2, done.stderr
    assert "base.pretraining.steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_that_nothing_is_known_of_is_cleaned_up(tmp_path: Path) -> None:
    """A signal while libraries are still being imported."""
    project = stand(tmp_path / "stand", 0.1)
    process = project.start_dvc()
    wait_for(lambda: running(project.path) and "Running stage" in project.said())
    with contextlib.suppress(AssertionError):
        os.kill(project.pid("launcher"), signal.SIGTERM)
    process.wait(30)
    wait_for(lambda: not running(project.path))
    assert process.returncode != 0 or (project.path / "models/base").exists()
