"""What DVC keeps: its lock file, its cache by md5, listings of folders. It may come from elsewhere, and is checked."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from featdiff.artifacts.artifact import (
    FILE,
    FOLDER,
    JSON_BYTES,
    NOTHING,
    ContractError,
    inside,
    kind,
    read_bytes,
    read_json,
    require,
)

MD5 = re.compile(r"[0-9a-f]{32}")
LABEL_BYTES = 128
PULL = "run dvc pull, or dvc repro -f its stage"
AGAIN = f"delete it, then {PULL}"
LOCK = "dvc.lock"
USERS = ".dvc/tmp/rwlock"
"""DVC's table of the processes that read and write each path."""
PATIENCE = 5
REPAIR = f"restore it: git checkout {LOCK}, or dvc repro"


class Output(NamedTuple):
    """One that dvc.lock has an md5 of."""

    label: str
    entry: dict[str, Any]
    """What dvc.lock has about its stage."""
    path: str
    md5: str
    """Ends in ``.dir`` for a folder: then it is that of a listing."""


def locked(root: Path) -> list[Output]:
    """The outputs in ``root``'s dvc.lock. Raises ContractError for one that is not as DVC writes it."""
    path = root / LOCK
    found = _yaml(path) if kind(path) != NOTHING else {}
    stages: Any = found.get("stages", {}) if isinstance(found, dict) else None
    require(isinstance(stages, dict), path, "stages", "a mapping of stages", found, REPAIR)
    outputs = []
    for label, entry in stages.items():
        holds = inside(label) and "/" not in label and len(label.encode()) <= LABEL_BYTES  # it becomes part of a file name
        require(holds, path, "stages", "names of stages", label, REPAIR)
        require(isinstance(entry, dict), path, label, "a mapping", entry, REPAIR)
        for field in ("deps", "outs"):
            files = entry.get(field, [])
            require(isinstance(files, list), path, f"{label}.{field}", "a list", files, REPAIR)
            for file in files:
                holds = isinstance(file, dict) and isinstance(file.get("path"), str) and _is_md5(file.get("md5", "0" * 32))
                require(holds, path, f"{label}.{field}", "a path and an md5", file, REPAIR)
        for output in entry.get("outs", []):
            require(inside(output["path"]), path, f"{label}.outs", "paths inside the repository", output["path"], REPAIR)
            if "md5" in output:
                outputs.append(Output(label, entry, output["path"], output["md5"]))
    return outputs


def set_aside_half(root: Path) -> list[str]:
    """Rename what DVC cannot read of its own: it writes dvc.lock and the table of its readers and writers in place, and a kill
    may leave half of them. Without dvc.lock ``dvc repro`` takes every result from its run cache, and without the table it
    starts a new one; with a half it would stop at once. Returns the names of the files renamed."""
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.strictyaml import load

    renamed = []
    for name in (LOCK, USERS):
        path = root / name
        for _ in range(PATIENCE):  # a DVC at work may be writing it just now
            if not path.is_file():
                break
            try:
                load(path, COMPILED_LOCKFILE_SCHEMA) if name == LOCK else json.loads(path.read_bytes())
                break
            except (DvcException, ValueError):
                time.sleep(0.2)
        else:
            path.replace(path.with_name(f"{path.name}.half"))
            print(f"featdiff: {name} is not whole, and was renamed {path.name}.half; dvc repro does without")
            renamed.append(name)
    return renamed


def _is_md5(value: object) -> bool:
    return isinstance(value, str) and MD5.fullmatch(value.removesuffix(".dir")) is not None


def _yaml(path: Path) -> Any:
    """Read by PyYAML's own code: libyaml crashes where values are nested deeply."""
    import yaml  # here: whoever writes a record needs none of it

    content = read_bytes(path, JSON_BYTES)
    try:
        return yaml.load(content, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        # beside its own errors, PyYAML lets through those of values that do not fit their tags
        raise ContractError(path, "content", "YAML", " ".join(str(error).split()), REPAIR) from None


def cache_folder(root: Path) -> Path:
    """Where DVC keeps objects of the repository ``root`` by md5."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if shown.returncode:
        raise ContractError(root, "DVC's cache", "a repository of DVC", shown.stderr.strip(), "go to the project's top folder")
    return root / shown.stdout.strip() / "files" / "md5"


def stored(cache: Path, md5: str) -> Path:
    """Where the cache keeps the object ``md5``."""
    return cache / md5[:2] / md5[2:]


def cached(cache: Path, md5: str) -> Path:
    """The file of the object ``md5``, after it was hashed. Raises ContractError for one that is not what its name says."""
    path, wanted = stored(cache, md5), md5.removesuffix(".dir")
    for place, expected in ((path.parent, FOLDER), (path, FILE)):
        found = kind(place)
        if found != expected:
            raise ContractError(path, "object", f"{expected} of DVC's cache", found, PULL if found == NOTHING else AGAIN)
    found = md5_file(path)
    if found != wanted:
        raise ContractError(path, "md5", wanted, found, AGAIN)
    return path


def md5_file(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "md5").hexdigest()
    except OSError as error:
        raise ContractError(path, "content", "readable", error.strerror, AGAIN) from None


def listing(path: Path) -> dict[str, str]:
    """The md5 of every file of an output by relative name, as the cached object ``path`` lists them."""
    found = read_json(path, JSON_BYTES)
    require(isinstance(found, list), path, "listing", "a list", found, AGAIN)
    for entry in found:
        holds = isinstance(entry, dict) and inside(entry.get("relpath")) and _is_md5(entry.get("md5"))
        require(holds, path, "entry", "a relpath that stays inside and an md5", entry, AGAIN)
        require(not entry["md5"].endswith(".dir"), path, "entry", "a file", entry, AGAIN)
    for name, following in pairwise(sorted(f"{entry['relpath']}/" for entry in found)):
        require(not following.startswith(name), path, "entry", "a name once, of a file or of a folder", name, AGAIN)
    return {entry["relpath"]: entry["md5"] for entry in found}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of the repository; empty if there is none and, with a line that says so, if it cannot be read."""
    from featdiff.config.reading import ConfigError, parse_yaml

    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        print(f"featdiff: {error} (taken as empty)", file=sys.stderr)
        return {}


if __name__ == "__main__":
    set_aside_half(Path())
