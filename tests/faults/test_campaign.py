"""``dvc repro`` of the whole nano study as a person starts it, killed from outside again and again in every stage, then run to
the end: the bytes of an undisturbed study, no process left, no lock in the way.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

from forge import GRAPH, Study, running, start_repro, wait_for

from featdiff.artifacts.artifact import sha256_file
from featdiff.artifacts.dvc import set_aside_half

KILLS = [
    (number, target)
    for number, target in product((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP), ("group", "dvc", "launcher"))
    if (number, target) != (signal.SIGINT, "dvc")  # to which dvc pays no heed while a command runs
]
LEAST = 60
"""Kills, and some in every kind of stage."""
IMPORTS, LIFE = 4.0, 9.0
"""Seconds for which a stage of the nano study imports and lives."""
HURRY = 0.3
"""Of the time until a kill, where only kinds of stages are left of which none was hit: short ones were over too soon."""


class Repository:
    """The nano study under DVC; nothing is replaced, and params are those of the profile."""

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.log = path, path / "log.txt"
        path.mkdir()
        for name in ("conf", "stages", "dvc.yaml", "params.yaml"):
            source = study.path / name
            shutil.copytree(source, path / name) if source.is_dir() else shutil.copy(source, path)
        (path / "src").symlink_to((study.path / "src").resolve())
        self.environment = study.environment | {"DVC_NO_ANALYTICS": "1"}
        for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
            subprocess.run(command, cwd=path, env=self.environment, check=True, capture_output=True)

    def forget(self) -> None:
        """As if nothing had been computed."""
        for out in (*(out.split("/")[0] for out, _ in GRAPH), "report", "provenance", ".dvc/cache", ".featdiff"):
            shutil.rmtree(self.path / out, ignore_errors=True)
        (self.path / "dvc.lock").unlink()

    def repro(self) -> subprocess.Popen[bytes]:
        return start_repro(self.path, self.environment, self.log)

    def stage(self) -> str:
        """The stage that runs, or ran last."""
        return (["", *re.findall(r"Running stage '([^']+)'", self.said())])[-1]

    def stages(self) -> list[str]:
        """Every stage of the nano study."""
        words = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
        listed = subprocess.run(words, cwd=self.path, env=self.environment, check=True, capture_output=True, text=True)
        return listed.stdout.split()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, dvc: subprocess.Popen[bytes], number: signal.Signals, target: str) -> bool:
        """Send it; whether there was something to send it to: between two stages there is no launcher."""
        with contextlib.suppress(OSError):  # whatever has ended meanwhile
            if target != "launcher":
                (os.killpg if target == "group" else os.kill)(dvc.pid, number)
                return True
            for pid in running(self.path):
                if b"featdiff.processes.launch" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, number)
                    return True
        return False


def test_killed_from_outside_in_every_stage_the_study_ends_in_the_same_bytes(study: Study, tmp_path: Path) -> None:
    repository, rng = Repository(tmp_path / "repository", study), random.Random(0)
    stages = {name.partition("@")[0] for name in repository.stages()} - {"check"}
    hits: Counter[str] = Counter()
    most = 0

    def spared() -> set[str]:
        return stages - {name.partition("@")[0] for name in hits}

    def wanted(stage: str) -> bool:
        """As long as there were too few; then only those of whose kind none was hit."""
        kinds = stages if sum(hits.values()) < LEAST else spared()
        return stage.partition("@")[0] in kinds and hits[stage] < most

    while sum(hits.values()) < LEAST or spared():
        most += 3  # kills a stage: a round takes the study itself beside them
        while attacked(repository, rng, hits, wanted, rng.choice(KILLS), HURRY if sum(hits.values()) >= LEAST else 1.0):
            pass
        for out, _ in GRAPH:
            folder = repository.path / out
            found = {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
            assert found == study.files(out), out
        repository.forget()
    print(f"{sum(hits.values())} kills: {dict(hits)}")


def attacked(
    repository: Repository,
    rng: random.Random,
    hits: Counter[str],
    wanted: Callable[[str], bool],
    shot: tuple[signal.Signals, str],
    pace: float,
) -> bool:
    """Start ``dvc repro`` and kill it while a stage runs that is ``wanted``; False if none was, and the study ended by
    itself."""
    dvc = repository.repro()
    wait_for(lambda: dvc.poll() is not None or wanted(repository.stage()), 600)
    with contextlib.suppress(subprocess.TimeoutExpired):
        dvc.wait(pace * rng.choice([rng.uniform(0, IMPORTS), rng.uniform(0, IMPORTS), rng.uniform(IMPORTS, LIFE)]))
    if dvc.poll() is None:
        hit = repository.stage()
        if not repository.signal(dvc, *shot):
            repository.signal(dvc, signal.SIGKILL, "group")
        hits[hit] += 1
        try:
            dvc.wait(30)
        except subprocess.TimeoutExpired:
            assert repository.stage() != hit, "its stage pays no heed to the signal"
            repository.signal(dvc, signal.SIGKILL, "group")  # the stage had ended when the signal came
            dvc.wait(30)
    elif set_aside_half(repository.path):  # as make repro does: DVC was killed while it wrote one of its files in place
        pass
    else:
        assert dvc.returncode == 0, repository.said()[-3000:]
    said = repository.said()
    for refusal in ("Unable to acquire lock", "is busy", "no other process writing it"):
        assert refusal not in said, said[-2000:]
    if dvc.returncode == 0 or rng.random() < 0.5:  # else the next one starts while a stage may still finish its step
        wait_for(lambda: not running(repository.path), 60)
    return dvc.returncode != 0
