"""How a stage runs: command line, lock, signals, parameters, artifacts and the tracking record.

``python -m featdiff.launch [--one] stages/<stage>.py …`` hands a stage to ``accelerate launch`` under the hardware
that ``$ACCELERATE_CONFIG`` names, so that hardware is never part of a stage's signature. Inside the stage,
:func:`stage` is the one context manager around the work. Nothing here knows about science or imports torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from featdiff import artifact, stopping
from featdiff.artifact import ContractError
from featdiff.config import ConfigError, load_params, load_study
from featdiff.ranks import rank, world_size
from featdiff.stopping import Stopped
from featdiff.tracking import Record

if TYPE_CHECKING:
    from featdiff.resume import Scratch

SCRATCH = Path(".featdiff")
DEFAULT_HARDWARE = "conf/accelerate/cpu.yaml"
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75


class Run:
    """What a stage may touch: verified inputs, one output folder, scratch to resume from, and the record of metrics."""

    def __init__(self, name: str, out: Path, signature: dict[str, Any], params: Any, record: Record) -> None:
        self.name, self.target, self.signature, self.params, self.record = name, out, signature, params, record
        self.seed: int = signature["params"]["seed"]
        self.parents: dict[str, str] = {}
        self.door_seconds = 0.0
        """Spent on verifying what is read and publishing what is written."""
        self.out = artifact.staging_path(out)
        self.log = record.log
        self.observe = record.observe

    def scratch(self) -> Scratch:
        """Where this stage keeps what it can resume from; ask when all inputs are read. What an earlier run with other
        inputs, code, params, ranks or threads left is removed."""
        from featdiff.resume import Scratch

        threads = os.environ.get("OMP_NUM_THREADS", "")
        key = artifact.hash_json(self.signature | {"parents": self.parents, "ranks": world_size(), "threads": threads})[:16]
        place = scratch_folder(self.target)
        if rank() == 0:
            for other in place.glob("*"):
                if other.name != key:
                    shutil.rmtree(other)
        return Scratch(place / key, load_study().resume.every_seconds, self.record)

    def read(self, path: str, *files: str) -> Path:
        """Folder of the artifact at ``path``, after its files (or only ``files``) were hashed against the manifest."""
        folder, began = Path(path), time.monotonic()
        self.parents |= artifact.verify(folder, *files)
        artifact.require_parents(folder, Path())
        self.door_seconds += time.monotonic() - began
        self.record.input(folder.as_posix())
        return folder

    def metrics(self, values: dict[str, Any]) -> None:
        """Final metrics: ``metrics.json`` of the artifact, and numbers of the tracking run."""
        if rank() == 0:
            artifact.write_json(self.out / "metrics.json", values)
            self.record.summary(values)

    def attach(self, name: str) -> None:
        """Show this file of the output folder as an artifact of the tracking run."""
        self.record.attach(name)


@contextmanager
def stage(name: str, out: str, key: str = "") -> Iterator[Run]:
    """Everything around a stage's work: reads its section of params.yaml, takes the lock of ``out``, opens
    the record, and publishes ``out`` whole at the end. Bad input ends the process with one line."""
    target, main = Path(out), rank() == 0
    label = f"{name}@{key}" if key else name
    try:
        stopping.listen()
        stopping.die_with_parent()
        params, signature = _signature(name, label)
        with _lock(target) if main else _nothing():
            if main:
                artifact.begin(target)
            record = Record(label, name, key, params.model_dump(), signature["params"]["seed"], main=main)
            run = Run(label, target, signature, params, record)
            status = "FAILED"
            try:
                yield run
                if main:
                    record.save(run.out)
                    _, now = _signature(name, label)
                    if now != signature:
                        changed = next(field for field in now if now[field] != signature[field])
                        where = "params.yaml" if changed == "params" else "src"
                        raise ContractError(where, changed, "unchanged since the stage began", "an edit", "run dvc repro again")
                    began = time.monotonic()
                    artifact.publish(target, params=signature["params"], code=signature["code"], parents=run.parents)
                    record.observe(door_seconds=round(run.door_seconds + time.monotonic() - began, 3))
                    shutil.rmtree(scratch_folder(target), ignore_errors=True)
                status = "FINISHED"
            except Stopped:
                status = "KILLED"
                raise
            finally:
                if main:
                    artifact.discard(target)
                record.close(status)
    except (ContractError, ConfigError, FloatingPointError) as error:
        _exit(f"{label}: {error}", EXIT_BAD_INPUT)
    except Stopped as error:
        _exit(f"{label}: stopped by {error}; nothing was published; start it again with dvc repro", EXIT_STOPPED)
    except (OSError, SafetensorError) as error:
        if not _disk_full(error):
            raise
        place = getattr(error, "filename", None) or target
        _exit(f"{label}: {place}: no space left on device; free some and run dvc repro", EXIT_BAD_INPUT)


def scratch_folder(target: Path) -> Path:
    """Where what the stage of ``target`` can resume from is kept until it is done."""
    return SCRATCH / "scratch" / target


def _signature(name: str, label: str) -> tuple[Any, dict[str, Any]]:
    """The stage's section of params.yaml, and what determines its result besides its inputs."""
    params, seed = load_params(name)
    code = artifact.hash_files(source_files(name))
    return params, {"label": label, "params": {"seed": seed, name: params.model_dump()}, "code": code}


def _disk_full(error: OSError | SafetensorError) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code}" in str(error) for code in codes)  # safetensors passes the code on in words only


def source_files(name: str) -> list[Path]:
    """Source files that dvc.yaml declares as dependencies of stage ``name``."""
    entry = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][name]
    deps = entry.get("do", entry)["deps"]
    return [Path(dep) for dep in deps if dep.startswith(("src/", "stages/"))]


def _exit(message: str, code: int) -> None:
    print(f"featdiff: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One writer per output; a second one is refused and told the first one's pid."""
    folder = SCRATCH / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / target.as_posix().replace("/", "_")
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            writer = handle.read().strip() or "unknown"
            raise ContractError(
                target, "writer", "no other process writing it", f"process {writer}", "wait for it or end it"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _hardware(path: Path) -> tuple[int, bool]:
    """Processes on this machine and whether they run on the CPU, as an accelerate configuration says."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return max(1, found.get("num_processes", 1) // found.get("num_machines", 1)), bool(found.get("use_cpu"))


def main(arguments: list[str]) -> None:
    """Replace this process by ``accelerate launch`` on ``arguments`` (a stage script and its options).

    ``--one`` before the script runs it as a single process whatever the hardware has, without a launcher's start-up."""
    one = arguments[:1] == ["--one"]
    hardware = os.environ.get("ACCELERATE_CONFIG", DEFAULT_HARDWARE)
    if not Path(hardware).is_file():
        _exit(f"ACCELERATE_CONFIG: {hardware}: not found; use a file of conf/accelerate/", EXIT_BAD_INPUT)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    ranks, on_cpu = _hardware(Path(hardware))
    ranks = 1 if one else ranks
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"  # without it, CPU processes do not find each other
    threads = environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not sys.stderr.isatty():
        environment.setdefault("TQDM_MININTERVAL", "10")  # a log file wants a line now and then, not a thousand
    quiet = "--quiet"  # a stage that stopped has said why; the launcher's own traceback would bury it
    accelerate = [
        "-m",
        "accelerate.commands.launch",
        quiet,
        "--config_file",
        hardware,
        "--num_cpu_threads_per_process",
        threads,
    ]
    stopping.die_with_parent()  # holds for the launcher too: it survives execve
    os.execve(sys.executable, [sys.executable, *([] if one else accelerate), *arguments[one:]], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
