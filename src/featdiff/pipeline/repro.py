"""``dvc repro`` with stages side by side: ``python -m featdiff.pipeline.repro [--jobs N]`` (ours).

DVC runs one stage after another, but lets several of it work in one repository, each on a stage of its own: it locks what
stages read and write, and says itself that this is how to run them side by side. Here is decided which may begin, in an order
by which what most waits for goes first. A stage that dvc.yaml calls ``spread`` is long, and ranks share out its work
(``--shared``): it begins when nothing else could, and has the cores of all. What each says goes to .featdiff/logs, and from
there to the terminal. At the end DVC itself has the last word on whether anything is left to do.
"""

from __future__ import annotations

import argparse
import codecs
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from featdiff.artifacts.artifact import ContractError, one_line
from featdiff.config.params import Study, load_study
from featdiff.config.reading import ConfigError
from featdiff.pipeline import outside
from featdiff.processes import signals, warm
from featdiff.processes.launch import EXIT_BAD_INPUT, SHARE, Hardware, environment_of, share_of_cores
from featdiff.processes.ranks import process_start
from featdiff.processes.signals import EXIT_STOPPED, say
from featdiff.processes.turns import TURNS, Turns

LOGS = Path(".featdiff/logs")
POLL_SECONDS = 0.2
SHOWN_EVERY = 30
"""Seconds between two states of a bar where the output is no terminal."""
WORTH_IT = 4
"""Stages from which a process that loads their libraries once costs less than it saves."""
USUAL = (
    "Running stage",
    "> ",
    "Generating lock file",
    "Updating lock file",
    "To track",
    "git add",
    "To enable",
    "dvc config",
    "Use `dvc",
)
"""What dvc says of every stage, and what stays in its log; --quiet would keep back its errors, too."""
PATIENT = "exec sh stages/run "
"""How the command of a stage begins that waits for its turn (featdiff.pipeline.stage)."""
Graph = Mapping[str, set[str]]
"""What each stage waits for."""
ONE_READ = "crosscoders"
"""None of DVC's stages: what makes the crosscoders of several stages from one read of their rows, before DVC runs each of them
(featdiff.crosscoder.together). It is told no names, and asks DVC itself: which have changed is known only when all that they
read is there, as what was made again may have come out the same."""
READERS = ("crosscoder@", "pair@", "wide@")


class Output:
    """What a stage writes to its log, as it grows."""

    def __init__(self, path: Path) -> None:
        self._stream, self._rest, self._shown = path.open("rb"), "", time.monotonic()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def lines(self) -> list[str]:
        """Those finished since; of a bar, which is written over itself, its last state."""
        *whole, self._rest = (self._rest + self._decoder.decode(self._stream.read())).split("\n")
        return [text for line in whole if (text := _last(line))]

    @property
    def bar(self) -> str:
        """The newest state of the line that is being written."""
        return _last(self._rest)

    def due(self) -> str:
        """:attr:`bar`, now and then; else nothing."""
        if time.monotonic() - self._shown < SHOWN_EVERY:
            return ""
        self._shown = time.monotonic()
        return self.bar


def _last(line: str) -> str:
    return next((part for part in reversed(line.split("\r")) if part.strip()), "")


class Job:
    """One stage, under a dvc that leads a group of processes."""

    def __init__(self, stage: str, environment: Mapping[str, str]) -> None:
        self.stage, self.log = stage, LOGS / f"{stage}.log"
        self.began: float | None = None
        """None for a stage that was started ahead, and waits for its turn."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        dvc = ["dvc", "--wait-for-lock", "repro", "--single-item", stage]
        command = ["-m", *(["featdiff.crosscoder.together"] if stage == ONE_READ else dvc)]
        with self.log.open("wb") as log, Path(os.devnull).open("rb") as nothing:
            streams = nothing.fileno(), log.fileno(), log.fileno()
            forked = None if stage == ONE_READ else warm.ask(command, dict(environment), warm.DVC, streams)
            self._process = forked or subprocess.Popen(
                [sys.executable, *command], stdin=nothing, stdout=log, stderr=log, env=environment, process_group=0,
                preexec_fn=signals.follow,
            )  # fmt: skip
        self.output = Output(self.log)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def ended(self) -> int | None:
        """Exit status of its dvc, as ``subprocess`` gives it; None while it is at work."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        if not select.select([self._process.line], [], [], 0)[0]:
            return None
        if (status := self._process.wait()) is not None:
            return os.waitstatus_to_exitcode(status)
        return None if process_start(self._process.pid) else -signal.SIGTERM  # with the process that it was forked from

    @property
    def took(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began) if self.began else 0, 60)
        return f"{minutes}:{seconds:02d}"


class Repro:
    """``stages`` that are changed, or wait for one that is, ``jobs`` at a time, or one that is spread. With ``turns`` one more
    of the patient ones is started ahead, and the place of a stage is free as soon as its own processes have ended, while its
    dvc still keeps what they wrote."""

    def __init__(self, stages: Stages, jobs: int, environment: Mapping[str, str], turns: Turns | None = None) -> None:
        self._graph, self._jobs, self._requests = stages.graph, jobs, signals.Requests()
        self._spread, self._patient = stages.spread, stages.patient - stages.spread
        self._turns = turns
        self._stale = set(stages.changed)
        self._sorter = TopologicalSorter(stages.graph)
        self._order = order(stages.graph)
        self._running: list[Job] = []
        self._ready: list[str] = []
        self._status, self._done, self._all = 0, 0, len(affected(stages.graph, stages.changed))
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        self._environment = os.environ | environment | ({"TQDM_MININTERVAL": "1"} if self._console.is_terminal else {})
        signals.handle(self._hand_on)
        signal.signal(signal.SIGTSTP, self._pause)

    def run(self) -> int:
        """Exit status of the first stage that failed, 75 after a request to stop, else 0. After either no stage begins, and
        those at work end: a request as they are asked to, a failure of another by themselves."""
        self._sorter.prepare()
        with Live(console=self._console, get_renderable=self._shown, refresh_per_second=2, transient=True) as live:
            while self._sorter.is_active():
                self._ready += self._sorter.get_ready()
                self._begin()
                if not self._running:
                    break
                self._wait()
                for job in list(self._running):
                    ended = job.ended()
                    if job.began:
                        self._tell(job, live.is_started and self._console.is_terminal)
                    if ended is not None:
                        self._end(job, ended)
        return EXIT_STOPPED if self._requests.asked else self._status

    @property
    def _over(self) -> bool:
        """Whether no further stage may begin."""
        return bool(self._requests.asked or self._status)

    @property
    def _waiting(self) -> Job | None:
        """The stage that was started ahead."""
        return next((job for job in self._running if not job.began), None)

    def _wait(self) -> None:
        """For a while, or until a stage says something."""
        if self._turns:
            if self._over:
                self._turns.give_no_more()
            self._turns.wait(POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)

    def _begin(self) -> None:
        """Pass over what has nothing to do, let begin what there is room for, and start the next one ahead."""
        while passed := [stage for stage in self._ready if stage not in self._stale]:
            self._sorter.done(*passed)
            self._ready = [stage for stage in self._ready if stage in self._stale] + list(self._sorter.get_ready())
        if self._over:
            return
        begun = {job.stage for job in self._running if job.began}
        working = begun - (self._turns.left if self._turns else set[str]())
        # those whose dvc still keeps what they wrote are as many at most: dvc lets one of them do so at a time
        room = min(self._jobs - len(working), 2 * self._jobs - len(begun))
        ahead = self._waiting
        for stage in sorted([*self._ready, *([ahead.stage] if ahead else [])], key=self._order.__getitem__):
            alone = not working and not ahead and self._spread.issuperset(self._ready)
            if room > 0 and (alone if stage in self._spread else not working & self._spread):
                room -= 1
                working.add(stage)
                self._let_begin(ahead if ahead and ahead.stage == stage else self._started(stage))
            elif self._turns and stage in self._patient and not self._waiting:
                self._started(stage)

    def _started(self, stage: str) -> Job:
        self._ready.remove(stage)
        share = {SHARE: str(self._jobs)} if stage in self._spread else {}
        self._running.append(job := Job(stage, self._environment | share))
        if self._requests.asked:  # while it was being started, so that it was not told
            job.signal(signal.SIGINT)
        return job

    def _let_begin(self, job: Job) -> None:
        job.began = time.monotonic()
        if self._turns:
            self._turns.give(job.stage)
        self._say(job.stage, "begins")

    def _end(self, job: Job, status: int) -> None:
        self._running.remove(job)
        if not job.began:
            if status and self._over:
                return  # its turn did not come
            self._tell(job, bars_are_shown=True)
        if status:
            self._status = self._status or status
            self._say(job.stage, f"failed after {job.took} (status {status}); all that it said: {job.log}")
            return
        self._done += 1
        self._stale |= {stage for stage, upstream in self._graph.items() if job.stage in upstream}
        self._sorter.done(job.stage)
        self._say(job.stage, f"done in {job.took} ({self._done} of {self._all})")

    def _tell(self, job: Job, bars_are_shown: bool) -> None:
        for line in job.output.lines():
            if not line.strip().startswith(USUAL):
                self._say(job.stage, line)
        if not bars_are_shown and (bar := job.output.due()):
            self._say(job.stage, bar)

    def _say(self, stage: str, text: str) -> None:
        self._console.print(f"{stage} | {text}")

    def _shown(self) -> Table:
        """A line for each stage at work: how long, and the newest state of its bar."""
        table = Table.grid(padding=(0, 2))
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for job in filter(lambda job: job.began, self._running):
            table.add_row(job.stage, job.took, job.output.bar.strip())
        return table

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        """To dvc and launcher as a key press, whatever was asked: dvc waits for the launcher, which ends the stage."""
        if self._requests.first(number) is not None:
            for job in self._running:
                job.signal(signal.SIGINT)

    def _pause(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z stops the stages too, and ``fg`` lets them go on."""
        for job in self._running:
            job.signal(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for job in self._running:
            job.signal(signal.SIGCONT)


def affected(graph: Graph, changed: set[str]) -> set[str]:
    """``changed`` and all that waits for one of them, directly or not."""
    found: set[str] = set()
    for stage in TopologicalSorter(graph).static_order():
        if stage in changed or found & graph[stage]:
            found.add(stage)
    return found


def with_one_read(stages: Stages) -> Stages:
    """The same where crosscoders that may have to be made again wait for :data:`ONE_READ`, and that for all that they need."""
    graph = stages.graph
    readers = {stage for stage in affected(graph, stages.changed) if stage.startswith(READERS)}
    if len(readers) < 2:
        return stages
    waiting = {stage: graph[stage] | {ONE_READ} for stage in readers}
    read = {ONE_READ: set[str]().union(*(graph[stage] for stage in readers))}
    return stages._replace(graph={**graph, **waiting, **read}, changed=stages.changed | {ONE_READ})


def order(graph: Graph) -> dict[str, tuple[int, int, str]]:
    """Sort keys: first the stage for which most others wait, and of several the one that itself waited for most, since the last
    ones of a study tend to be the long ones."""
    above: dict[str, set[str]] = {}
    for stage in TopologicalSorter(graph).static_order():
        above[stage] = graph[stage].union(*(above[each] for each in graph[stage]))
    below = {stage: sum(stage in others for others in above.values()) for stage in graph}
    return {stage: (-below[stage], -len(above[stage]), stage) for stage in graph}


class Stages(NamedTuple):
    """Those of the repository."""

    graph: Graph
    changed: set[str]
    """Those of which anything is not as dvc.lock has it."""
    patient: set[str]
    """Those that may be started ahead."""
    spread: set[str]
    """Those that are long and shared out by ranks: each has all places."""


def stages() -> Stages:
    """Raises ConfigError with what DVC says where it cannot tell."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(_wait_for_lock=True) as repo:
            graph = repo.index.graph
            waits = {stage.addressing: {each.addressing for each in graph.successors(stage)} for stage in graph}
            patient = {stage.addressing for stage in graph if str(stage.cmd).startswith(PATIENT)}
            spread = {stage.addressing for stage in graph if (getattr(stage, "meta", None) or {}).get("spread")}
            return Stages(waits, set(repo.status()), patient, spread)
    except DvcException as error:
        raise ConfigError(f"dvc: {one_line(str(error))}") from None


def side_by_side(study: Study) -> int:
    """How many stages have a core for each thread of their ranks: one on a GPU, or where a stage takes all cores."""
    hardware = Hardware.chosen()
    if hardware is None or not hardware.on_cpu or study.threads is None:
        return 1
    return share_of_cores(study.threads * hardware.ranks)


@contextmanager
def ahead(stages: int) -> Iterator[tuple[dict[str, str], Turns | None]]:
    """What to set for ``stages`` stages so that they and dvc find libraries loaded and wait for their turn, and what gives
    turns; nothing where a stage is not one process on a CPU, or where they are few."""
    hardware = Hardware.chosen()
    one = hardware is not None and hardware.on_cpu and (hardware.machines, hardware.ranks) == (1, 1)
    if not one or warm.WARM in os.environ or sys.platform != "linux" or stages < WORTH_IT:
        yield {}, None
        return
    with warm.started(environment_of(1, on_cpu=True)) as environment:
        path = warm.address(environment[warm.WARM], "turns")
        yield environment | {TURNS: path}, Turns(path)


def main(arguments: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.pipeline.repro", description="dvc repro, with stages side by side")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), metavar="N", help="stages at a time (default: cores / threads)"
    )
    asked = parser.parse_args(arguments)
    signals.outlive_terminal()
    try:
        jobs = asked.jobs or side_by_side(load_study())
        if outside.OUTSIDE.is_dir() and (other := outside.forget_changed(load_study())):
            say(f"changed since it was read: {', '.join(other)}")
        found = stages()
        if any(stage.startswith(READERS) for stage in found.graph) and load_study().activations.source == "models":
            found = with_one_read(found)
        if changed := found.changed:
            with ahead(len(affected(found.graph, changed))) as (environment, turns):
                status = Repro(found, jobs, environment, turns).run()
            if status == EXIT_STOPPED:
                say("stopped; what was computed is kept: say it again")
            if status:
                return status
            changed = stages().changed
    except (ConfigError, ContractError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    say(f"changed meanwhile: {', '.join(sorted(changed))}; say it again" if changed else "every stage is up to date")
    return EXIT_BAD_INPUT if changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
