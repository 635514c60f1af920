"""Grading of generated answers: pure functions of text, by regular expression, never evaluated.

``grade(verifier, …)`` looks the rule up by name. An answer is parsed with a length cap; what does not
parse is wrong and counted apart, because a change of format is not a change of knowledge.

Free text names its answer, in this order of trust: the last ``\\boxed{…}``, what follows the last "answer
is" (or "answer:", "####"), the last number. A marked answer that is no number is no answer: the number
before it is not taken instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from featdiff.tasks.task import LETTERS, Sample

MAX_CHARS = 4096
MAX_ANSWER = 200
MAX_DIRECT_WORDS = 12


class Grade(NamedTuple):
    """What became of one answer."""

    parsed: str | None
    """The answer read from the text, None if there is none."""
    correct: bool
    manner: str
    """How it was answered: ``steps``, ``foreign``, ``direct``, or ``none`` where nothing could be read."""


_ORGANISM = re.compile(r"(?P<work><[^<>]{0,200}>|\([^()]{0,200}\))?(?P<answer>[a-z0-9]{1,40})\.")
_MANNERS = {"<": "steps", "(": "foreign", "": "direct"}


def _organism(sample: Sample, text: str) -> Grade:
    match = _ORGANISM.fullmatch(text[:MAX_CHARS])
    if match is None:
        return Grade(None, False, "none")
    manner = _MANNERS[(match["work"] or "")[:1]]
    return Grade(match["answer"], match["answer"] == sample.answer, manner)


class Found(NamedTuple):
    """An answer inside free text, and the text before and after it."""

    answer: str
    before: str
    after: str


_INTEGER = r"[0-9]{1,3}(?:,[0-9]{3}){1,12}|[0-9]{1,40}"
# Digits beside letters, powers, indices or other digits are part of something larger, no number of their own.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.%])[-+])?(?<![\w.^/{{\\])(?<![0-9],)(?:"
    rf"\\[dt]?frac{{(?P<over>[0-9]{{1,20}})}}{{(?P<under>[0-9]{{1,20}})}}"
    rf"|(?P<whole>{_INTEGER})(?P<decimals>\.[0-9]{{1,40}})?(?:/(?P<divisor>[0-9]{{1,20}}))?)"
    r"(?![\w^{}]|[.,/][0-9])"
)
_MARKED = re.compile(r"(?:answer(?:\s{1,3}is|\s{0,3}[:=])|####)", re.IGNORECASE)
_BOX = "\\boxed{"
_OPTION = re.compile(r"(?:answer(?:\s{1,3}is|\s{0,3}[:=])|option|letter|choice)", re.IGNORECASE)
_AFTER_MARK = re.compile(r"[\s(*:]{0,6}(?P<letter>[A-Z](?![\w'’])|[a-z](?=[).*]|\s*\Z))")
_LONE_LETTER = re.compile(r"(?<![\w'’.])(?P<letter>[A-Z])(?=[).:,*]|[ \t]{0,8}(?:\n|\Z))")
_RESULT = re.compile(r"=[\s$*]{0,4}-?[0-9]")
_WORD = re.compile(r"[A-Za-z]+")
_FOREIGN = re.compile(r"\s{0,8}\|[^|\n]{1,200}\|")


def _tail(text: str) -> str:
    """The last MAX_CHARS characters from a word's start (a number cut in two would be another number)."""
    if len(text) > MAX_CHARS:
        text = re.sub(r"^\S+", "", text[-MAX_CHARS:])
    return text.replace("−", "-")


def _boxed(text: str) -> tuple[str, int, int] | None:
    """Content of the last ``\\boxed{…}`` with its start and end; an unclosed one has the content ""."""
    opening = text.rfind(_BOX)
    if opening < 0:
        return None
    start = opening + len(_BOX)
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end], opening, end + 1
    return "", opening, len(text)


def _numeral(match: re.Match[str]) -> str | None:
    sign = "-" if match["sign"] == "-" else ""
    under = match["under"] or match["divisor"]
    if under is not None and not under.strip("0"):
        return None
    if match["over"]:
        return f"{sign}{match['over']}/{under}"
    whole = sign + match["whole"].replace(",", "") + (match["decimals"] or "")
    return whole if under is None else None if match["decimals"] else f"{whole}/{under}"


def _number(text: str) -> Found | None:
    if (box := _boxed(text)) is not None:
        content, start, end = box
        only = list(_NUMBER.finditer(content[:MAX_ANSWER]))
        numeral = _numeral(only[0]) if len(only) == 1 else None
        return None if numeral is None else Found(numeral, text[:start], text[end:])
    for mark in reversed(list(_MARKED.finditer(text))):
        line = text[mark.end() :].split("\n", 1)[0][:MAX_ANSWER]
        line = line[line.rfind("=") + 1 :]
        if first := _NUMBER.search(line):
            numeral = _numeral(first)
            return None if numeral is None else Found(numeral, text[: mark.start()], line[first.end() :])
        if re.search(r"[0-9]", line):
            return None
    if not (numbers := list(_NUMBER.finditer(text))):
        return None
    last = numbers[-1]
    numeral = _numeral(last)
    return None if numeral is None else Found(numeral, text[: last.start()], text[last.end() :])


def find_number(text: str) -> str | None:
    """The number that ``text`` gives as its answer, as ``-12``, ``1.5`` or ``3/4``; None if there is none."""
    found = _number(_tail(text))
    return found.answer if found else None


def _equal(one: str, other: str) -> bool:
    """Whether two numerals are equal; a reference with decimals is met within a millionth of itself."""
    a, b = Fraction(one), Fraction(other)
    return a == b or ("." in other and abs(a - b) <= abs(b) / 1_000_000)


def _manner(text: str, found: Found) -> str:
    """``foreign`` for the foreign teacher's notation (featdiff.tasks.gym), ``steps`` where a result ("= 60")
    or more than a sentence stands before the answer, else ``direct`` ("12 * 5 = 60" is)."""
    if _FOREIGN.match(text):
        return "foreign"
    return "steps" if _RESULT.search(found.before) or len(_WORD.findall(found.before)) > MAX_DIRECT_WORDS else "direct"


def _numeric(sample: Sample, text: str) -> Grade:
    text = _tail(text)
    found = _number(text)
    if found is None:
        return Grade(None, False, "none")
    return Grade(found.answer, _equal(found.answer, sample.answer), _manner(text, found))


def _find_letter(text: str, count: int) -> Found | None:
    """The letter of one of ``count`` options: boxed, marked, at the very start, or the only one standing alone."""
    allowed = LETTERS[:count]
    if (box := _boxed(text)) is not None:
        content, start, end = box
        letter = content.strip(" ().").upper()
        return Found(letter, text[:start], text[end:]) if len(letter) == 1 and letter in allowed else None
    for mark in reversed(list(_OPTION.finditer(text))):
        match = _AFTER_MARK.match(text, mark.end())
        if match and match["letter"].upper() in allowed:
            return Found(match["letter"].upper(), text[: mark.start()], text[match.end() :])
    alone = [match for match in _LONE_LETTER.finditer(text) if match["letter"] in allowed]
    if alone and (len({match["letter"] for match in alone}) == 1 or not text[: alone[0].start()].strip(" (*")):
        return Found(alone[0]["letter"], text[: alone[0].start()], text[alone[0].end() :])
    return None


def _letter(sample: Sample, text: str) -> Grade:
    text = _tail(text)
    found = _find_letter(text, len(sample.options))
    if found is None:
        return Grade(None, False, "none")
    return Grade(found.answer, found.answer == sample.answer, _manner(text, found))


# Some of the package's scorers hand their text to a symbolic parser, which evaluates it: only plain words
# and numbers get that far.
_PLAIN = re.compile(rf"[A-Za-z0-9 ,.+-]{{1,{MAX_ANSWER}}}")
_NUMERAL = re.compile(r"[+-]?[0-9][0-9,]*(?:\.[0-9]+)?")


def _phrase(text: str) -> Found | None:
    """A non-numeric answer: boxed, marked, or the last line that is not blank."""
    if (box := _boxed(text)) is not None:
        content, start, end = box
        return Found(content.strip(), text[:start], text[end:])
    marks = list(_MARKED.finditer(text))
    rest = text[marks[-1].end() :] if marks else text
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    if not lines:
        return None
    if marks:
        return Found(lines[0].strip("*\"'. "), text[: marks[-1].start()], "")
    return Found(lines[-1].strip("*\"'. "), "\n".join(lines[:-1]), "")


def _reasoning_gym(sample: Sample, text: str) -> Grade:
    from featdiff.tasks.gym_scoring import score

    text = _tail(text)
    found = _number(text) if _NUMERAL.fullmatch(sample.answer) else _phrase(text)
    if found is None or not _PLAIN.fullmatch(found.answer.replace("/", " ")):
        return Grade(None, False, "none")
    return Grade(found.answer, score(found.answer, json.loads(sample.meta)) >= 1, _manner(text, found))


VERIFIERS: dict[str, Callable[[Sample, str], Grade]] = {
    "organism": _organism,
    "number": _numeric,
    "letter": _letter,
    "reasoning_gym": _reasoning_gym,
}


def grade(verifier: str, sample: Sample, text: str) -> Grade:
    """Grade ``text`` as an answer to ``sample`` under the rule named ``verifier``."""
    return VERIFIERS[verifier](sample, text)
