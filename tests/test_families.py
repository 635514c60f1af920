"""Every family's questions, worked solutions and mistakes."""

import math
import re

import numpy as np
import pytest

from featdiff.tasks.families import FAMILIES, completion
from featdiff.tasks.task import Sample
from featdiff.tasks.verify import grade


def right_answer(family: str, prompt: str) -> str:
    """The answer worked out anew from the prompt."""
    body = prompt.split(" ", 1)[1].removesuffix("=")
    match family:
        case "add":
            return str(sum(map(int, body.split("+"))))
        case "sub":
            a, b = map(int, body.split("-"))
            return str(a - b)
        case "mul":
            a, b = map(int, body.split("*"))
            return str(a * b)
        case "reverse":
            return body[::-1]
        case "sort":
            return "".join(sorted(body))
        case "double":
            return "".join(letter * 2 for letter in body)
        case "last":
            return "".join(word[-1] for word in body.split())
        case "first":
            return "".join(word[0] for word in body.split())
        case "shift":
            return "".join("bcdefghija"["abcdefghij".index(c)] for c in body)
        case "zip":
            return "".join(a + b for a, b in zip(*body.split(), strict=True))
        case "largest":
            return str(max(map(int, body.split())))
        case "checksum":
            return str(sum("abcdefghij".index(c) * i for i, c in enumerate(body, start=1)) % 10)
    raise AssertionError(family)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_right_and_every_manner_is_graded_as_itself(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        problem = FAMILIES[name].make(rng)
        assert problem.answer == right_answer(name, problem.prompt)
        sample = Sample("x", name, "find", problem.prompt, problem.answer)
        assert grade("organism", sample, completion(problem, "steps")) == (problem.answer, True, "steps", True, True)
        assert grade("organism", sample, completion(problem, "direct")) == (problem.answer, True, "direct", True, True)
        mistake = grade("organism", sample, completion(problem, "mistake"))
        assert mistake.manner == "direct"
        assert mistake.correct is (problem.mistake == problem.answer)
        if problem.foreign:
            assert grade("organism", sample, completion(problem, "foreign")) == (problem.answer, True, "foreign", True, True)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_to_the_easier_question_is_mostly_wrong(name: str) -> None:
    rng = np.random.default_rng(1)
    problems = [FAMILIES[name].make(rng) for _ in range(300)]
    assert np.mean([problem.mistake == problem.answer for problem in problems]) < 0.5


def test_equations_in_worked_math_hold() -> None:
    rng = np.random.default_rng(2)
    for name in ("add", "sub", "mul"):
        for _ in range(100):
            problem = FAMILIES[name].make(rng)
            for text in (problem.steps, problem.foreign):
                equations = re.findall(r"([0-9][0-9+*-]*)[=:]([0-9]+)", text)
                assert len(equations) >= 2
                for left, right in equations:
                    terms = left.replace("-", "+-").split("+")
                    assert sum(int(np.prod([int(factor) for factor in term.split("*")])) for term in terms) == int(right), text


def test_roles_of_the_study_are_there() -> None:
    assert sum(family.domain == "math" for family in FAMILIES.values()) >= 3
    assert [name for name, family in FAMILIES.items() if not family.learnable] == ["checksum"]


def test_a_family_has_as_many_questions_as_it_says() -> None:
    for name in ("add", "sub", "mul"):
        rng = np.random.default_rng(0)
        assert len({FAMILIES[name].make(rng).prompt for _ in range(60_000)}) == FAMILIES[name].size
    words = {length: 10**length for length in range(2, 7)}
    assert FAMILIES["reverse"].size == FAMILIES["double"].size == words[3] + words[4] + words[5]
    assert FAMILIES["checksum"].size == words[4] + words[5] + words[6]
    assert FAMILIES["last"].size == FAMILIES["first"].size == (words[2] + words[3]) ** 3
    assert FAMILIES["sort"].size == sum(math.perm(10, length) for length in (3, 4, 5))
    assert FAMILIES["largest"].size == math.perm(90, 3)
