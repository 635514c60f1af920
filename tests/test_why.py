"""Why a stage reruns: every kind of change is named by its cause, from the terminal."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from featdiff.artifacts.why import main

pytestmark = pytest.mark.graph
GRAPH = {
    "check": {"cmd": "echo 1 > .checked", "deps": ["params.yaml"], "outs": [".checked"]},
    "prepare": {
        "cmd": "mkdir data && cp src/one.py data",
        "deps": ["src", ".checked"],
        "params": ["seed", "prepare"],
        "outs": ["data"],
    },
    "arm": {
        "foreach": ["sft", "grpo"],
        "do": {
            "cmd": "mkdir -p models/${item} && cp stage.py data/one.py models/${item}",
            "deps": ["stage.py", "data"],
            "params": ["arms.${item}"],
            "outs": ["models/${item}"],
        },
    },
    "report": {"cmd": "mkdir report", "deps": ["models"], "outs": ["report"]},
}
PARAMS = {"seed": 0, "prepare": {"texts": 5, "kinds": ["a"]}, "arms": {"sft": {"lr": 0.1}, "grpo": {"lr": 0.2}}}


def run(*words):
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A repository in which nothing has to be done."""
    folder = tmp_path_factory.mktemp("why") / "one"
    (folder / "src").mkdir(parents=True)
    for name, text in {"src/one.py": "1", "src/two.py": "2", "stage.py": "3"}.items():
        (folder / name).write_text(text)
    write(folder / "dvc.yaml", {"stages": GRAPH})
    write(folder / "params.yaml", PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
        for words in (["git", "init"], ["dvc", "init"], ["dvc", "repro"], ["git", "add", "--all"]):
            run(*words, "--quiet") if "add" not in words else run(*words)
        run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all")
    return folder


@pytest.fixture
def here(computed, tmp_path, monkeypatch):
    """A copy of it, the working folder."""
    shutil.copytree(computed, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")


def write(path, content):
    path.write_text(yaml.safe_dump(content))


def params(**changes):
    write(Path("params.yaml"), PARAMS | changes)


def graph(stage, **changes):
    write(Path("dvc.yaml"), {"stages": GRAPH | {stage: GRAPH[stage] | changes}})


def made_anew():
    params(seed=1)
    Path("src/one.py").write_text("other")
    run(sys.executable, "-m", "dvc", "repro", "--quiet", "prepare")


CHANGES = {
    "a param": (lambda: params(seed=7), "prepare", "params.yaml: seed: was 0, is 7"),
    "a key of a section": (
        lambda: params(prepare={"texts": 5, "kinds": ["a"], "new": 1}),
        "prepare",
        "params.yaml: prepare.new: was absent, is 1",
    ),
    "one of a group": (lambda: params(arms={"sft": {"lr": 0.1}, "grpo": {"lr": 9}}), "arm", "arms.grpo.lr: was 0.2, is 9"),
    "a file of code": (lambda: Path("src/two.py").write_text("x"), "prepare", "src/two.py: changed since dvc.lock"),
    "a new file": (lambda: Path("src/three.py").write_text("x"), "prepare", "src/three.py: changed since dvc.lock"),
    "a file that is gone": (lambda: Path("src/two.py").unlink(), "prepare", "src/two.py: changed since dvc.lock"),
    "the script": (lambda: Path("stage.py").write_text("x"), "arm@sft", "stage.py: changed since dvc.lock"),
    "no script": (lambda: Path("stage.py").unlink(), "arm@sft", "stage.py: it is missing"),
    "the command": (lambda: graph("report", cmd="mkdir  report"), "report", "its command in dvc.yaml is another"),
    "another dependency": (
        lambda: graph("report", deps=["models", "stage.py"]),
        "report",
        "stage.py: dvc.yaml names it as a dependency, which it did not",
    ),
    "upstream": (lambda: params(seed=7), "arm@grpo", "data: made again, as prepare reruns: params.yaml: seed: was 0, is 7"),
    "far upstream": (lambda: params(seed=7), "report", "prepare reruns: params.yaml: seed: was 0, is 7"),
    "made anew": (made_anew, "arm@sft", "data: made anew since, by prepare"),
    "an output": (lambda: Path("report/x").write_text("x"), "report", "report: what it made was changed since; dvc checkout"),
    "no output": (lambda: shutil.rmtree("report"), "report", "report: what it made is missing"),
    "no lock": (lambda: Path("dvc.lock").unlink(), "prepare", "it never ran"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_cause_of_a_rerun_is_named(here, capsys, kind):
    change, stage, cause = CHANGES[kind]
    assert main([stage]) == 0
    assert "up to date" in capsys.readouterr().out
    change()
    assert main([stage]) == 0
    said = capsys.readouterr().out
    assert " reruns:\n" in said
    assert cause in said, said
    if kind == "one of a group":
        assert "arm@sft reruns" not in said


def test_an_unknown_stage_is_one_line(here, capsys):
    assert main(["reprot"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "did you mean report" in said


def test_without_a_name_all_stages_are_asked(here, capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == "up to date: 5 of 5 stages\n"
    Path("stage.py").write_text("x")
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "up to date: 2 of 5 stages" in said
    assert {line.partition(" ")[0] for line in said.splitlines() if line.endswith("reruns:")} == {
        "arm@sft",
        "arm@grpo",
        "report",
    }
