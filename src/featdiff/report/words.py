"""How numbers are written on the page: typographic minus, fixed digits, a dash for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from featdiff.stats import Interval

MISSING = "–"
NBSP, THIN = "\u00a0", "\u202f"


def number(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def signed(value: float | None, digits: int = 2) -> str:
    text = number(value, digits)
    return text if text == MISSING or text.startswith("−") or not float(text) else f"+{text}"


def short(value: float | None) -> str:
    """Three digits, whatever the size."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.3g}".replace("-", "−")


def moved(before: str, after: str) -> str:
    """``before → after`` in one piece."""
    return f"{before}{NBSP}→{NBSP}{after}"


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.{0 if share == 0 or share >= 0.0995 else 1}f}{THIN}%"


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """``[low, high]``; empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{number(low, digits)},{NBSP}{number(high, digits)}]"


def change(estimate: Interval | None) -> str:
    """A difference with its interval and n."""
    if estimate is None:
        return "not measured"
    return f"{signed(estimate.value)} {interval(estimate.low, estimate.high)}, n{NBSP}={NBSP}{count(estimate.n)}"


def count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}".replace(",", THIN)


def compact(value: float) -> str:
    """A large count in short: 450k, 1.2M, 7.6B."""
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.3g}{unit}"
    return f"{value:.0f}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "none"


def things(value: int, noun: str) -> str:
    """``1 task``, ``3 tasks``."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"
