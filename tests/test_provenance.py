"""What is written beside an artifact about how it came about, and what it is read for."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from featdiff.artifacts import artifact, provenance
from featdiff.artifacts.artifact import MANIFEST, begin, hash_json, publish, read_manifest, read_statement, verify
from featdiff.artifacts.provenance import LIBRARIES, Provenance, path_of, require_parents
from project import describe
from test_artifact import DEEP, LEFT_OUT, ODD, UNSAFE, flipped, link_to_file, refusal

DIGEST = hash_json("code")


def made(folder: Path, text: str, parents: dict[str, str] | None = None) -> str:
    """Publish ``folder`` with one file, and its provenance where there are ``parents``."""
    (begin(folder) / "a.bin").write_text(text, encoding="utf-8")
    digest = publish(folder)
    if parents is not None:
        describe(folder, folder.parent, parents)
    return digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An artifact with provenance, made from the folder ``base`` and from a file of ``data``."""
    base, data = made(tmp_path / "base", "b", {}), tmp_path / "data"
    made(data, "d", {})
    made(tmp_path / "model", "m", {"base": base, "data/a.bin": verify(data, "a.bin")[f"{data.as_posix()}/a.bin"]})
    return tmp_path / "model"


def check(model: Path) -> str:
    return refusal(require_parents, model, model.parent)


def test_it_lies_beside_the_artifact_under_its_whole_name() -> None:
    assert path_of(Path("data"), Path()) == Path("provenance/data.json")
    assert path_of(Path("/study/crosscoders/k1.5"), Path("/study")) == Path("/study/provenance/crosscoders/k1.5.json")


def test_it_can_be_read_by_people_and_says_which_artifact_it_describes(model: Path) -> None:
    said = json.loads(path_of(model, model.parent).read_text(encoding="utf-8"))
    assert said["manifest"] == artifact.sha256_file(model / MANIFEST)
    assert said["params"]["sft"] == {"lr": 0.1}
    assert said["parents"].keys() == {"base", "data/a.bin"}
    assert read_statement(path_of(model, model.parent), Provenance).fields() == said


def test_versions_are_those_installed_and_nothing_is_imported_for_them() -> None:
    assert provenance.versions() == {
        name: metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate", "numpy", "scikit-learn")
    }
    program = "import sys; from featdiff.artifacts.provenance import versions; versions(); "
    program += f"sys.exit(bool({set(LIBRARIES)} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_artifact_and_its_parents_of_one_run_belong_together(model: Path) -> None:
    require_parents(model, model.parent)


def test_a_parent_that_was_made_anew_is_named(model: Path) -> None:
    made(model.with_name("base"), "another", {})
    assert "provenance/model.json: parent base: expected " in check(model)
    assert "it was made from another version; run dvc repro" in check(model)


def test_a_parent_that_was_made_again_with_the_same_bytes_is_the_same(model: Path) -> None:
    made(model.with_name("base"), "b", {"data": DIGEST})
    require_parents(model, model.parent)


def test_a_parent_that_is_one_file_is_held_against_its_folders_manifest(model: Path) -> None:
    data = model.with_name("data")
    (begin(data) / "a.bin").write_text("d", encoding="utf-8")
    (artifact.staging_path(data) / "more.bin").write_text("another table", encoding="utf-8")
    publish(data)
    require_parents(model, model.parent)
    made(data, "another")
    assert "parent data/a.bin: expected " in check(model)
    (begin(data) / "other.bin").write_text("d", encoding="utf-8")
    publish(data)
    assert "parent data/a.bin: expected " in check(model)
    assert "found nothing" in check(model)


def test_where_there_is_no_parent_or_no_provenance_there_is_nothing_to_compare(model: Path) -> None:
    for name in ("base", "data"):
        model.with_name(name).rename(model.with_name(f"no {name}"))
    require_parents(model, model.parent)
    made(model.with_name("base"), "another")
    check(model)
    path_of(model, model.parent).unlink()
    require_parents(model, model.parent)


def test_a_provenance_of_another_version_of_the_artifact_is_refused(model: Path) -> None:
    made(model, "another")
    assert f"provenance/model.json: manifest: expected {read_manifest(model / MANIFEST).digest()[:12]}, found " in check(model)
    assert f"it describes another version of {model}; run dvc repro (or dvc checkout)" in check(model)


def test_a_provenance_of_another_artifact_is_refused(model: Path) -> None:
    path_of(model.with_name("base"), model.parent).replace(path_of(model, model.parent))
    assert "provenance/model.json: manifest: expected " in check(model)


def test_damaged_manifests_of_the_artifact_and_of_a_parent_are_named(model: Path) -> None:
    for folder in (model, model.with_name("base")):
        sound = (folder / MANIFEST).read_bytes()
        (folder / MANIFEST).write_bytes(flipped(sound, 500))
        assert f"{folder / MANIFEST}: " in check(model)
        (folder / MANIFEST).write_bytes(sound)


@pytest.mark.parametrize("make", ODD)
def test_it_is_a_regular_file(model: Path, make: Callable[[Path], None]) -> None:
    path = path_of(model, model.parent)
    path.rename(path.with_name("elsewhere.json"))
    if make is link_to_file:
        path.symlink_to("elsewhere.json")
    else:
        make(path)
    found = ODD[make].removeprefix("an empty ").removeprefix("a ")
    assert f"{path}: file: expected a file, found a {found}; delete it, then restore it: dvc checkout" in check(model)


def test_no_flipped_bit_goes_unseen(model: Path) -> None:
    path = path_of(model, model.parent)
    sound = path.read_bytes()
    for bit in range(8 * len(sound)):
        path.write_bytes(flipped(sound, bit))
        assert check(model).startswith(f"{path}: ")
    path.write_bytes(sound)
    require_parents(model, model.parent)


def forge(path: Path, changes: dict[str, Any]) -> None:
    """One with these fields, written as they are and with the right hash; those that are LEFT_OUT are not there."""
    fields: dict[str, Any] = {"schema": artifact.SCHEMA, "manifest": DIGEST, "stage": "crosscoder@k1", "params": {"seed": 0}}
    fields |= {"code": DIGEST, "versions": {"torch": "2.8.0+cpu"}, "parents": {"data": DIGEST}} | changes
    rest = {name: value for name, value in fields.items() if value is not LEFT_OUT}
    rest |= {} if "self" in rest else {"self": hash_json(rest)}
    path.write_text(json.dumps(rest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


FIELDS = ("manifest", "stage", "params", "code", "versions", "parents")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        *(({name: LEFT_OUT}, f"{name}: expected a value, found nothing") for name in FIELDS),
        *(({name: value}, f"{name}: expected") for name in (*FIELDS, "self") for value in (None, 1, [])),
        *(({name: value}, f"{name}: expected a sha256") for name in ("manifest", "code") for value in ("", "0" * 63, "A" * 64)),
        ({"schema": 2}, "schema: expected 3, found 2"),
        ({"host": "here"}, "fields: expected"),
        ({"stage": "a\nb"}, "stage: expected the name of a stage"),
        ({"versions": {"torch": 2}}, "versions: torch: expected a version"),
        ({"versions": {"torch": "2\n"}}, "versions: torch: expected a version"),
        ({"parents": {"data": "0"}}, "parents: data: expected a sha256"),
        ({"self": "0" * 64}, "self: expected"),
        ({"params": {"lr": float("nan")}}, "self: expected"),
        *(({"parents": {name: DIGEST}}, "") for name in UNSAFE),
    ],
)
def test_every_field_is_of_its_type_and_there_is_no_other(model: Path, changes: dict[str, Any], field: str) -> None:
    path = path_of(model, model.parent)
    forge(path, {})
    read_statement(path, Provenance)
    forge(path, changes)
    assert f"{path}: {field}" in check(model)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text + "\n",
        lambda text: json.dumps(json.loads(text), sort_keys=True),
        lambda text: text.replace('"seed": 0', '"seed": 0.0'),
        lambda text: text.replace('"seed": 0', '"seed": ' + "[" * 500 + "]" * 500),
        lambda text: text.replace('"seed": 0', '"seed": ' + "[" * DEEP + "]" * DEEP),
        lambda text: text.replace('"seed": 0', '"seed": ' + "1" * 5000),
        lambda text: text.replace('"seed": 0', '"seed": 0, "seed": 0'),
        lambda text: text.replace('"seed": 0', '"seed": "\\ud800"'),
        lambda text: "[" * DEEP,
        lambda text: "null",
        lambda text: "",
    ],
)
def test_it_is_written_in_one_way(model: Path, rewrite: Callable[[str], str]) -> None:
    path = path_of(model, model.parent)
    forge(path, {})
    path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert len(check(model)) < 500 + len(str(path))


def test_what_could_not_be_read_again_is_not_written(model: Path) -> None:
    path = path_of(model, model.parent)
    sound = path.read_bytes()
    for parents in ({"../data": DIGEST}, {"data": "v1"}):
        refusal(describe, model, model.parent, parents)
        assert path.read_bytes() == sound
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []
