"""Twins, a killed dvc, a lost rank, numbers that are not finite; and what happens where a guard is taken away."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forge import LONG, Study, running, wait_for
from safetensors.torch import load_file

OUT = "crosscoders/joint_topk"


def twins(study: Study, sabotage: Callable[[], None] | None = None) -> tuple[int, int]:
    """Exit status of a stage and of a second one started while it works."""
    study.clear(OUT)
    first = study.start(LONG[OUT], sabotage)
    wait_for(lambda: list(study.scratch(OUT).glob("*/checkpoints/0*")))
    os.kill(first.pid, signal.SIGSTOP)  # so that both are alive for certain
    try:
        second = study.start(LONG[OUT], sabotage)
        second.join(60)
        if second.exitcode is None:
            second.kill()
            second.join()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join(120)
    return first.exitcode, second.exitcode


def no_lock() -> None:
    from featdiff.pipeline import stage

    stage._lock = lambda target: contextlib.nullcontext()  # type: ignore[assignment]


def test_a_twin_is_refused_and_the_first_goes_on(study: Study) -> None:
    wanted = study.files(OUT)
    assert twins(study) == (0, 2)
    assert "no other process writing it, found process" in study.said()
    assert study.files(OUT) == wanted


def test_without_the_lock_the_twin_would_not_be_refused(study: Study) -> None:
    assert twins(study, no_lock)[1] != 2


EXPLODING = {"models/base": "base.pretraining.lr", "models/sft": "sft.lr", OUT: "crosscoder.training.lr"}
"""Learning rates: of 1e30, one ends in infinity within a few steps."""


def poison() -> None:
    """Make GRPO's third loss NaN: where rollouts earn nothing there is no gradient that a learning rate could blow up."""
    from trl import GRPOTrainer

    original, calls = GRPOTrainer._compute_loss, 0

    def poisoned(self: Any, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *given) * (float("nan") if calls == 3 else 1.0)

    GRPOTrainer._compute_loss = poisoned


@pytest.mark.parametrize("out", [*EXPLODING, "models/grpo"])
def test_what_is_not_finite_stops_the_stage_before_the_step_and_shows(study: Study, out: str) -> None:
    study.clear(out)
    if rate := EXPLODING.get(out):
        study.set({rate: 1e30})
    assert study.finish(LONG[out], None if rate else poison) == 2, study.said()[-2000:]
    said = study.said()
    assert not (study.path / out).exists()
    assert "Traceback" not in said
    assert " at step " in said or "NaN or infinity" in said
    for path in study.scratch(out).rglob("*.safetensors"):
        assert all(torch.isfinite(tensor.float()).all() for tensor in load_file(path).values()), path
    newest = max((study.path / ".featdiff/runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
    last = json.loads((newest / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"nan", "inf"} & set(map(str, last.values())), last


def believe_any_number() -> None:
    from featdiff.crosscoder import fit

    fit.require_finite = lambda *_: None  # type: ignore[assignment]


def test_without_the_guard_numbers_that_are_not_finite_reach_the_weights(study: Study) -> None:
    study.clear(OUT)
    study.set({EXPLODING[OUT]: 1e30})
    status = study.finish(LONG[OUT], believe_any_number)
    weights = [file for place in (study.path / OUT, study.scratch(OUT)) for file in place.rglob("*.safetensors")]
    finite = all(torch.isfinite(tensor.float()).all() for path in weights for tensor in load_file(path).values())
    assert not (status != 0 and finite), "the test above would not notice that the guard is gone"


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("out", ["models/sft", "models/grpo", OUT])
def test_one_of_two_ranks_lost_ends_all_in_bounded_time_without_orphans(
    study: Study, out: str, lost: int, tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    shutil.copytree(study.path, folder, symlinks=True, ignore=shutil.ignore_patterns(".featdiff"))
    shutil.rmtree(folder / out)
    environment = study.environment | {"ACCELERATE_CONFIG": "conf/accelerate/cpu_2ranks.yaml"}
    script, *rest = LONG[out]
    command = [sys.executable, "-m", "featdiff.processes.launch", f"stages/{script}.py", *rest]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    wait_for(lambda: [*(folder / ".featdiff/scratch" / out).glob("*/*/*[0-9]/manifest.json")])
    victims = [pid for pid, values in running(folder).items() if values.get("RANK") == str(lost)]
    began = time.monotonic()
    os.kill(max(victims), signal.SIGKILL)
    assert process.wait(90) != 0
    wait_for(lambda: not running(folder), 30)
    assert time.monotonic() - began < 90
    assert not (folder / out).exists()


def test_killing_dvc_leaves_no_orphan_and_the_next_repro_finishes(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "dvc"
    folder.mkdir()
    for name in ("conf", "stages", "dvc.yaml", "params.yaml"):
        source = study.path / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder)
    (folder / "src").symlink_to((study.path / "src").resolve())
    environment = study.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    for command in (["git", "init", "--quiet"], ["dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    process = subprocess.Popen(["dvc", "repro", "base"], cwd=folder, env=environment, stdout=-3, stderr=-3)
    wait_for(lambda: list((folder / ".featdiff/scratch/models/base").glob("*/checkpoints/0*")))
    process.kill()
    process.wait()
    wait_for(lambda: not running(folder), 30)
    again = subprocess.run(["dvc", "repro", "base"], cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "going on from step" in again.stderr
    weights = "models/base/model.safetensors"
    assert (folder / weights).read_bytes() == (study.path / weights).read_bytes()


@pytest.mark.parametrize("out", ["models/base", "evals/grpo", "activations/grpo", OUT, "analysis/intervene/remove"])
def test_a_full_disk_is_one_line_and_nothing_half_written(study: Study, out: str) -> None:
    study.clear(out)
    disk = study.path / ".featdiff"
    shutil.rmtree(disk)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        status, said = study.finish(LONG[out]), study.said()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert status == 2, said[-2000:]
    assert "no space left on device" in said
    assert "Traceback" not in said
    assert not (study.path / out).exists()
