"""The only door to disk: stage outputs are folders that are published whole and verified on reading.

A stage writes into a sibling folder; :func:`publish` describes it in ``manifest.json`` (size and sha256 of every file, and a
hash of all this), flushes it and renames it into place. :func:`verify` checks a folder against its manifest before anything
is computed from it. How an artifact came about lies beside it (featdiff.artifacts.provenance), so that equal files are equal
folders.

An artifact holds regular files in folders that are not empty. No link is followed, and nothing else is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

SCHEMA = 3
MANIFEST = "manifest.json"
DESCRIBING = f".{MANIFEST}"
"""A manifest not yet whole."""
JSON_BYTES = 64 << 20
"""The largest statement that is read: a manifest of some 400,000 files."""
NAME_BYTES = 1024
"""The longest relative name; a part of it may have 255, as file systems allow."""
DIGEST = re.compile(r"[0-9a-f]{64}")
NOTHING, FILE, FOLDER, LINK = "nothing", "a file", "a folder", "a link"
KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: FOLDER,
    stat.S_IFLNK: LINK,
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
RESTORE = "restore it: dvc checkout, or rerun the stage"


class ContractError(Exception):
    """Input that breaks its contract: one line naming file, field, expected, found and what to do."""

    def __init__(self, file: Path | str, field: str, expected: object, found: object, todo: str) -> None:
        self.what = one_line(f"{file}: {field}: expected {expected}, found {found}")
        super().__init__(f"{self.what}; {one_line(todo)}")


def one_line(text: str) -> str:
    """``text`` with everything that does not print, line breaks first of all, as escapes."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def require(holds: bool, file: Path, field: str, expected: object, found: object, todo: str) -> None:
    """Raise ContractError unless ``holds``, with ``found`` cut short."""
    if not holds:
        raise ContractError(file, field, expected, reprlib.repr(found), todo)


@contextmanager
def exported(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` when all is written; after an error nothing is left. Raises ContractError
    where something lies in the way."""
    free = not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))
    require(free, folder, "folder", "one that is empty or not there", "something", "name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:100]}.") as place:
        filled = Path(place) / "filled"
        filled.mkdir()
        yield filled
        filled.rename(folder)


def inside(name: object) -> bool:
    """Whether ``name`` is a relative path that stays inside the folder it is joined to, and prints in one line."""
    if not (isinstance(name, str) and name.isprintable() and "\\" not in name and len(name.encode()) <= NAME_BYTES):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))


def kind(path: Path) -> str:
    """What lies at ``path``, in words. No link is followed and nothing is opened."""
    try:
        return _kind(path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return NOTHING
    except OSError as error:
        return f"nothing that can be read ({error.strerror})"


def _kind(found: os.stat_result) -> str:
    return KINDS.get(stat.S_IFMT(found.st_mode), "something else")


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: object) -> str:
    """sha256 of ``value`` in canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """One hash over names and contents of source files (folders: every ``*.py`` below)."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, value: object) -> None:
    path.write_bytes(_written(value))


def place_json(path: Path, value: object) -> None:
    """Write ``value`` to a file outside of any artifact, which appears whole or stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write_json(temporary, value)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _written(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path, limit: float = math.inf) -> Any:
    """The JSON value in ``path``. Raises ContractError for anything but a regular file of at most ``limit`` bytes, for
    what is no JSON, and for text that could not be written again."""
    return _parsed(path, read_bytes(path, limit))


def read_bytes(path: Path, limit: float = math.inf) -> bytes:
    """What is in ``path``. Raises ContractError for anything but a regular file of at most ``limit`` bytes."""
    found = kind(path)
    if found != FILE:
        todo = "run the stage that makes it: dvc repro" if found == NOTHING else f"delete it, then {RESTORE}"
        raise ContractError(path, "file", FILE, found, todo)
    try:
        if (size := path.stat().st_size) > limit:
            raise ContractError(path, "size", f"at most {limit} bytes", f"{size} bytes", RESTORE)
        return path.read_bytes()
    except OSError as error:
        raise ContractError(path, "content", "readable", error.strerror, RESTORE) from None


def _parsed(path: Path, content: bytes) -> Any:
    try:
        value = json.loads(content.decode())
        if b"\\u" in content:  # an escape can stand for half a character, which no file and no terminal takes
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ContractError(path, "content", "JSON", error, RESTORE) from None
    return value


@dataclass(frozen=True)
class Statement:
    """What a JSON file says about an artifact, with the schema and a hash over it all; every hash is a sha256."""

    @classmethod
    def checked(cls, path: Path, found: dict[str, Any]) -> Self:
        """Made of ``found``, the fields in ``path``. Raises ContractError for one that is not of its type."""
        raise NotImplementedError

    def fields(self) -> dict[str, Any]:
        """All that is written."""
        rest = {"schema": SCHEMA} | asdict(self)
        return rest | {"self": hash_json(rest)}

    def written(self) -> bytes:
        """The one way to write it."""
        return _written(self.fields())

    def digest(self) -> str:
        return hashlib.sha256(self.written()).hexdigest()


S = TypeVar("S", bound=Statement)


def read_statement(path: Path, of: type[S]) -> S:
    """The statement in the file ``path``. Raises ContractError for one in which a single bit is not as it was written."""
    return parse_statement(path, read_bytes(path, JSON_BYTES), of)


def parse_statement(path: Path, content: bytes, of: type[S]) -> S:
    """The same, of the ``content`` of that file."""
    found = _parsed(path, content)
    schema = found.get("schema") if isinstance(found, dict) else None
    require(schema == SCHEMA, path, "schema", SCHEMA, schema, "rerun its stage with this version")
    names = {"schema", "self", *(field.name for field in fields(of))}
    for field in sorted(names ^ found.keys()):
        require(field in names, path, "fields", ", ".join(sorted(names)), field, RESTORE)
        raise ContractError(path, field, "a value", NOTHING, RESTORE)
    statement = of.checked(path, found)
    try:
        holds = content == statement.written()
    except (ValueError, RecursionError):  # numbers that JSON has not, or values nested too deeply
        holds = False
    if not holds:
        raise ContractError(path, "self", "the hash and the writing of these fields", "another", RESTORE)
    return statement


def require_table(path: Path, field: str, table: Any) -> None:
    """Raise ContractError unless ``table`` is a mapping whose keys are names that stay inside."""
    require(isinstance(table, dict), path, field, "a mapping of names", table, RESTORE)
    for name in table:
        require(inside(name), path, field, "relative names that stay inside", name, RESTORE)


@dataclass(frozen=True)
class File:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest(Statement):
    """What an artifact holds."""

    files: dict[str, File]

    @classmethod
    def checked(cls, path: Path, found: dict[str, Any]) -> Self:
        files = found["files"]
        require_table(path, "files", files)
        for name, entry in files.items():
            holds = isinstance(entry, dict) and entry.keys() == {"size", "sha256"} and is_digest(entry["sha256"])
            holds = holds and type(entry["size"]) is int and 0 <= entry["size"] < 1 << 63
            require(holds, path, f"files: {name}", "a size and a sha256", entry, RESTORE)
        return cls({name: File(**entry) for name, entry in files.items()})


def read_manifest(path: Path) -> Manifest:
    return read_statement(path, Manifest)


def is_digest(value: object) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def staging_path(target: Path) -> Path:
    """The temporary sibling under which ``target`` is written, the same for every rank."""
    return target.with_name(f".{target.name}.partial")


def begin(target: Path) -> Path:
    """An empty staging folder for ``target``."""
    _require_folder(target, FOLDER, NOTHING)
    staging = staging_path(target)
    discard(target)
    staging.mkdir(parents=True)
    return staging


def publish(target: Path) -> str:
    """Describe, flush and rename the staging folder of ``target``; returns the manifest's sha256."""
    staging = staging_path(target)
    digest = seal(staging)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    _flush(target.parent)
    return digest


def seal(folder: Path) -> str:
    """Flush what is in ``folder``, then describe it in its manifest, which appears whole; returns the manifest's sha256."""
    sizes = _sizes(folder, "a stage must leave nothing else in its output; mend it and run it again")
    files = {name: File(size, sha256_file(folder / name)) for name, size in sizes.items() if name not in (MANIFEST, DESCRIBING)}
    for path in folder.rglob("*"):
        _flush(path)
    manifest = Manifest(files)
    temporary = folder / DESCRIBING
    write_json(temporary, manifest.fields())
    read_manifest(temporary)  # what could not be read must not be published
    _flush(temporary)
    temporary.rename(folder / MANIFEST)
    _flush(folder)
    return manifest.digest()


def _sizes(folder: Path, todo: str, names: Iterable[str] = ()) -> dict[str, int]:
    """The size of every file of ``folder`` by relative name, or of those ``names`` that are there. Raises ContractError for
    anything on the way that is not a regular file in a folder that is not empty."""
    wanted = {way.as_posix() for name in names for way in (PurePosixPath(name), *PurePosixPath(name).parents)}
    sizes: dict[str, int] = {}
    places = [""]
    while places:
        place = places.pop()
        try:
            with os.scandir(folder / place) as entries:
                children = [(f"{place}{entry.name}", entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            raise ContractError(folder / place, "folder", "readable", error.strerror, todo) from None
        if place and not children:
            raise ContractError(folder / place, "folder", "files", "an empty folder", todo)
        for name, found in sorted(children):
            if wanted and name not in wanted:
                continue
            what = _kind(found)
            if what == FOLDER:
                places.append(f"{name}/")
            elif what != FILE:
                raise ContractError(folder / name, "file", "a regular file", what, todo)
            elif not inside(name):
                raise ContractError(folder / name, "name", "printable, without backslash and not too long", "another", todo)
            else:
                sizes[name] = found.st_size
    return sizes


def discard(target: Path) -> None:
    """Remove what an unfinished stage wrote for ``target``."""
    shutil.rmtree(staging_path(target), ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(folder: Path, *names: str) -> dict[str, str]:
    """Hash the files of ``folder`` against its manifest: all of them, or only ``names``.

    Returns what was verified with its sha256: the folder with its manifest's, or each named file with its own.
    Raises ContractError for a missing manifest, an unknown schema, and a missing, added or altered file."""
    todo = f"restore it (dvc checkout {folder}) or rerun its stage (dvc repro)"
    _require_folder(folder, FOLDER)
    manifest = read_manifest(folder / MANIFEST)
    listed = manifest.files
    links = "links, as DVC's cache type symlink makes them, are not supported"
    sizes = _sizes(folder, f"delete it, then dvc checkout {folder} or rerun its stage (dvc repro); {links}", names)
    if missing := sorted(set(names or listed) - sizes.keys()):
        raise ContractError(folder / missing[0], "file", "listed in the manifest", "missing", todo)
    if added := sorted(sizes.keys() - listed.keys() - {MANIFEST}):
        raise ContractError(folder / added[0], "file", "only files of the manifest", "an extra file", todo)
    for name in names or listed:
        path, entry = folder / name, listed[name]
        if sizes[name] != entry.size:
            raise ContractError(path, "size", f"{entry.size} bytes", f"{sizes[name]} bytes", todo)
        try:
            digest = sha256_file(path)
        except OSError as error:
            raise ContractError(path, "content", "readable", error.strerror, todo) from None
        if digest != entry.sha256:
            raise ContractError(path, "sha256", entry.sha256[:12], digest[:12], todo)
    if names:
        return {(folder / name).as_posix(): listed[name].sha256 for name in names}
    return {folder.as_posix(): manifest.digest()}


def _require_folder(folder: Path, *allowed: str) -> None:
    """Raise ContractError unless what lies at ``folder`` is ``allowed``."""
    found = kind(folder)
    if found not in allowed:
        todo = "run the stage that makes it: dvc repro"
        if found != NOTHING:
            todo = "put a folder in its place; links, as DVC's cache type symlink makes them, are not supported"
        raise ContractError(folder, "folder", "a published artifact", found, todo)
