"""Being asked to stop: a stage finishes its current step, keeps what it can go on from, and ends with status 75.

A request is a SIGTERM, SIGINT or SIGHUP, or the end of the process that started this one. One key press can reach a
process several times (from the terminal, from its launcher, by its parent's death): what comes within :data:`SAME` seconds of
the first is the same request. A later signal is a second one, and ends the stage at once, unless it is one that nobody sends
twice: a terminal that closes hangs up once for itself and once more when its session leader (here dvc) has ended.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PARENT_ENDED = signal.SIGUSR2
"""Sent by Linux when the parent ends: a signal of its own, because it repeats a request and is never a second one."""
NEVER_SECOND = (PARENT_ENDED, signal.SIGHUP)
SAME = 0.3
"""Seconds within which signals count as one request."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Stopped(BaseException):
    """A signal asked this process to stop; the stage ends non-zero and publishes nothing."""


class Requests:
    """Tells the first request from its echoes and from a second one."""

    def __init__(self) -> None:
        self.asked, self._first = "", 0.0

    def first(self, number: int) -> bool | None:
        """True for the first request, None for an echo of it, False for a second one."""
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = _name(number), now
            return True
        return None if number in NEVER_SECOND or now - self._first < SAME else False


def _name(number: int) -> str:
    return "the end of the process that started it" if number == PARENT_ENDED else signal.Signals(number).name


_requests, _deferred = Requests(), False


def handle(handler: Any) -> None:
    """Have ``handler`` called for every request. A SIGHUP that was ignored (``nohup``) stays ignored."""
    for number in (*SIGNALS, PARENT_ENDED):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def listen() -> None:
    """Raise :class:`Stopped` at a request from here on (see :func:`deferred`)."""
    global _requests, _deferred
    _requests, _deferred = Requests(), False
    handle(_stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    first = _requests.first(number)
    if first is None:
        return
    if _deferred and first:
        say(f"{_requests.asked}: stopping at the next checkpoint; once more stops at once")
        return
    raise Stopped(_requests.asked)


def close() -> None:
    """Pay no heed to requests from here on: the stage is ending as it was asked to."""
    handle(signal.SIG_IGN)


def asked() -> str:
    """What asked to stop; empty if nothing did."""
    return _requests.asked


@contextmanager
def deferred() -> Iterator[None]:
    """Within, the first request only sets :func:`asked`; the work inside keeps what it has done and ends by itself. What was
    asked and not seen inside raises :class:`Stopped` at the end."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before
    if _requests.asked and not before:
        raise Stopped(_requests.asked)


def die_with_parent(number: int = PARENT_ENDED, parent: int | None = None) -> None:
    """Ask Linux to send ``number`` to this process when the one that started it ends: killing dvc must leave no twin.
    ``parent``: its pid, where it was known before this process came to ask."""
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before this could be asked for
            raise Stopped(_name(PARENT_ENDED))


def follow() -> None:
    """In a new process that leads a group of its own: end with the one that started it, and write to the terminal from the
    background."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    die_with_parent(signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be waited for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


class Lasting:
    """A standard stream that outlives its terminal: a closed window must not stop a stage from writing its checkpoint."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._unless_gone(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._unless_gone(self._stream.flush)

    def _unless_gone(self, act: Any, *given: Any) -> Any:
        try:
            return act(*given)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            null = os.open(os.devnull, os.O_WRONLY)  # what the stream still holds goes there
            os.dup2(null, self._stream.fileno())
            os.close(null)
            return None


def outlive_terminal() -> None:
    """Make standard output and error last longer than the terminal they go to."""
    sys.stdout, sys.stderr = (stream if isinstance(stream, Lasting) else Lasting(stream) for stream in (sys.stdout, sys.stderr))


def say(text: str) -> None:
    print(f"featdiff: {text}", file=sys.stderr, flush=True)
