"""How a stage starts and ends: published whole or not at all, and one line where it was stopped."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from featdiff.artifacts import artifact, provenance
from project import ROOT, Project

GRAPH = """
stages:
  prepare:
    cmd: python stages/prepare.py
    deps: [stages/prepare.py]
    params: [seed, prepare]
    outs: [data]
"""
STAGE = """
import sys
from featdiff.artifacts.artifact import ContractError
from featdiff.pipeline.stage import stage
with stage("prepare", out="data") as run:
    (run.out / "some.txt").write_text("half")
    run.log(1, {"loss": 0.5})
    run.metrics({"rows": 3})
    print("begun", flush=True)
    # here
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of one stage, ``prepare``."""
    return bare(tmp_path / "project")


def bare(path: Path) -> Project:
    (path / "stages").mkdir(parents=True)
    shutil.copy(ROOT / "conf/profiles/organism.yaml", path / "params.yaml")
    (path / "dvc.yaml").write_text(GRAPH, encoding="utf-8")
    return Project(path)


def body(project: Project, *lines: str) -> None:
    text = STAGE.replace("    # here\n", "".join(f"    {line}\n" for line in lines))
    (project.path / "stages/prepare.py").write_text(text, encoding="utf-8")


def statuses(project: Project) -> list[str]:
    records = sorted((project.path / ".featdiff/runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text(encoding="utf-8"))["status"] for path in records]


def begun(project: Project) -> subprocess.Popen[str]:
    """The stage as a process that has written to its staging folder."""
    process = project.start("stages/prepare.py")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_success_publishes_the_whole(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    body(project)
    result = project.run("stages/prepare.py")
    assert (result.returncode, result.stderr) == (0, "")
    data = project.path / "data"
    artifact.verify(data)
    assert {path.name for path in data.iterdir()} == {
        "some.txt",
        "metrics.json",
        "metrics.jsonl",
        "curves.csv",
        "manifest.json",
    }
    said = artifact.read_statement(project.path / "provenance/data.json", provenance.Provenance)
    assert said.manifest == artifact.sha256_file(data / "manifest.json")
    assert (said.stage, said.parents, said.versions) == ("prepare", {}, provenance.versions())
    params = yaml.safe_load((project.path / "params.yaml").read_text(encoding="utf-8"))
    assert said.params.keys() == {"seed", "prepare"}
    assert (said.params["seed"], said.params["prepare"]["samples"]) == (params["seed"], params["prepare"]["samples"])
    monkeypatch.chdir(project.path)
    assert said.code == artifact.hash_files([Path("stages/prepare.py")])
    assert artifact.read_json(data / "metrics.json") == {"rows": 3}
    assert statuses(project) == ["FINISHED"]


def test_a_stage_reads_what_another_published(project: Project) -> None:
    with project.publishing("models/base") as folder:
        (folder / "weights").write_text("w", encoding="utf-8")
    body(project, "assert (run.read('models/base') / 'weights').read_text() == 'w'")
    assert project.run("stages/prepare.py").returncode == 0
    digest = artifact.sha256_file(project.path / "models/base" / artifact.MANIFEST)
    assert artifact.read_json(project.path / "provenance/data.json")["parents"] == {"models/base": digest}
    (project.path / "models/base/weights").write_text("x", encoding="utf-8")
    shutil.rmtree(project.path / "data")
    project.refused(
        project.run("stages/prepare.py"), "data", "prepare: models/base/weights: sha256", "dvc checkout models/base"
    )


def test_other_code_and_params_give_another_provenance_and_the_same_artifact(project: Project) -> None:
    said, files = [], []
    for line, samples in (("pass", 1), ("pass", 1), ("pass  # a comment", 1), ("pass", 2)):
        body(project, line)
        project.set({"prepare.samples.find": samples})
        assert project.run("stages/prepare.py").returncode == 0
        files.append({path.name: path.read_bytes() for path in (project.path / "data").iterdir()})
        said.append((project.path / "provenance/data.json").read_bytes())
    assert files == 4 * [files[0]]
    assert said[0] == said[1], "no clock and no host"
    assert len(set(said)) == 3


def test_a_provenance_that_could_not_be_read_again_is_not_written(project: Project) -> None:
    body(project, "run.parents['../data'] = '0' * 64")
    result = project.run("stages/prepare.py")
    assert result.returncode == 2
    assert "provenance/data.json: parents: expected relative names that stay inside, found '../data'" in result.stderr
    assert not (project.path / "provenance").exists()
    assert statuses(project) == ["FAILED"]


def test_an_exception_publishes_nothing_and_shows_its_traceback(project: Project) -> None:
    body(project, "raise RuntimeError('out of ideas')")
    result = project.run("stages/prepare.py")
    assert result.returncode == 1
    assert "RuntimeError: out of ideas" in result.stderr
    project.without("data")
    assert statuses(project) == ["FAILED"]


def test_a_failure_leaves_the_artifact_of_the_last_good_run(project: Project) -> None:
    body(project)
    project.run("stages/prepare.py")
    digest = artifact.verify(project.path / "data")
    body(project, "raise RuntimeError")
    assert project.run("stages/prepare.py").returncode == 1
    assert artifact.verify(project.path / "data") == digest


def test_bad_input_is_one_line(project: Project) -> None:
    body(project, "raise ContractError('some.jsonl:3', 'answer', 'a text', 'a list', 'correct this row')")
    result = project.run("stages/prepare.py")
    assert result.returncode == 2
    wanted = "featdiff: prepare: some.jsonl:3: answer: expected a text, found a list; correct this row\n"
    assert result.stderr == wanted
    project.without("data")


def test_bad_params_are_one_line(project: Project) -> None:
    body(project)
    project.set({"sft.epoch": 2})
    result = project.run("stages/prepare.py")
    assert result.returncode == 2
    project.refused(result, "data", "params.yaml: sft.epoch: unknown key; did you mean epochs?")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_with_75_and_publishes_nothing(project: Project, number: signal.Signals) -> None:
    body(project, "sys.stdin.read()")
    process = begun(project)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert said == f"featdiff: prepare: stopped by {number.name}; nothing was published; start it again with dvc repro\n"
    project.without("data")
    assert statuses(project) == ["KILLED"]


def test_a_twin_is_refused_with_the_pid_of_the_first_which_goes_on(project: Project) -> None:
    body(project, "sys.stdin.read()")
    first = begun(project)
    second = project.run("stages/prepare.py")
    assert second.returncode == 2
    assert f"data: writer: expected no other process writing it, found process {first.pid};" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert artifact.staging_path(project.path / "data").is_dir()
    first.communicate(timeout=30)
    assert first.returncode == 0
    artifact.verify(project.path / "data")


def test_after_a_kill_the_next_run_starts_clean(project: Project) -> None:
    body(project, "(run.out / 'left.txt').write_text('over')", "sys.stdin.read()")
    process = begun(project)
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (project.path / "data").exists()
    body(project)
    assert project.run("stages/prepare.py").returncode == 0
    artifact.verify(project.path / "data")
    assert not (project.path / "data/left.txt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is told by Linux")
@pytest.mark.parametrize(
    "launcher", [[], pytest.param(["-m", "featdiff.processes.launch"], marks=pytest.mark.graph)], ids=["alone", "launched"]
)
def test_a_stage_ends_with_the_process_that_started_it(project: Project, launcher: list[str]) -> None:
    body(project, "import time", "time.sleep(60)")
    project.environment["ACCELERATE_CONFIG"] = str(ROOT / "conf/accelerate/cpu.yaml")
    parent = project.start(
        "-c", "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])", *launcher, "stages/prepare.py"
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "begun\n"
    parent.kill()
    deadline = time.monotonic() + 20
    while statuses(project) != ["KILLED"] and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.communicate(timeout=30)
    assert statuses(project) == ["KILLED"]
    project.without("data")


WRITES = [
    "(run.out / 'large').write_bytes(bytes(1 << 20))",
    "import numpy, safetensors.numpy as s; s.save_file({'a': numpy.zeros(1 << 17)}, run.out / 'a.safetensors')",
    "from featdiff.artifacts.tables import CORPUS"
    "; CORPUS.write(run.out, [dict.fromkeys(CORPUS.columns, os.urandom(1 << 20).hex())])",
]


@pytest.mark.parametrize("write", WRITES, ids=["plain", "safetensors", "parquet"])
def test_a_full_disk_is_one_line(small_disk: Path, write: str) -> None:
    project = bare(small_disk / "project")
    body(project, "import os", write)
    result = project.run("stages/prepare.py")
    assert result.returncode == 2
    project.refused(result, "data", "featdiff: prepare: ", "no space left on device; free some and run dvc repro")


@pytest.mark.parametrize(
    ("stage", "script", "made"),
    [
        ("arm@sft", "arm", "sft"),
        ("evaluate@sft", "evaluate", "sft"),
        ("evaluate_base", "evaluate", "base"),
        ("pair@sft", "crosscoder", "pair_sft"),
        ("crosscoder@joint_l1", "crosscoder", "joint_l1"),
        ("pair@joint_l1", "crosscoder", "--fit: 'pair_joint_l1': unknown"),
    ],
)
def test_what_a_stage_makes_is_what_dvc_calls_it(project: Project, stage: str, script: str, made: str) -> None:
    """Also where other arms have names that are made of those of stages and arms."""
    text = (project.path / "params.yaml").read_text(encoding="utf-8")
    more = "".join(f"  {name}: {{method: sft}}\n" for name in ("arm_sft", "evaluate_sft", "crosscoder_sft"))
    (project.path / "params.yaml").write_text(text.replace("  sft: {method: sft}\n", f"  sft: {{method: sft}}\n{more}"))
    source = (ROOT / f"stages/{script}.py").read_text(encoding="utf-8")
    ask = next(line for line in source.splitlines() if "stage_key(" in line)
    program = f"from featdiff.pipeline.stage import stage_key\n{ask}\nprint({ask.partition(' = ')[0]})"
    project.environment["DVC_STAGE"] = stage
    done = project.run("-c", program)
    assert made in (done.stdout.strip(), done.stderr.strip().removeprefix("featdiff: ").partition(";")[0]), done.stderr


def test_a_stage_whose_launcher_ended_before_it_began_stops(project: Project) -> None:
    """It was importing when the launcher was killed, and nobody above it is left who could tell."""
    body(project)
    gone = subprocess.Popen(["true"])
    gone.wait()
    project.environment["FEATDIFF_LAUNCHER"] = f"{gone.pid}:1"
    done = project.run("stages/prepare.py")
    assert done.returncode == 75
    assert "stopped by the end of its launcher" in done.stderr
    project.without("data")


def test_hardware_that_is_not_there_is_one_line(project: Project) -> None:
    body(project)
    project.environment["ACCELERATE_CONFIG"] = "conf/accelerate/tpu.yaml"
    result = project.run("-m", "featdiff.processes.launch", "stages/prepare.py")
    assert result.returncode == 2
    assert result.stderr == "featdiff: ACCELERATE_CONFIG: conf/accelerate/tpu.yaml: not found; use a file of conf/accelerate/\n"
    project.without("data")


@pytest.mark.graph
def test_under_accelerate_bad_input_stays_one_line(project: Project) -> None:
    body(project, "raise ContractError('some.jsonl:3', 'answer', 'a text', 'a list', 'correct this row')")
    project.environment["ACCELERATE_CONFIG"] = str(ROOT / "conf/accelerate/cpu.yaml")
    project.refused(
        project.run("-m", "featdiff.processes.launch", "stages/prepare.py"), "data", "featdiff: prepare: some.jsonl:3"
    )
