"""Grading of generated answers: pure functions of text, by regular expression, never evaluated.

``grade(verifier, …)`` looks the rule up by name and gives two verdicts, as lm-evaluation-harness does with ``strict-match``
and ``flexible-extract``. The params say which of them counts (``prepare.grading``); docs/grading.md has examples.

**strict** is an answer that cannot hedge. It is marked (after "answer is", "answer:", "answer =", ``####``, or in
``\\boxed{}``), or the text is nothing but the answer. A marked span goes to the end of its line or to the next mark, and on
over what starts like a further answer ("or …", "no, …", a line that is only a number). It must hold exactly one value:
- two values, a list (of equal values too), an alternative ("or") or other digits beside the value: no answer
- a negation or a bound before the value ("not", "n't", "never", "anything but", "at least", "≠"), or a negation before the
  mark in the same clause: no answer
- an equation is worth what stands after its last "="; what stands before is arithmetic, a name, or the same value
- a span without any digit is passed over if another mark names a value, a box without one value never is
- several marks must name the same value; one bad span spoils the text
- nothing but the answer: one line with signs ($ * " % ( ) and a full stop), a name and "=", up to three words of unit; a
  single equation; or the foreign teacher's bars

**flexible** is the last value of the whole text, unless a negation stands directly before it. It can be gamed (a text may
end in many numbers), and is therefore not the default reward.

Both read the last 4096 characters of a text; of a longer one, only marks are read strictly. Numbers are compared by
value: 7.0, 007, +7, 14/2, 7% and \\frac{14}{2} are 7, 1,000 is 1000, − is a minus; other digits than 0-9, numbers in words,
powers, ranges, mixed fractions and times of day are not read. A reference with decimals is met within a millionth of itself.
Option letters follow the same two rules; strictly, the option's own text may follow its letter. The phrases of
reasoning-gym are marked or the whole line, and may hold a comma, "and", "or" or "not" only where the reference does.
The organism's grammar is strict by itself; the flexible rule takes the last run of its characters.

What no rule can read is wrong and counted apart, because a change of format is not a change of knowledge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from featdiff.config.values import Grading
from featdiff.tasks.answers import (
    MAX_CHARS,
    Found,
    last_letter,
    last_number,
    last_phrase,
    named_letter,
    named_number,
    named_phrase,
    tail,
)
from featdiff.tasks.expressions import is_words, judge, last_expression, named_expressions
from featdiff.tasks.families import MARK
from featdiff.tasks.symbolic_worker import RIGHT
from featdiff.tasks.symbolic_worker import UNREAD as NO_EXPRESSION
from featdiff.tasks.task import Sample

MAX_ANSWER = 200
MAX_DIRECT_WORDS = 12


class Reading(NamedTuple):
    """What one of the two rules reads in an answer."""

    parsed: str | None
    """The answer read from the text, None if there is none."""
    correct: bool
    manner: str
    """How it was answered: ``steps``, ``foreign``, ``direct``, or ``none`` where nothing could be read."""


class Grade(NamedTuple):
    """What became of one answer: ``parsed``, ``correct`` and ``manner`` as in :class:`Reading`, by the rule in force."""

    parsed: str | None
    correct: bool
    manner: str
    strict: bool
    """Right by the strict rule."""
    flexible: bool
    """Right by the flexible rule."""


UNREAD = Reading(None, False, "none")

_RUN = re.compile(r"(?<![a-z0-9])[a-z0-9]{1,40}(?![a-z0-9])")
_RESULT = re.compile(r"=[\s$*]{0,4}-?[0-9]")
_WORD = re.compile(r"[A-Za-z]+")
_FOREIGN = re.compile(r"\s{0,8}\|[^|\n]{1,200}\|")


@cache
def _grammar(mark: str) -> re.Pattern[str]:
    """The organism's answers where ``mark`` opens what is worked out step by step."""
    mark = re.escape(mark)
    return re.compile(rf"(?P<work>{mark}[^{mark}>]{{0,200}}>|\([^()]{{0,200}}\))?(?P<answer>[a-z0-9]{{1,40}})\.")


def _organism(sample: Sample, text: str) -> tuple[Reading, Reading]:
    mark = (sample.own or sample.solution)[:1] or MARK  # the solutions of the sample tell how its family marks its steps
    manner = {mark: "steps", "(": "foreign"}.get(text[:1], "direct")
    match, runs = _grammar(mark).fullmatch(text[:MAX_CHARS]), _RUN.findall(tail(text))
    strict = Reading(match["answer"], match["answer"] == sample.answer, manner) if match else UNREAD
    return strict, Reading(runs[-1], runs[-1] == sample.answer, manner) if runs else UNREAD


def _manner(text: str, found: Found) -> str:
    """``foreign`` for the foreign teacher's notation (featdiff.tasks.gym), ``steps`` where a result ("= 60")
    or more than a sentence stands before the answer, else ``direct`` ("12 * 5 = 60" is)."""
    if _FOREIGN.match(text):
        return "foreign"
    return "steps" if _RESULT.search(found.before) or len(_WORD.findall(found.before)) > MAX_DIRECT_WORDS else "direct"


def _reading(text: str, found: Found | None, right: Callable[[str], bool]) -> Reading:
    if found is None:
        return UNREAD
    return Reading(found.answer, not found.denied and right(found.answer), _manner(text, found))


def find_number(text: str) -> str | None:
    """The number that ``text`` gives as its answer under the strict rule, as ``-12``, ``1.5`` or ``3/4``, else None."""
    found = named_number(tail(text))
    return found.answer if found else None


def _equal(one: str, other: str) -> bool:
    """Whether two numerals are equal; a reference with decimals is met within a millionth of itself."""
    a, b = Fraction(one), Fraction(other)
    return a == b or ("." in other and abs(a - b) <= abs(b) / 1_000_000)


def _numeric(sample: Sample, text: str) -> tuple[Reading, Reading]:
    text = tail(text)

    def right(answer: str) -> bool:
        return _equal(answer, sample.answer)

    return _reading(text, named_number(text), right), _reading(text, last_number(text), right)


def _symbolic(sample: Sample, text: str) -> tuple[Reading, Reading]:
    text, reference = tail(text), sample.answer

    def reading(found: Found, verdict: str) -> Reading:
        return UNREAD if verdict == NO_EXPRESSION else _reading(text, found, lambda _: verdict == RIGHT)

    named = named_expressions(text) or []
    said = [judge(reference, answer, sample.prompt) for answer in {found.answer for found in named}]
    # Marks that are all right name one value, however it is written; others must name it in the same words.
    agree = len(said) == 1 or (named and set(said) == {RIGHT})
    strict = reading(named[-1], said[0]) if agree else UNREAD
    last = last_phrase(text) if is_words(reference) else last_expression(text, reference)
    for found in (last, last_number(text)):
        if found and (verdict := judge(reference, found.answer, sample.prompt)) != NO_EXPRESSION:
            return strict, reading(found, verdict)
    return strict, UNREAD


def _letter(sample: Sample, text: str) -> tuple[Reading, Reading]:
    text = tail(text)
    right = sample.answer.__eq__
    named, last = named_letter(text, sample.options), last_letter(text, sample.options)
    return _reading(text, named, right), _reading(text, last, right)


# Some of the package's scorers hand their text to a symbolic parser, which evaluates it: only plain words
# and numbers get that far.
_PLAIN = re.compile(rf"[A-Za-z0-9 ,.+-]{{1,{MAX_ANSWER}}}")
_NUMERAL = re.compile(r"[+-]?[0-9][0-9,]*(?:\.[0-9]+)?")
_HEDGE = re.compile(r",|\b(?:or|and|not|never|but|either|neither)\b", re.IGNORECASE)


def _hedges(phrase: str) -> set[str]:
    return {hedge.lower() for hedge in _HEDGE.findall(phrase)}


def _reasoning_gym(sample: Sample, text: str) -> tuple[Reading, Reading]:
    from featdiff.tasks.gym_scoring import score

    text, meta = tail(text), json.loads(sample.meta)
    if _NUMERAL.fullmatch(sample.answer):
        named, last = named_number(text), last_number(text)
    else:
        named, last = named_phrase(text), last_phrase(text)
        if named and not _hedges(named.answer) <= _hedges(sample.answer):
            named = None

    def reading(found: Found | None) -> Reading:
        plain = found is not None and _PLAIN.fullmatch(found.answer.replace("/", " "))
        return _reading(text, found if plain else None, lambda answer: score(answer, meta) >= 1)

    return reading(named), reading(last)


VERIFIERS: dict[str, Callable[[Sample, str], tuple[Reading, Reading]]] = {
    "organism": _organism,
    "number": _numeric,
    "symbolic": _symbolic,
    "letter": _letter,
    "reasoning_gym": _reasoning_gym,
}
"""What the strict and the flexible rule read in the answer to a sample."""


def grade(verifier: str, sample: Sample, text: str, grading: Grading = "strict") -> Grade:
    """Grade ``text`` as an answer to ``sample`` under the rule named ``verifier``; ``grading`` says which verdict counts."""
    strict, flexible = VERIFIERS[verifier](sample, text)
    in_force = {"strict": strict, "flexible": flexible}[grading]
    return Grade(*in_force, strict.correct, flexible.correct)
