"""A stage on several machines: two launchers on this one, started by a stand-in for srun, whose ranks meet on the loopback."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from project import Project

SRUN = """
import os, signal, subprocess, sys
tasks = [subprocess.Popen(sys.argv[1:], env=os.environ | {"SLURM_PROCID": str(i)}, start_new_session=True) for i in (0, 1)]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
"""Starts a command twice, in sessions of their own as on machines of their own, hands SIGTERM on and ends with the larger
status: what srun does."""
RANK = """
import json, os, sys, time
from pathlib import Path
from accelerate.utils import gather_object
from featdiff.processes.ranks import process_state, world_size
from featdiff.processes import signals
signals.listen()
state = process_state()
Path(os.environ["FEATDIFF_RANKS"], str(os.getpid())).touch()
said = gather_object([[state.process_index, os.environ["GROUP_RANK"], os.environ["FEATDIFF_RANKS"]]])
Path(f"rank{state.process_index}.json").write_text(json.dumps(said))
try:
    time.sleep(float(sys.argv[1]))
except signals.Stopped as stopped:
    Path(os.environ["FEATDIFF_RANKS"], str(os.getpid())).write_text("75")
    sys.exit(75)
"""


@pytest.fixture
def machines(tmp_path: Path) -> Project:
    project = Project(tmp_path).fill()
    (tmp_path / "srun.py").write_text(SRUN, encoding="utf-8")
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    project.environment |= {
        "ACCELERATE_CONFIG": "conf/accelerate/cpu_2machines.yaml",
        "FEATDIFF_NODES": f"{sys.executable} srun.py",
        "PYTHONPATH": str(tmp_path / "src"),
    }
    return project


def test_ranks_of_two_machines_meet(machines: Project) -> None:
    done = machines.run("-m", "featdiff.processes.launch", "rank.py", "0")
    assert done.returncode == 0, done.stderr
    heard = [json.loads((machines.path / f"rank{i}.json").read_text(encoding="utf-8")) for i in (0, 1)]
    assert heard[0] == heard[1], "each hears of the other"
    assert [(rank, machine) for rank, machine, _ in heard[0]] == [(0, "0"), (1, "1")]
    assert len({folder for *_, folder in heard[0]}) == 2, "each under a launcher of its own"


def test_a_request_reaches_the_ranks_of_both(machines: Project) -> None:
    process = machines.start("-m", "featdiff.processes.launch", "rank.py", "60")
    try:
        deadline = time.monotonic() + 60
        while not all((machines.path / f"rank{i}.json").exists() for i in (0, 1)):
            assert time.monotonic() < deadline, process.poll()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75, said


def test_without_a_way_to_start_it_on_each_it_is_refused_in_a_line(machines: Project) -> None:
    del machines.environment["FEATDIFF_NODES"]
    done = machines.run("-m", "featdiff.processes.launch", "rank.py", "0")
    assert done.returncode == 2
    assert done.stderr == (
        "featdiff: conf/accelerate/cpu_2machines.yaml: num_machines: 2: say in $FEATDIFF_NODES what starts a command on each "
        "of them, such as srun\n"
    )


@pytest.mark.graph
def test_activations_of_two_machines_are_those_of_one(machines: Project) -> None:
    assert machines.run("-m", "featdiff.config.profiles", "use", "nano", "--discard").returncode == 0
    machines.set({"base.pretraining.steps": 2})
    for stage in ("prepare", "base"):
        done = machines.run("-m", "featdiff.processes.launch", "--one", f"stages/{stage}.py")
        assert done.returncode == 0, done.stderr
    folders = {}
    for hardware in ("cpu", "cpu_2machines"):
        machines.environment["ACCELERATE_CONFIG"] = f"conf/accelerate/{hardware}.yaml"
        done = machines.run("-m", "featdiff.processes.launch", "stages/activations.py", "--model", "base")
        assert done.returncode == 0, done.stderr
        target = machines.path / hardware
        (machines.path / "activations/base").rename(target)
        folders[hardware] = {path.name: load_file(path) for path in sorted(target.glob("*.safetensors"))}
    one, two = folders.values()
    assert one.keys() == two.keys()
    for name, tensors in one.items():
        assert all(torch.equal(tensor, two[name][key]) for key, tensor in tensors.items()), name
