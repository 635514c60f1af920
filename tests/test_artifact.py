"""Folders that are published whole and verified on reading."""

import hashlib
import json
import os
import random
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featdiff.artifacts import artifact
from featdiff.artifacts.artifact import (
    JSON_BYTES,
    MANIFEST,
    ContractError,
    Manifest,
    begin,
    discard,
    hash_files,
    hash_json,
    inside,
    one_line,
    publish,
    read_json,
    read_manifest,
    seal,
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
    return publish(target)


def test_what_is_published_verifies_and_says_only_what_it_is(target: Path) -> None:
    digest = published(target)
    assert verify(target) == {target.as_posix(): digest}
    assert digest == hashlib.sha256((target / MANIFEST).read_bytes()).hexdigest()
    assert not staging_path(target).exists()
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    assert manifest.keys() == {"schema", "files", "self"}
    assert manifest["schema"] == artifact.SCHEMA
    assert manifest["files"].keys() == {"weights.bin", "config.json", "checkpoints/1/weights.bin"}
    assert manifest["files"]["weights.bin"] == {"size": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest()}


def test_equal_files_are_equal_folders_and_other_bytes_or_names_another_manifest(target: Path) -> None:
    first = published(target)
    written = (target / MANIFEST).read_bytes()
    assert published(target) == first
    assert (target / MANIFEST).read_bytes() == written
    (fill(target) / "config.json").write_text("[]", encoding="utf-8")
    second = publish(target)
    (fill(target) / "config.json").rename(staging_path(target) / "settings.json")
    assert len({first, second, publish(target)}) == 3


def test_publishing_again_leaves_nothing_of_the_old_artifact(target: Path) -> None:
    published(target)
    (begin(target) / "only.txt").write_text("new", encoding="utf-8")
    publish(target)
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
    publish(target)
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
        ('{"schema": 2, "files": {}}', ["schema", "expected 3, found 2", "rerun its stage with this version"]),
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


def refusal(act: Callable[..., object], *arguments: Any) -> str:
    """What ``act`` says as it refuses, which is one line and takes no longer than five seconds."""
    with within(5), pytest.raises(ContractError) as caught:
        act(*arguments)
    message = str(caught.value)
    assert message.isprintable()
    return message


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def described(folder: Path, names: list[str]) -> bytes:
    """The manifest of an artifact with files of these ``names``."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    seal(folder)
    return (folder / MANIFEST).read_bytes()


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


MANIFESTS = {
    "one file, every bit": (["a"], None),
    "nested": ([f"checkpoints/{i}/weights-{j}.safetensors" for i in range(5) for j in range(4)], 400),
    "unicode": (["größe.csv", "数/模型.json", "🙂", "a b/c d"], 400),
    "many files": ([f"acts-{i:05d}.safetensors" for i in range(300)], 100),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_no_flipped_bit_of_a_manifest_goes_unseen(tmp_path: Path, kind: str) -> None:
    names, sample = MANIFESTS[kind]
    content, path = described(tmp_path / "a", names), tmp_path / MANIFEST
    bits = range(8 * len(content))
    for bit in bits if sample is None else random.Random(kind).sample(bits, sample):
        path.write_bytes(flipped(content, bit))
        refusal(read_manifest, path)
    path.write_bytes(content)
    assert read_manifest(path).written() == content


def test_without_the_hash_over_itself_flipped_bits_would_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, path = described(tmp_path / "a", ["a"]), tmp_path / MANIFEST
    monkeypatch.setattr(Manifest, "written", lambda _: ANY)
    taken = 0
    for bit in range(8 * len(content)):
        path.write_bytes(flipped(content, bit))
        try:
            read_manifest(path)
        except ContractError:
            continue
        taken += 1
    assert taken > 100, "the test above would not notice that the guard is gone"


SOUND = {"size": 1, "sha256": "0" * 64}
DEEP = 100_000


def with_file(**changes: object) -> dict[str, Any]:
    return {"files": {"a": SOUND | changes}}


UNSAFE = [
    *("", "/", "/etc/passwd", "..", "../a", "a/../../b", "a/..", ".", "./a", "a/./b", "a//b", "a/", "a\\b", "..\\a"),
    *(
        "a\nb",
        "a\rb",
        "a\tb",
        "a\0b",
        "a\x1bb",
        "a\x85b",
        "a\u2028b",
        "a\u202eb",
        "\ud800",
        "a" * 256,
        "é" * 128,
        "a/" * 600 + "a",
    ),
]
"""Names that leave the folder they are joined to, break a line, or are too long for a file system."""


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_leads_out_or_breaks_a_line_is_not_safe(tmp_path: Path, name: str) -> None:
    assert not inside(name)
    forge(tmp_path / MANIFEST, {"files": {name: SOUND}})
    expected = "content: expected JSON" if name == "\ud800" else "files: expected relative names that stay inside"
    assert expected in refusal(read_manifest, tmp_path / MANIFEST)


@pytest.mark.parametrize("name", ["a", "a/b.c", ".hidden", "...", "a b", "größe/数", "🙂", "a" * 255, "a:b", "~", "-rf"])
def test_any_other_name_is(name: str) -> None:
    assert inside(name)


@pytest.mark.parametrize("name", [None, 1, b"a", ["a"], Path("a")])
def test_what_is_no_text_is_no_name(name: object) -> None:
    assert not inside(name)


def forge(path: Path, changes: dict[str, Any]) -> None:
    """A manifest with these fields, written as manifests are and with the right hash; those that are LEFT_OUT are not there."""
    fields = {"schema": artifact.SCHEMA, "files": {}} | changes
    rest = {name: value for name, value in fields.items() if value is not LEFT_OUT}
    rest |= {} if "self" in rest else {"self": hash_json(rest)}
    path.write_text(json.dumps(rest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


LEFT_OUT = object()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"files": LEFT_OUT}, "files: expected a value, found nothing"),
        *(({name: value}, f"{name}: expected") for name in ("files", "self") for value in (None, 1)),
        ({"schema": 3.0}, "self: expected"),
        ({"schema": True}, "schema: expected 3, found True"),
        ({"schema": 4}, "schema: expected 3, found 4"),
        ({"size": 1}, "fields: expected"),
        ({"code": "0" * 64}, "fields: expected files, schema, self, found 'code'"),
        ({"self": "0" * 64}, "self: expected"),
        ({"files": []}, "files: expected"),
        ({"files": {"a": []}}, "files: a"),
        ({"files": {"a": {}}}, "files: a"),
        (with_file(mode=1), "files: a"),
        *((with_file(size=size), "files: a") for size in (-1, 1.0, True, "1", None, 1 << 63, 10**4000)),
        *(
            (with_file(sha256=digest), "files: a")
            for digest in (None, "", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", 1)
        ),
    ],
)
def test_a_manifest_with_the_right_hash_has_every_field_of_its_type_and_no_other(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    forge(tmp_path / MANIFEST, {})
    read_manifest(tmp_path / MANIFEST)
    forge(tmp_path / MANIFEST, changes)
    assert f"{tmp_path / MANIFEST}: {field}" in refusal(read_manifest, tmp_path / MANIFEST)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text + "\n",
        lambda text: text[:-1],
        lambda text: " " + text,
        lambda text: json.dumps(json.loads(text), sort_keys=True),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=1) + "\n",
        lambda text: text.replace('{\n "files"', '{\n "files": {},\n "files"'),
        lambda text: text.replace('"a"', '"\\u0061"'),
        lambda text: text.replace('"size": 1', '"size": ' + "1" * 5000),
        lambda text: text.replace('"size": 1', '"size": NaN'),
        lambda text: text.replace('"size": 1', '"size": ' + "[" * DEEP + "]" * DEEP),
        lambda text: text.replace('"size": 1', '"size": ' + "[" * 500 + "]" * 500),
        lambda text: "[" * DEEP,
        lambda text: '{"files":' * DEEP,
        lambda text: "\ufeff" + text,
        lambda text: "null",
        lambda text: "",
    ],
)
def test_a_manifest_is_written_in_one_way(tmp_path: Path, rewrite: Callable[[str], str]) -> None:
    path = tmp_path / MANIFEST
    forge(path, with_file())
    read_manifest(path)
    path.write_text(rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert len(refusal(read_manifest, path)) < 500


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endpoint(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # zeros without end
    except PermissionError:
        pytest.skip("making a device needs root")


def link_to_file(path: Path) -> None:
    path.symlink_to(__file__)


def link_to_folder(path: Path) -> None:
    path.symlink_to(Path(__file__).parent)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def nested(path: Path) -> None:
    (path / "in" / "in").mkdir(parents=True)


ODD = {
    fifo: "a FIFO",
    endpoint: "a socket",
    device: "a device",
    link_to_file: "a link",
    link_to_folder: "a link",
    dangling: "a link",
    Path.mkdir: "an empty folder",
    nested: "an empty folder",
}


@pytest.mark.parametrize("name", ["odd", "checkpoints/1/odd", "o\ndd", "od\udcffd"])
@pytest.mark.parametrize("make", ODD)
def test_an_artifact_holds_regular_files_in_folders_that_are_not_empty(
    target: Path, make: Callable[[Path], None], name: str
) -> None:
    published(target)
    (target / "hard.bin").hardlink_to(target / "weights.bin")  # as DVC and the scratch make them
    seal(target)
    verify(target)
    make(target / name)
    message = refusal(verify, target)
    assert f"found {ODD[make]}; delete it, then dvc checkout {target}" in message
    assert one_line(str(target / name)) in message
    verify(target, "weights.bin")  # no concern of one who reads only this

    staging = fill(target)
    make(staging / name)
    message = refusal(lambda: publish(target))
    assert f"found {ODD[make]}; a stage must leave nothing else" in message
    assert not (staging / MANIFEST).exists()
    assert not (staging / artifact.DESCRIBING).exists()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\udcff", "a\\b", "folder\n/a"])
def test_a_file_whose_name_is_not_safe_is_neither_published_nor_read(target: Path, name: str) -> None:
    published(target)
    for folder, act in ((target, verify), (fill(target.with_name("new")), lambda _: publish(target.with_name("new")))):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        assert one_line(str(folder / name)) in refusal(act, folder)


@pytest.mark.parametrize("make", [fifo, endpoint, device, link_to_file, link_to_folder, dangling, Path.mkdir])
def test_a_manifest_is_a_regular_file(target: Path, make: Callable[[Path], None]) -> None:
    published(target)
    (target / MANIFEST).rename(target.parent / "elsewhere.json")
    if make is link_to_file:
        (target / MANIFEST).symlink_to(target.parent / "elsewhere.json")
    else:
        make(target / MANIFEST)
    found = "a folder" if make is Path.mkdir else ODD[make]
    for act in (verify, lambda folder: read_json(folder / MANIFEST)):
        assert f"{target / MANIFEST}: file: expected a file, found {found}; delete it" in refusal(act, target)


def test_a_manifest_that_is_too_large_or_cannot_be_read(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(target)
    sound = (target / MANIFEST).read_bytes()
    os.truncate(target / MANIFEST, JSON_BYTES + 1)
    assert f"size: expected at most {JSON_BYTES} bytes" in refusal(verify, target)
    (target / MANIFEST).write_bytes(sound)

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert "content: expected readable, found Permission denied" in refusal(verify, target)


def test_a_file_that_cannot_be_read_is_named(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(target)

    def broken(_: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(artifact, "sha256_file", broken)
    assert "content: expected readable, found Input/output error; restore it" in refusal(verify, target)


def test_a_link_in_place_of_an_artifact_is_refused_and_not_replaced(target: Path) -> None:
    published(target)
    real = target.rename(target.with_name("real"))
    target.symlink_to(real)
    for act in (verify, begin):
        message = refusal(act, target)
        assert f"{target}: folder: expected a published artifact, found a link; put a folder in its place" in message
        assert "cache type symlink" in message
    target.unlink()
    target.write_bytes(b"")
    assert "found a file" in refusal(begin, target)
    assert "found a file" in refusal(verify, target)


def test_a_link_on_the_way_to_a_named_file_is_refused(target: Path) -> None:
    published(target)
    (target / "checkpoints").rename(target.parent / "elsewhere")
    (target / "checkpoints").symlink_to(target.parent / "elsewhere")
    assert f"{target}/checkpoints: file: expected a regular file, found a link" in refusal(
        verify, target, "checkpoints/1/weights.bin"
    )
    verify(target, "weights.bin")


def test_a_folder_that_was_sealed_is_sealed_again(target: Path) -> None:
    published(target)
    (target / "more.bin").write_bytes(BODY)
    seal(target)
    assert read_manifest(target / MANIFEST).files.keys() == {
        *("weights.bin", "config.json", "checkpoints/1/weights.bin", "more.bin")
    }
    verify(target)


@given(st.text())
def test_a_message_is_one_line_whatever_it_names(text: str) -> None:
    message = str(ContractError(text, text, text, text, text))
    assert message.isprintable()
    if text.isprintable():
        assert message == f"{text}: {text}: expected {text}, found {text}; {text}"


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
    publish(target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", MANIFEST]


def test_a_failure_while_publishing_leaves_the_old_artifact(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = published(target)
    (begin(target) / "half.txt").write_text("half", encoding="utf-8")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        publish(target)
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * DEEP, "recursion"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "recursion"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"\\udfff": 1}', "surrogates"),
        (b'"\xed\xa0\x80"', "utf-8"),
        (b"\xff\xfe[\x00]\x00", "utf-8"),
        (b"1" * 5000, "digits"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "choice.json"
    path.write_bytes(content)
    message = refusal(read_json, path)
    assert message.startswith(f"{path}: content: expected JSON, found ")
    assert words in message


def test_json_that_others_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "choice.json"
    path.write_bytes(b'{"a": "\\u00e4 \\ud83d\\ude42", "b": NaN}')
    found = read_json(path)
    assert (found["a"], found["b"] != found["b"]) == ("ä 🙂", True)
    with pytest.raises(ContractError, match="size: expected at most 10 bytes, found"):
        read_json(path, 10)
    assert "nothing; run the stage" in refusal(read_json, tmp_path / "nowhere.json")
    assert "found a folder" in refusal(read_json, tmp_path)


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        artifact.write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    artifact.write_json(tmp_path / "metrics.json", {"b": 1, "a": "ä"})
    assert read_json(tmp_path / "metrics.json") == {"a": "ä", "b": 1}
