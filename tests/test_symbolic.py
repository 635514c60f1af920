"""Answers that are expressions: what is equal, what hedges, and that the process which compares holds its limits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import SuiteTask
from featdiff.tasks import symbolic
from featdiff.tasks.expressions import readable
from featdiff.tasks.suites import SuiteSource
from featdiff.tasks.symbolic_worker import MEMORY, SECONDS
from featdiff.tasks.task import Sample, TaskInfo
from featdiff.tasks.verify import grade

pytestmark = pytest.mark.skipif(find_spec("math_verify") is None, reason="the extra math is not installed")
SHARED = Path(__file__).parents[2] / "shared" / "data" / "math"
FORMS = Path(__file__).parent / "data" / "expressions.jsonl"
"""Written for this project: a reference, answers that are right, answers that are not."""


def sample(reference: str, prompt: str = "p") -> Sample:
    return Sample("s", "t", "find", prompt, reference)


def forms(kind: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in FORMS.read_text(encoding="utf-8").splitlines()]
    return [(row["reference"], answer) for row in rows for answer in row[kind]]


@pytest.mark.parametrize(("reference", "answer"), forms("right"))
def test_the_same_value_in_another_form(reference: str, answer: str) -> None:
    for text in (f"So it is \\boxed{{{answer}}}.", f"The answer is ${answer}$."):
        graded = grade("symbolic", sample(reference), text)
        assert graded.strict, text
        assert graded.flexible, text


@pytest.mark.parametrize(("reference", "answer"), forms("wrong"))
def test_another_value_in_a_like_form(reference: str, answer: str) -> None:
    for text in (f"So it is \\boxed{{{answer}}}.", f"The answer is ${answer}$."):
        assert not grade("symbolic", sample(reference), text).strict, text


def test_at_least_a_hundred_wrong_answers_are_tried() -> None:
    assert len(forms("wrong")) >= 100


SURD = r"3\sqrt{13}"
# Text, and whether it is the right answer where that is 3√13: by the strict rule, by the flexible rule.
TEXTS: list[tuple[str, bool, bool]] = [
    (r"3\sqrt{13}", True, True),
    (r"$3\sqrt{13}$.", True, True),
    ("3√13", True, True),
    (r"The answer is \(3\sqrt{13}\).", True, True),
    (r"The distance is $\sqrt{117}$. The answer is $3\sqrt{13}$.", True, True),
    (r"The answer is $\sqrt{117} = \boxed{3\sqrt{13}}$.", True, True),
    (r"The answer is $x = 3\sqrt{13}$ units.", True, True),
    ("The answer is therefore 3√13 units", True, True),
    (r"\boxed{3\sqrt{13}} and \boxed{\sqrt{117}}", True, True),
    (r"\boxed{3\sqrt{13}} is the answer, since $\sqrt{117} = 10.8$", True, False),
    (r"So it is $3\sqrt{13}$", False, True),
    ("so x is 3√13 units", False, True),
    (r"It is not $3\sqrt{13}$", False, False),
    (r"The answer isn't $3\sqrt{13}$", False, False),
    (r"I don't think that the answer is $3\sqrt{13}$", False, True),
    (r"The answer is $3\sqrt{13}$ or $4$", False, False),
    (r"The answer is $4$ or $3\sqrt{13}$", False, True),
    (r"\boxed{4} \boxed{3\sqrt{13}}", False, True),
    (r"\boxed{3\sqrt{13}} or 4", False, False),
    (r"\boxed{3\sqrt{13}, 4}", False, False),
    (r"\boxed{4 = 3\sqrt{13}}", False, True),
    (r"The answer is $4 = \boxed{3\sqrt{13}}$", False, True),
    ("3", False, False),
    ("The answer is 3", False, False),
    ("", False, False),
    (r"\boxed{", False, False),
    (r"\boxed{3\sqrt{13}", False, False),
    (r"\boxed{\boxed{3\sqrt{13}}}", False, True),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), TEXTS)
def test_expressions_read_from_free_text(text: str, strict: bool, flexible: bool) -> None:
    graded = grade("symbolic", sample(SURD), text)
    assert (graded.strict, graded.flexible) == (strict, flexible)


@pytest.mark.parametrize(
    ("reference", "prompt", "answer", "right"),
    [
        (r"6\sqrt{5}", r"Simplify $\sqrt{180}$.", r"6\sqrt{5}", True),
        (r"6\sqrt{5}", r"Simplify $\sqrt{180}$.", r"\sqrt{180}", False),
        (r"6\sqrt{5}", r"Simplify $\sqrt{180}$.", r"\sqrt{ 180 }", False),
        (r"6\sqrt{5}", r"Simplify $\sqrt{4 \cdot 45}$.", r"\sqrt{180}", True),
        (r"x^2-x-6", r"Expand $(x+2)(x-3)$.", "(x+2)(x-3)", False),
        (r"x^2-x-6", r"Expand $(x+2)(x-3)$.", "-6-x+x^2", True),
        (r"\frac{1}{2}", r"Is it $1/2$ or $1/3$?", "1/2", True),
        (r"(3,4]", r"Is it $(3,4)$ or $(3,4]$?", "(3,4]", True),
    ],
)
def test_what_the_question_asks_about_is_no_answer(reference: str, prompt: str, answer: str, right: bool) -> None:
    assert grade("symbolic", sample(reference, prompt), f"\\boxed{{{answer}}}").strict is right


def math500() -> list[dict[str, str]]:
    path = SHARED / "math500/test.jsonl"
    if not path.is_file():
        pytest.skip("../shared/data is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_of_math500_is_graded_right_and_what_differs_is_not() -> None:
    rows = math500()
    for row in rows:
        asked = sample(row["answer"], row["problem"])
        assert readable(row["answer"])
        assert grade("symbolic", asked, f"Thus $\\boxed{{{row['answer']}}}$.").strict, row["answer"]
    hard = [row for row in rows if not row["answer"].lstrip("-").isdigit()]
    assert all(symbolic.equal(row["answer"], row["answer"]) == "right" for row in hard if "\\text{" not in row["answer"])
    others = [(row, other["answer"]) for row, other in pairwise(hard) if row["answer"] != other["answer"]]
    assert len(others) >= 150
    for row, other in others:
        graded = grade("symbolic", sample(row["answer"], row["problem"]), f"\\boxed{{{other}}}")
        assert not graded.strict, (row["answer"], other)


def test_worked_solutions_of_math500() -> None:
    graded = [grade("symbolic", sample(row["answer"], row["problem"]), row["solution"]) for row in math500()]
    assert sum(one.strict for one in graded) >= 495
    assert sum(one.flexible for one in graded) >= 430


@pytest.mark.parametrize(("file", "adapter"), [("math500", "math500"), ("aime24", "aime"), ("aime25", "aime")])
def test_the_papers_math_suites(file: str, adapter: str) -> None:
    path = SHARED / file / "test.jsonl"
    if not path.is_file():
        pytest.skip("../shared/data is not here")
    task = SuiteTask(
        source="suite", role="heldout", adapter=adapter, path=str(path), scoring="generation", prompt="own", columns=None
    )  # fmt: skip
    suite = SuiteSource(file, task, chat=True, grading="strict", max_chars=10**4, seed=0, suites="hub")
    assert (suite.info.verifier, suite.info.domain, suite.info.options) == ("symbolic", "math", 0)
    assert len(suite.questions) == {"math500": 500}.get(file, 30)
    samples = suite.eval_samples({"find": 10, "tune": 10, "report": 10}, np.random.default_rng(0))
    assert all(grade("symbolic", one, f"\\boxed{{{one.answer}}}").strict for one in samples)


def test_an_answer_that_no_rule_can_hold_against_is_named(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"q": "?", "a": "\\frac{1}{"}) + "\n", encoding="utf-8")
    columns = {"question": "q", "expression": "a"}
    task = SuiteTask(
        source="suite", role="find", adapter="columns", path=str(path), scoring="generation", prompt="own", columns=columns
    )  # fmt: skip
    with pytest.raises(ContractError, match=r"f.jsonl:1: a: expected a number, words or an expression in LaTeX"):
        SuiteSource("mine", task, chat=True, grading="strict", max_chars=100, seed=0, suites="hub")


# The worker. What gets to it past the rules is put to it directly.

ENDLESS = "9^{9^{9}}"


@pytest.fixture
def worker() -> Iterator[symbolic.Worker]:
    found = symbolic.Worker()
    yield found
    found.stop()


def seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_request_without_end_is_ended_and_the_next_is_answered(worker: symbolic.Worker) -> None:
    assert worker.ask("\\sqrt{12}", "2\\sqrt{3}") == "right"
    first = worker.process
    assert first is not None
    before = seconds_of(first.pid)
    begun = os.times()
    assert worker.ask("7", ENDLESS) == "unread"
    spent = os.times().children_user - begun.children_user
    assert spent - before <= SECONDS + 2  # of processor time, however busy the machine
    assert (worker.process, worker.stopped) == (None, 1)
    assert first.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
    assert worker.ask("\\sqrt{12}", "2\\sqrt{3}") == "right"
    assert worker.stopped == 1


def test_memory_is_limited(worker: symbolic.Worker) -> None:
    worker.ask("1", "1")
    assert worker.process is not None
    limits = Path(f"/proc/{worker.process.pid}/limits").read_text(encoding="utf-8")
    assert re.search(rf"Max address space\s+{MEMORY}\s+{MEMORY}", limits)
    assert re.search(r"Max file size\s+0\s+0", limits)
    assert worker.ask("7", "10^{10^{10}}") in ("unread", "wrong")  # four gigabytes of digits


def test_a_worker_that_was_killed_meanwhile_is_replaced_and_costs_no_answer(worker: symbolic.Worker) -> None:
    assert worker.ask("x+1", "1+x") == "right"
    assert worker.process is not None
    os.kill(worker.process.pid, signal.SIGTERM)
    assert worker.ask("x+1", "1+x") == "right"
    assert worker.stopped == 0


def test_threads_take_turns(worker: symbolic.Worker) -> None:
    pairs = [(f"{i}+x", f"x+{i + i % 2}") for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda pair: worker.ask(*pair), pairs))
    assert said == ["right", "wrong"] * 12


def test_nothing_in_an_answer_is_run(worker: symbolic.Worker, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for text in (f"__import__('os').system('touch {mark}')", f"\\text{{__import__('pathlib').Path('{mark}').touch()}}"):
        assert worker.ask("7", text) in ("unread", "wrong")
        assert not grade("symbolic", sample("7"), f"\\boxed{{{text}}}").correct
    assert not mark.exists()
    assert "math_verify" not in sys.modules
    assert "sympy.parsing.latex" not in sys.modules


HOSTILE = [
    ENDLESS, "9**9**9", "10^{999999999}", "999999999!", "\\frac{" * 100_000, "{" * 200 + "1" + "}" * 200,
    "(" * 30 + "1" + ")" * 30,
    "(x+y+z)^{300}", "1" * 100_000, "\\sqrt{" * 60 + "2" + "}" * 60, "}{", "\\", "\x00", "\\begin{pmatrix} 1", "x_{1}^{2}_{3}",
    "\\frac{0}{0}", "\\infty", "٧", "$$$$", "\\boxed{\\boxed{", "\\text{" * 50,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_expressions_are_wrong_and_most_never_get_to_the_worker(text: str) -> None:
    stopped = symbolic.WORKER.stopped
    for whole in (text, f"\\boxed{{{text}}}", f"The answer is ${text}$."):
        graded = grade("symbolic", sample(SURD), whole)
        assert not graded.strict
        assert not graded.flexible
    assert symbolic.WORKER.stopped == stopped


LIVES = """
import os, sys, time
from featdiff.tasks import symbolic
assert symbolic.WORKER.ask("x", "x") == "right"
if sys.argv[1] == "killed":
    os.dup(symbolic.WORKER.process.stdin.fileno())
    if os.fork() == 0:  # holds the line open
        time.sleep(60)
        os._exit(0)
print(symbolic.WORKER.process.pid, flush=True)
if sys.argv[1] == "killed":
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["returns", "killed"])
def test_the_worker_ends_with_its_parent(end: str) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", LIVES, end], stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        if end == "killed":
            parent.kill()
        parent.wait(timeout=60)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8"):
            assert time.monotonic() < deadline, "the worker outlives its parent"
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def test_a_symbolic_task_rewards() -> None:
    from featdiff.training.grpo import Reward

    task = TaskInfo("t", "train", "math", "generation", "symbolic", "strict", False, 0)
    reward = Reward({"t": task}, [sample(SURD)], steps=1, read=list)
    texts = [r"\boxed{\sqrt{117}}", r"\boxed{3}", "The answer is 3√13", r"\boxed{9^{9^{9}}}"]
    assert reward(texts, sample_id=["s"] * 4) == [1.0, 0.0, 1.0, 0.0]


def _verdicts(_: int) -> list[bool]:
    texts = [r"\boxed{\sqrt{117}}", r"\boxed{3}", "The answer is $3*\\sqrt{13}$"]
    symbolic.equal.cache_clear()
    return [grade("symbolic", sample(SURD), text).correct for text in texts]


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_every_rank_has_a_worker_of_its_own(start: str) -> None:
    assert _verdicts(0) == [True, False, True]  # a fork inherits this process's worker, and must leave it alone
    mine = symbolic.WORKER.process
    with get_context(start).Pool(2) as ranks:
        assert ranks.map(_verdicts, range(2), chunksize=1) == [[True, False, True]] * 2
    assert _verdicts(0) == [True, False, True]
    assert symbolic.WORKER.process is mine
