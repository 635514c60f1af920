"""Whether two expressions are equal, asked of a process of its own (featdiff.tasks.symbolic_worker) that lives on between
questions, is replaced when it dies, and ends with this one. Every process that grades has its own.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from importlib.util import find_spec
from typing import IO

from featdiff.artifacts.artifact import ContractError
from featdiff.tasks import symbolic_worker
from featdiff.tasks.symbolic_worker import READY, UNREAD

PATIENCE = 120
"""Seconds until a silent worker is given up. Its limit is on processor time, so that a busy machine gives the same verdicts;
this one is for a worker that is stopped, or waits for something."""
START = 300
TOO_MUCH = (-signal.SIGXCPU, -signal.SIGKILL)
"""How a worker ends that a request took over a limit."""


class Worker:
    """The line to the process that compares. Threads take turns."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()
        self.stopped = 0
        """Requests that were given up, for their time or memory."""

    def ask(self, reference: str, answer: str) -> str:
        """``right``, ``wrong`` or ``unread``; the last also for what takes too long. ContractError without the package."""
        request = json.dumps([reference, answer]).encode() + b"\n"
        with self.lock:
            for _ in range(2):  # whatever else may have ended the worker meanwhile says nothing about this request
                if (said := self._ask(request)) is not None:
                    return said
                if self.stop() in TOO_MUCH:
                    break
            self.stopped += 1
            return UNREAD

    def _ask(self, request: bytes) -> str | None:
        process = self.process or self._start()
        try:
            _pipe(process.stdin).write(request)
        except BrokenPipeError:
            return None
        return _line(process, PATIENCE)

    def _start(self) -> subprocess.Popen[bytes]:
        todo = "pip install -e .[math]"
        if find_spec("math_verify") is None:
            raise ContractError("params.yaml", "prepare.tasks", "the package math-verify installed", "no module of it", todo)
        # -P: the folder of the script, whose modules have everyday names, is no place to import from.
        command = [sys.executable, "-P", str(symbolic_worker.__file__), str(os.getpid())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, bufsize=0, **pipes)  # type: ignore[call-overload]
        if _line(self.process, START) != READY:
            code = self.stop()
            raise ContractError("math-verify", "worker", "a process that starts", f"it ended with {code}", todo)
        return self.process

    def stop(self) -> int | None:
        """End the worker; returns how it ended."""
        process, self.process = self.process, None
        if process is None:
            return None
        _pipe(process.stdin).close()
        try:
            process.wait(timeout=0.5)  # one that is dying has its own reason, and one that waits for a request ends now
        except subprocess.TimeoutExpired:
            process.kill()
        _pipe(process.stdout).close()
        return process.wait()

    def forget(self) -> None:
        """In a process that was forked from the worker's: it is not ours, nor is a lock that another thread held."""
        if self.process is not None:
            _pipe(self.process.stdin).close()
            _pipe(self.process.stdout).close()
            self.process.returncode = 0  # nobody to wait for
        Worker.__init__(self)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _line(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """The next line of ``process``; None where it has ended, or says nothing for ``seconds``."""
    out, said = _pipe(process.stdout), b""
    poll = select.poll()
    poll.register(out, select.POLLIN)
    while not said.endswith(b"\n"):
        if not poll.poll(seconds * 1000) or not (read := os.read(out.fileno(), 4096)):
            return None
        said += read
    return said.decode().strip()


WORKER = Worker()
atexit.register(WORKER.stop)
os.register_at_fork(after_in_child=WORKER.forget)


@lru_cache(maxsize=100_000)
def equal(reference: str, answer: str) -> str:
    """:meth:`Worker.ask`; the groups of GRPO ask the same again and again."""
    return WORKER.ask(reference, answer)
