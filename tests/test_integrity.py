"""Whether everything on disk is what it says: artifacts, their parents, and DVC's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from featdiff.artifacts import artifact, integrity
from featdiff.artifacts.artifact import ContractError
from featdiff.artifacts.dvc import set_aside_half
from featdiff.artifacts.integrity import problems
from featdiff.artifacts.provenance import path_of, require_parents
from project import ROOT, describe


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two artifacts, the second made from the first, as DVC keeps them."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["dvc", "init", "--quiet"], cwd=tmp_path, check=True)
    cache, stages, parents = tmp_path / ".dvc/cache/files/md5", {}, {}

    def store(data: bytes, suffix: str = "") -> str:
        name = md5(data) + suffix
        (cache / name[:2]).mkdir(parents=True, exist_ok=True)
        (cache / name[:2] / name[2:]).write_bytes(data)
        return name

    for name in ("one", "two"):
        target = tmp_path / name
        (artifact.begin(target) / "x.bin").write_bytes(name.encode())
        digest = artifact.publish(target)
        describe(target, tmp_path, parents)
        parents, described = {name: digest}, path_of(target, tmp_path)
        listed = [{"md5": store(path.read_bytes()), "relpath": path.name} for path in sorted(target.iterdir())]
        outs = {name: store(json.dumps(listed).encode(), ".dir"), f"provenance/{name}.json": store(described.read_bytes())}
        stages[name] = {"outs": [{"path": path, "md5": md5} for path, md5 in outs.items()]}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC is asked once where its cache is: that takes a second."""
    monkeypatch.setattr(integrity, "cache_folder", cache(integrity.cache_folder))


def found(root: Path) -> list[str]:
    return [line for line in problems(root) if line is not None]


def test_sound_things_are_counted(repository: Path) -> None:
    assert found(repository) == []
    # artifacts and provenance, and in the cache each one's listing, two files and provenance
    assert len(list(problems(repository))) == 2 * 2 + 2 * 4


def test_what_git_keeps_is_compared_with_the_lock_and_not_looked_for_in_the_cache(repository: Path) -> None:
    summary, lock = repository / "summary.json", repository / "dvc.lock"
    summary.write_bytes(b"{}")
    stages = yaml.safe_load(lock.read_text())["stages"]
    stages["report"] = {"outs": [{"path": "summary.json", "md5": md5(b"{}")}]}
    lock.write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    declared = {"report": {"cmd": "x", "outs": ["one", {"summary.json": {"cache": False}}]}}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": declared}), encoding="utf-8")
    assert found(repository) == []
    summary.write_bytes(b"{ }")
    assert len(found(repository)) == 1
    assert "summary.json: not what dvc.lock names" in found(repository)[0]


def test_a_damaged_artifact_is_named(repository: Path) -> None:
    (repository / "one/x.bin").write_bytes(b"onE")
    assert len(found(repository)) == 1
    assert "one/x.bin: sha256" in found(repository)[0]


def test_a_damaged_and_a_missing_object_are_named_with_what_to_do(repository: Path) -> None:
    stored = repository / ".dvc/cache/files/md5" / md5(b"two")[:2] / md5(b"two")[2:]
    stored.write_bytes(b"tw0")
    (line,) = found(repository)
    assert str(stored.relative_to(repository)) in line
    assert "delete it, then run dvc pull" in line
    stored.unlink()
    assert "two/x.bin: " in found(repository)[0]
    assert "expected a file of DVC's cache, found nothing; run dvc pull" in found(repository)[0]


def test_an_artifact_that_is_not_checked_out_is_named(repository: Path) -> None:
    shutil.rmtree(repository / "two")
    assert found(repository) == ["two: not in the workspace; run dvc pull or dvc checkout"]


def test_sound_artifacts_that_do_not_belong_together_are_told_apart(repository: Path) -> None:
    (artifact.begin(repository / "one") / "x.bin").write_bytes(b"another")
    artifact.publish(repository / "one")
    describe(repository / "one", repository, {})
    with pytest.raises(ContractError, match=r"two\.json: parent one: expected .*made from another version"):
        require_parents(repository / "two", repository)
    assert any("two.json: parent one: " in line for line in found(repository))


def test_a_damaged_a_foreign_and_a_missing_provenance_are_named(repository: Path) -> None:
    path, other = (repository / f"provenance/{name}.json" for name in ("two", "one"))
    sound = path.read_bytes()
    for content, word in ((sound.replace(b'"sft"', b'"sfT"'), "self"), (other.read_bytes(), "manifest"), (b"{", "content")):
        path.write_bytes(content)
        lines = found(repository)
        assert len(lines) == 2
        assert f"{path}: {word}: expected" in lines[1]
        assert "provenance/two.json: not what dvc.lock names" in lines[0]
        assert "run dvc checkout" in lines[0]
    path.unlink()
    assert found(repository) == ["provenance/two.json: not in the workspace; run dvc pull or dvc checkout"]
    os.mkfifo(path)
    lines = found(repository)
    assert len(lines) == 2
    assert all(f"{path}: file: expected a file, found a FIFO; delete it" in line for line in lines)


def test_a_listing_that_cannot_be_used_is_one_line(repository: Path) -> None:
    lock, outside = repository / "dvc.lock", b'[{"relpath": "../../x", "md5": "%s"}]' % (b"0" * 32)
    stages = yaml.safe_load(lock.read_text())["stages"]
    for listing in (b"{}", b"[1]", b"[" * 100_000, outside, b'[{"relpath": "x", "md5": "/x"}]'):
        name = md5(listing) + ".dir"
        stages["two"]["outs"][0]["md5"] = name
        lock.write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
        stored = repository / ".dvc/cache/files/md5" / name[:2] / name[2:]
        stored.parent.mkdir(exist_ok=True)
        stored.write_bytes(listing)
        (line,) = found(repository)
        assert line.startswith(f"two: {stored}: ")
        assert line.isprintable()


def test_a_cache_object_that_is_no_file_is_named_and_not_opened(repository: Path) -> None:
    stored = repository / ".dvc/cache/files/md5" / md5(b"two")[:2] / md5(b"two")[2:]
    stored.unlink()
    os.mkfifo(stored)
    (line,) = found(repository)
    assert f"two/x.bin: {stored}: object: expected a file of DVC's cache, found a FIFO" in line


@pytest.mark.parametrize("text", ["stages: [", "[1]", "stages: {one: {outs: [{path: ../one, md5: x}]}}", "[" * 2_000])
def test_a_malformed_lock_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "dvc.lock").write_text(text, encoding="utf-8")
    (line,) = problems(tmp_path)
    assert line is not None
    assert line.startswith(f"{tmp_path}/dvc.lock: ")
    assert line.isprintable()


def test_half_a_lock_is_set_aside_and_a_whole_one_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As DVC leaves it when it is killed while it writes."""
    lock = tmp_path / "dvc.lock"
    shutil.copy(ROOT / "dvc.lock", lock)
    whole = lock.read_bytes()
    set_aside_half(tmp_path)
    assert lock.read_bytes() == whole
    half = whole[: whole.index(b"size:") + len(b"size: ")]  # in the middle of an entry
    lock.write_bytes(half)
    set_aside_half(tmp_path)
    assert not lock.exists()
    assert (tmp_path / "dvc.lock.half").read_bytes() == half
    assert "renamed dvc.lock.half" in capsys.readouterr().out
    assert set_aside_half(tmp_path) == []


@pytest.mark.parametrize(("text", "whole"), [('{"data": {"write"', False), ("", False), ('{"data": {}}', True)])
def test_half_of_dvcs_table_of_readers_and_writers_is_set_aside(tmp_path: Path, text: str, *, whole: bool) -> None:
    """With half of it ``dvc repro`` ends at once; it makes a new one where there is none."""
    table = tmp_path / ".dvc/tmp/rwlock"
    table.parent.mkdir(parents=True)
    table.write_text(text, encoding="utf-8")
    assert set_aside_half(tmp_path) == ([] if whole else [".dvc/tmp/rwlock"])
    assert table.exists() == whole
