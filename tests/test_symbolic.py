"""Answers that are expressions: what is equal, what hedges, and that the process which compares holds its limits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import SuiteTask
from featdiff.tasks import symbolic
from featdiff.tasks.expressions import judge, readable
from featdiff.tasks.suites import SuiteSource
from featdiff.tasks.symbolic_worker import SECONDS
from featdiff.tasks.task import Sample, TaskInfo
from featdiff.tasks.verify import grade
from featdiff.training.grpo import Reward

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
