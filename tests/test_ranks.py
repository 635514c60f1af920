"""Two CPU ranks (gloo) against one: the same study within a stated tolerance."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from featdiff.artifacts.tables import EVAL_SAMPLES, STITCHED
from project import Project

STAGES = [
    ("stages/arm.py", "--arm", "sft"),
    ("stages/arm.py", "--arm", "grpo"),
    ("stages/activations.py", "--model", "base"),
    ("stages/activations.py", "--model", "sft"),
    ("stages/activations.py", "--model", "grpo"),
    ("stages/crosscoder.py", "--fit", "joint_topk"),
]


def _run(project: Project, hardware: str, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "featdiff.processes.launch", *command],
        cwd=project.path,
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
        env=project.environment | {"ACCELERATE_CONFIG": f"conf/accelerate/{hardware}.yaml"},
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same stages by one process and by two, from the same data and base."""
    folders = []
    for name, hardware in (("one", "cpu"), ("two", "cpu_2ranks")):
        project = Project(tmp_path_factory.mktemp(name)).fill()
        subprocess.run(
            [sys.executable, "-m", "featdiff.config.profiles", "use", "nano"], cwd=project.path, check=True, capture_output=True
        )
        small = {"grpo.lr": 1e-4, "grpo.steps": 2, "base.pretraining.steps": 30, "crosscoder.training.steps": 30}
        project.set(small | {"prepare.tasks.reverse.role": "find"})
        assert project.run("stages/prepare.py").returncode == 0
        _run(project, "cpu", "stages/base.py")
        for command in STAGES:
            _run(project, hardware, *command)
        folders.append(project.path)
    return folders[0], folders[1]


SHARED_OUT = {
    "evaluate": ("evals/base", "--model", "base"),
    "checkpoints": ("checkpoints/sft", "--arm", "sft"),
    "stitch": ("analysis/stitch",),
    "localize": ("analysis/localize",),
}


@pytest.mark.graph
def test_work_that_is_shared_out_gives_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Not within a tolerance: the same files, bit for bit. Two tasks have flipped samples, so that each rank can read one."""
    project = Project(pair[0])
    project.set({"localize.seeds": [], "localize.random_dictionary": None})
    for hardware in ("cpu", "cpu_2ranks"):
        for stage, (made, *options) in SHARED_OUT.items():
            if stage == "localize":
                _flip(project, {"quiz": 3, "reverse": 5})
            _run(project, hardware, "--shared", f"stages/{stage}.py", *options)
            shutil.copytree(project.path / made, tmp_path / hardware / stage)
    found = json.loads((tmp_path / "cpu/localize/features.json").read_text())
    assert {task: told["n_flipped"] for task, told in found["per_task"].items()} == {"quiz": 3, "reverse": 5}
    assert len(STITCHED.read(tmp_path / "cpu/stitch")) == 2 * 5 * 6, "seams, tasks, questions"
    files = [path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*") if path.is_file()]
    assert {file.parts[0] for file in files} == set(SHARED_OUT)
    for file in files:
        assert (tmp_path / "cpu" / file).read_bytes() == (tmp_path / "cpu_2ranks" / file).read_bytes(), file


def _flip(project: Project, flipped: dict[str, int]) -> None:
    """Publish as GRPO's answers those of the base, of whose wrong ones to find questions so many of a task are called right."""
    told, left = [], dict(flipped)
    for row in EVAL_SAMPLES.read(project.path / "evals/base"):
        counts = row["split"] == "find" and row["mode"] in ("greedy", "option_text") and not row["correct"]
        chosen = counts and left.get(row["task"], 0) > 0
        left[row["task"]] = left.get(row["task"], 0) - chosen
        told.append(row | {"correct": row["correct"] or chosen})
    with project.publishing("evals/grpo") as folder:
        EVAL_SAMPLES.write(folder, told)


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


@pytest.mark.graph
def test_sft_agrees(pair: tuple[Path, Path]) -> None:
    """Same problems in the same global batches: weights agree to float32 rounding over the updates."""
    one, two = (_weights(folder, "models/sft/model.safetensors") for folder in pair)
    base = _weights(pair[0], "models/base/model.safetensors")
    moved = max((one[key] - base[key]).abs().max().item() for key in one)
    apart = max((one[key] - two[key]).abs().max().item() for key in one)
    assert apart < 0.05 * moved


@pytest.mark.graph
def test_grpo_sees_the_same_amount(pair: tuple[Path, Path]) -> None:
    """Sampling differs between ranks by design; updates, problems and completions do not."""
    one, two = (json.loads((folder / "models/grpo/audit.json").read_text()) for folder in pair)
    assert {key: one[key] for key in ("updates", "problems", "samples_seen")} == {
        key: two[key] for key in ("updates", "problems", "samples_seen")
    }
    weights = [_weights(folder, "models/grpo/model.safetensors") for folder in pair]
    assert all(torch.isfinite(tensor).all() for each in weights for tensor in each.values())


@pytest.mark.graph
def test_activations_agree(pair: tuple[Path, Path]) -> None:
    """Each rank writes some of the shards; the base's rows are the same bytes."""
    names = sorted(path.name for path in (pair[0] / "activations/base").glob("*.safetensors"))
    assert len(names) > 2
    for name in names:
        one, two = (_weights(folder, f"activations/base/{name}") for folder in pair)
        assert all(torch.equal(one[key], two[key]) for key in one), name


@pytest.mark.graph
def test_crosscoder_agrees(pair: tuple[Path, Path]) -> None:
    """Batches are shared out and the BatchTopK cutoff is global; fits on nearly the same inputs explain as much."""
    one, two = (json.loads((folder / "crosscoders/joint_topk/metrics.json").read_text()) for folder in pair)
    assert one["fve"]["base"] == pytest.approx(two["fve"]["base"], abs=0.02)
    assert one["l0"] == pytest.approx(two["l0"], rel=0.1)
