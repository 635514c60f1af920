"""A study on machines that may vanish and share no file system, with DVC's remote as what stays (ours):
``python -m featdiff.pipeline.carry [run [--every SECONDS] | load]``.

``run`` is ``make repro`` that begins with what the remote has of this profile. It puts there what each stage has finished, and
now and then, and when it is asked to stop, what stages at work would go on from. ``load`` only fetches, to read the results.

Finished outputs are DVC's (``dvc push``). Beside them, in ``going_on/<profile>`` of the remote, lies what DVC does not keep:
dvc.lock with the stages that are there, outputs that it caches nowhere, and the checkpoints of stages at work, whose files are
copied while they are written. That is safe, because a checkpoint that is not whole is never taken up
(featdiff.pipeline.checkpoint). One machine at a time works on a profile.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import yaml

from featdiff.artifacts.artifact import ContractError, inside, one_line, require
from featdiff.artifacts.dvc import LOCK, Output, cache_folder, locked, stored
from featdiff.artifacts.remote import default
from featdiff.config.params import load_study
from featdiff.config.reading import ConfigError
from featdiff.pipeline.stage import SCRATCH, scratch_folder
from featdiff.processes import signals
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import EXIT_STOPPED, say

PLACE = "going_on"
LOADED = SCRATCH / "loaded"
"""Written once a machine has what the remote had: from then on its own files are the newer ones."""
EVERY = 600.0
POLL_SECONDS = 1.0

State = tuple[int, int]
"""By which a file is seen to have changed: when it was written, and its size."""


class Store:
    """What the remote has of one profile. Raises ConfigError where there is no remote."""

    def __init__(self, profile: str) -> None:
        from dvc.repo import Repo

        name = default()
        with Repo() as repo:
            remote = repo.cloud.get_remote(name)
            self._stages = {stage.addressing for stage in repo.index.stages}
            outs = [out for stage in repo.index.stages for out in stage.outs if not out.use_cache]
            self._beside = [Path(out.def_path) for out in outs]
        self._fs, self._root = remote.fs, remote.fs.join(remote.path, PLACE, profile)
        self._sent: dict[str, State | None] = dict.fromkeys(self._names())
        """Files there, and how those were here that came from here or went here."""
        self._pushed: dict[str, str] = {}
        """md5 of the outputs there, by path."""
        self._lock = b""

    def _names(self) -> list[str]:
        if not self._fs.exists(self._root):
            return []
        skip = len(self._fs.parts(self._root))
        names = ["/".join(self._fs.parts(place)[skip:]) for place in self._fs.find(self._root)]
        for name in names:
            require(inside(name), self._root, "files", "names that lead to this folder", name, "remove it there")
        return names

    def load(self) -> list[str]:
        """Fetch everything; returns the stages that are finished."""
        for name in self._sent:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(self._place(name), name)
            self._sent[name] = _state(Path(name))
        if LOCK not in self._sent:
            return []
        outputs = locked(Path())
        finished = sorted({output.label for output in outputs} & self._stages)
        if finished:
            _dvc("pull", "--force", *finished)
        self._pushed = {output.path: output.md5 for output in outputs}
        return finished

    def save(self) -> None:
        """Push what has been finished since, then put the rest beside it: dvc.lock there never names what is not there."""
        with suppress(FileNotFoundError, ContractError):  # DVC is writing it just now: next time
            lock, outputs = Path(LOCK).read_bytes(), locked(Path())
            if lock != self._lock and Path(LOCK).read_bytes() == lock:
                self._push(lock, outputs)
        files = {path.as_posix(): path for path in self._files()}
        for name, path in files.items():
            with suppress(FileNotFoundError):  # a checkpoint in whose place a newer one came meanwhile
                if self._sent.get(name) != (state := _state(path)):
                    self._put(path, name)
                    self._sent[name] = state
        for name in self._sent.keys() - files.keys() - {LOCK}:
            self._fs.remove(self._place(name))
            del self._sent[name]

    def _push(self, lock: bytes, outputs: list[Output]) -> None:
        """Push the stages whose outputs are in DVC's cache here or were found there, and name them in dvc.lock there."""
        cache, whole = cache_folder(Path()), dict[str, bool]()
        for output in outputs:
            known = Path(output.path) in self._beside or self._pushed.get(output.path) == output.md5
            whole[output.label] = whole.get(output.label, True) and (known or stored(cache, output.md5).exists())
        finished = {label for label, there in whole.items() if there and label in self._stages}
        new = {each.label for each in outputs if each.label in finished and self._pushed.get(each.path) != each.md5}
        if new:
            _dvc("push", *sorted(new))
        found = yaml.safe_load(lock)
        found["stages"] = {label: entry for label, entry in found["stages"].items() if label in finished}
        self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(self._place(LOCK), yaml.safe_dump(found, sort_keys=False).encode())
        self._pushed |= {output.path: output.md5 for output in outputs if output.label in finished}
        self._lock = lock

    def _place(self, name: str) -> str:
        return str(self._fs.join(self._root, *name.split("/")))

    def _put(self, path: Path, name: str) -> None:
        self._fs.makedirs(self._fs.parent(self._place(name)), exist_ok=True)
        self._fs.put_file(str(path), self._place(name))

    def _files(self) -> Iterator[Path]:
        """Outputs that DVC does not cache, and what stages at work go on from."""
        yield from (path for path in self._beside if path.is_file())
        yield from (path for path in sorted(scratch_folder(Path()).rglob("*")) if path.is_file())


def _state(path: Path) -> State:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _dvc(*words: str) -> None:
    """Of a process group of its own, so that a request to stop does not reach it."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, process_group=0)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ConfigError(f"dvc {words[0]}: {one_line((said or [f'status {done.returncode}'])[0])}")


def kept(store: Store) -> bool:
    """Whether everything could be put into the store; says in a line why not. The study goes on without."""
    try:
        store.save()
    except Exception as error:  # each kind of remote has errors of its own
        say(f"not carried: {one_line(str(error)) or type(error).__name__}")
        return False
    return True


def run(store: Store, every: float) -> int:
    """Exit status of the study, or 1 where it ended well and could not be kept."""
    if not LOADED.exists():
        found = store.load()
        LOADED.parent.mkdir(exist_ok=True)
        LOADED.touch()
        say(f"going on after {len(found)} finished stages" if found else "nothing of this profile is there yet")
    requests = signals.Requests()
    study = subprocess.Popen([sys.executable, "-m", "featdiff.pipeline.repro"], process_group=0, preexec_fn=signals.follow)

    def hand_on(number: int, _frame: FrameType | None) -> None:
        if requests.first(number) is not None:
            study.send_signal(signal.SIGTERM)

    signals.handle(hand_on)
    lock, due = b"", time.monotonic() + every
    while study.poll() is None:
        time.sleep(POLL_SECONDS)
        with suppress(FileNotFoundError):
            if (now := Path(LOCK).read_bytes()) != lock or time.monotonic() >= due:
                lock, due = now, time.monotonic() + every
                kept(store)
    whole = kept(store)
    if requests.asked and study.returncode:
        return EXIT_STOPPED
    return study.returncode or int(not whole)


def main(arguments: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.pipeline.carry", description="a study on machines that may vanish")
    parser.add_argument("command", nargs="?", choices=["run", "load"], default="run")
    parser.add_argument("--every", type=float, default=EVERY, metavar="SECONDS", help="between two copies of unfinished work")
    asked = parser.parse_args(arguments)
    signals.outlive_terminal()
    try:
        store = Store(load_study().profile)
        if asked.command == "run":
            return run(store, asked.every)
        say(f"fetched {len(store.load())} finished stages")
    except (ConfigError, ContractError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
