"""Starts the processes of one stage and stays with them to the end:
``python -m featdiff.processes.launch [--one | --shared] stages/<stage>.py …``

A stage is handed to ``accelerate launch`` under the hardware that ``$ACCELERATE_CONFIG`` names, so that hardware is never
part of a stage's signature; ``--one`` runs it as a single process instead, without a launcher's start-up. ``--shared`` says
that ranks share out the work of the stage, whose result does not depend on how many they are. Where the hardware has one only,
that is a single process, too; on the CPUs of one machine there may be more of them (:data:`SHARE`), and they are forks of one
process (featdiff.processes.forked).

Signals go to the ranks and to nobody else: accelerate's launcher would die of one, and take its ranks along in the middle
of a step. It and the ranks are therefore in process groups of their own (each of several ranks in one), which no key press
reaches, and this process hands on each request, waits however long the current step takes, and ends with the status that the
ranks left behind: the launcher knows only "failed". A second request ends everything at once. Nothing here imports more than
it needs: this process stays as long as the stage.

Where the hardware is several machines (``num_machines``), this process starts a launcher like itself on each of them, by the
command in ``$FEATDIFF_NODES``, and hands requests to that command. They share a file system.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from featdiff.processes import signals, warm
from featdiff.processes.ranks import process_start
from featdiff.processes.signals import EXIT_STOPPED, say

DEFAULT_HARDWARE = "conf/accelerate/cpu.yaml"
EXIT_BAD_INPUT = 2
RANKS = "FEATDIFF_RANKS"
"""Environment variable: a folder in which each rank writes a file, named after its pid and holding its exit status at last."""
LAUNCHER = "FEATDIFF_LAUNCHER"
"""Environment variable: pid and start time of the launcher. A rank that finds it gone when it begins has nobody left above
that could end it."""
STARTER = "FEATDIFF_STARTER"
"""Environment variable: pid of the process, dvc as a rule, that started ``stages/run``, which becomes this launcher: it may
end while a Python is still being looked for."""
NODES = "FEATDIFF_NODES"
"""Environment variable: a command that starts the command after it once on every machine, passes its environment and the
signals that it gets on, and sets :data:`NODE`: ``srun --ntasks-per-node=1`` does."""
NODE = "SLURM_PROCID"
"""Environment variable: the number of this machine, from 0."""
MEETING = "FEATDIFF_MEETING"
"""Environment variable of the launcher on each machine: host and port at which the ranks of all of them meet."""
SHARE = "FEATDIFF_SHARE"
"""Environment variable: how many times the ranks of its hardware a stage may have that is started with ``--shared`` on the CPUs
of one machine. ``make repro`` sets it for a stage to which it leaves all cores."""
POLL_SECONDS = 0.2
GRACE = 2
"""Seconds that ranks have to end by themselves after a second request."""
SPIN = "5000"
"""How often a thread of OpenMP looks for its fellows before it sleeps. The default, some millions, wastes a core for as long as
a fellow waits for its turn: beside two busy processes training was up to thirty times slower (docs/reliability.md)."""


class Launch:
    """The processes of a stage, from start to end."""

    def __init__(self, ranks: Path) -> None:
        self._ranks, self._requests = ranks, signals.Requests()
        self._group = 0
        signals.adopt_orphans()
        signals.handle(self._hand_on)
        signal.signal(signal.SIGALRM, lambda *_: self._signal_group(signal.SIGKILL))
        signal.signal(signal.SIGTSTP, self._pause)
        signals.die_with_parent(parent=int(os.environ.get(STARTER, "0")))

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Exit status of ``command`` and of all that it started: 0, 2 (bad input), 75 (stopped), or another failure."""
        environment = environment | {RANKS: str(self._ranks), LAUNCHER: f"{os.getpid()}:{process_start(os.getpid())}"}
        interpreter, *words = command
        fork = warm.ask(words, environment) if interpreter == sys.executable else None
        child = fork or subprocess.Popen(command, env=environment, process_group=0, preexec_fn=signals.follow)
        self._group = child.pid
        if self._requests.asked:  # while it was being started
            self._signal_group(signal.SIGTERM)
        ended = fork.wait() if fork else self._last_of_the_group()
        if ended is None:  # what it was forked from has ended, which asks it to stop, and nobody else could tell how it does
            while process_start(self._group):
                time.sleep(POLL_SECONDS)
            ended = signal.SIGTERM
        if not ended:
            return 0
        found = {path.read_text(encoding="utf-8") for path in self._ranks.iterdir()}
        found |= {str(os.waitstatus_to_exitcode(ended))}  # of a launcher on another machine, or of the one rank itself
        for status in (EXIT_BAD_INPUT, EXIT_STOPPED):
            if str(status) in found:
                return status
        if self._requests.asked:
            say(f"stopped at once by {self._requests.asked}; nothing was published; start it again with dvc repro")
            return EXIT_STOPPED
        if "" in found:
            say("a process of the stage was killed (out of memory?); start it again with dvc repro")
        return os.waitstatus_to_exitcode(ended) if os.WIFEXITED(ended) else 128 + os.WTERMSIG(ended)

    def _last_of_the_group(self) -> int | None:
        """Wait status of the process that leads the group, once it, the ranks and all of the group have ended."""
        ended: int | None = None
        with suppress(ChildProcessError):
            while True:  # ranks whose launcher was killed are children of this process now
                pid, status = os.waitpid(-1, 0)
                ended = status if pid == self._group else ended
                if ended is not None and not any(map(_exists, self._pids())):
                    if not _exists(-self._group):
                        break
                    signal.alarm(GRACE)  # for whatever a rank left behind
        signal.alarm(0)
        return ended

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        first = self._requests.first(number)
        if first is None:
            return
        ranks = self._pids()
        if not ranks:  # nothing has begun that would be worth keeping
            self._signal_group(signal.SIGTERM)
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if number == signals.PARENT_ENDED else number)
        if not first:
            signal.alarm(GRACE)

    def _pids(self, *, at_work: bool = False) -> list[int]:
        """Of the ranks, or of those that have not said how they ended."""
        return [int(path.name) for path in self._ranks.iterdir() if not (at_work and path.stat().st_size)]

    def _signal_group(self, number: int) -> None:
        """All that belongs to the stage: accelerate's launcher gives each of several ranks a group of its own."""
        for process in [*([-self._group] if self._group else []), *self._pids(at_work=True)]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def _pause(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z stops the ranks too, and ``fg`` lets them go on."""
        self._signal_group(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_group(signal.SIGCONT)


def _exists(pid: int) -> bool:
    """Whether there is such a process, or for a negative number such a group."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Hardware(NamedTuple):
    """What stages run on, as an accelerate configuration says."""

    path: str
    machines: int
    ranks: int
    """Processes on each."""
    on_cpu: bool

    @classmethod
    def chosen(cls) -> Hardware | None:
        """That of $ACCELERATE_CONFIG, or of the default; None, with a line that says so, where there is no such file."""
        import yaml

        path = os.environ.get("ACCELERATE_CONFIG", DEFAULT_HARDWARE)
        if not Path(path).is_file():
            say(f"ACCELERATE_CONFIG: {path}: not found; use a file of conf/accelerate/")
            return None
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        machines = max(1, found.get("num_machines", 1))
        return cls(path, machines, max(1, found.get("num_processes", 1) // machines), bool(found.get("use_cpu")))


def _on_every_machine(arguments: list[str], environment: dict[str, str]) -> list[str]:
    """The command that starts a launcher on each machine, whose ranks meet on this one."""
    environment.pop(STARTER, None)  # none of their parents
    with socket.socket() as free:
        free.bind(("", 0))
        environment[MEETING] = f"{socket.gethostname()}:{free.getsockname()[1]}"
    return [*shlex.split(os.environ[NODES]), sys.executable, "-m", "featdiff.processes.launch", *arguments]


def share_of_cores(parts: int) -> int:
    """Cores of this machine for each of ``parts``, at least one."""
    return max(1, (os.cpu_count() or 1) // parts)


def environment_of(ranks: int, on_cpu: bool) -> dict[str, str]:
    """That of a stage's processes, of which there are ``ranks`` on this machine."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"  # without it, CPU processes do not find each other
    environment.setdefault("OMP_NUM_THREADS", str(_threads(ranks, on_cpu)))
    environment.setdefault("GOMP_SPINCOUNT", SPIN)
    return environment


def _threads(ranks: int, on_cpu: bool) -> int:
    """Threads of each rank: on a CPU what params.yaml says, else its share of the cores."""
    from featdiff.config.reading import PARAMS, ConfigError, read_yaml

    given = None
    with suppress(ConfigError):  # the stage says what is wrong with it
        given = read_yaml(PARAMS).get("threads")
    return given if on_cpu and isinstance(given, int) and given > 0 else share_of_cores(ranks)


def main(arguments: list[str]) -> int:
    """Run ``arguments`` (a stage script and its options) to the end; returns the exit status."""
    hardware = Hardware.chosen()
    if hardware is None:
        return EXIT_BAD_INPUT
    option = next((word for word in arguments[:1] if word in ("--one", "--shared")), None)
    machines, ranks = (1, 1) if option == "--one" else (hardware.machines, hardware.ranks)
    forked = option == "--shared" and hardware.on_cpu and machines == 1
    if forked:
        if not (share := os.environ.get(SHARE, "1")).isdecimal() or int(share) < 1:
            say(f"{SHARE}: {share!r}: a number from 1 on is expected; unset it")
            return EXIT_BAD_INPUT
        ranks *= int(share)
    meeting = os.environ.get(MEETING)
    if machines > 1 and not (meeting or os.environ.get(NODES)):
        say(f"{hardware.path}: num_machines: {machines}: say in ${NODES} what starts a command on each of them, such as srun")
        return EXIT_BAD_INPUT
    environment = environment_of(ranks, hardware.on_cpu)
    if not sys.stderr.isatty():
        environment.setdefault("TQDM_MININTERVAL", "10")  # a log file wants a line now and then, not a thousand
    accelerate = ["-m", "featdiff.processes.accelerated", "--quiet", "--config_file", hardware.path]
    accelerate += ["--num_cpu_threads_per_process", environment["OMP_NUM_THREADS"]]
    if meeting and machines > 1:
        host, _, port = meeting.rpartition(":")
        accelerate += ["--machine_rank", os.environ[NODE], "--main_process_ip", host, "--main_process_port", port]
    signals.outlive_terminal()
    if machines > 1 and not meeting:
        command = _on_every_machine(arguments, environment)
    else:
        fork = ["-m", "featdiff.processes.forked", str(ranks)]
        one = machines * ranks == 1 and option is not None
        command = [sys.executable, *([] if one else fork if forked else accelerate), *arguments[option is not None :]]
    try:
        with tempfile.TemporaryDirectory(prefix="featdiff-") as folder:
            return Launch(Path(folder)).run(command, environment)
    except signals.Stopped:
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
