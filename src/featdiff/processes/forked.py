"""The ranks of a stage that shares out its work on the CPUs of one machine, as forks of one process:
``python -m featdiff.processes.forked <ranks> stages/<stage>.py …``

``accelerate launch`` would start every rank, and itself, from nothing. Here large libraries are loaded once, or were before
(featdiff.processes.warm), and this process only waits. Where one rank fails the others are asked to stop, which keeps what they
have finished.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from contextlib import suppress

from featdiff.processes import signals, warm

HOST = "127.0.0.1"
LIBRARIES = ("accelerate", "transformers.generation")
"""What any such stage imports that takes long."""


def main(ranks: int, command: list[str]) -> int:
    """Exit status of the first rank that failed, negative where a signal killed it, else 0. In a rank it does not return."""
    warm.load(LIBRARIES)
    with socket.socket() as free:
        free.bind((HOST, 0))
        meeting = {"MASTER_ADDR": HOST, "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    pids: list[int] = []
    for number in range(ranks):
        if not (pid := os.fork()):
            signals.follow()
            os.environ |= meeting | {"RANK": str(number), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(ranks)}
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
            sys.exit()
        pids.append(pid)
    signals.handle(lambda *_: _stop(pids))  # whoever asks this process; a launcher asks the ranks themselves
    first = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            _stop(pids)
    return first


def _stop(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signals.PARENT_ENDED)  # which is never a second request


if __name__ == "__main__":
    status = main(int(sys.argv[1]), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
