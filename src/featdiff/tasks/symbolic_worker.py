"""The process that compares expressions, with limits on its time and memory: ``python symbolic_worker.py <pid of its parent>``

It reads one JSON request a line, ``[reference, answer]`` in LaTeX, and writes one word a line: ``right``, ``wrong``, or
``unread`` where the answer is no expression. Nothing of featdiff is imported here, and math-verify and sympy nowhere else: they
evaluate what they are given, and some of it (``9^{9^9}``) would take for ever. A request that takes more than ``SECONDS`` of
processor time ends the process, by the kernel, so that no code in C can hold it up; its parent starts another.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys

SECONDS = 2
"""Processor time that one request has (the kernel counts whole seconds: it may get up to one more)."""
MEMORY = 2**30
"""Bytes of address space."""
RIGHT, WRONG, UNREAD = "right", "wrong", "unread"
READY = "ready"


def compare(reference: str, answer: str) -> str:
    """Whether two expressions are equal, as math-verify has it: exactly, or where one is a decimal to six places."""
    from math_verify import LatexExtractionConfig, parse, verify

    # A box is the one form that is parsed as a whole; in any other the package searches for something that it can parse. Its
    # own limits on time are signals of a clock, and off.
    how = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}
    box = [LatexExtractionConfig(boxed_match_priority=0)]
    expected, found = (parse(f"\\boxed{{{text}}}", box, **how) for text in (reference, answer))
    if not expected or not found:
        return UNREAD
    return RIGHT if verify(expected, found, timeout_seconds=None) else WRONG


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def serve(parent: int) -> None:
    """Answer requests until there are no more, or the process ``parent`` is gone."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run asks to the end, and closes the line
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    compare("\\sqrt{12} + x", "2\\sqrt{3} + x")  # whatever is imported at its first use
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):  # no file written, no process started
        _limit(what, 0)
    _limit(resource.RLIMIT_AS, MEMORY)
    os.write(answers, f"{READY}\n".encode())
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    while True:
        if not select.select([0], [], [], 1)[0]:
            if os.getppid() != parent:  # another child of it may hold the line open
                return
            continue
        line = sys.stdin.buffer.readline()
        if not line:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (soft if most == resource.RLIM_INFINITY else min(soft, most), most))
        try:
            said = compare(*json.loads(line))
        except Exception:  # the parser raises all kinds of errors on text that it does not expect, MemoryError among them
            said = UNREAD
        os.write(answers, f"{said}\n".encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
