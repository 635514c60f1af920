"""What a study reads that DVC does not track: other content at the same path is noticed, and what was made of it made again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from featdiff.artifacts.artifact import MANIFEST, verify
from featdiff.config.params import Study
from featdiff.config.parse import parse
from featdiff.language.models import save_model
from featdiff.pipeline import outside
from project import ROOT, Project
from tiny import tiny_model


def fill(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{name}\n", encoding="utf-8")


def written() -> dict[Path, bytes]:
    """What is known of every stage."""
    return {file: file.read_bytes() for file in outside.OUTSIDE.rglob("*.json") if file.name != MANIFEST}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """One that reads something outside at every place that can name it."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], check=True)
    for folder in ("base", "teacher", "early", "final", "sae"):
        fill(tmp_path / folder, "model.safetensors", "config.json")
    fill(tmp_path / "suites/mcq/piqa", "test.jsonl")
    fill(tmp_path, "questions.jsonl", "web.jsonl")
    params: dict[str, Any] = yaml.safe_load((ROOT / "conf/profiles/organism.yaml").read_text(encoding="utf-8"))
    suite = {"source": "suite", "role": "heldout", "scoring": "option_text", "prompt": "own", "columns": None}
    params["prepare"]["suites"] = "suites"
    params["prepare"]["tasks"] |= {
        "piqa": suite | {"adapter": "piqa", "path": "suite:mcq/piqa/test"},
        "mine": suite | {"adapter": "columns", "path": "questions.jsonl", "columns": {"question": "q", "answer": "a"}},
    }
    params["prepare"]["corpus"]["general"] = {"web": {"path": "web.jsonl", "column": "text", "share": 1.0}}
    sampling = {"samples": 1, "temperature": 1.0, "max_new_tokens": 8, "sampling_batch_size": 8, "dtype": "float32"}
    params["teachers"] = {"big": sampling | {"source": "teacher", "chat": False, "instruction": ""}}
    params["base"]["source"] = "base"
    params["arms"]["theirs"] = {"method": "imported", "source": "final", "checkpoints": ["early"]}
    params["crosscoder"]["fits"]["brought"] = params["crosscoder"]["fits"]["joint_l1"] | {"loss": "imported", "source": "sae"}
    return parse(Study, params, "params.yaml")


@pytest.mark.parametrize(
    ("path", "field", "stage"),
    [
        ("suites/mcq/piqa/test.jsonl", "prepare.tasks.piqa.path", "prepare"),
        ("questions.jsonl", "prepare.tasks.mine.path", "prepare"),
        ("web.jsonl", "prepare.corpus.general.web", "prepare"),
        ("teacher/model.safetensors", "teachers.big.source", "teachers/big"),
        ("base/model.safetensors", "base.source", "base"),
        ("early/config.json", "arms.theirs.checkpoints[0]", "arms/theirs"),
        ("final/model.safetensors", "arms.theirs.source", "arms/theirs"),
        ("sae/model.safetensors", "crosscoder.fits.brought.source", "crosscoders/brought"),
    ],
)
def test_what_changed_is_named_and_forgotten_alone(study: Study, path: str, field: str, stage: str) -> None:
    outside.record(study)
    assert outside.forget_changed(study) == []
    before = written()
    Path(path).write_text("another content", encoding="utf-8")
    assert outside.forget_changed(study) == [field]
    assert before.keys() - written().keys() == {outside.OUTSIDE / f"{stage}.json"}
    outside.record(study)
    assert outside.forget_changed(study) == []
    after = written()
    assert [file for file in before if before[file] != after[file]] == [outside.OUTSIDE / f"{stage}.json"]


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda folder: fill(folder, "tokenizer.json"), True),
        (lambda folder: (folder / "config.json").unlink(), True),
        (lambda folder: fill(folder, "optimizer.pt", ".hidden"), False),
        (lambda folder: fill(folder / "runs", "events"), False),
        (lambda folder: folder.rename("elsewhere"), False),
    ],
    ids=["a file more", "a file less", "files that are never read", "a folder in it", "all gone"],
)
def test_what_counts_is_what_could_be_read(study: Study, change: Callable[[Path], None], seen: bool) -> None:
    """A folder that is gone needs none of what was made from it to be made again; its stage says so if it has to run."""
    outside.record(study)
    change(Path("base"))
    assert outside.forget_changed(study) == ["base.source"] * seen
    kept = (outside.OUTSIDE / "base.json").is_file()
    assert kept is not seen


def test_a_path_that_is_new_has_not_changed(study: Study) -> None:
    outside.record(study.model_copy(update={"base": study.base.model_copy(update={"source": "pretrain"})}))
    assert outside.forget_changed(study) == []
    assert not (outside.OUTSIDE / "base.json").exists()


def test_nothing_is_kept_of_an_arm_that_is_no_more(study: Study) -> None:
    outside.record(study)
    arms = {name: arm for name, arm in study.arms.items() if name != "theirs"}
    outside.record(study.model_copy(update={"arms": arms}))
    verify(outside.OUTSIDE)
    assert {path.stem for path in (outside.OUTSIDE / "arms").iterdir()} == set(arms)


@pytest.mark.graph
def test_other_weights_in_the_same_folder_make_another_base(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.path.mkdir()
    project.fill()
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], cwd=project.path, check=True)
    project.set({"base.source": str(tmp_path / "mine"), "prepare.pretrain.texts": 0, "prepare.corpus.texts": 50})
    project.set({"prepare.train_problems": 20})

    def base(seed: int) -> str:
        model, tokenizer = tiny_model(seed)
        save_model(model, tokenizer, tmp_path / "mine")
        asked = "from featdiff.config.params import load_study as s; from featdiff.pipeline.outside import forget_changed as f"
        said = project.run("-c", f"{asked}; print(f(s()))")
        assert said.returncode == 0, said.stderr
        done = project.run("-m", "dvc", "repro", "base")
        assert done.returncode == 0, done.stderr
        found = yaml.safe_load((project.path / "dvc.lock").read_text(encoding="utf-8"))["stages"]["base"]["outs"]
        return f"{said.stdout.strip()} {next(out['md5'] for out in found if out['path'] == 'models/base')}"

    first, other, again, back = base(0), base(1), base(1), base(0)
    assert [found.split(" ")[0] for found in (first, other, again, back)] == ["[]", "['base.source']", "[]", "['base.source']"]
    digests = [found.split(" ")[1] for found in (first, other, again, back)]
    assert digests[0] != digests[1] == digests[2]
    assert digests[3] == digests[0]
