"""Being asked to stop: SIGTERM or SIGINT end a stage at once, or at the next checkpoint where one can be written."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A signal asked this process to stop; the stage ends non-zero and publishes nothing."""


_asked, _deferred = "", False


def listen() -> None:
    """Raise :class:`Stopped` at SIGTERM and SIGINT from here on (see :func:`deferred`)."""
    global _asked, _deferred
    _asked, _deferred = "", False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    global _asked
    first, _asked = not _asked, signal.Signals(number).name
    if _deferred and first:
        print(f"featdiff: {_asked}: stopping at the next checkpoint; once more stops at once", file=sys.stderr, flush=True)
        return
    for other in (signal.SIGTERM, signal.SIGINT):  # the launcher and the parent's death may both send one
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(_asked)


def asked() -> str:
    """Name of the signal that asked to stop; empty if none did."""
    return _asked


@contextmanager
def deferred() -> Iterator[None]:
    """Within, the first signal only sets :func:`asked`; the work inside writes a checkpoint and ends by itself. What was
    asked and not seen inside raises :class:`Stopped` at the end."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _asked:
        raise Stopped(_asked)


def die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends (killing dvc must leave no twin)."""
    if sys.platform == "linux":
        parent, parent_death_signal = os.getppid(), 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it could be asked for
            raise Stopped("the death of the process that started it")
