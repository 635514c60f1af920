"""Names in params.yaml under a plain ``dvc repro``: nothing of them reaches a shell or leads to another folder."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from project import Project

HOSTILE = ["a; touch pwned #", "$(touch pwned)", "a\ntouch pwned", "../docs", "a/../../docs", "-x"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("names")).fill()
    project.environment["DVC_NO_ANALYTICS"] = "1"
    (project.path / "docs").mkdir()
    (project.path / "docs/kept.md").write_text("kept", encoding="utf-8")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=project.path, check=True, capture_output=True)
    return project


def named(project: Project, name: str, table: str = "crosscoder.fits") -> None:
    """params.yaml with one more crosscoder of this name, or one more arm."""
    project.fill_params()
    params = yaml.safe_load((project.path / "params.yaml").read_text(encoding="utf-8"))
    entries = params["arms"] if table == "arms" else params["crosscoder"]["fits"]
    project.set({table: entries | {name: copy.deepcopy(next(iter(entries.values())))}})


@pytest.mark.graph
@pytest.mark.parametrize(("table", "name"), [*product(["crosscoder.fits"], HOSTILE), *product(["arms"], HOSTILE[:3])])
def test_a_hostile_name_is_one_line_and_touches_nothing(repository: Project, table: str, name: str) -> None:
    named(repository, name, table)
    done = repository.run("-m", "dvc", "repro")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("featdiff: ")]
    assert len(lines) == 1
    assert f"params.yaml: {table}" in lines[0]
    assert not (repository.path / "pwned").exists()
    assert (repository.path / "docs/kept.md").read_text() == "kept"


@pytest.mark.graph
def test_an_arm_that_would_lead_out_of_its_folder_is_refused_by_dvc_itself(repository: Project) -> None:
    named(repository, "../docs", "arms")
    done = repository.run("-m", "dvc", "repro")
    assert done.returncode != 0
    assert "output 'docs' is specified in" in done.stderr
    assert (repository.path / "docs/kept.md").read_text() == "kept"


@pytest.mark.graph
@pytest.mark.parametrize("name", HOSTILE[:2])
def test_its_stage_alone_runs_no_command_of_it_either(repository: Project, name: str) -> None:
    """``dvc repro --single-item`` leaves out the stage that checks params."""
    named(repository, name)
    done = repository.run("-m", "dvc", "repro", "--single-item", "--force", f"crosscoder@{name}")
    assert done.returncode != 0
    assert not (repository.path / "pwned").exists()


@pytest.mark.graph
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_a_stage_runs_under_dvcs_own_python_where_no_environment_is_activated(repository: Project, shell: str) -> None:
    """dvc starts a command through the user's shell, which may stay between the two."""
    repository.fill_params()
    environment = repository.environment | {"PATH": "/usr/bin:/bin", "SHELL": shell}
    command = [str(Path(sys.executable).with_name("dvc")), "repro", "check"]
    done = subprocess.run(
        command, cwd=repository.path, env=environment, text=True, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (repository.path / ".outside/base.json").exists()


@pytest.mark.graph
def test_where_no_python_has_featdiff_one_line_says_what_to_do(repository: Project) -> None:
    environment = {"PATH": "/usr/bin:/bin"}
    script = ["sh", "-c", "sh stages/run --one stages/check.py; exit $?"]  # so that this Python is not what started it
    done = subprocess.run(script, cwd=repository.path, env=environment, text=True, capture_output=True, check=False, timeout=60)
    if done.returncode == 0:
        pytest.skip("the system's own Python has featdiff")
    assert done.returncode == 2
    assert done.stderr.startswith("featdiff: no Python with featdiff found")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("given", ["crosscoder@nosuch", "crosscoder@", "crosscoder@../docs", ""])
def test_a_stage_without_a_known_name_says_which_there_are(repository: Project, given: str) -> None:
    repository.fill_params()
    repository.environment["DVC_STAGE"] = given
    done = repository.run("stages/crosscoder.py")
    del repository.environment["DVC_STAGE"]
    repository.refused(done, "crosscoders", "--fit: ", "unknown; ")
    assert done.returncode == 2


def test_without_the_guard_a_name_would_reach_the_shell(repository: Project) -> None:
    """What dvc.yaml would do with the name in its command: shows that the tests above could fail."""
    named(repository, "a; touch pwned #")
    path = repository.path / "dvc.yaml"
    kept = path.read_text(encoding="utf-8")
    graph = yaml.safe_load(kept)
    graph["stages"]["crosscoder"]["do"] |= {"cmd": "true --fit ${key}", "deps": ["params.yaml"]}
    path.write_text(yaml.safe_dump(graph), encoding="utf-8")
    try:
        repository.run("-m", "dvc", "repro", "--single-item", json.dumps("crosscoder@a; touch pwned #")[1:-1])
        assert (repository.path / "pwned").exists()
    finally:
        path.write_text(kept, encoding="utf-8")
        (repository.path / "pwned").unlink(missing_ok=True)
