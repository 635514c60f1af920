"""The jobs of conf/cluster: what they ask for is there, and they say what they are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from featdiff.processes.signals import EXIT_STOPPED
from project import ROOT

FOLDER = ROOT / "conf/cluster"
FIELDS = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"},
    "resources": {"accelerators", "use_spot", "disk_size", "job_recovery"},
    "job_recovery": {"recover_on_exit_codes"},
}
"""Of a task of SkyPilot that are used here, by section; its own schema (0.14.1) takes them."""


def task() -> dict[str, Any]:
    found = yaml.safe_load((FOLDER / "sky.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_task_for_skypilot_has_its_fields() -> None:
    found = task()
    assert found.keys() == FIELDS[""]
    assert found["resources"].keys() == FIELDS["resources"]
    assert found["resources"]["job_recovery"].keys() == FIELDS["job_recovery"]
    assert found["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_STOPPED]
    assert found["resources"]["use_spot"] is True
    assert found["envs"]["STORE"] is None, "SkyPilot asks for what is null"


def test_the_task_asks_for_the_gpus_that_its_processes_need() -> None:
    found = task()
    hardware = yaml.safe_load((ROOT / found["envs"]["ACCELERATE_CONFIG"]).read_text(encoding="utf-8"))
    assert found["resources"]["accelerators"].partition(":")[2] == str(hardware["num_processes"])
    assert found["num_nodes"] == hardware["num_machines"] == 1
    assert (ROOT / f"conf/profiles/{found['envs']['PROFILE']}.yaml").is_file()


@pytest.mark.parametrize("name", ["gpu_8", "gpu_2x8"])
def test_hardware_that_shares_weights_differs_in_that_alone(name: str) -> None:
    whole, shared = (
        yaml.safe_load((ROOT / f"conf/accelerate/{each}.yaml").read_text(encoding="utf-8")) for each in (name, f"{name}_fsdp")
    )
    one = yaml.safe_load((ROOT / "conf/accelerate/gpu_8_fsdp.yaml").read_text(encoding="utf-8"))
    assert shared.pop("fsdp_config") == one["fsdp_config"]
    assert shared == whole | {"distributed_type": "FSDP"}


@pytest.mark.parametrize("name", ["sky.yaml", "slurm.sh"])
def test_targets_files_and_modules_that_a_job_names_exist(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert (named := set(re.findall(r"^\s*make ([a-z]+)", text, re.MULTILINE)))
    assert named <= targets
    for path in re.findall(r"conf/[\w/.]+\.(?:yaml|sh)", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m (featdiff[\w.]+)", text):
        assert (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").is_file(), module


@pytest.mark.parametrize("status", [0, EXIT_STOPPED])
def test_the_task_for_skypilot_ends_as_the_study_does(tmp_path: Path, status: int) -> None:
    """Its two scripts with stand-ins for make, uv and the Python of the environment."""
    for path in ("make", "uv", ".venv/bin/python"):
        tool = tmp_path / path
        tool.parent.mkdir(parents=True, exist_ok=True)
        ends = f"exit {status}" if path.startswith(".venv") else ""
        tool.write_text(f'#!/bin/bash\necho "{path} $*" >> log\n{ends}\n', encoding="utf-8")
        tool.chmod(0o755)
    found, environment = task(), {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment |= found["envs"] | {"STORE": "s3://bucket/a path"}
    done = [subprocess.run(["bash", "-c", found[part]], cwd=tmp_path, env=environment) for part in ("setup", "run")]
    assert [each.returncode for each in done] == [0, status]
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == [
        "make install",
        "make remote URL=s3://bucket/a path",
        "make profile PROFILE=qwen3_4b",
        ".venv/bin/python -m featdiff.pipeline.carry",
    ]


@pytest.mark.parametrize(("status", "nodes", "hardware"), [(0, "1", "gpu_8_fsdp"), (2, "2", "gpu_2x8_fsdp")])
def test_the_script_for_slurm_asks_for_another_turn_only_when_it_was_told_to_stop(
    tmp_path: Path, status: int, nodes: str, hardware: str
) -> None:
    """With stand-ins for make, which runs a study that ends with ``status`` when it is asked to stop, and for scontrol."""
    stop = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))"
    study = f"import signal, sys, time; {stop}; open('began', 'w'); time.sleep(60)"
    note = 'echo "$ACCELERATE_CONFIG|$FEATDIFF_NODES|$*" > made'
    tools = {
        "make": f'"{sys.executable}" -c "{study}"\nstatus=$?\n{note}\nexit $status',
        "scontrol": 'echo "$*" > requeued',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    script = FOLDER / "slurm.sh"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment["SLURM_NNODES"] = nodes
    process = subprocess.Popen(["bash", str(script), "PROFILE=nano"], env=environment)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == status
    finally:
        process.kill()
    made = (tmp_path / "made").read_text(encoding="utf-8").strip()
    assert made == f"conf/accelerate/{hardware}.yaml|srun --ntasks-per-node=1 --overlap|repro PROFILE=nano"
    assert (tmp_path / "requeued").exists() is (status != 0)
