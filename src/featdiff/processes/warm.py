"""A process that has loaded the large libraries, and from which the process of a stage is forked when a launcher asks for one
(ours): ``python -m featdiff.processes.warm <socket>``; featdiff.processes.dvc is another, for dvc.

Of the sixty stages of a study most spend two to ten seconds on importing the same libraries; a fork has them at once. Nothing
of featdiff is loaded here but what starts processes, so that a stage runs the code that its record names. A launcher that gets
no answer starts a process of its own, as without this one. Linux only.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from featdiff.processes import signals

WARM = "FEATDIFF_WARM"
"""Environment variable: the folder of the sockets of warm processes (:func:`address`). Set to nothing, there are none."""
LIBRARIES = (
    "accelerate.commands.launch",
    "transformers.generation",
    "transformers.models.qwen3.modeling_qwen3",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
    "sklearn.linear_model",
    "sklearn.model_selection",
)
"""What stages import that takes long. One that cannot be loaded is left to the stage, which says why."""
DVC = "dvc"
_LENGTH, _NUMBER = struct.Struct("!Q"), struct.Struct("!i")


def address(folder: str, kind: str) -> str:
    """Path of the socket of a process: of that for :data:`DVC`, or of one with so many threads, as OpenMP asks how many there
    are once, when it is loaded."""
    return str(Path(folder) / f"{kind}.sock")


class Child(NamedTuple):
    """A process that was asked for, as its launcher sees it."""

    pid: int
    line: socket.socket
    """Its closing tells the child that the launcher has ended."""

    def wait(self) -> int | None:
        """Its wait status, once it has ended; None where the process that it was forked from is gone."""
        found = self.line.recv(_NUMBER.size, socket.MSG_WAITALL)
        return int(_NUMBER.unpack(found)[0]) if len(found) == _NUMBER.size else None


def ask(
    command: list[str], environment: dict[str, str], kind: str = "", streams: tuple[int, int, int] = (0, 1, 2)
) -> Child | None:
    """Have ``command`` (what would stand after ``python``: a script or ``-m`` and a module, and options) run by a fork, with
    ``environment``, ``streams`` and this process's working folder. ``kind``: see :func:`address`, by default as many threads as
    ``environment`` says. None where no process answers."""
    if not (folder := environment.get(WARM)):
        return None
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(OSError):
        line.connect(address(folder, kind or environment.get("OMP_NUM_THREADS", "")))
        asked = json.dumps([command, environment, str(Path.cwd())]).encode()
        socket.send_fds(line, [_LENGTH.pack(len(asked))], streams)
        line.sendall(asked)
        found = line.recv(_NUMBER.size, socket.MSG_WAITALL)
        if len(found) == _NUMBER.size:
            return Child(int(_NUMBER.unpack(found)[0]), line)
    line.close()
    return None


@contextmanager
def started(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Warm processes for stages with ``environment`` and for dvc; gives the environment in which both are found."""
    kinds = {"featdiff.processes.warm": environment["OMP_NUM_THREADS"], "featdiff.processes.dvc": DVC}
    quiet = subprocess.DEVNULL
    with tempfile.TemporaryDirectory(prefix="featdiff-") as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, address(folder, kind)], env=environment if kind != DVC else None,
                stdin=quiet, stdout=quiet, stderr=quiet, process_group=0, preexec_fn=signals.follow,
            )
            for module, kind in kinds.items()
        ]  # fmt: skip
        try:
            yield {WARM: folder}
        finally:
            for process in processes:
                process.terminate()
                process.wait()


class _Server:
    """Forks a child for every request, and tells each launcher how its child ended."""

    def __init__(self, listener: socket.socket, sweeps: bool) -> None:
        self._listener, self._sweeps = listener, sweeps
        self._lines: dict[int, socket.socket] = {}
        """To the launcher of each child, by pid."""
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> tuple[list[str], dict[str, str], str]:
        """Returns in a child, with what it was asked for. The process itself stays here until a signal ends it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, self._accept)
            selector.register(self._woken, selectors.EVENT_READ, self._reap)
            while True:
                for key, _ in selector.select():
                    if (asked := key.data()) is not None:
                        return asked

    def _accept(self) -> tuple[list[str], dict[str, str], str] | None:
        line, _ = self._listener.accept()
        try:
            head, streams, *_ = socket.recv_fds(line, _LENGTH.size, 3)
            (length,) = _LENGTH.unpack(head)
            command, environment, folder = json.loads(line.recv(length, socket.MSG_WAITALL))
        except (OSError, ValueError, struct.error):  # a launcher that ended while it asked
            line.close()
            return None
        if pid := os.fork():
            os.setpgid(pid, pid)  # here, too: the launcher may signal the group as soon as it knows the pid
            for stream in streams:
                os.close(stream)
            self._lines[pid] = line
            with suppress(OSError):
                line.sendall(_NUMBER.pack(pid))
            return None
        self._become_a_child(line, streams)
        return command, environment, folder

    def _become_a_child(self, line: socket.socket, streams: list[int]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (self._listener, self._woken, self._wakes, *self._lines.values()):
            other.close()
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # What the death of a parent tells a child, the closing of this line does: Linux sends the signal.
        fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(line, getattr(fcntl, "F_SETSIG", 10), signals.PARENT_ENDED)
        fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | os.O_ASYNC)
        self._lines = {os.getpid(): line}

    def _reap(self) -> None:
        self._woken.recv(4096)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                with suppress(ProcessLookupError):
                    if self._sweeps:
                        os.killpg(pid, signal.SIGKILL)  # what it left behind
                with self._lines.pop(pid) as line, suppress(OSError):
                    line.sendall(_NUMBER.pack(status))


def load(libraries: Iterable[str]) -> None:
    """Import what processes that are forked from this one will need."""
    for library in libraries:
        with suppress(Exception):
            importlib.import_module(library)
    gc.freeze()  # a child then neither looks through what is loaded here nor copies its pages


def main(path: str, libraries: Iterable[str], sweeps: bool = True) -> None:
    """Load ``libraries`` and listen at ``path``; a child ends as the command that it runs, and what is left of its group then
    is killed if ``sweeps``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    load(libraries)
    listener.bind(path)
    listener.listen()
    server = _Server(listener, sweeps)
    command, environment, folder = server.serve()
    signals.follow()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], LIBRARIES)
