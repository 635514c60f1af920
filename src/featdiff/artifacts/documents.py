"""Pages whose tables are written by code, so that no number there is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable


def fill(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of ``name``. Raises ValueError where they are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"a page without the markers {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def markdown(head: list[str], body: Iterable[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))
