"""Amounts as people say them."""

from __future__ import annotations

GIB = 2**30


def scaled(amount: float, unit: str) -> str:
    """``amount`` with three digits and the prefix that fits."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if amount >= size:
            return f"{amount / size:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}"


def sized(amount: float) -> str:
    """Bytes."""
    if amount >= 1024 * GIB:
        return f"{amount / (1024 * GIB):.2f} TiB"
    return f"{amount / GIB:.2f} GiB" if amount >= 0.1 * GIB else f"{amount / 2**20:.1f} MiB"


def timed(found: float | None) -> str:
    """Seconds; a question mark where nobody knows."""
    if found is None:
        return "?"
    minutes = found / 60
    return f"{found:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
