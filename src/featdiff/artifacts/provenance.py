"""How an artifact came about: ``provenance/<artifact>.json``, an output of the same stage beside it.

The artifact itself says only what it is. So a changed comment gives another provenance and an equal folder, and DVC runs no
stage again that reads the folder. No stage depends on a provenance; :func:`require_parents` reads it, so that sound
artifacts of different runs are not mixed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from featdiff.artifacts.artifact import (
    MANIFEST,
    NOTHING,
    RESTORE,
    ContractError,
    Statement,
    inside,
    is_digest,
    kind,
    parse_statement,
    place_json,
    read_manifest,
    read_statement,
    require,
    require_table,
)

HOME = "provenance"
LIBRARIES = ("accelerate", "numpy", "scikit-learn", "torch", "transformers", "trl")
"""Those whose version can change a number."""


@dataclass(frozen=True)
class Provenance(Statement):
    """What an artifact was made from and by; no clock and no host in it."""

    manifest: str
    """The hash of the manifest of the artifact that it describes."""
    stage: str
    params: dict[str, Any]
    """The seed, and the stage's whole section of params.yaml."""
    code: str
    """The hash of the source files that dvc.yaml declares."""
    versions: dict[str, str]
    parents: dict[str, str]
    """The hash of the manifest of each artifact that was read, or of the single file."""

    @classmethod
    def checked(cls, path: Path, found: dict[str, Any]) -> Self:
        for field in ("manifest", "code"):
            require(is_digest(found[field]), path, field, "a sha256", found[field], RESTORE)
        require(inside(found["stage"]), path, "stage", "the name of a stage", found["stage"], RESTORE)
        require(isinstance(found["params"], dict), path, "params", "a mapping", found["params"], RESTORE)
        for field, expected, holds in (("versions", "a version", inside), ("parents", "a sha256", is_digest)):
            require_table(path, field, found[field])
            for name, value in found[field].items():
                require(holds(value), path, f"{field}: {name}", expected, value, RESTORE)
        return cls(**{field.name: found[field.name] for field in fields(cls)})


def path_of(folder: Path, root: Path) -> Path:
    """Where the provenance of the artifact ``folder`` of the repository ``root`` lies."""
    return root / HOME / f"{folder.relative_to(root).as_posix()}.json"


def versions() -> dict[str, str]:
    """The installed version of each of LIBRARIES; none is imported for that."""
    return {name: metadata.version(name) for name in LIBRARIES}


def place(folder: Path, root: Path, provenance: Provenance) -> None:
    """Write that of the artifact ``folder``, which is in place already."""
    path = path_of(folder, root)
    parse_statement(path, provenance.written(), Provenance)  # what could not be read must not be written
    place_json(path, provenance.fields())


def require_parents(folder: Path, root: Path) -> None:
    """Raise ContractError where the provenance of the artifact ``folder`` describes another version of it, and where a parent
    that lies under ``root`` is no longer the one that it was made from: each may be sound, and the two do not belong
    together. Where there is no provenance or no parent there is nothing to compare."""
    path = path_of(folder, root)
    if kind(path) == NOTHING:
        return
    provenance, digest = read_statement(path, Provenance), read_manifest(folder / MANIFEST).digest()
    if provenance.manifest != digest:
        todo = f"it describes another version of {folder}; run dvc repro (or dvc checkout)"
        raise ContractError(path, "manifest", digest[:12], provenance.manifest[:12], todo)
    for name, wanted in provenance.parents.items():
        parent = root / name
        home, file = (parent, None) if parent.is_dir() else (parent.parent, parent.name)
        if kind(home / MANIFEST) == NOTHING:
            continue
        manifest = read_manifest(home / MANIFEST)
        files = {None: manifest.digest()} | {name: entry.sha256 for name, entry in manifest.files.items()}
        now = files.get(file, NOTHING)
        if now != wanted:
            todo = "it was made from another version; run dvc repro (or dvc checkout)"
            raise ContractError(path, f"parent {name}", wanted[:12], now[:12], todo)
