"""Folders that are published whole and verified on reading."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featdiff import artifact
from featdiff.artifact import (
    MANIFEST,
    ContractError,
    begin,
    discard,
    hash_files,
    hash_json,
    publish,
    read_json,
    staging_path,
    verify,
)

BODY = b"0123456789" * 20


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "sft"


def fill(target: Path) -> Path:
    staging = begin(target)
    (staging / "weights.bin").write_bytes(BODY)
    (staging / "config.json").write_text("{}", encoding="utf-8")
    (staging / "checkpoints" / "1").mkdir(parents=True)
    (staging / "checkpoints" / "1" / "weights.bin").write_bytes(BODY[::-1])
    return staging


def published(target: Path) -> str:
    fill(target)
    return publish(target, params={"lr": 0.1}, code="c0de", parents={"data": "abc"})


def test_what_is_published_verifies_and_says_where_it_comes_from(target: Path) -> None:
    digest = published(target)
    assert verify(target) == {target.as_posix(): digest}
    assert digest == hashlib.sha256((target / MANIFEST).read_bytes()).hexdigest()
    assert not staging_path(target).exists()
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    assert (manifest["schema"], manifest["code"], manifest["parents"]) == (artifact.SCHEMA, "c0de", {"data": "abc"})
    assert manifest["params"] == hash_json({"lr": 0.1})
    assert manifest["files"].keys() == {"weights.bin", "config.json", "checkpoints/1/weights.bin"}
    assert manifest["files"]["weights.bin"] == {"size": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}


def test_equal_work_gives_equal_bytes_and_other_params_another_manifest(target: Path) -> None:
    first = published(target)
    assert published(target) == first
    fill(target)
    assert publish(target, params={"lr": 0.2}, code="c0de", parents={"data": "abc"}) != first


def test_publishing_again_leaves_nothing_of_the_old_artifact(target: Path) -> None:
    published(target)
    (begin(target) / "only.txt").write_text("new", encoding="utf-8")
    publish(target, params={}, code="", parents={})
    assert sorted(path.name for path in target.iterdir()) == [MANIFEST, "only.txt"]
    verify(target)


def test_named_files_are_verified_alone(target: Path) -> None:
    published(target)
    (target / "checkpoints/1/weights.bin").write_bytes(b"other")
    found = verify(target, "weights.bin", "config.json")
    assert found.keys() == {f"{target.as_posix()}/weights.bin", f"{target.as_posix()}/config.json"}
    assert found[f"{target.as_posix()}/weights.bin"] == hashlib.sha256(BODY).hexdigest()
    with pytest.raises(ContractError, match=r"checkpoints/1/weights.bin: size"):
        verify(target, "checkpoints/1/weights.bin")
    with pytest.raises(ContractError, match=r"nowhere.txt: file: expected listed in the manifest, found missing"):
        verify(target, "nowhere.txt")
    (target / "stray.txt").write_text("stray", encoding="utf-8")
    with pytest.raises(ContractError, match=r"stray.txt: file: expected only files of the manifest"):
        verify(target, "stray.txt")


def _flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[7] ^= 1
    path.write_bytes(body)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _swap(path: Path) -> None:
    other = path.parent / "checkpoints/1/weights.bin"
    here, there = path.read_bytes(), other.read_bytes()
    path.write_bytes(there)
    other.write_bytes(here)


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (_flip, "sha256"),
        (_truncate, "size"),
        (Path.unlink, "file: expected listed in the manifest, found missing"),
        (lambda path: (path.parent / "weights.binn").write_bytes(BODY), "found an extra file"),
        (lambda path: (path.parent / "checkpoints" / MANIFEST).write_text("{}"), "found an extra file"),
        (_swap, "sha256"),
    ],
)
def test_every_damage_names_the_file_and_what_to_do(target: Path, damage: Callable[[Path], object], field: str) -> None:
    published(target)
    damage(target / "weights.bin")
    with pytest.raises(ContractError) as caught:
        verify(target)
    message = str(caught.value)
    assert field in message
    assert str(target) in message
    assert any(name in message for name in ("weights.bin", f"checkpoints/{MANIFEST}"))
    assert f"dvc checkout {target}" in message
    assert "\n" not in message


@settings(max_examples=30)
@given(position=st.integers(0, len(BODY) - 1), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    target = tmp_path_factory.mktemp("flip") / "a"
    (begin(target) / "weights.bin").write_bytes(BODY)
    publish(target, params={}, code="", parents={})
    body = bytearray(BODY)
    body[position] ^= 1 << bit
    (target / "weights.bin").write_bytes(body)
    with pytest.raises(ContractError, match="sha256"):
        verify(target)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, ["nothing", "dvc repro"]),
        ("{", ["JSON", "dvc checkout"]),
        ("[]", ["schema", "rerun"]),
        ('{"files": {}}', ["schema", "found None"]),
        ('{"schema": 2, "files": {}}', ["schema", "expected 1, found 2", "rerun its stage with this version"]),
        ("\udcff", ["JSON"]),
    ],
)
def test_a_manifest_that_cannot_be_used(target: Path, manifest: str | None, words: list[str]) -> None:
    published(target)
    if manifest is None:
        (target / MANIFEST).unlink()
    else:
        (target / MANIFEST).write_bytes(manifest.encode("utf-8", "surrogateescape"))
    with pytest.raises(ContractError) as caught:
        verify(target)
    for word in [str(target / MANIFEST), *words]:
        assert word in str(caught.value)


def test_an_artifact_that_was_never_made(target: Path) -> None:
    with pytest.raises(ContractError, match=r"models/sft: folder: .*run the stage that makes it"):
        verify(target)


def test_what_a_crash_leaves_is_no_artifact_and_does_not_get_into_the_next(target: Path) -> None:
    staging = fill(target)
    with pytest.raises(ContractError):
        verify(target)
    with pytest.raises(ContractError):
        verify(staging)
    assert sorted(path.name for path in begin(target).iterdir()) == []
    (staging / "config.json").write_text("{}", encoding="utf-8")
    publish(target, params={}, code="", parents={})
    assert sorted(path.name for path in target.iterdir()) == ["config.json", MANIFEST]


def test_a_failure_while_publishing_leaves_the_old_artifact(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = published(target)
    (begin(target) / "half.txt").write_text("half", encoding="utf-8")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        publish(target, params={}, code="", parents={})
    discard(target)
    assert verify(target) == {target.as_posix(): digest}
    assert not staging_path(target).exists()


def test_discard_removes_the_unfinished_and_only_that(target: Path) -> None:
    digest = published(target)
    fill(target)
    discard(target)
    discard(target)
    assert verify(target) == {target.as_posix(): digest}
    assert not staging_path(target).exists()


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.floats(allow_nan=False)), max_size=5)
)
def test_the_order_of_keys_is_not_part_of_a_hash(value: dict[str, object]) -> None:
    assert hash_json(value) == hash_json(dict(reversed(value.items())))


def test_the_code_hash_sees_contents_and_names_and_no_byte_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    package, script = Path("src/package"), Path("stages/one.py")
    package.mkdir(parents=True)
    script.parent.mkdir()
    (package / "a.py").write_text("1", encoding="utf-8")
    script.write_text("2", encoding="utf-8")
    before = hash_files([package, script])
    assert hash_files([script, package]) == before
    (package / "a.pyc").write_bytes(b"compiled")
    assert hash_files([package, script]) == before
    (package / "a.py").rename(package / "b.py")
    renamed = hash_files([package, script])
    (package / "b.py").write_text("3", encoding="utf-8")
    assert len({before, renamed, hash_files([package, script])}) == 3


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        artifact.write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    artifact.write_json(tmp_path / "metrics.json", {"b": 1, "a": "ä"})
    assert read_json(tmp_path / "metrics.json") == {"a": "ä", "b": 1}
