"""``featdiff.processes.warm``: scripts handed to a process that is there already, by the launcher as stages are."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from featdiff.processes.warm import WARM, address

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are told of their launcher's end by Linux")
ROOT = Path(__file__).parents[1]
SERVER = "import sys; from featdiff.processes import warm; warm.main(sys.argv[1], ('colorsys', 'no_such_library'))"
SCRIPT = """
import os, pathlib, subprocess, sys, time
from featdiff.processes import signals
from featdiff.pipeline.stage import _report
signals.listen(); _report("")
try:
    print("forked" if "colorsys" in sys.modules else "new", sys.argv, os.environ.get("MARK"), os.getcwd(), flush=True)
    {body}
except signals.Stopped as stopped:
    print("stopped by", stopped, flush=True)
    _report(75)
    sys.exit(75)
"""


class Desk:
    """A folder with a script, and a process that stands ready to run it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        self.environment |= {WARM: str(root), "ACCELERATE_CONFIG": str(ROOT / "conf/accelerate/cpu.yaml"), "MARK": "mine"}
        (root / "params.yaml").write_text("threads: 1\n", encoding="utf-8")
        self.server = subprocess.Popen([sys.executable, "-c", SERVER, address(str(root), "1")])
        deadline = time.monotonic() + 30
        while not Path(address(str(root), "1")).exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def start(self, body: str, *launcher: str) -> subprocess.Popen[str]:
        (self.root / "script.py").write_text(SCRIPT.format(body=body), encoding="utf-8")
        launch = [sys.executable, "-m", "featdiff.processes.launch", *launcher, "script.py", "--word"]
        return subprocess.Popen(
            launch, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def children(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.server.pid).children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.server.kill()
    made.server.wait()


@pytest.mark.parametrize(
    ("body", "status"),
    [("pass", 0), ("sys.exit(2)", 2), ("raise ValueError('seen')", 1), ("os.kill(os.getpid(), 9)", 128 + signal.SIGKILL)],
)
@pytest.mark.parametrize("launcher", [["--one"], pytest.param([], marks=pytest.mark.graph)], ids=["one", "accelerate"])
def test_a_fork_ends_as_a_process_of_its_own_does(desk: Desk, body: str, status: int, launcher: list[str]) -> None:
    ends, said = [], []
    for warm in (True, False):
        if not warm:
            desk.environment[WARM] = ""
        process = desk.start(body, *launcher)
        out, errors = process.communicate(timeout=60)
        ends.append(process.returncode)
        said.append((out.removeprefix("forked" if warm else "new"), "seen" in errors, "killed" in errors))
    assert ends == [status, status]
    assert said[0] == said[1]
    assert said[0][0] == f" ['script.py', '--word'] mine {desk.root}\n"


def test_where_nobody_answers_a_process_is_started(desk: Desk) -> None:
    for threads, begins in (("1", "forked"), ("2", "new")):  # it stands ready for one thread
        desk.environment["OMP_NUM_THREADS"] = threads
        out, _ = desk.start("pass", "--one").communicate(timeout=60)
        assert out.startswith(begins)
    desk.environment["OMP_NUM_THREADS"] = "1"
    desk.server.kill()
    desk.server.wait()
    out, _ = desk.start("pass", "--one").communicate(timeout=60)
    assert out.startswith("new")


def began(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().startswith("forked")


def test_a_request_reaches_the_fork_and_its_status_the_launcher(desk: Desk) -> None:
    process = desk.start("time.sleep(60)", "--one")
    began(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (75, "stopped by SIGTERM\n")


def test_a_fork_ends_with_its_launcher_and_with_what_it_was_forked_from(desk: Desk) -> None:
    process = desk.start("time.sleep(60)", "--one")
    began(process)
    process.kill()
    out, _ = process.communicate(timeout=30)  # the fork holds the other end of the pipe
    assert out == "stopped by the end of the process that started it\n"
    process = desk.start("time.sleep(60)", "--one")
    began(process)
    desk.server.kill()
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (75, "stopped by SIGTERM\n")


def test_nothing_that_a_fork_started_outlives_it(desk: Desk) -> None:
    process = desk.start("print(subprocess.Popen(['sleep', '60'], stdout=2).pid, flush=True)", "--one")
    out, _ = process.communicate(timeout=30)
    pid = int(out.split()[-1])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert desk.children() == []


def test_two_are_served_at_once(desk: Desk) -> None:
    one, two = desk.start("time.sleep(60)", "--one"), desk.start("time.sleep(60)", "--one")
    began(one)
    began(two)
    assert len(desk.children()) == 2
    for process in (one, two):
        process.terminate()
        assert process.wait(timeout=30) == 75


UPDATE = """
import sys
from featdiff.processes.dvc import read_lock_fast
from dvc.dvcfile import modify_yaml
{before}
with modify_yaml("dvc.lock") as data:
    data["stages"]["base"]["params"]["params.yaml"]["base.note"] = [None, 1e-5, "yes", "a word " * 40]
print(type(data).__name__)
"""


def test_a_lock_file_that_is_read_fast_is_written_as_dvc_writes_it(tmp_path: Path) -> None:
    kind, written = {}, {}
    for before in ("", "read_lock_fast()"):
        shutil.copy(ROOT / "dvc.lock", tmp_path)
        command = [sys.executable, "-c", UPDATE.format(before=before)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        kind[before], written[before] = done.stdout.strip(), (tmp_path / "dvc.lock").read_bytes()
    assert kind == {"": "CommentedMap", "read_lock_fast()": "dict"}
    assert written[""] == written["read_lock_fast()"] != (ROOT / "dvc.lock").read_bytes()
