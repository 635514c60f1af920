"""The only door to disk: stage outputs are folders that are published whole and verified on reading.

A stage writes into a sibling folder; :func:`publish` describes it in ``manifest.json`` (size and sha256
of every file, hash of parameters and code, hashes of the parents' manifests), flushes it and renames it
into place. :func:`verify` checks a folder against its manifest before anything is computed from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
MANIFEST = "manifest.json"
DESCRIBING = f".{MANIFEST}"
"""A manifest not yet whole."""


class ContractError(Exception):
    """Input that breaks its contract: one line naming file, field, expected, found and what to do."""

    def __init__(self, file: Path | str, field: str, expected: object, found: object, todo: str) -> None:
        self.what = f"{file}: {field}: expected {expected}, found {found}"
        super().__init__(f"{self.what}; {todo}")


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
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ContractError(path, "file", "a JSON file", "nothing", "run the stage that makes it: dvc repro") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ContractError(path, "content", "JSON", f"{error}", "restore it: dvc checkout, or rerun the stage") from None


def staging_path(target: Path) -> Path:
    """The temporary sibling under which ``target`` is written, the same for every rank."""
    return target.with_name(f".{target.name}.partial")


def begin(target: Path) -> Path:
    """An empty staging folder for ``target``."""
    staging = staging_path(target)
    discard(target)
    staging.mkdir(parents=True)
    return staging


def publish(target: Path, *, params: Mapping[str, Any], code: str, parents: Mapping[str, str]) -> str:
    """Describe, flush and rename the staging folder of ``target``; returns the manifest's sha256."""
    staging = staging_path(target)
    digest = seal(staging, params=params, code=code, parents=parents)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    _flush(target.parent)
    return digest


def seal(folder: Path, *, params: Mapping[str, Any], code: str, parents: Mapping[str, str]) -> str:
    """Flush what is in ``folder``, then describe it in its manifest, which appears whole; returns the manifest's sha256."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != DESCRIBING
    }
    for path in folder.rglob("*"):
        _flush(path)
    described = {"schema": SCHEMA, "params": hash_json(dict(params)), "code": code}
    temporary = folder / DESCRIBING
    write_json(temporary, described | {"parents": dict(sorted(parents.items())), "files": files})
    _flush(temporary)
    temporary.rename(folder / MANIFEST)
    _flush(folder)
    return sha256_file(folder / MANIFEST)


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
    if not folder.is_dir():
        raise ContractError(folder, "folder", "a published artifact", "nothing", "run the stage that makes it: dvc repro")
    manifest = read_json(folder / MANIFEST)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ContractError(folder / MANIFEST, "schema", SCHEMA, schema, "rerun its stage with this version")
    listed = manifest["files"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if missing := sorted(set(names or listed) - found):
        raise ContractError(folder / missing[0], "file", "listed in the manifest", "missing", todo)
    if added := sorted((set(names) or found) - listed.keys()):
        raise ContractError(folder / added[0], "file", "only files of the manifest", "an extra file", todo)
    for name in names or listed:
        path, entry = folder / name, listed[name]
        if (size := path.stat().st_size) != entry["size"]:
            raise ContractError(path, "size", f"{entry['size']} bytes", f"{size} bytes", todo)
        if (digest := sha256_file(path)) != entry["sha256"]:
            raise ContractError(path, "sha256", entry["sha256"][:12], digest[:12], todo)
    if names:
        return {(folder / name).as_posix(): listed[name]["sha256"] for name in names}
    return {folder.as_posix(): sha256_file(folder / MANIFEST)}


def require_parents(folder: Path, root: Path) -> None:
    """Raise ContractError where a parent of the artifact ``folder`` that lies under ``root`` is no longer the one that it
    was made from: each may be sound, and the two do not belong together."""
    for name, digest in read_json(folder / MANIFEST)["parents"].items():
        parent = root / name
        home, file = (parent, None) if parent.is_dir() else (parent.parent, parent.name)
        if not (home / MANIFEST).is_file():
            continue  # not at hand: nothing to compare with
        listed = read_json(home / MANIFEST)["files"]
        now = sha256_file(home / MANIFEST) if file is None else listed.get(file, {}).get("sha256", "nothing")
        if now != digest:
            todo = "it was made from another version; run dvc repro (or dvc checkout)"
            raise ContractError(folder / MANIFEST, f"parent {name}", digest[:12], now[:12], todo)
