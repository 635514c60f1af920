"""The record of one executed stage: local files that are the truth, of which MLflow is a view.

A record is a folder ``.featdiff/runs/<id>/`` with ``run.json`` (what ran, on what, how it ended), ``metrics.jsonl``
(one line per logged step, no clock in it, so that it is the same bytes in every run), ``times.txt`` (the clock of each
of those lines, milliseconds), ``system.jsonl`` (how busy the machine was) and ``files/`` (what to show).
A separate process (featdiff.tracking.mirror) copies records to MLflow, so that no server can slow or stop a stage.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.dvc import read_yaml
from featdiff.processes.ranks import pipeline_process, process_start
from featdiff.tracking.system import SYSTEM, Sampler, processor

WORDS = ("report.title", "report.about")
METRICS = "metrics.jsonl"
CURVES = "curves.csv"
TIMES = "times.txt"


def home() -> Path:
    """Where records live: beside the repository, also when DVC runs an experiment in a temporary copy."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve() / ".featdiff"


def runs_folder() -> Path:
    return home() / "runs"


def finished(profile: str) -> list[dict[str, Any]]:
    """What ``run.json`` says of every stage that ran to its end here under ``profile``, in the order in which they began."""
    records = [read_json(file) for file in sorted(runs_folder().glob("*/run.json"))]
    return [each for each in records if each["status"] == "FINISHED" and each["profile"] == profile]


def by_pipeline(records: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """``records`` of each pipeline apart, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for each in records:
        found.setdefault(each["pipeline"]["id"], []).append(each)
    return list(found.values())


def pauses(records: Iterable[Mapping[str, Any]]) -> list[float]:
    """Seconds that passed before each of a pipeline's stages but the first ones, given in the order in which they began: since
    the end of the one whose place it took, the last that had ended and was not yet followed, as stages may run side by side."""
    ended: list[float] = []
    found = []
    for each in records:
        free = [end for end in ended if end <= each["started"]]
        if free:
            ended.remove(max(free))
            found.append(each["started"] - max(free))
        ended.append(each["ended"])
    return found


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among nested ``values`` under keys joined by ``/``."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def curated(params: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Params worth a column each, under dotted keys.

    Of a table of entries only the entry ``key`` is kept; a table whose entries have a role becomes names per role."""
    from featdiff.config.reading import flatten

    flat: dict[str, Any] = {}
    for name, value in params.items():
        table = isinstance(value, Mapping) and all(isinstance(entry, Mapping) for entry in value.values())
        if table and key in value:
            flat |= flatten(value[key], f"{name}.")
        elif table and value and all("role" in entry for entry in value.values()):
            for role in dict.fromkeys(entry["role"] for entry in value.values()):
                flat[f"{name}.{role}"] = ", ".join(task for task, entry in value.items() if entry["role"] == role)
        else:
            flat |= flatten({name: value})
    return flat


def _json_safe(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _line(step: int, values: Mapping[str, float]) -> dict[str, float | str]:
    return {"step": int(step)} | {key: _json_safe(float(value)) for key, value in values.items()}


def _now() -> str:
    return str(time.time_ns() // 1_000_000)


class Record:
    """Writes one record; does nothing on ranks other than the first (``main=False``)."""

    def __init__(
        self, label: str, stage: str, key: str, params: Mapping[str, Any], seed: int, *, out: str = "", main: bool
    ) -> None:
        self.main, self.closed = main, False
        if not main:
            return
        started, study = time.time(), in_force(Path())
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(started))
        identity = f"{stamp}-{label.replace('@', '-')}-{socket.gethostname()}-{os.getpid()}"
        self.folder = runs_folder() / identity
        (self.folder / "files").mkdir(parents=True)
        self._attachments: list[str] = []
        self._columns: dict[str, None] = {"step": None}
        self._info: dict[str, Any] = {
            "id": identity,
            "label": label,
            "stage": stage,
            "key": key,
            "out": out,
            "status": "RUNNING",
            "started": started,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_start": process_start(os.getpid()),
            "pipeline": _pipeline(),
            "root": str(Path.cwd()),
            "experiment": os.environ.get("DVC_EXP_NAME", ""),
            "commit": _commit(),
            "profile": str(study.get("profile", "")),
            "study": study,
            "seed": seed,
            "params": dict(params),
            "inputs": {},
            "summary": {},
            "observed": {"cpu": processor()},
        }
        self._write()
        self._stream = (self.folder / METRICS).open("w", encoding="utf-8")
        self._times = (self.folder / TIMES).open("w", encoding="utf-8")
        self._sampler = Sampler(self.folder / SYSTEM)
        _start_mirror()

    def _write(self) -> None:
        temporary = self.folder / "run.json.tmp"
        temporary.write_text(json.dumps(self._info, indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.folder / "run.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one point of the training curves."""
        if self.main:
            row = _line(step, values)
            self._columns |= dict.fromkeys(row)
            # before the line, so that whoever sees the line finds its time
            self._times.write(f"{_now()}\n")
            self._times.flush()
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()

    def curves(self) -> list[list[str]]:
        """What was logged so far: each line with its time."""
        if not self.main:
            return []
        lines = ((self.folder / name).read_text(encoding="utf-8").splitlines() for name in (METRICS, TIMES))
        return [list(pair) for pair in zip(*lines, strict=True)]

    def resume(self, curves: list[list[str]]) -> None:
        """Go on after ``curves``, in place of anything logged so far."""
        if not self.main:
            return
        for stream, column in ((self._times, 1), (self._stream, 0)):
            stream.seek(0)
            stream.truncate()
            stream.writelines(f"{pair[column]}\n" for pair in curves)
            stream.flush()
        self._columns |= dict.fromkeys(name for line, _ in curves for name in json.loads(line))

    def observe(self, **values: float | str) -> None:
        """Facts about this execution (speed, memory), which are no part of the result."""
        if self.main:
            self._info["observed"] |= values

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final metrics."""
        if self.main:
            self._info["summary"] |= {key: _json_safe(value) for key, value in numbers(values).items()}

    def input(self, path: str) -> None:
        """Name an artifact that this stage read, with the digest DVC has for it."""
        if self.main:
            self._info["inputs"][path] = _dvc_digest(path)
            self._write()

    def attach(self, name: str) -> None:
        """Show ``name``, a file of the stage's output folder, with the run."""
        if self.main:
            self._attachments.append(name)

    def save(self, out: Path) -> None:
        """Copy curves into ``out`` (also as CSV, for ``dvc plots``) and keep copies of the attached files."""
        if not self.main:
            return
        rows = (self.folder / METRICS).read_text(encoding="utf-8")
        if rows:
            (out / METRICS).write_text(rows, encoding="utf-8")
            with (out / CURVES).open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(self._columns), restval="")
                writer.writeheader()
                writer.writerows(json.loads(line) for line in rows.splitlines())
        for name in self._attachments:
            kept = self.folder / "files" / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / name, kept)

    def close(self, status: str) -> None:
        """End the record with ``FINISHED``, ``FAILED`` or ``KILLED``."""
        if not self.main or self.closed:
            return
        self.closed = True
        self._sampler.close()
        self._stream.close()
        self._times.close()
        ended = time.time()
        self._info["observed"] |= {
            "wall_seconds": round(ended - self._info["started"], 3),
            "peak_memory_mib": round(_peak_memory_kib() / 1024, 1),
        }
        self._info |= {"status": status, "ended": ended}
        self._write()


class Curves(Record):
    """Curves alone, in memory: what is done before its stage runs has its record from the stage."""

    def __init__(self) -> None:
        super().__init__("", "", "", {}, 0, main=False)
        self._lines: list[list[str]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.append([json.dumps(_line(step, values)), _now()])

    def curves(self) -> list[list[str]]:
        return self._lines

    def resume(self, curves: list[list[str]]) -> None:
        self._lines = [list(pair) for pair in curves]


def _peak_memory_kib() -> int:
    """Largest resident set of this process or of a finished child.

    ``VmHWM`` where there is one: ``ru_maxrss`` of a process also counts what its parent held when it was started."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "linux":
        own = int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def _pipeline() -> dict[str, Any]:
    """The dvc process that started this stage, or this process when started by hand: the parent run's identity."""
    found = pipeline_process() or os.getpid()
    start = process_start(found)
    # one dvc process may run several experiments
    names = (socket.gethostname(), found, start, os.environ.get("DVC_EXP_NAME"))
    identity = re.sub(r"[^\w.-]", "_", "-".join(str(name) for name in names if name))
    return {"pid": found, "start": start, "id": identity}


def in_force(root: Path) -> dict[str, Any]:
    """Params of the whole study in ``root`` under dotted keys, by which runs are compared: all that can change a result, so
    without the words of the report, how often work is saved, and the numbers of methods that no arm has."""
    from featdiff.config.models import METHODS
    from featdiff.config.reading import PARAMS

    params = read_yaml(root / PARAMS)
    methods = {arm.get("method") for arm in params.get("arms", {}).values() if isinstance(arm, Mapping)}
    left_out = {"resume", "threads", *(METHODS.keys() - methods)}
    flat: dict[str, Any] = {}
    for section, values in params.items():
        if section not in left_out:
            named = curated(values) if isinstance(values, Mapping) else None
            flat |= {section: values} if named is None else {f"{section}.{name}": value for name, value in named.items()}
    return {name: value for name, value in flat.items() if name not in WORDS}


SETTLED = 2.0
"""Seconds after which nobody is still writing dvc.lock: DVC writes it in place, in half a second."""


def _dvc_digest(path: str) -> str:
    """md5 that dvc.lock holds for the output ``path``; empty if it has none. A dvc beside this stage may be writing the file:
    while it is so new, it is believed up to the stage that it ends in."""
    lock = Path("dvc.lock").absolute()
    for _ in range(100):
        try:
            now = lock.stat()
            known, last = _digests(lock, (now.st_mtime_ns, now.st_size))
        except FileNotFoundError:
            return ""
        if time.time() - now.st_mtime > SETTLED:
            return (known | last).get(path, "")
        if path in known:
            return known[path]
        time.sleep(0.1)
    return ""


@lru_cache(maxsize=1)  # a tenth of a second in a finished study, whose report reads some fifty artifacts
def _digests(lock: Path, _state: tuple[int, int]) -> tuple[dict[str, str], dict[str, str]]:
    """md5 by output: of all stages but the last one in the file, and of that."""
    from featdiff.config.reading import ConfigError, parse_yaml

    def those(value: Any, kind: type[Any]) -> Any:
        """``value``, or nothing where it is cut off."""
        return value if isinstance(value, kind) else kind()

    try:
        whole, _, _half_a_line = lock.read_text(encoding="utf-8").rpartition("\n")
        data = parse_yaml(whole, "dvc.lock")
    except ConfigError:
        data = {}
    found: list[dict[str, str]] = [{}, {}]
    for entry in those(data.get("stages"), dict).values():
        outputs = (those(output, dict) for output in those(those(entry, dict).get("outs"), list))
        found.append({output["path"]: str(output.get("md5", "")) for output in outputs if "path" in output})
    return {path: md5 for outputs in found[:-1] for path, md5 in outputs.items()}, found[-1]


def _start_mirror() -> None:
    """Start the MLflow mirror in a session of its own; it leaves at once where another is at work."""
    if os.environ.get("FEATDIFF_MIRROR", "on") == "off":
        return
    # its folder is not the stage's: DVC removes the copies in which experiments run
    with (home() / "mirror.log").open("a", encoding="utf-8") as log:
        subprocess.Popen(
            [sys.executable, "-P", "-m", "featdiff.tracking.mirror", "follow"],
            cwd=home().parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
