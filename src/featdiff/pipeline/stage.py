"""A stage from the inside: its lock, signals, parameters, artifacts and the tracking record. :func:`stage` is the one context
manager around the work. Nothing here knows about science or imports torch.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import yaml
from safetensors import SafetensorError

from featdiff.artifacts import artifact, provenance
from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import PAIR
from featdiff.config.models import Arm
from featdiff.config.params import Study, load_study
from featdiff.config.reading import ConfigError, closest
from featdiff.processes import signals
from featdiff.processes.launch import EXIT_BAD_INPUT, LAUNCHER, RANKS
from featdiff.processes.memory import keep_freed
from featdiff.processes.ranks import alive, hardware, leave, process_start, process_state, rank, starters
from featdiff.processes.signals import EXIT_STOPPED, Stopped, say
from featdiff.processes.turns import turn
from featdiff.tracking.record import Curves, Record

if TYPE_CHECKING:
    import torch

    from featdiff.pipeline.checkpoint import Scratch

SCRATCH = Path(".featdiff")
POLL_SECONDS = 0.2


class Run:
    """What a stage may touch: verified inputs, one output folder, scratch to resume from, and the record of metrics."""

    def __init__(self, name: str, out: Path, signature: dict[str, Any], study: Study, params: Any, record: Record) -> None:
        self.name, self.target, self.signature, self.record = name, out, signature, record
        self.study, self.params = study, params
        self.seed: int = study.seed
        self.parents: dict[str, str] = {}
        self.door_seconds = 0.0
        """Spent on verifying what is read and publishing what is written."""
        self.kept: Scratch | None = None
        """What :meth:`scratch` gave; a stop writes what it still holds."""
        self.out = artifact.staging_path(out)
        self.beside: dict[Path, Any] = {}
        """JSON files outside of the artifact by path, written whole once it is published."""
        self.log = record.log
        self.observe = record.observe

    @property
    def device(self) -> torch.device:
        """Where the models and crosscoders of the stage compute. What they are given, and what is written, is on the CPU."""
        return process_state().device

    def scratch(self) -> Scratch:
        """Where this stage keeps what it can resume from; ask when all inputs are read. What an earlier run with other
        inputs, code, params or hardware left is removed."""
        return self._scratch(hardware())

    def shared_scratch(self) -> Scratch:
        """:meth:`scratch` of a stage whose ranks share out its parts, for each rank its own: what was finished by some number
        of ranks is taken up by any other."""
        same = {name: value for name, value in hardware().items() if name in ("threads", "vllm")}
        self.kept = self._scratch(same | {"device": self.device.type}).of_rank()
        return self.kept

    def _scratch(self, hardware: dict[str, Any]) -> Scratch:
        from featdiff.pipeline.checkpoint import Scratch

        key = artifact.hash_json(self.signature | {"parents": self.parents} | hardware)[:16]
        place = scratch_folder(self.target)
        if rank() == 0:
            for other in place.glob("*"):
                if other.name != key:
                    shutil.rmtree(other)
        resume = self.study.resume
        self.kept = Scratch(place / key, resume.every_seconds, resume.share, self.record)
        return self.kept

    def read(self, path: str, *files: str) -> Path:
        """Folder of the artifact at ``path``, after its files (or only ``files``) were hashed against the manifest."""
        folder, began = Path(path), time.monotonic()
        self.parents |= artifact.verify(folder, *files)
        provenance.require_parents(folder, Path())
        self.door_seconds += time.monotonic() - began
        self.record.input(folder.as_posix())
        return folder

    def metrics(self, values: dict[str, Any]) -> None:
        """Final metrics: ``metrics.json`` of the artifact, and numbers of the tracking run."""
        if rank() == 0:
            artifact.write_json(self.out / "metrics.json", values)
            self.record.summary(values)

    def was_made(self) -> bool:
        """Whether what this stage makes was made with that of others (:func:`beforehand`), and is in the output folder now. Ask
        after :meth:`scratch`."""
        assert self.kept is not None
        if not self.kept.kept():
            return False
        if rank() == 0:
            self.metrics(self.kept.take(self.out)["metrics"])
        return True

    def attach(self, name: str) -> None:
        """Show this file of the output folder as an artifact of the tracking run."""
        self.record.attach(name)


def stage_key(option: str, doc: str, known: Callable[[Study], Iterable[str]]) -> str:
    """Which of its kind this stage makes, one of ``known``: what ``option`` says on the command line, else what stands after
    ``@`` in the name that DVC gives (``$DVC_STAGE``), or after ``_`` where a stage of that kind stands by itself; the stage
    ``pair@<arm>`` makes the crosscoder ``pair_<arm>``. DVC would write it into a command as it is, and a shell would run what
    it holds; so no command of dvc.yaml has it."""
    parser = argparse.ArgumentParser(description=doc)
    kind, _, named = os.environ.get("DVC_STAGE", "").partition("@")
    given = f"{PAIR}{named}" if f"{kind}_" == PAIR else named or kind.rpartition("_")[2]
    parser.add_argument(option, dest="key", default=given)
    key: str = parser.parse_args().key
    try:
        if key not in (names := list(known(load_study()))):
            raise ConfigError(f"{option}: {key!r}: unknown; {closest(key, names)}")
    except ConfigError as error:
        _exit(str(error), EXIT_BAD_INPUT)
    return key


@contextmanager
def stage(name: str, out: str, key: str = "", numbers: Callable[[Study], Any] | None = None) -> Iterator[Run]:
    """Everything around a stage's work: reads its numbers (the section of params.yaml that has its name, or what ``numbers``
    takes from the whole), takes the lock of ``out``, opens the record, and publishes ``out`` whole at the end. Bad input ends
    the process with one line."""
    target, main = Path(out), rank() == 0
    label = _label(name, key)
    with _as_a_stage(label, target):
        study, params, signature = _signature(name, key, numbers)
        with turn() if main else _nothing(), _lock(target) if main else _nothing():
            if main:
                artifact.begin(target)
            record = Record(label, name, key, params.model_dump(), study.seed, out=out, main=main)
            run = Run(label, target, signature, study, params, record)
            status = "FAILED"
            try:
                yield run
                if main:
                    record.save(run.out)
                    *_, now = _signature(name, key, numbers)
                    if now != signature:
                        changed = next(field for field in now if now[field] != signature[field])
                        where = "params.yaml" if changed == "params" else "src"
                        raise ContractError(where, changed, "unchanged since the stage began", "an edit", "run dvc repro again")
                    began = time.monotonic()
                    digest = artifact.publish(target)
                    described = provenance.Provenance(
                        digest, label, signature["params"], signature["code"], provenance.versions(), run.parents
                    )
                    provenance.place(target, Path(), described)
                    for path, value in run.beside.items():
                        artifact.place_json(path, value)
                    record.observe(door_seconds=round(run.door_seconds + time.monotonic() - began, 3))
                    shutil.rmtree(scratch_folder(target), ignore_errors=True)
                status = "FINISHED"
            except (Stopped, RuntimeError) as error:  # the latter, too, where another rank has ended that this one waits for
                status = "KILLED" if isinstance(error, Stopped) else status
                if run.kept:
                    run.kept.write_pending()
                raise
            finally:
                signals.close()
                if main:
                    artifact.discard(target)
                record.close(status)
                leave()


@contextmanager
def beforehand(name: str, outs: Mapping[str, str]) -> Iterator[dict[str, Run]]:
    """Everything around making what several stages ``name`` make, before they run, by their keys: as :func:`stage`, with the
    locks of all ``outs``, and nothing is published. What is kept whole in the scratch of one (Scratch.keep) its stage takes
    up."""
    with _as_a_stage(f"{name}s together", Path()), ExitStack() as locks:
        runs = {}
        for key, out in outs.items():
            study, params, signature = _signature(name, key, None)
            if rank() == 0:
                locks.enter_context(_lock(Path(out)))
            runs[key] = Run(_label(name, key), Path(out), signature, study, params, Curves())
        try:
            yield runs
        finally:
            signals.close()
            leave()


@contextmanager
def _as_a_stage(label: str, target: Path) -> Iterator[None]:
    """A process as launchers know it: it stops when it is asked to, or when what started it ends, and bad input ends it with
    one line."""
    try:
        signals.listen()
        signals.outlive_terminal()
        _report("")
        signals.die_with_parent()
        keep_freed()
        if (launcher := os.environ.get(LAUNCHER)) and not alive(*map(int, launcher.split(":"))):
            raise Stopped("the end of its launcher")
        yield
    except (ContractError, ConfigError, FloatingPointError) as error:
        _exit(f"{label}: {error}", EXIT_BAD_INPUT)
    except Stopped as error:
        _exit(f"{label}: stopped by {error}; nothing was published; start it again with dvc repro", EXIT_STOPPED)
    except (OSError, SafetensorError) as error:
        if not _disk_full(error):
            raise
        place = getattr(error, "filename", None) or target
        _exit(f"{label}: {place}: no space left on device; free some and run dvc repro", EXIT_BAD_INPUT)
    except BaseException:
        _report(1)
        raise


def _label(name: str, key: str) -> str:
    return f"{name}@{key}" if key else name


def _report(status: object) -> None:
    """Tell the launcher that this rank is there (""), or how it ends."""
    if folder := os.environ.get(RANKS):
        with suppress(OSError):  # a launcher that was killed no longer asks
            (Path(folder) / str(os.getpid())).write_text(str(status), encoding="utf-8")


def scratch_folder(target: Path) -> Path:
    """Where what the stage of ``target`` can resume from is kept until it is done."""
    return SCRATCH / "scratch" / target


def _signature(name: str, key: str, numbers: Callable[[Study], Any] | None) -> tuple[Study, Any, dict[str, Any]]:
    """The params as a whole, the stage's own, and what determines its result besides its inputs."""
    study = load_study()
    params, arm = numbers(study) if numbers else getattr(study, name), study.arms.get(key)
    entry = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][name]
    definition = entry.get("do", entry)
    in_force: dict[str, Any] = {"seed": study.seed, name: params.model_dump()}
    if arm:
        in_force["arms"] = {key: arm.model_dump()}
    if "roles" in definition.get("params", []):
        in_force["roles"] = study.roles.model_dump()
    code = artifact.hash_files(_source_files(definition["deps"], arm))
    return study, params, {"label": _label(name, key), "params": in_force, "code": code}


def _disk_full(error: OSError | SafetensorError) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code}" in str(error) for code in codes)  # safetensors passes the code on in words only


def _source_files(deps: list[str], arm: Arm | None) -> list[Path]:
    """Source files among the dependencies that dvc.yaml declares, for an ``arm`` those of its method."""
    named = [dep.replace("${item.method}", arm.method) if arm else dep for dep in deps]
    return [Path(dep) for dep in named if dep.startswith(("src/", "stages/"))]


def _exit(message: str, code: int) -> NoReturn:
    say(message)
    _report(code)
    sys.exit(code)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One writer per output; a second one is refused and told the first one's pid. A writer whose launcher or dvc has ended is
    about to end, too: it is waited for."""
    folder = SCRATCH / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / target.as_posix().replace("/", "_")
    with path.open("a+") as handle:
        waiting = False
        while not _locked(handle):
            handle.seek(0)
            writer, *above = handle.read().split() or ["unknown"]
            if all(alive(*map(int, each.split(":"))) for each in above):
                raise ContractError(
                    target, "writer", "no other process writing it", f"process {writer}", "wait for it or end it"
                )
            if not waiting:
                say(f"{target}: process {writer}, which was asked to stop, finishes its step; waiting for it")
            waiting = True
            time.sleep(POLL_SECONDS)
        handle.truncate(0)
        handle.write(" ".join([str(os.getpid()), *(f"{pid}:{process_start(pid)}" for pid in starters())]))
        handle.flush()
        yield


def _locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
