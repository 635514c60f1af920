"""General text of the crosscoder's corpus, from a file with a ``text`` column."""

from __future__ import annotations

import re

import numpy as np

from featdiff.artifacts.artifact import ContractError
from featdiff.tasks.external import read_rows
from featdiff.tasks.task import Text

_HEADING = re.compile(r"(?:=+|#+)[^\n]*")


def general_texts(path: str, count: int, max_chars: int, banned: set[str], rng: np.random.Generator) -> list[Text]:
    """``count`` different texts of ``path`` in random order, each cut after a word to ``max_chars``.

    Blank texts, lone headings (``= Title =``, ``# Title``) and evaluation prompts are passed over."""
    kept: dict[str, None] = {}
    for row in read_rows(path):
        if not isinstance(found := row.value("text"), str):
            raise row.wrong("text", "a text", type(found).__name__)
        text = row.text("text", blank=True)
        if text and not _HEADING.fullmatch(text) and text not in banned:
            kept[_cut(text, max_chars)] = None
    texts = list(kept)
    if len(texts) < count:
        todo = "lower prepare.corpus.texts, raise prepare.corpus.math_share or give a larger file"
        raise ContractError(path, "rows", f"{count} texts", f"{len(texts)} that are neither blank nor headings", todo)
    return [Text("", texts[i], "general") for i in rng.permutation(len(texts))[:count].tolist()]


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head, space, _ = text[: max_chars + 1].rpartition(" ")
    return (head if space else text[:max_chars]).rstrip()
