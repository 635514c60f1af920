"""Records of results that were computed elsewhere: from dvc.lock and DVC's cache, after ``dvc pull``.

Only what the cache holds for the very md5 of dvc.lock is read, so that it does not matter what lies in the
workspace. A record made here has the md5 in its name: doing it again changes nothing.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featdiff.tracking import METRICS, numbers, read_yaml, runs_folder

SHOWN = (".html", ".png", ".svg", ".csv")
"""Files of an output that are kept with the record, up to this size:"""
SHOWN_BYTES = 10_000_000


def restore(root: Path) -> list[str]:
    """Write a record for every directory output in ``root``'s dvc.lock that has none; returns what was done, in lines.

    An output counts as recorded where a finished record of its stage has the same curves and final metrics."""
    entries = [
        (label, entry, output)
        for label, entry in read_yaml(root / "dvc.lock").get("stages", {}).items()
        for output in entry.get("outs", [])
        if str(output.get("md5", "")).endswith(".dir")
    ]
    if not entries:
        return ["dvc.lock: no results; run dvc repro, or git pull and dvc pull"]
    cache = cache_folder(root)
    commit, committed = _commit_of(root / "dvc.lock")
    recorded = list(_finished())
    profile = str(read_yaml(root / "params.yaml").get("profile", ""))
    made, absent = 0, []
    for position, (label, entry, output) in enumerate(entries):
        folder = runs_folder() / f"restored-{label.replace('@', '-')}-{output['md5'].removesuffix('.dir')}"
        if folder.exists():
            continue
        files = _files(cache, output["md5"])
        if files is None:
            absent.append(output["path"])
            continue
        curves = files[METRICS].read_bytes() if METRICS in files else b""
        summary = numbers(json.loads(files["metrics.json"].read_text(encoding="utf-8"))) if "metrics.json" in files else {}
        if (label, curves, summary) not in recorded:
            # a millisecond apart, so that lists by time keep the order of the graph
            info = _info(folder.name, label, entry, summary, commit, committed + position / 1000, profile)
            _write(folder, info, curves, files)
            made += 1
    lines = [f"dvc.lock: {made} record(s) restored, {len(entries) - made - len(absent)} known already"]
    if absent:
        lines.append(f"not in DVC's cache: {', '.join(absent)}; run dvc pull first")
    return lines


def cache_folder(root: Path) -> Path:
    """Where DVC keeps objects of the repository ``root`` by md5."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return root / shown.stdout.strip() / "files" / "md5"


def _files(cache: Path, md5: str) -> dict[str, Path] | None:
    """Cached files of a directory output by relative path; None if any of them is absent."""
    listing = cache / md5[:2] / md5[2:]
    if not listing.is_file():
        return None
    files = {
        entry["relpath"]: cache / entry["md5"][:2] / entry["md5"][2:]
        for entry in json.loads(listing.read_text(encoding="utf-8"))
    }
    return files if all(path.is_file() for path in files.values()) else None


def _commit_of(path: Path) -> tuple[str, float]:
    """The commit that last changed ``path`` and its time; now, where git does not know the file."""
    command = ["git", "log", "-1", "--format=%H %ct", "--", path.name]
    found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False).stdout.split()
    return (found[0], float(found[1])) if found else ("", time.time())


def _finished() -> Iterator[tuple[str, bytes, dict[str, float]]]:
    """Label, curves and final metrics of every finished record."""
    for path in runs_folder().glob("*/run.json"):
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            continue
        if info["status"] == "FINISHED":
            curves = path.with_name(METRICS)
            yield (
                info["label"],
                curves.read_bytes() if curves.exists() else b"",
                {k: float(v) for k, v in info["summary"].items()},
            )


def _params(entry: dict[str, Any], stage: str) -> tuple[int, dict[str, Any]]:
    """Seed and this stage's section, from the params that dvc.lock holds (whole sections or dotted keys)."""
    section: dict[str, Any] = {}
    locked: dict[str, Any] = entry.get("params", {}).get("params.yaml", {})
    for name, value in locked.items():
        if name == stage and isinstance(value, dict):
            section |= value
        elif name.startswith(f"{stage}."):
            *above, last = name.split(".")[1:]
            target = section
            for part in above:
                target = target.setdefault(part, {})
            target[last] = value
    return int(locked.get("seed", 0)), section


def _info(
    identity: str, label: str, entry: dict[str, Any], summary: dict[str, float], commit: str, moment: float, profile: str
) -> dict[str, Any]:
    stage, _, key = label.partition("@")
    seed, params = _params(entry, stage)
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
        "profile": profile,
        "changed": {},
        "seed": seed,
        "params": params,
        "inputs": {dep["path"]: dep["md5"] for dep in entry.get("deps", []) if str(dep.get("md5", "")).endswith(".dir")},
        "summary": summary,
        "observed": {},
    }


def _write(folder: Path, info: dict[str, Any], curves: bytes, files: dict[str, Path]) -> None:
    """Make the record whole under a temporary name, so that its folder says it is done."""
    temporary = runs_folder().parent / f"{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "files").mkdir(parents=True)
    (temporary / METRICS).write_bytes(curves)
    for name, path in files.items():
        if name.endswith(SHOWN) and path.stat().st_size <= SHOWN_BYTES:
            kept = temporary / "files" / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
    (temporary / "run.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    folder.parent.mkdir(exist_ok=True)
    temporary.rename(folder)
