"""General text of the crosscoder's corpus, from files and data sets with a column of texts."""

from __future__ import annotations

import re

import numpy as np

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import CorpusParams, TextSource
from featdiff.tasks.external import Row, located, read_rows, streamed_rows
from featdiff.tasks.task import Text

_HEADING = re.compile(r"(?:=+|#+)[^\n]*")


def general_texts(params: CorpusParams, suites: str, count: int, banned: set[str], rng: np.random.Generator) -> list[Text]:
    """``count`` texts of the sources of ``params``, in their shares and one source after the other."""
    shares = np.rint(np.cumsum([0.0, *(source.share for source in params.sources.values())]) * count).astype(int)
    return [
        Text("", text, name)
        for (name, source), wanted in zip(params.sources.items(), np.diff(shares).tolist(), strict=True)
        for text in _texts(source, located(source.path, suites), wanted, params.max_chars, banned, rng)
    ]


def _texts(source: TextSource, path: str, count: int, max_chars: int, banned: set[str], rng: np.random.Generator) -> list[str]:
    """``count`` different texts of ``source`` at ``path`` in random order, each cut after a word to ``max_chars``.

    Blank texts, lone headings (``= Title =``, ``# Title``) and evaluation prompts are passed over. A file is read to its end,
    and every line of it checked; of a data set of the hub, which may be larger than a disk, rows arrive in random order until
    there are enough."""
    streamed = path.startswith("hub:")
    kept: dict[str, None] = {}
    for row in streamed_rows(path, int(rng.integers(2**31))) if streamed else read_rows(path):
        text = _text(row, source.column)
        if text and not _HEADING.fullmatch(text) and text not in banned:
            kept[_cut(text, max_chars)] = None
            if streamed and len(kept) >= count:
                break
    texts = list(kept)
    if len(texts) < count:
        todo = "lower prepare.corpus.texts, raise prepare.corpus.math_share, or give a larger file or a smaller share of it"
        raise ContractError(path, "rows", f"{count} texts", f"{len(texts)} that are neither blank nor headings", todo)
    return [texts[i] for i in rng.permutation(len(texts))[:count].tolist()]


def _text(row: Row, column: str) -> str:
    found = row.value(column)
    if isinstance(found, list):
        return "\n\n".join(row.texts(column)) if found else ""
    if not isinstance(found, str):
        raise row.wrong(column, "a text", type(found).__name__)
    return row.text(column, blank=True)


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head, space, _ = text[: max_chars + 1].rpartition(" ")
    return (head if space else text[:max_chars]).rstrip()
