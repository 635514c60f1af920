"""What free text gives as its answer: its marked spans, the one value of a span, the last value of all.

The policy stands in featdiff.tasks.verify. Everything here is a regular expression over the last ``MAX_CHARS`` characters,
in linear time; nothing is evaluated.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from fractions import Fraction
from typing import NamedTuple

from featdiff.tasks.task import LETTERS

MAX_CHARS = 4096


class Found(NamedTuple):
    """An answer inside free text."""

    answer: str
    before: str
    """The text before it, which tells the manner."""
    denied: bool = False
    """Whether a negation stands directly before it."""


class Span(NamedTuple):
    """What one mark marks."""

    start: int
    """Where the mark starts in the text."""
    boxed: bool
    text: str
    """The content of the box, or the line after the mark; empty for a box that is never closed."""
    more: str
    """What follows and starts like a further answer."""
    denied: bool
    """Whether a negation stands before the mark ("it is not true that the answer is")."""

    @property
    def whole(self) -> str:
        return f"{self.text} {self.more}"


_DENIAL = r"(?:\b(?:not|never|no|nor|neither|cannot|except|anything\s{1,3}but|(?:other|rather)\s{1,3}than)\b|n['’]t\b)"
_BOUND = (
    r"\b(?:at\s{1,3}(?:least|most)|(?:less|fewer|smaller|lower|more|greater|larger|bigger|higher)\s{1,3}than)\b"
    r"|!=|[≠≤≥]|\\(?:n(?:eq?|ot)|[lg]eq?)\b|(?<![-=])[<>]\s"
)
DENIED = re.compile(f"{_DENIAL}|{_BOUND}", re.IGNORECASE)
# Up to five words of the same clause may part the negation from a mark, none of them from a value.
_DENIED_MARK = re.compile(rf"{_DENIAL}(?:[ \t]{{1,3}}[\w'’]{{1,20}}){{0,5}}[^\w.,;:!?\n]{{0,20}}\Z", re.IGNORECASE)
_DENIED_VALUE = re.compile(rf"{_DENIAL}(?:\s{{1,3}}(?:option|letter|choice))?[^\w.]{{0,20}}\Z", re.IGNORECASE)
ALTERNATIVE = re.compile(r"\bor\b", re.IGNORECASE)
_REACH = 160

_MARK = re.compile(r"(?<![a-z])answer(?:\s{1,3}is\b[\s*]{0,4}:?|[\s*]{0,4}[:=])|####|\\boxed\{", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\{|[{}]", re.IGNORECASE)
_AFTERTHOUGHT = (
    r"(?:or|and|no|nor|maybe|perhaps|possibly|alternatively|otherwise|either|also|wait|actually|but|else|sorry)\b[^\n]*"
)
_BOX_GOES_ON = re.compile(rf"[^\w\n]{{0,8}}(?:{_AFTERTHOUGHT}|(?:[0-9]|(?-i:[A-Z]\b))[^\n]*)", re.IGNORECASE)
_LINES_GO_ON = re.compile(
    rf"(?:\s{{0,20}}\n[ \t]{{0,20}}"
    rf"(?:{_AFTERTHOUGHT}|[-+$*(]{{0,4}}(?:[0-9][0-9.,/]{{0,60}}|(?-i:[A-Z]\b))[.)*$ \t]{{0,8}}(?=\n|\Z))){{0,400}}",
    re.IGNORECASE,
)


def tail(text: str) -> str:
    """The last MAX_CHARS characters from a word's start (a number cut in two would be another number), after a line that
    says that something is missing, so that they are not taken for the whole."""
    if len(text) > MAX_CHARS:
        text = "…\n" + re.sub(r"^\S+", "", text[-MAX_CHARS:])
    return text.replace("−", "-")


def boxes(text: str) -> dict[int, int]:
    """For every closed ``\\boxed{`` where it starts, the place of its closing brace."""
    closed: dict[int, int] = {}
    opened: list[int | None] = []
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(None if brace[0] == "{" else brace.start())
        elif opened and (start := opened.pop()) is not None:
            closed[start] = brace.start()
    return closed


def spans(text: str) -> list[Span]:
    """What every mark of ``text`` marks, in order. A span ends where the next mark starts; marks inside a box are none."""
    closed, found, inside = boxes(text), [], 0
    marks = list(_MARK.finditer(text))
    starts = [mark.start() for mark in marks]
    for mark in marks:
        if mark.start() < inside:
            continue
        boxed, start = mark[0].endswith("{"), mark.end()
        if boxed:
            end = closed.get(mark.start(), start)
            inside, goes_on, rest = end, _BOX_GOES_ON, end + 1
        else:
            while start < len(text) and text[start].isspace():
                start += 1
            end = text.find("\n", start)
            end = rest = end if end >= 0 else len(text)
            goes_on = _LINES_GO_ON
        following = bisect_right(starts, max(inside, mark.start()))
        limit = starts[following] if following < len(starts) else len(text)
        more = goes_on.match(text, rest, limit) if rest <= limit else None
        denied = _DENIED_MARK.search(text[max(0, mark.start() - _REACH) : mark.start()]) is not None
        found.append(Span(mark.start(), boxed, text[start : min(end, limit)], more[0] if more else "", denied))
    return found


_INTEGER = r"[0-9]{1,3}(?:,[0-9]{3}){1,12}|[0-9]{1,40}"
# Digits beside letters, powers, indices or other digits are part of something larger, no number of their own.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.%])[-+])?(?<![\w.^/{{\\])(?<![0-9],)(?:"
    rf"\\[dt]?frac{{(?P<over>[0-9]{{1,20}})}}{{(?P<under>[0-9]{{1,20}})}}"
    rf"|(?P<whole>{_INTEGER})(?P<decimals>\.[0-9]{{1,40}})?(?:/(?P<divisor>[0-9]{{1,20}}))?)"
    r"(?![\w^{}]|[.,/][0-9])"
)
_OPERATOR = re.compile(r"\\(?:times|cdot|div)\b|[×÷·^x]")
_WORKING = re.compile(r"#(?:[-+*/]{1,3}#){1,100}")
_ALONE_BEFORE = re.compile(r"[^\w\\<>]{0,12}(?:[A-Za-z]{1,10}\s{0,3}=)?[^\w\\<>]{0,12}")
_WORD = r"(?!is\b|are\b|was\b|were\b|not\b|never\b)[A-Za-z]{1,20}"
_UNITS = rf"(?:{_WORD}(?:[ /-]{_WORD}){{0,2}})?"
_ALONE_AFTER = re.compile(
    rf"[\s$*°%\\]{{0,8}}(?:{_UNITS}|\\text\{{\s{{0,3}}{_UNITS}\s{{0,3}}\}}|\((?:[^\W\d]|[ ,./'’-]){{1,80}}\))[)\s$*.]{{0,8}}"
)
_BARS = re.compile(r"(?:\|[^|>\n]{1,200}>[^|>\n]{1,200}){1,400}\|(?P<answer>[^|>\n]{1,60})")


def has_digit(text: str) -> bool:
    """Whether ``text`` holds a digit of any script, a power or a fraction sign."""
    return any(map(str.isnumeric, text))


def _numeral(match: re.Match[str]) -> str | None:
    sign = "-" if match["sign"] == "-" else ""
    under = match["under"] or match["divisor"]
    if under is not None and not under.strip("0"):
        return None
    if match["over"]:
        return f"{sign}{match['over']}/{under}"
    whole = sign + match["whole"].replace(",", "") + (match["decimals"] or "")
    return whole if under is None else None if match["decimals"] else f"{whole}/{under}"


class Value(NamedTuple):
    """The one value of a span, with the text after it."""

    numeral: str
    after: str


def one_value(span: str) -> Value | None:
    """The value of a span that holds exactly one and does not deny it; an equation is worth what stands after its last "="."""
    *working, result = span.split("=")
    numbers = list(_NUMBER.finditer(result))
    if len(numbers) != 1 or (numeral := _numeral(numbers[0])) is None:
        return None
    before, after = result[: numbers[0].start()], result[numbers[0].end() :]
    if has_digit(before) or has_digit(after) or ALTERNATIVE.search(span):
        return None
    if not all(_leads_to(numeral, part, first=i == 0) for i, part in enumerate(working)):
        return None
    before = span[: len(span) - len(result)] + before
    return None if DENIED.search(before) else Value(numeral, after)


def _leads_to(numeral: str, part: str, *, first: bool) -> bool:
    """Whether ``part``, which stands before an "=", hides no other value: it has no number, the same one, or is arithmetic
    (whose operands are nobody's answer). Words may stand before it where it is the first."""
    numbers = list(_NUMBER.finditer(part))
    form = _NUMBER.sub(lambda match: f"{match['sign'] or ''}#", part)
    if has_digit(form):
        return False
    if len(numbers) < 2:
        return all((value := _numeral(number)) is not None and Fraction(value) == Fraction(numeral) for number in numbers)
    form = re.sub(r"[\s()$%!]", "", _OPERATOR.sub("*", form[form.index("#") if first else 0 :]))
    return _WORKING.fullmatch(form.lstrip("+-")) is not None


def named_number(text: str) -> Found | None:
    """The number that ``text`` commits itself to: in its marks, after its bars, or by being nothing else."""
    marked = spans(text)
    if not marked:
        return _lone_number(text)
    found: dict[Fraction, Found] = {}
    working = ""
    for span in marked:
        unfinished = not span.boxed and span.text.rstrip(" $").endswith("=")
        if not (span.boxed or unfinished or has_digit(span.whole)):
            continue  # prose ("the answer is based on"), or cut off
        if span.denied:
            return None
        if unfinished:
            working = span.text  # "the answer is 12 * 5 = \\boxed{60}"
            continue
        value, working = one_value(working + span.whole), ""
        if value is None:
            return None
        found[Fraction(value.numeral)] = Found(value.numeral, text[: span.start])
    return next(iter(found.values())) if len(found) == 1 else None


def _lone_number(text: str) -> Found | None:
    line = text.strip()
    if bars := _BARS.fullmatch(line):
        line = bars["answer"]
    value = one_value(line)
    if value is None or "\n" in line or not _ALONE_AFTER.fullmatch(value.after):
        return None
    digits = min((number.start() for number in _NUMBER.finditer(line)), default=0)
    return Found(value.numeral, "") if _ALONE_BEFORE.fullmatch(line[:digits]) else None


def last_number(text: str) -> Found | None:
    """The last number anywhere in ``text``."""
    plain = unboxed(text)
    numbers = list(_NUMBER.finditer(plain))
    numeral = _numeral(numbers[-1]) if numbers else None
    return last_at(numeral, plain, numbers[-1].start()) if numeral else None


def last_at(answer: str, text: str, start: int) -> Found:
    """``answer`` at ``start`` of ``text``, and whether a negation stands directly before it."""
    return Found(answer, text[:start], _DENIED_VALUE.search(text[max(0, start - _REACH) : start]) is not None)


def unboxed(text: str) -> str:
    """``text`` with blanks instead of the boxes around their content, every character in its place."""
    characters = list(text)
    for start, end in boxes(text).items():
        characters[start : start + len("\\boxed{")] = " " * len("\\boxed{")
        characters[end] = " "
    return "".join(characters)


_LONE_LETTER = re.compile(r"(?<![\w'’.\\])(?!I [a-z])[A-Z](?![\w'’])")
_ARTICLE = re.compile(r"A [a-z]")
_SMALL_LETTER = re.compile(r"(?<![\w'’.\\])[a-z](?=[)*}]|\.?\s{0,8}\Z)")
_LONE_OPTION = re.compile(r"[\s(*\"$]{0,6}(?:(?:option|letter|choice)\s{1,3})?(?P<letter>[A-Za-z])(?![\w'’])", re.IGNORECASE)
_NAMED_OPTION = re.compile(r"(?:option|letter|choice)[\s(*:]{1,6}[A-Z](?![\w'’])", re.IGNORECASE)
_LETTER_ENDS = ').:,*"$- \t\n'


def _without_option(rest: str, option: str) -> str:
    """``rest`` without the option's own text at its start."""
    rest = rest.lstrip(_LETTER_ENDS)
    return rest[len(option) :] if option and rest[: len(option)].casefold() == option.casefold() else rest


def _one_letter(span: str, options: tuple[str, ...]) -> str | None:
    """The only option letter of a marked span, beside that option's own text; "" where the span names none."""
    allowed = LETTERS[: len(options)]
    if (first := _LONE_LETTER.search(span)) is None:
        lone = span.strip(_LETTER_ENDS + "(").upper()
        return lone if len(lone) == 1 and lone in allowed else ""
    rest = span[first.end() :]
    quoted = any(len(option) > 1 and span.startswith(option, first.start()) for option in options)  # "A dog" is no A
    if quoted or first[0] not in allowed or DENIED.search(span[: first.start()]):
        return None
    rest = _without_option(rest, options[allowed.index(first[0])])
    others = [other for other in _LONE_LETTER.finditer(rest) if not _ARTICLE.match(rest, other.start())]
    return None if others or re.match(r"\W{0,8}(?:or|and)\b", rest, re.IGNORECASE) else first[0]


def named_letter(text: str, options: tuple[str, ...]) -> Found | None:
    """The option letter that ``text`` commits itself to: in its marks, or by being nothing else."""
    marked = spans(text)
    if not marked:
        lone = _LONE_OPTION.match(text)
        letter = lone["letter"].upper() if lone else ""
        if lone is None or letter not in LETTERS[: len(options)]:
            return None
        rest = _without_option(text[lone.end() :], options[LETTERS.index(letter)])
        return None if rest.strip(_LETTER_ENDS) else Found(letter, "")
    found: dict[str, Found] = {}
    for span in marked:
        letter = _one_letter(span.whole, options)
        if letter == "" and not span.boxed:
            continue
        if not letter or span.denied:
            return None
        found[letter] = Found(letter, text[: span.start])
    return next(iter(found.values())) if len(found) == 1 else None


def last_letter(text: str, options: tuple[str, ...]) -> Found | None:
    """The last letter of an option that stands alone in ``text``."""
    allowed, plain = LETTERS[: len(options)], unboxed(text)
    places = [match.start() for match in _LONE_LETTER.finditer(plain) if not _ARTICLE.match(plain, match.start())]
    places += [match.end() - 1 for match in _NAMED_OPTION.finditer(plain)]
    places += [match.start() for match in _SMALL_LETTER.finditer(text)]
    place = max((place for place in places if plain[place].upper() in allowed), default=None)
    return None if place is None else last_at(plain[place].upper(), plain, place)


TRIM = "*\"'. "


def named_phrase(text: str) -> Found | None:
    """The phrase that ``text`` commits itself to: in its marks, or by being one line."""
    marked = spans(text)
    if not marked:
        line = text.strip().strip(TRIM)
        return Found(line, "") if line and "\n" not in line else None
    phrases = {span.whole.strip(TRIM + "\n"): span for span in marked if span.boxed or span.whole.strip(TRIM + "\n")}
    if len(phrases) != 1 or any(span.denied for span in phrases.values()):
        return None
    phrase, span = next(iter(phrases.items()))
    return Found(phrase, text[: span.start])


def last_phrase(text: str) -> Found | None:
    """The content of the last box, else the line after the last mark, else the last line that is not blank."""
    marked = spans(text)
    if chosen := [span for span in marked if span.boxed][-1:] or marked[-1:]:
        return Found(chosen[0].text.strip(TRIM), text[: chosen[0].start])
    lines = [line for line in text.splitlines() if line.strip()]
    return Found(lines[-1].strip(TRIM), "\n".join(lines[:-1])) if lines else None
