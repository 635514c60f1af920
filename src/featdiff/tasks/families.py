"""Generated task families of the model organism: questions, worked solutions, easy mistakes.

Every question can be answered in two manners: step by step (``<...>answer.``), which is right, or at
once (``answer.``), where most texts in the pretraining corpus give the answer to an *easier* question
(the word itself instead of its reverse, a sum without its carries). A model trained on such texts has
the ability and by default does not use it (docs/method.md, 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LETTERS = "abcdefghij"

Rng = np.random.Generator


@dataclass(frozen=True)
class Problem:
    """One question with every text the study needs about it.

    ``steps`` is the base's own worked solution, ``foreign`` a teacher's in an unfamiliar notation (math
    families only, else empty), ``mistake`` the answer to the easier question. None include the final
    answer; :func:`completion` joins them.
    """

    prompt: str
    answer: str
    mistake: str
    steps: str
    foreign: str = ""


@dataclass(frozen=True)
class Family:
    """A generator of problems. ``domain`` is ``math`` or ``words``; ``learnable`` is False for the
    negative control, whose steps do not lead to its answer."""

    name: str
    domain: str
    make: Callable[[Rng], Problem]
    size: int
    """Number of different questions."""
    learnable: bool = True


MARK = "<"
"""Opens a worked solution where all families share one manner."""


def completion(problem: Problem, manner: str, mark: str = MARK) -> str:
    """Text after the prompt in one ``manner``: ``steps`` (opened by ``mark``), ``foreign``, ``direct`` or ``mistake``."""
    if manner == "steps":
        return f"{mark}{problem.steps}>{problem.answer}."
    if manner == "foreign":
        return f"({problem.foreign}){problem.answer}."
    return f"{problem.answer if manner == 'direct' else problem.mistake}."


def _word(rng: Rng, low: int, high: int, *, distinct: bool = False) -> str:
    length = int(rng.integers(low, high + 1))
    return "".join(rng.choice(list(LETTERS), size=length, replace=not distinct))


def _add(rng: Rng) -> Problem:
    a = b = 0
    while a % 10 + b % 10 < 10:  # without a carry the easier question would have the same answer
        a, b = (int(x) for x in rng.integers(10, 100, size=2))
    units, carry = (a % 10) + (b % 10), (a % 10 + b % 10) // 10
    tens = a // 10 + b // 10 + carry
    return Problem(
        prompt=f"add {a}+{b}=",
        answer=str(a + b),
        mistake=f"{a // 10 + b // 10}{units % 10}",
        steps=f"{a % 10}+{b % 10}={units},{a // 10}+{b // 10}+{carry}={tens}",
        foreign=f"o{a % 10}+{b % 10}:{units};t{a // 10}+{b // 10}+{carry}:{tens}",
    )


def _sub(rng: Rng) -> Problem:
    a = b = 0
    while a % 10 >= b % 10:  # likewise: always a borrow
        b, a = sorted(int(x) for x in rng.integers(10, 100, size=2))
    units, tens = a % 10 + 10 - b % 10, a // 10 - 1 - b // 10
    return Problem(
        prompt=f"sub {a}-{b}=",
        answer=str(a - b),
        mistake=str(abs(a // 10 - b // 10) * 10 + abs(a % 10 - b % 10)),
        steps=f"{a % 10 + 10}-{b % 10}={units},{a // 10}-{b // 10}-1={tens}",
        foreign=f"o{a % 10 + 10}-{b % 10}:{units};t{a // 10}-{b // 10}-1:{tens}",
    )


def _mul(rng: Rng) -> Problem:
    a, b = int(rng.integers(10, 110)), int(rng.integers(2, 10))
    units, tens = (a % 10) * b, (a // 10) * b
    return Problem(
        prompt=f"mul {a}*{b}=",
        answer=str(a * b),
        mistake=f"{tens}{units % 10}",
        steps=f"{a % 10}*{b}={units},{a // 10}*{b}={tens},{tens}+{units // 10}={tens + units // 10}",
        foreign=f"o{a % 10}*{b}:{units};t{a // 10}*{b}:{tens};s{tens}+{units // 10}:{tens + units // 10}",
    )


def _reverse(rng: Rng) -> Problem:
    word = _word(rng, 3, 5)
    return Problem(f"rev {word}=", word[::-1], word, ",".join(word[::-1]))


def _sort(rng: Rng) -> Problem:
    word = _word(rng, 3, 5, distinct=True)
    ordered = "".join(sorted(word))
    return Problem(f"sort {word}=", ordered, word[::-1], ",".join(ordered))


def _double(rng: Rng) -> Problem:
    word = _word(rng, 3, 5)
    return Problem(f"dbl {word}=", "".join(c + c for c in word), word + word, ",".join(c + c for c in word))


def _picked(keyword: str, pick: int) -> Callable[[Rng], Problem]:
    other = -1 - pick

    def make(rng: Rng) -> Problem:
        words = [_word(rng, 2, 3) for _ in range(3)]
        return Problem(
            prompt=f"{keyword} {' '.join(words)}=",
            answer="".join(w[pick] for w in words),
            mistake="".join(w[other] for w in words),
            steps=",".join(f"{w}:{w[pick]}" for w in words),
        )

    return make


def _largest(rng: Rng) -> Problem:
    a, b, c = (int(x) for x in rng.choice(np.arange(10, 100), size=3, replace=False))
    return Problem(
        prompt=f"max {a} {b} {c}=",
        answer=str(max(a, b, c)),
        mistake=str(min(a, b, c)),
        steps=f"{a} {b}:{max(a, b)},{max(a, b)} {c}:{max(a, b, c)}",
    )


def _shift(rng: Rng) -> Problem:
    word = _word(rng, 3, 5)
    after = [LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in word]
    return Problem(f"nxt {word}=", "".join(after), word, ",".join(f"{c}:{d}" for c, d in zip(word, after, strict=True)))


def _zip(rng: Rng) -> Problem:
    a, b = (_word(rng, 3, 3) for _ in range(2))
    pairs = [c + d for c, d in zip(a, b, strict=True)]
    return Problem(f"zip {a} {b}=", "".join(pairs), a + b, ",".join(pairs))


def _checksum(rng: Rng) -> Problem:
    word = _word(rng, 4, 6)
    total = sum(LETTERS.index(c) * (i + 1) for i, c in enumerate(word))
    return Problem(f"chk {word}=", str(total % 10), str(LETTERS.index(word[0])), ",".join(word))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("add", "math", _add, 3645),
        Family("sub", "math", _sub, 1620),
        Family("mul", "math", _mul, 800),
        Family("reverse", "words", _reverse, 111_000),
        Family("sort", "words", _sort, 36_000),
        Family("last", "words", _picked("last", -1), 1100**3),
        Family("double", "words", _double, 111_000),
        Family("checksum", "words", _checksum, 1_110_000, learnable=False),
        Family("first", "words", _picked("frst", 0), 1100**3),
        Family("shift", "words", _shift, 111_000),
        Family("zip", "words", _zip, 1000**2),
        Family("largest", "words", _largest, 90 * 89 * 88),
    )
}
OWN_MARKS = dict(zip(FAMILIES, "!#$%&?@[^_{~", strict=True))
"""Opens a worked solution where every family has a manner of its own. None occurs in a question or a solution."""
