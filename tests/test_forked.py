"""``featdiff.processes.forked``: ranks that share out work, started by the launcher as stages are, with gloo between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest

from featdiff.processes.launch import SHARE
from featdiff.processes.warm import WARM
from test_warm import Desk, desk  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are told of their parent's end by Linux")
ROOT = Path(__file__).parents[1]
HEAD = """
import json, os, pathlib, sys, time
from featdiff.pipeline.checkpoint import Scratch
from featdiff.pipeline.stage import _report
from featdiff.processes import signals
from featdiff.processes.ranks import leave, rank, shared_out, world_size
signals.listen(); _report("")
def tell(**facts):
    pathlib.Path(f"told-{rank()}-of-{world_size()}.json").write_text(json.dumps(facts))
try:
    exec(pathlib.Path("body.py").read_text())
    leave()
except signals.Stopped as stopped:
    tell(stopped=str(stopped))
    _report(75)
    sys.exit(75)
"""
DEALT = """
def job(i):
    def do():
        time.sleep(3 if i == 1 else 0.02)
        return [i, rank()]
    return do
done = []
found = shared_out([job(i) for i in range(12)], done=done.append)
again = shared_out([job(0)] * 2 + [lambda: [2, 2]])
tell(found=found, done=done, again=again, nothing=shared_out([]))
"""
KEPT = """
computed = []
def job(name):
    def do():
        if name == "f" and os.path.exists("fatal"):
            os.kill(os.getpid(), 9)
        computed.append(name)
        time.sleep(0.2)
        return {"named": name}
    return do
heard = []
values = Scratch(pathlib.Path("kept"), 0).of_rank().parts([(name, job(name)) for name in "abcdefghij"], heard.append)
tell(values=values, computed=computed, heard=heard)
"""


class Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "OMP_"))}
        self.environment |= {WARM: "", "ACCELERATE_CONFIG": str(ROOT / "conf/accelerate/cpu.yaml")}
        (root / "params.yaml").write_text("threads: 1\n", encoding="utf-8")
        (root / "script.py").write_text(HEAD, encoding="utf-8")

    def start(self, body: str, share: int | str, option: str = "--shared") -> subprocess.Popen[str]:
        (self.root / "body.py").write_text(body, encoding="utf-8")
        command = [sys.executable, "-m", "featdiff.processes.launch", option, "script.py"]
        environment = self.environment | {SHARE: str(share)}
        return subprocess.Popen(command, cwd=self.root, env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, body: str, share: int | str, option: str = "--shared") -> tuple[int, str]:
        process = self.start(body, share, option)
        _, said = process.communicate(timeout=240)
        return process.returncode, said

    def told(self) -> dict[str, Any]:
        """What each rank told last, by ``<rank> of <ranks>``."""
        found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.root.glob("told-*"))}
        for path in found:
            path.unlink()
        return {path.stem.removeprefix("told-").replace("-", " "): facts for path, facts in found.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_who_is_free_takes_the_next_job_and_every_rank_has_all_in_their_order(folder: Folder) -> None:
    status, said = folder.run(DEALT, 2)
    assert status == 0, said
    told = folder.told()
    assert list(told) == ["0 of 2", "1 of 2"]
    one, other = told.values()
    assert one["found"] == other["found"]
    assert [i for i, _ in one["found"]] == list(range(12)), "in the order of the jobs"
    busy = one["found"][1][1]
    assert [who for _, who in one["found"]].count(busy) <= 2, "the one with the long job leaves all others to the free one"
    for number, each in enumerate((one, other)):
        own = [i for i, who in one["found"] if who == number]
        assert each["done"] == own + [i for i in range(12) if i not in own], "others' are heard of when all have ended"
        assert ([i for i, _ in each["again"]], each["nothing"]) == ([0, 0, 2], [])
    assert folder.run(DEALT, 1)[0] == 0
    assert folder.told() == {
        "0 of 1": {
            "found": [[i, 0] for i in range(12)], "done": list(range(12)), "again": [[0, 0], [0, 0], [2, 2]], "nothing": []
        }
    }  # fmt: skip


def kept(root: Path) -> list[str]:
    """Names of the parts that were written."""
    return sorted(chain(*(json.loads(path.read_text(encoding="utf-8")) for path in root.glob("kept/**/state.json"))))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_what_any_rank_finished_before_a_kill_is_taken_up_by_any_number_of_ranks(
    folder: Folder, before: int, after: int
) -> None:
    (folder.root / "fatal").touch()
    status, said = folder.run(KEPT, before)
    assert status != 0
    assert "killed" in said or before == 2
    done = kept(folder.root)
    assert set("abcd") <= set(done)
    assert "f" not in done
    (folder.root / "fatal").unlink()
    folder.told()
    assert folder.run(KEPT, after)[0] == 0
    told = list(folder.told().values())
    assert len(told) == after
    for each in told:
        assert each["values"] == [{"named": name} for name in "abcdefghij"]
        assert sorted(each["heard"]) == list("abcdefghij")
    assert sorted(chain(*(each["computed"] for each in told))) == sorted(set("abcdefghij") - set(done))


WAIT = """
print("", end="", file=open(f"begun-{rank()}", "w"))
for _ in range(600):
    time.sleep(0.1)
"""


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 75), ("sys.exit(2)", 2), ("raise ValueError('seen')", 75)])
def test_where_one_rank_fails_the_other_is_asked_to_stop(folder: Folder, end: str, status: int) -> None:
    fails = f"while not os.path.exists('begun-0'): time.sleep(0.05)\nif True: _report({end[9:-1]!r}[:1]); {end}"
    body = "if rank() == 0:\n" + WAIT.replace("\n", "\n    ") + "\nelse:\n    " + fails.replace("\n", "\n    ")
    began = time.monotonic()
    found, said = folder.run(body, 2)
    assert time.monotonic() - began < 45
    assert found == status, said
    assert "stopped" in folder.told()["0 of 2"]
    assert "seen" in said or "seen" not in end


@pytest.mark.parametrize("whom", ["the launcher", "the process of the ranks"])
def test_a_request_reaches_every_rank(folder: Folder, whom: str) -> None:
    process = folder.start(WAIT, 2)
    deadline = time.monotonic() + 60
    while len(list(folder.root.glob("begun-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (forks,) = psutil.Process(process.pid).children()
    (process if whom == "the launcher" else forks).send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert set(folder.told()) == {"0 of 2", "1 of 2"}
    assert not forks.is_running()


@pytest.mark.parametrize(("option", "share", "ranks"), [("--one", 2, 1), ("--shared", 1, 1), ("--shared", 3, 3)])
def test_only_a_stage_that_shares_its_work_out_has_more_ranks(folder: Folder, option: str, share: int, ranks: int) -> None:
    assert folder.run("tell(threads=os.environ['OMP_NUM_THREADS'])", share, option)[0] == 0
    assert folder.told() == {f"{number} of {ranks}": {"threads": "1"} for number in range(ranks)}


def test_what_is_no_number_of_ranks_is_one_line(folder: Folder) -> None:
    for share in ("0", "two", "-1", "1.5"):
        status, said = folder.run("tell()", share)
        assert (status, folder.told()) == (2, {})
        assert said == f"featdiff: FEATDIFF_SHARE: {share!r}: a number from 1 on is expected; unset it\n"


def test_ranks_have_the_libraries_of_a_warm_process(desk: Desk) -> None:  # noqa: F811
    desk.environment[SHARE] = "2"
    out, errors = desk.start("pass", "--shared").communicate(timeout=60)
    assert sorted(line.split()[0] for line in out.splitlines()) == ["forked", "forked"], errors
    desk.environment[WARM] = ""
    out, errors = desk.start("pass", "--shared").communicate(timeout=60)
    assert sorted(line.split()[0] for line in out.splitlines()) == ["new", "new"], errors


STUDY = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_study import whole
root, once = Path("study"), Scratch(Path("kept"), 1e9).of_rank()
done = whole(root, once.parts)
out = Path(f"out-{{world_size()}}")
if rank() == 0:
    out.mkdir()
    done.result.save(out, sensitivity=done.tried)
tell(rows=len(done.result.effects), computed=len(once._asked))
"""


def test_interventions_by_two_ranks_write_the_bytes_of_one(folder: Folder) -> None:
    """The whole study on real models, whose every part was computed anew by each number of ranks."""
    for ranks in (1, 2):
        status, said = folder.run(STUDY, ranks)
        assert status == 0, said
        assert not kept(folder.root), "so that nothing is taken up"
    told = folder.told()
    assert len({each["rows"] for each in told.values()}) == 1
    shares = [told[f"{number} of 2"]["computed"] for number in range(2)]
    assert min(shares) > 20, shares
    assert sum(shares) == told["0 of 1"]["computed"], "nothing is computed twice"
    files = sorted(path.name for path in (folder.root / "out-1").iterdir())
    assert len(files) == 7
    for name in files:
        assert (folder.root / "out-1" / name).read_bytes() == (folder.root / "out-2" / name).read_bytes(), name
