"""Records of results that were computed elsewhere: from dvc.lock and DVC's cache, after ``dvc pull``.

Only what the cache holds for the very md5 of dvc.lock is read, so that it does not matter what lies in the
workspace. A record made here has the md5 in its name: doing it again changes nothing.

Somebody else wrote all of this: names must stay inside, and an object is believed once its bytes have the md5 it is named by.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import (
    JSON_BYTES,
    NOTHING,
    ContractError,
    kind,
    one_line,
    read_bytes,
    read_json,
    require,
)
from featdiff.artifacts.dvc import AGAIN, LOCK, REPAIR, cache_folder, cached, listing, locked, stored
from featdiff.tracking.record import METRICS, in_force, numbers, runs_folder

SHOWN = (".html", ".png", ".svg", ".csv", ".md")
"""Files of an output that are kept with the record, up to this size:"""
SHOWN_BYTES = 10_000_000
CURVES_BYTES = 1 << 30


def restore(root: Path) -> list[str]:
    """Write a record for every directory output in ``root``'s dvc.lock that has none, but hidden ones, which are no results;
    returns what was done, in lines.

    An output counts as recorded where a finished record of its stage has the same curves and final metrics."""
    outputs = [output for output in locked(root) if output.md5.endswith(".dir") and output.path[0] != "."]
    if not outputs:
        return ["dvc.lock: no results; run dvc repro, or git pull and dvc pull"]
    cache = cache_folder(root)
    commit, committed = _commit_of(root / LOCK)
    recorded = list(_finished())
    study = in_force(root)
    made, absent, refused = 0, [], []
    for position, (label, entry, path, md5) in enumerate(outputs):
        folder = runs_folder() / f"restored-{label.replace('@', '-')}-{md5.removesuffix('.dir')}"
        if folder.exists():
            continue
        try:
            files = _files(cache, md5)
            if files is None:
                absent.append(path)
                continue
            curves = read_bytes(cached(cache, files[METRICS]), CURVES_BYTES) if METRICS in files else b""
            summary = _summary(cached(cache, files["metrics.json"])) if "metrics.json" in files else {}
            if (label, curves, summary) not in recorded:
                # a millisecond apart, so that lists by time keep the order of the graph
                info = _info(folder.name, label, entry, summary, commit, committed + position / 1000, study) | {"out": path}
                shown = {name: stored(cache, md5) for name, md5 in files.items() if name.endswith(SHOWN)}
                small = [name for name, place in shown.items() if place.lstat().st_size <= SHOWN_BYTES]
                _write(folder, info, curves, {name: cached(cache, files[name]) for name in small})
                made += 1
        except ContractError as error:
            refused.append(f"{one_line(path)}: left out: {error}")
    known = len(outputs) - made - len(absent) - len(refused)
    lines = [f"dvc.lock: {made} record(s) restored, {known} known already", *refused]
    if absent:
        lines.append(f"not in DVC's cache: {', '.join(absent)}; run dvc pull first")
    return lines


def _files(cache: Path, md5: str) -> dict[str, str] | None:
    """md5 by relative name of the files of a directory output; None if any of them is absent."""
    if kind(stored(cache, md5)) == NOTHING:
        return None
    files = listing(cached(cache, md5))
    return None if any(kind(stored(cache, file)) == NOTHING for file in files.values()) else files


def _summary(path: Path) -> dict[str, float]:
    """The numbers in the cached metrics.json at ``path``."""
    values = read_json(path, JSON_BYTES)
    require(isinstance(values, dict), path, "metrics", "a mapping", values, AGAIN)
    try:
        return numbers(values)
    except (RecursionError, OverflowError) as error:
        raise ContractError(path, "metrics", "numbers", error, AGAIN) from None


def _commit_of(path: Path) -> tuple[str, float]:
    """The commit that last changed ``path`` and its time; now, where git does not know the file."""
    command = ["git", "log", "-1", "--format=%H %ct", "--", path.name]
    found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False).stdout.split()
    return (found[0], float(found[1])) if found else ("", time.time())


def _finished() -> Iterator[tuple[str, bytes, dict[str, float]]]:
    """Label, curves and final metrics of every finished record."""
    for path in runs_folder().glob("*/run.json"):
        try:
            info = read_json(path)
        except ContractError:
            continue
        if info["status"] == "FINISHED":
            curves = path.with_name(METRICS)
            yield (
                info["label"],
                curves.read_bytes() if curves.exists() else b"",
                {k: float(v) for k, v in info["summary"].items()},
            )


def _params(entry: dict[str, Any], stage: str) -> tuple[int | None, dict[str, Any]]:
    """Seed (None where the stage does not depend on it) and this stage's section, from the params that dvc.lock holds: whole
    sections, or dotted keys."""
    section: dict[str, Any] = {}
    files = entry.get("params", {})
    found = files.get("params.yaml", {}) if isinstance(files, dict) else files
    holds = isinstance(found, dict) and all(isinstance(name, str) for name in found) and type(found.get("seed", 0)) is int
    require(holds, Path(LOCK), "params", "a mapping of names, and a whole number as seed", found, REPAIR)
    for name, value in found.items():
        if name == stage and isinstance(value, dict):
            section |= value
        elif name.startswith(f"{stage}."):
            *above, last = name.split(".")[1:]
            target = section
            for part in above:
                target = target.setdefault(part, {})
                require(isinstance(target, dict), Path(LOCK), name, "a name in a mapping", target, REPAIR)
            target[last] = value
        elif name.startswith(f"{stage}s.") and isinstance(value, dict):  # one of several; an arm changes numbers of its method
            method = found.get(value.get("method"), {})
            require(isinstance(method, dict), Path(LOCK), str(value.get("method")), "a mapping", method, REPAIR)
            section |= method | {key: change for key, change in value.items() if key not in ("method", "seed")}
    return found.get("seed"), section


def _info(
    identity: str,
    label: str,
    entry: dict[str, Any],
    summary: dict[str, float],
    commit: str,
    moment: float,
    study: dict[str, Any],
) -> dict[str, Any]:
    stage, _, key = label.partition("@")
    seed, params = _params(entry, stage)
    if seed is None:  # as a record has it: of the study
        seed = int(study.get("seed", 0))
    return {
        "id": identity,
        "restored": True,
        "label": label,
        "stage": stage,
        "key": key,
        "status": "FINISHED",
        "started": moment,
        "ended": moment,
        "host": socket.gethostname(),
        "pid": 0,
        "pid_start": 0,
        "pipeline": {"pid": 0, "start": 0, "id": f"restored-{commit[:12] or int(moment)}"},
        "experiment": "",
        "commit": commit,
        "profile": str(study.get("profile", "")),
        "study": study,
        "seed": seed,
        "params": params,
        "inputs": {dep["path"]: dep["md5"] for dep in entry.get("deps", []) if str(dep.get("md5", "")).endswith(".dir")},
        "summary": summary,
        "observed": {},
    }


def _write(folder: Path, info: dict[str, Any], curves: bytes, shown: dict[str, Path]) -> None:
    """Make the record whole under a temporary name, so that its folder says it is done."""
    try:
        described = json.dumps(info, indent=1, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(LOCK, info["label"], "values that JSON has", error, REPAIR) from None
    temporary = runs_folder().parent / f"{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "files").mkdir(parents=True)
    (temporary / METRICS).write_bytes(curves)
    for name, path in shown.items():
        kept = temporary / "files" / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
    (temporary / "run.json").write_bytes(described)
    folder.parent.mkdir(exist_ok=True)
    temporary.rename(folder)
