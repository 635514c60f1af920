"""Mathematical expressions as answers: which ones a text names, and whether one is the reference's.

What needs no algebra is settled here, by regular expression: a form that hedges or leaves the work undone, words, numerals, the
same characters. Only what is left is asked of featdiff.tasks.symbolic. The policy stands in docs/grading.md.
"""

from __future__ import annotations

import re
from fractions import Fraction

from featdiff.tasks import symbolic
from featdiff.tasks.answers import ALTERNATIVE, DENIED, Found, boxes, has_digit, last_at, spans, unboxed
from featdiff.tasks.symbolic_worker import RIGHT, UNREAD, WRONG

MAX_EXPRESSION = 400
"""Characters; the longest answer of MATH-500 has 60."""

# Which expressions a text names.


def _trimmed(text: str) -> str:
    return text.strip("*\"' \n,").rstrip(".*\"' \n,")


_SEGMENT = re.compile(
    r"\$\$(?P<display>[^$]{1,400})\$\$|(?<!\\)\$(?P<inline>(?:[^$\n\\]|\\.){1,400})\$"
    r"|\\\((?P<round>(?:[^\\\n]|\\[^()]){1,400})\\\)|\\\[(?P<square>(?:[^\\]|\\[^\]\[]){1,400})\\\]"
)
_SENTENCE = re.compile(r"[.!?]\s+(?=[A-Z])")
_LEAD = re.compile(r"(?:(?!(?:sqrt|pi|sin|cos|tan|log|ln)\b)[A-Za-z]{2,20}:?\s+){1,5}")
_SAYS = re.compile(r"[^\W_]|[√π∞]")
_PROSE = re.compile(r"(?:(?<![\\A-Za-z])(?!(?:sqrt|pi|sin|cos|tan|log|ln)\b)[A-Za-z]{2,}|\n)")
_VALUE = re.compile(r"[0-9\\√π∞]")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{(?:align|aligned|gather|equation|split|center|eqnarray)\*?\}")
_RESULT = re.compile(r"(?<![\\<>:])(?<![^0-9]!)=|\\(?:approx|equiv|Rightarrow|implies)(?![A-Za-z])")


def named_expressions(text: str) -> list[Found] | None:
    """The expression that each mark of ``text`` names, or the whole text where it has no mark and is one line; None where a
    mark names none, more than one, or is denied."""
    marked = spans(text)
    if not marked:
        line = _trimmed(text)
        whole = _SEGMENT.fullmatch(line)
        alone = _content(whole) if whole else "" if "\n" in line or _SEGMENT.search(line) else line
        return [Found(alone, "")] if alone else None
    found: list[Found] = []
    prose: list[Found] = []
    working = ""
    for span in marked:
        if not span.boxed and span.text.rstrip(" $").endswith("="):  # "the answer is 12 * 5 = \\boxed{60}"
            if span.denied:
                return None
            working = _LEAD.sub("", span.text, count=1).replace("$", "")
            continue
        expression = _in_box(span.text, span.more) if span.boxed else _in_line(span.whole)
        if expression == "":
            continue
        if expression is None or span.denied:
            return None
        (found if span.boxed or _VALUE.search(expression) else prose).append(Found(working + expression, text[: span.start]))
        working = ""
    return found or prose or None  # "the answer is correct" names nothing beside a value, "the answer is Evelyn" alone does


def _content(segment: re.Match[str]) -> str:
    return next(text for text in segment.groups() if text is not None).strip()


def _in_box(content: str, more: str) -> str | None:
    goes_on = has_digit(more) or "\\" in more or ALTERNATIVE.search(more)
    return None if goes_on else content.strip() or None


def _in_line(line: str) -> str | None:
    """The one expression of a marked line; "" for prose, or a line that was cut off."""
    segments = list(_SEGMENT.finditer(line))
    if segments:
        before, after = line[: segments[0].start()], line[segments[0].end() :]
        rest = f"{before} {after}"
        if len(segments) > 1 or has_digit(rest) or ALTERNATIVE.search(rest) or DENIED.search(before):
            return None
        return _content(segments[0])
    first, *others = _SENTENCE.split(line, maxsplit=1)
    if any(map(has_digit, others)):
        return None
    cut_off = ("$" in first and not has_digit(first)) or not _SAYS.search(first)
    first = "" if cut_off else _trimmed(first.replace("$", ""))
    if DENIED.search(first):
        return None if _VALUE.search(first) else ""
    alone = _LEAD.sub("", first, count=1) if _VALUE.search(first) and _LEAD.match(first) else first
    return alone if _VALUE.search(alone) or len(alone.split()) <= 3 else ""


def last_expression(text: str, reference: str) -> Found | None:
    """The last expression anywhere in ``text``: in dollars, boxed, or a run of characters without words; after its last "=",
    unless ``reference`` is an equation."""
    text = _ENVIRONMENT.sub(lambda match: " " * len(match[0]), text)
    plain = unboxed(text)
    places = [(segment.start(), segment.end(), _content(segment)) for segment in _SEGMENT.finditer(plain)]
    covered = max((end for _, end, _ in places), default=0)
    places += [(start, end + 1, text[start + 7 : end]) for start, end in boxes(text).items() if start >= covered]
    end = max((end for _, end, _ in places), default=0)
    start, runs = end, []
    for word in _PROSE.finditer(plain, end):
        runs.append((start, word.start()))
        start = word.end()
    runs.append((start, len(plain)))
    places += [(low, high, plain[low:high]) for low, high in runs if _VALUE.search(plain, low, high)]
    if not places:
        return None
    start, _, expression = max(places)
    expression = _trimmed(expression.strip(",:;?$"))
    if not _SIDES.search(reference):
        expression = _RESULT.split(expression)[-1].strip()
    return last_at(expression, text, start) if len(expression) <= MAX_EXPRESSION else None


# Whether an expression is the reference's.

MAX_DEPTH = 8
"""Of braces and brackets; answers of MATH-500 have three."""

_SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "±": r"\pm ", "°": r"^\circ ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "θ": r"\theta ", "−": "-", "–": "-",
    "²": "^2", "³": "^3", "**": "^",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_NAMES = re.compile(r"(?<![\\A-Za-z])(pi|theta|infty|sin|cos|tan|cot|sec|csc|log|ln)(?![A-Za-z])")
_ROOT = re.compile(
    r"(?:√|(?<![\\A-Za-z])sqrt)\s?(?:\((?P<inner>[^()]{1,100})\)|\{(?P<braced>[^{}]{1,100})\}|(?P<short>[0-9]+|[a-z]))"
)
_LOOK = re.compile(
    r"\\(?:left|right|displaystyle|bigl?|bigr?)(?![A-Za-z])|(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])"
    r"|(?<!\\)\$|\\(?=[$%])|\{(?=,\})|(?<=\{,)\}"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_MATRIX = re.compile(r"(?<=\\begin)\{[bB]?matrix\}|(?<=\\end)\{[bB]?matrix\}")
_SHORT = re.compile(r"\\frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))")
_DEGREES = re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])")
_UNIT = re.compile(
    r"(?<=[\w}\])!$])\s*(?:\\(?:text|mbox|mathrm|textrm)\{[^{}0-9]*\}|(?:\s+(?!(?:or|and|not|to|is)\b)(?:a|[a-z]{2,20}))+)"
    r"(?:\^\{?[23]\}?)?\s*\Z"
)
_WORDS = re.compile(
    r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit)\{(?P<words>[^{}]*)\}"
    r"|(?P<plain>(?:[A-Z][a-z]{2,}|[a-z]{4,})(?:[ '-][A-Za-z]+)*)"
)
_FONT = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit)\{([^{}]*)\}")
_ENGLISH = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|or|and|not|it|is|so|we|to|of|be|an|the|are|was|but|for|if)(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_NUMERAL = re.compile(
    r"(?P<sign>[-+]?)(?:\\frac\{?(?P<over>[0-9]{1,20}?)\}?\{?(?P<under>[0-9]{1,20})\}?"
    r"|(?P<whole>[0-9]{0,40})(?P<decimals>\.[0-9]{1,40})?(?:/(?P<divisor>[0-9]{1,20})|(?:\\times|\\cdot)10\^\{?(?P<power>-?[0-9]{1,2})\}?)?)%?"
)
_BASED = re.compile(r"([0-9]+)_\{?([0-9]+)\}?")
_SIDES = re.compile(r"(?<![\\<>!:])=")
_NAME = re.compile(r"(?:[A-Za-z]\([^()=]{1,20}\)|\\[A-Za-z]+|[A-Za-z]|[_'|(){}, ]|(?<=_)[0-9]|(?<=_\{)[0-9])*")
_SEPARATORS = re.compile(r"[,;&]|\\\\|\\pm(?![A-Za-z])|\\cup(?![A-Za-z])|\b(?:or|and)\b")
_OPERAND = re.compile(r"[0-9][0-9.,]*")
_OPENS_OR_CLOSES = re.compile(r"(?<!\\)[{}]|[()\[\]]")
_HUGE = re.compile(
    r"[0-9]{60}|[0-9]{4}\s?!|\^\s?\{?\s?-?[0-9]{4}|\^\s?\{?[^{}^ ]{1,20}\s?\^\s?\{?[^{}^ ]{0,20}\^"
    r"|[0-9]\s?\^\s?\{?\s?[0-9]+\s?\^"
    r"|\)\s?\^\s?\{?[0-9]{2}|\*\*[^*]{1,20}\*\*"
)
_UNDONE = re.compile(
    r"\\(?:int|oint|sum|prod|lim|limsup|liminf|max|min|gcd|lcm|det|binom|dbinom|tbinom|inf|sup|mod|bmod|pmod|operatorname)(?![A-Za-z])"
)
_ARITHMETIC = re.compile(r"(?<=[\w)}!])(?:[-+*]|\\(?:cdot|times|div|pm)(?![A-Za-z]))|!|(?<=[0-9}])\(|\)\(")


def judge(reference: str, answer: str, prompt: str = "") -> str:
    """``right``, ``wrong``, or ``unread`` where ``answer`` is no single value of the reference's kind, or is what ``prompt``
    asks about, copied. Asks the worker only what no rule here can settle."""
    if "\\boxed" in answer or not _sane(answer):
        return UNREAD
    if word := _word(reference):
        return RIGHT if _letters(answer) == word else WRONG
    expected, found = _tidy(reference), _tidy(answer)
    if not _fits(expected, found):
        return UNREAD
    sides = [found] if _SIDES.search(expected) else _SIDES.split(found)
    said = [_same(expected, side) for side in sides if side is sides[-1] or not _names(side, expected)]
    if said[-1] != RIGHT:
        return said[-1]
    if any(other != RIGHT for other in said) or _undone(expected, sides[-1]):
        return UNREAD
    return UNREAD if prompt and _copied(expected, sides[-1], prompt) else RIGHT


def is_words(reference: str) -> bool:
    """Whether ``reference`` is a name or an option's letter, ``\\text{Evelyn}`` or ``\\text{(C)}``."""
    return bool(_word(reference))


def readable(reference: str) -> bool:
    """Whether answers can be held against ``reference``."""
    if not _sane(reference):
        return False
    tidy = _tidy(reference)
    return bool(_word(reference)) or _number(tidy) is not None or symbolic.equal(tidy, tidy) == RIGHT


def _sane(text: str) -> bool:
    """Whether ``text`` says something, and nothing on which a parser or an evaluation is known to run for ever: what gets past
    this is ended by the worker's limits, which takes seconds."""
    if len(text) > MAX_EXPRESSION or not _SAYS.search(text) or _HUGE.search(text):
        return False
    braces = depth = 0
    for sign in _OPENS_OR_CLOSES.findall(text):
        step = 1 if sign in "{([" else -1
        depth += step
        braces += step if sign in "{}" else 0
        if braces < 0 or depth > MAX_DEPTH:
            return False
    return braces == 0


def _letters(text: str) -> str:
    return re.sub(r"[^\w]+", " ", _FONT.sub(r"\1", text)).strip().casefold()


def _word(reference: str) -> str:
    """The reference's words where it is nothing else: a name, or an option's letter."""
    match = _WORDS.fullmatch(reference.strip())
    words = _letters(match["words"] or match["plain"] or "") if match else ""
    return words if re.search(r"[^\W\d]", words) else ""


def _tidy(text: str) -> str:
    """``text`` as plain LaTeX, without unit, currency and everything that only changes its looks."""
    text = _ROOT.sub(lambda root: f"\\sqrt{{{root['inner'] or root['braced'] or root['short']}}}", text)
    text = _NAMES.sub(r"\\\1 ", _SYMBOL.sub(lambda symbol: _SYMBOLS[symbol[0]], text))
    text = _MATRIX.sub("{pmatrix}", text)
    text = _DEGREES.sub(" ", _FRACTION.sub(r"\\frac", _LOOK.sub("", text)))
    text = _SHORT.sub(_whole_fraction, _UNIT.sub("", _trimmed(text)).strip())
    return re.sub(r"\s+", " ", re.sub(r"\^\(([^()]*)\)", r"^{\1}", text))


def _whole_fraction(short: re.Match[str]) -> str:
    over, under = short[1] or short[2], short[3] or short[4]
    return f"\\frac{{{over}}}{{{under}}}" if over and under else short[0]


def _bare(text: str) -> str:
    return _THOUSANDS.sub("", re.sub(r"\s+", "", text))


def _fits(expected: str, found: str) -> bool:
    """Whether ``found`` has nothing that makes it more than one value of the kind of ``expected``."""
    if not _SAYS.search(found) or re.search(r"[0-9] [0-9]", found) or (DENIED.search(found) and not DENIED.search(expected)):
        return False
    several = _SEPARATORS.search(expected)
    if not several and _SEPARATORS.search(_THOUSANDS.sub("", found.replace(", ", ","))):
        return False
    english = {word.casefold() for word in _ENGLISH.findall(found)} - ({"and", "or"} if several else set())
    if english - {word.casefold() for word in _ENGLISH.findall(expected)}:
        return False
    equations = len(_SIDES.findall(expected))
    return not equations or len(_SIDES.findall(found)) <= equations


def _number(text: str) -> Fraction | None:
    match = _NUMERAL.fullmatch(_bare(text))
    if match is None or not (match["over"] or match["whole"] or match["decimals"]):
        return None
    over = match["over"] or (match["whole"] or "0") + (match["decimals"] or "")
    under = match["under"] or match["divisor"] or "1"
    if not under.strip("0"):
        return None
    return Fraction(match["sign"] + over) / int(under) * Fraction(10) ** int(match["power"] or 0)


def _same(expected: str, found: str) -> str:
    if _bare(expected) == _bare(found):
        return RIGHT
    one, other = _number(expected), _number(found)
    if one is not None and other is not None:
        close = "." in expected and abs(one - other) <= abs(one) / 1_000_000
        return RIGHT if one == other or close else WRONG
    # A numeral of another base is read without its base by the package.
    base, others = _BASED.fullmatch(_bare(expected)), _BASED.fullmatch(_bare(found))
    if others and (base is None or base.groups() != others.groups()):
        return WRONG
    return symbolic.equal(expected, found)


def _names(side: str, expected: str) -> bool:
    """Whether ``side``, which stands before an "=", only says what is equal: a name, or where a number is asked for, letters or
    arithmetic, whose operands are nobody's answer."""
    if _NAME.fullmatch(side) or _number(expected) is None:
        return _NAME.fullmatch(side) is not None
    return not has_digit(side) or len(_OPERAND.findall(side)) > 1


def _undone(expected: str, found: str) -> bool:
    """Whether ``found`` has an operation still to be carried out that ``expected`` has not."""
    if {*_UNDONE.findall(found)} - {*_UNDONE.findall(expected)}:
        return True
    return _number(expected) is not None and _number(found) is None and bool(_ARITHMETIC.search(_bare(found)))


def _copied(expected: str, found: str, prompt: str) -> bool:
    """Whether ``found``, which is more than a number or a name, stands in the question as it is, and is not the form that is
    asked for."""
    form = _bare(found)
    composed = len(form) > 3 and _number(found) is None and not _NAME.fullmatch(found)
    return composed and form != _bare(expected) and form in _bare(_tidy(prompt))
