"""Work that gives way at every piece of rows it reads, so that what reads the same rows can do so side by side (ours).

A function of this kind is a generator: it yields where it is before each piece, and returns what it made. :func:`alone` runs it
as the plain function that it would be; :func:`in_turns` runs several, the one that is furthest behind first. Nothing that it
computes depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import TypeAlias, TypeVar

from featdiff.processes.signals import Stopped, asked

T = TypeVar("T")
MEAN, FIT, FEATURES, HELDOUT = range(4)
"""Passes over the rows, in the order in which a crosscoder makes them."""
Turn: TypeAlias = tuple[int, int]
"""Which pass, and what of it comes next: a row, or a step."""
BEGIN: Turn = (-1, 0)
Turns: TypeAlias = Generator[Turn, None, T]


def alone(work: Turns[T]) -> T:
    """What ``work`` makes, done without a break."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            made: T = end.value
            return made


def in_turns(
    works: Mapping[str, Turns[T]],
    ended: Callable[[str, T], None],
    failed: Callable[[str, Exception], None],
    stops: Callable[[], bool],
) -> None:
    """Do ``works`` piece by piece: all that are furthest behind do one, and so on. ``ended`` gets what each has made,
    ``failed`` what was raised in it, and the others go on. Where ``stops`` says so, or one of them is stopped, each that has
    done anything does one more piece, in which it keeps what it has; then :class:`~featdiff.processes.signals.Stopped` is
    raised."""
    at: dict[str, Turn] = dict.fromkeys(works, BEGIN)
    moved, stopped = set[str](), None

    def go_on(name: str) -> None:
        try:
            at[name] = next(works[name])
            moved.add(name)
        except StopIteration as end:
            del at[name]
            ended(name, end.value)
        except Exception as error:
            del at[name]
            failed(name, error)

    try:
        while at and not stopped:
            behind = min(at.values())
            for name in [name for name, turn in at.items() if turn == behind]:
                try:
                    go_on(name)
                except Stopped as request:
                    stopped = request
                    del at[name]
            if not stopped and stops():
                stopped = Stopped(asked() or "a signal to another rank")
        if stopped:
            for name in [name for name in at if name in moved]:
                with suppress(Stopped):
                    go_on(name)
            raise stopped
    finally:
        for work in works.values():
            work.close()
