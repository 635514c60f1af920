"""How a stage runs: command line, lock, signals, parameters, artifacts and the tracking record.

``python -m featdiff.launch [--one] stages/<stage>.py …`` hands a stage to ``accelerate launch`` under the hardware
that ``$ACCELERATE_CONFIG`` names, so that hardware is never part of a stage's signature. Inside the stage,
:func:`stage` is the one context manager around the work. Nothing here knows about science or imports torch.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from safetensors import SafetensorError

from featdiff import artifact
from featdiff.artifact import ContractError
from featdiff.config import ConfigError, load_params
from featdiff.tracking import Record

SCRATCH = Path(".featdiff")
DEFAULT_HARDWARE = "conf/accelerate/cpu.yaml"
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived; the stage ends non-zero and publishes nothing."""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Run:
    """What a stage may touch: verified inputs, one output folder, and the record of metrics."""

    def __init__(self, name: str, out: Path, params: Any, seed: int, record: Record) -> None:
        self.name, self.target, self.params, self.seed, self.record = name, out, params, seed, record
        self.parents: dict[str, str] = {}
        self.out = artifact.staging_path(out)
        self.scratch = SCRATCH / "scratch" / out
        self.log = record.log
        self.observe = record.observe

    def read(self, path: str, *files: str) -> Path:
        """Folder of the artifact at ``path``, after its files (or only ``files``) were hashed against the manifest."""
        folder = Path(path)
        self.parents |= artifact.verify(folder, *files)
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
    _die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        params, seed = load_params(name)
        with _lock(target) if main else _nothing():
            if main:
                artifact.begin(target)
            record = Record(label, name, key, params.model_dump(), seed, main=main)
            run = Run(label, target, params, seed, record)
            status = "FAILED"
            try:
                yield run
                if main:
                    record.save(run.out)
                    code = artifact.hash_files(source_files(name))
                    signature = {"seed": seed, name: params.model_dump()}
                    artifact.publish(target, params=signature, code=code, parents=run.parents)
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


def _stop(number: int, _frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGINT):  # the launcher and the parent's death may both send one
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def _die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends (killing dvc must leave no twin)."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


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

    ``--one`` before the script starts a single process whatever the hardware has."""
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
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        quiet,
        "--config_file",
        hardware,
        "--num_cpu_threads_per_process",
        threads,
        *(["--num_processes", "1"] if one else []),
        *arguments[one:],
    ]
    _die_with_parent()  # holds for the launcher too: it survives execve
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
