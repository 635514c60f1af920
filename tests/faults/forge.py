"""Real stages in forked processes whose libraries are imported already, so that a hundred kills take minutes, not hours.

Nothing of a stage is replaced. A ``sabotage`` (a picklable function) runs in the forked process before the stage: to kill
it at an exact place, or to take a guard away and see that its test then fails.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import MANIFEST, sha256_file
from featdiff.artifacts.provenance import path_of
from featdiff.config.params import Study as StudyParams
from featdiff.config.parse import parse
from featdiff.config.profiles import render_profile
from featdiff.config.reading import parse_yaml
from project import Project

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "featdiff.attribution.dynamics",
        "featdiff.description.describe",
        "featdiff.intervention.sensitivity",
        "featdiff.training.grpo",
        "featdiff.training.imported",
        "featdiff.training.pretrain",
        "featdiff.training.sft",
    ]
)
"""What stages import; of installed modules, as the server does not know this process's path."""

os.environ["TQDM_MININTERVAL"] = "0"  # for the server: progress is what tests wait for

NANO = parse(StudyParams, parse_yaml(render_profile("nano"), "nano"), "nano")
LONG = {
    "models/base": ["base"],
    "models/sft": ["arm", "--arm", "sft"],
    "models/grpo": ["arm", "--arm", "grpo"],
    "evals/grpo": ["evaluate", "--model", "grpo"],
    "checkpoints/grpo": ["checkpoints", "--arm", "grpo"],
    "activations/grpo": ["activations", "--model", "grpo"],
    "crosscoders/joint_topk": ["crosscoder", "--fit", "joint_topk"],
    "crosscoders/joint_l1": ["crosscoder", "--fit", "joint_l1"],
    "analysis/intervene/remove": ["intervene", "--side", "remove"],
}
"""Long stages by output: what has to go on after a kill."""
CHECKPOINT = "checkpoints/0*"
"""Checkpoints of base and crosscoders in their scratch."""
SHORT = {
    "analysis/attribution": ["attribution"],
    "analysis/dynamics/grpo": ["dynamics", "--arm", "grpo"],
    "analysis/stitch": ["stitch"],
    "analysis/describe": ["describe"],
}
GRAPH = [
    ("data", ["prepare"]),
    ("models/base", ["base"]),
    *((f"models/{name}", ["arm", "--arm", name]) for name in NANO.arms),
    *((f"evals/{name}", ["evaluate", "--model", name]) for name in NANO.models),
    *((f"checkpoints/{name}", ["checkpoints", "--arm", name]) for name in NANO.arms),
    *((f"activations/{name}", ["activations", "--model", name]) for name in NANO.models),
    *((f"crosscoders/{name}", ["crosscoder", "--fit", name]) for name in NANO.fits),
    ("analysis/localize", ["localize"]),
    ("analysis/dynamics/sft", ["dynamics", "--arm", "sft"]),
    *SHORT.items(),
    ("analysis/intervene/amplify", ["intervene", "--side", "amplify"]),
    ("analysis/intervene/remove", LONG["analysis/intervene/remove"]),
]


CHANGEABLE = ("params.yaml", "src", "provenance", *sorted({out.split("/")[0] for out, _ in GRAPH}))


def copy(source: Path, target: Path) -> None:
    """A file, a folder or a link in place of what is there."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if source.is_symlink():
        target.symlink_to(source.resolve())
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _child(
    folder: Path, command: list[str], environment: dict[str, str], log: Path, sabotage: Callable[[], None] | None
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = [f"stages/{command[0]}.py", *command[1:]]
    if sabotage is not None:
        sabotage()
    runpy.run_path(sys.argv[0], run_name="__main__")


class Study(Project):
    """The nano study with every artifact, saving at every opportunity."""

    took: dict[str, float]
    kept: Path

    def start(self, command: list[str], sabotage: Callable[[], None] | None = None) -> BaseProcess:  # type: ignore[override]
        environment = self.environment | {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
        process = CONTEXT.Process(target=_child, args=(self.path, command, environment, self.log, sabotage))
        process.start()
        return process

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def said(self) -> str:
        """What stages have printed since the last call."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text

    def reached(self, out: str, pattern: str, count: int = 1) -> BaseProcess:
        """The long stage of ``out`` from nothing, running, when ``count`` paths of its scratch match ``pattern``."""
        self.clear(out)
        process = self.start(LONG[out])
        while process.is_alive() and len(list(self.scratch(out).glob(f"*/{pattern}"))) < count:
            time.sleep(0.01)
        assert process.is_alive(), f"{out} ended before it could be disturbed: {self.said()[-2000:]}"
        return process

    def killed(self, out: str, pattern: str, count: int = 1) -> None:
        """The same, killed there."""
        process = self.reached(out, pattern, count)
        process.kill()
        process.join()

    def finish(self, command: list[str], sabotage: Callable[[], None] | None = None) -> int:
        """Exit status of a stage that is left alone."""
        process = self.start(command, sabotage)
        process.join(300)
        assert process.exitcode is not None, self.said()[-2000:]
        return process.exitcode

    def compute(self) -> None:
        self.took = {}
        for out, command in GRAPH:
            began = time.monotonic()
            assert self.finish(command) == 0, f"{out}: {self.said()[-3000:]}"
            self.took[out] = time.monotonic() - began

    def keep(self, place: Path) -> None:
        """Copy everything that a test may change to ``place``, for :meth:`mend`."""
        self.kept = place
        for name in CHANGEABLE:
            copy(self.path / name, place / name)
        self.said()

    def mend(self) -> None:
        """Everything as it was when it was kept, and nothing to go on from."""
        for name in CHANGEABLE:
            copy(self.kept / name, self.path / name)
        shutil.rmtree(self.path / ".featdiff/scratch", ignore_errors=True)
        self.said()

    def files(self, out: str) -> dict[str, str]:
        """sha256 of every file of an artifact, read anew."""
        folder = self.path / out
        return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}

    def provenance(self, out: str) -> Path:
        return path_of(self.path / out, self.path)

    def scratch(self, out: str) -> Path:
        return self.path / ".featdiff/scratch" / out

    def published(self, out: str) -> set[str]:
        """Folders in the scratch of ``out`` that are complete; a stage may be adding and removing some."""
        return {folder for folder, _, files in os.walk(self.scratch(out)) if MANIFEST in files}

    def clear(self, out: str) -> None:
        """As DVC does before it runs a stage; and forget what could be resumed."""
        shutil.rmtree(self.path / out, ignore_errors=True)
        self.provenance(out).unlink(missing_ok=True)
        shutil.rmtree(self.scratch(out), ignore_errors=True)
        self.said()


def start_repro(folder: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """``dvc repro`` in ``folder`` as the leader of a process group, writing to ``log``."""
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=stream, stderr=stream, start_new_session=True, preexec_fn=_as_from_a_terminal,
        )  # fmt: skip


def _as_from_a_terminal() -> None:
    """In a new process: heed signals that a background job of a shell, in which tests may run, has ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(done: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def running(folder: Path) -> dict[int, dict[str, str]]:
    """Environment of every process that works in ``folder``, by pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (entry / "cwd").resolve() == folder and b"Z" not in (entry / "stat").read_bytes().rpartition(b")")[2][:3]:
                pairs = (entry / "environ").read_bytes().split(b"\0")
                found[int(entry.name)] = dict(pair.decode().partition("=")[::2] for pair in pairs if b"=" in pair)
    return found


def nano(path: Path) -> Study:
    study = Study(path)
    study.fill()
    subprocess.run([sys.executable, "-m", "featdiff.config.profiles", "use", "nano"], cwd=path, check=True, capture_output=True)
    study.set({"resume.every_seconds": 0.0})
    return study
