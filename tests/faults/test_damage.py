"""Damaged, exchanged and stale artifacts: every stage refuses them in one line before it computes anything."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forge import CHECKPOINT, LONG, Study

from featdiff.artifacts.artifact import MANIFEST, ContractError, verify

READERS = {
    "data": ("eval.parquet", "evals/base", ["evaluate", "--model", "base"]),
    "models/base": ("model.safetensors", "models/sft", LONG["models/sft"]),
    "models/grpo": ("checkpoints/1/model.safetensors", "activations/grpo", LONG["activations/grpo"]),
    "evals/grpo": ("samples.parquet", "analysis/localize", ["localize"]),
    "activations/sft": ("acts-00000.safetensors", "crosscoders/joint_topk", LONG["crosscoders/joint_topk"]),
    "crosscoders/joint_topk": ("weights.safetensors", "analysis/attribution", ["attribution"]),
    "analysis/localize": ("features.json", "analysis/intervene/remove", LONG["analysis/intervene/remove"]),
    "analysis/intervene/remove": ("effects.parquet", "report", ["report"]),
}
"""For every kind of artifact: a file, and a stage that reads it."""


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def zero_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: -len(data) // 4] + bytes(len(data) - len(data[: -len(data) // 4])))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def delete(path: Path) -> None:
    path.unlink()


def add(path: Path) -> None:
    path.with_name("extra.bin").write_bytes(b"x")


def exchange(path: Path) -> None:
    """Two files of the artifact swap their contents."""
    others = (file for file in sorted(path.parent.iterdir()) if file.is_file() and file.name != MANIFEST)
    other = next(file for file in others if file != path)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def manifest_of(path: Path) -> Path:
    return next(folder / MANIFEST for folder in path.parents if (folder / MANIFEST).exists())


def list_nothing(path: Path) -> None:
    manifest = manifest_of(path)
    manifest.write_text(json.dumps(json.loads(manifest.read_text(encoding="utf-8")) | {"files": None}), encoding="utf-8")


def nest_deeply(path: Path) -> None:
    manifest_of(path).write_text('{"files": ' + "[" * 100_000, encoding="utf-8")


def put_a_folder_for_the_manifest(path: Path) -> None:
    manifest = manifest_of(path)
    manifest.unlink()
    manifest.mkdir()


def put_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("odd"))


def put_a_dangling_link(path: Path) -> None:
    path.with_name("odd").symlink_to("nowhere")


def put_an_empty_folder(path: Path) -> None:
    path.with_name("odd").mkdir()


OF_FILES = [flip, zero_tail, truncate, delete, add, exchange]
OF_MANIFESTS = [list_nothing, nest_deeply, put_a_folder_for_the_manifest]
ADDED = [add, put_a_fifo, put_a_dangling_link, put_an_empty_folder]


@pytest.mark.parametrize("damage", dict.fromkeys([*OF_FILES, *OF_MANIFESTS, *ADDED]))
@pytest.mark.parametrize("artifact", READERS)
def test_every_damage_of_every_kind_of_artifact_is_seen_before_anything_is_computed(
    study: Study, artifact: str, damage: Callable[[Path], None]
) -> None:
    file, out, command = READERS[artifact]
    if artifact == "data" and damage in ADDED:
        pytest.skip("stages name the tables that they read; others do not concern them")
    before = study.files(out) if (study.path / out).exists() else {}
    damage(study.path / artifact / file)
    assert study.finish(command) == 2
    said = study.said()
    lines = [line for line in said.splitlines() if line.startswith("featdiff:")]
    assert len(lines) == 1, said
    assert f"{artifact}/" in lines[0]
    assert "Traceback" not in said
    assert "%|" not in said, "no progress bar: nothing was computed"
    assert (study.files(out) if (study.path / out).exists() else {}) == before


def believe_any_file() -> None:
    from featdiff.artifacts import artifact

    artifact.verify = lambda folder, *_names: {folder.as_posix(): "0" * 64}


def test_without_verification_a_flipped_bit_would_be_read(study: Study) -> None:
    file, _, command = READERS["models/base"]
    flip(study.path / "models/base" / file)
    assert study.finish(command, believe_any_file) != 2, "the test above would not notice that the guard is gone"


def look_at_files_only() -> None:
    from featdiff.artifacts import artifact

    artifact._sizes = lambda folder, *_: {  # type: ignore[assignment]
        path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }


def test_without_a_look_at_what_is_no_file_a_dangling_link_would_pass(study: Study) -> None:
    file, _, command = READERS["evals/grpo"]
    put_a_dangling_link(study.path / "evals/grpo" / file)
    assert study.finish(command, look_at_files_only) != 2, "the test above would not notice that the guard is gone"


@pytest.mark.parametrize("artifact", READERS)
def test_no_flipped_bit_of_a_real_manifest_goes_unseen(study: Study, artifact: str) -> None:
    folder = study.path / artifact
    verify(folder)
    sound = (folder / MANIFEST).read_bytes()
    for bit in random.Random(artifact).sample(range(8 * len(sound)), 200):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / MANIFEST).write_bytes(damaged)
        with pytest.raises(ContractError) as caught:
            verify(folder)
        assert str(caught.value).startswith(f"{folder / MANIFEST}: ")
        assert str(caught.value).isprintable()
    (folder / MANIFEST).write_bytes(sound)
    verify(folder)


def test_sound_artifacts_of_different_runs_are_not_mixed(study: Study) -> None:
    study.set({"sft.lr": 0.002})
    assert study.finish(LONG["models/sft"]) == 0
    study.said()
    assert study.finish(LONG["crosscoders/joint_topk"]) == 2
    assert "provenance/activations/sft.json: parent models/sft: expected" in study.said()


def mix_anything() -> None:
    from featdiff.artifacts import provenance

    provenance.require_parents = lambda *_: None


def test_without_a_look_at_parents_artifacts_of_different_runs_would_be_mixed(study: Study) -> None:
    study.set({"sft.lr": 0.002})
    assert study.finish(LONG["models/sft"]) == 0
    assert study.finish(LONG["crosscoders/joint_topk"], mix_anything) == 0, (
        "the test above would not notice that the guard is gone"
    )


def test_an_artifact_beside_the_provenance_of_another_version_is_not_read(study: Study) -> None:
    old = study.provenance("models/sft").read_bytes()
    study.set({"sft.lr": 0.002})
    assert study.finish(LONG["models/sft"]) == 0
    study.provenance("models/sft").write_bytes(old)
    assert study.finish(["activations", "--model", "sft"]) == 2
    assert "provenance/models/sft.json: manifest: expected" in study.said()


@pytest.mark.parametrize("edited", ["params.yaml", "src"])
def test_an_edit_while_a_stage_runs_makes_it_fail(study: Study, edited: str) -> None:
    out = "crosscoders/joint_topk"
    wanted = study.files(out)
    if edited == "src":  # a copy of the sources, so that nothing else sees the edit
        source = (study.path / "src").resolve()
        (study.path / "src").unlink()
        shutil.copytree(source, study.path / "src")
    process = study.reached(out, CHECKPOINT)
    shutil.copytree(study.kept / out, study.path / out)  # of the last good run
    if edited == "src":
        with (study.path / "src/featdiff/crosscoder/model.py").open("a", encoding="utf-8") as stream:
            stream.write("# edited\n")
    else:
        study.set({"crosscoder.training.lr": 0.002})
    process.join(120)
    said = study.said()
    assert process.exitcode == 2, said[-2000:]
    assert "unchanged since the stage began" in said
    assert study.files(out) == wanted, "the artifact of the last good run stays"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, computed: Study) -> tuple[Path, dict[str, str]]:
    """`prepare` and `base` of the nano study under DVC."""
    folder = tmp_path_factory.mktemp("dvc")
    for name in ("conf", "stages", "dvc.yaml", "params.yaml"):
        source = computed.path / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder)
    shutil.copytree((computed.path / "src").resolve(), folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    environment = computed.environment | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
    }
    environment["PYTHONPATH"] = str(folder / "src")
    for command in (["git", "init", "--quiet"], ["dvc", "init", "--quiet"], ["dvc", "repro", "base"]):
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=300)
    return folder, environment


def verified(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "featdiff.artifacts.integrity"]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=120)


def test_a_damaged_cache_object_that_keeps_its_mode_is_found_and_never_read_as_good(
    repository: tuple[Path, dict[str, str]],
) -> None:
    folder, environment = repository
    assert verified(folder, environment).returncode == 0
    weights = folder / "models/base/model.safetensors"
    digest = subprocess.run(["md5sum", weights], capture_output=True, text=True, check=True).stdout[:32]
    stored = folder / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
    sound, mode = stored.read_bytes(), stored.stat().st_mode
    stored.chmod(0o644)
    stored.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    stored.chmod(mode)
    try:
        found = verified(folder, environment)
        assert found.returncode == 1
        assert f"{Path('.dvc/cache/files/md5') / digest[:2] / digest[2:]}: md5: expected {digest}" in found.stderr
        shutil.rmtree(folder / "models/base")
        subprocess.run(["dvc", "checkout", "models/base"], cwd=folder, env=environment, capture_output=True, check=False)
        refused = subprocess.run(
            [sys.executable, "stages/arm.py", "--arm", "sft"],
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        assert refused.returncode == 2
        assert "featdiff: arm@sft: models/base" in refused.stderr
    finally:
        stored.chmod(0o644)
        stored.write_bytes(sound)
        shutil.rmtree(folder / "models/base", ignore_errors=True)
        subprocess.run(["dvc", "checkout", "models/base"], cwd=folder, env=environment, capture_output=True, check=True)
    assert verified(folder, environment).returncode == 0
