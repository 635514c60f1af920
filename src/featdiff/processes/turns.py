"""Turns: a stage that was started before there is room for it waits here until it may begin (ours).

What comes before the work of a stage (dvc, a launcher, imports) takes seconds, in which its place would stand empty. So
featdiff.pipeline.repro starts a stage ahead, and gives it its turn when another has ended. Linux only.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from featdiff.processes.signals import Stopped

TURNS = "FEATDIFF_TURNS"
"""Environment variable: the socket at which stages ask for their turn. Without it every stage begins at once."""
_LONGEST = 256
"""Bytes of the longest message: the name of a stage."""
_YES = b"+"


@contextmanager
def turn() -> Iterator[None]:
    """In a stage: its work, after it was given its turn. Where the end of the work is reached it is said, so that the end of
    this process counts as that of a stage that did what it should. Raises Stopped where no turn will come any more."""
    if not (path := os.environ.get(TURNS)):
        yield
        return
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answer = b""
    with suppress(OSError):
        line.connect(path)
        line.send(os.environ.get("DVC_STAGE", "").encode())
        answer = line.recv(_LONGEST)
    if not answer:
        raise Stopped("the end of the pipeline before its turn")
    yield
    with suppress(OSError):
        line.send(_YES)
    line.detach()  # open until this process, with its memory, is gone: so the other end hears of it


class Turns:
    """Gives turns to the stages that ask at ``path``, and knows which of them are done."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._names: dict[socket.socket, str] = {}
        """Of the stages at the other ends."""
        self._asking: set[socket.socket] = set()
        """Those that have no answer yet."""
        self._given: set[str] = set()
        self._finished: set[str] = set()
        self._over = False
        self.left: set[str] = set()
        """Stages that did their work and whose processes have ended."""

    def wait(self, seconds: float) -> None:
        """Hear what stages say, for ``seconds`` at most."""
        for key, _ in self._selector.select(seconds):
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is self._listener:
                self._selector.register(self._listener.accept()[0], selectors.EVENT_READ)
            else:
                self._hear(key.fileobj)

    def give(self, stage: str) -> None:
        """Its turn, now or as soon as it asks."""
        self._given.add(stage)
        self._answer()

    def give_no_more(self) -> None:
        """Whoever waits for a turn, or asks for one that was not given, is told that none will come."""
        self._over = True
        self._answer()

    def _hear(self, line: socket.socket) -> None:
        said = b""
        with suppress(OSError):
            said = line.recv(_LONGEST)
        if not said:
            self._end(line)
        elif line in self._names:
            self._finished.add(self._names[line])
        else:
            self._names[line] = os.fsdecode(said)
            self._asking.add(line)
            self._answer()

    def _answer(self) -> None:
        for line in list(self._asking):
            if self._names[line] in self._given:
                self._asking.remove(line)
                with suppress(OSError):
                    line.send(_YES)
            elif self._over:
                self._end(line)

    def _end(self, line: socket.socket) -> None:
        self._selector.unregister(line)
        line.close()
        self._asking.discard(line)
        if (stage := self._names.pop(line, "")) in self._finished:
            self.left.add(stage)
