"""Rows of a file that others wrote: a local jsonl, or a split of a hub data set at one commit.

A row knows its place, so that whatever is wrong with it is said with file, line and column. A suite that both the hub and a
folder can hold is named ``suite:<kind>/<name>/<split>``; ``prepare.suites`` says which of the two is asked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import ContractError, sha256_file
from featdiff.config.data import SUITE, suite_file
from featdiff.config.reading import legible
from featdiff.config.values import HUB_NAME

HUB = re.compile(rf"hub:(?P<name>{HUB_NAME})(?::(?P<config>[\w.-]+))?@(?P<revision>[\w./-]+)#(?P<split>[\w.-]+)", re.ASCII)
HUB_FORM = "hub:<owner>/<name>[:<config>]@<commit or branch>#<split>"
COMMIT = re.compile(r"[0-9a-f]{40}")
SUITES = {
    "aime24": "HuggingFaceH4/aime_2024#train",
    "aime25": "math-ai/aime25",
    "arc_challenge": "allenai/ai2_arc:ARC-Challenge",
    "asdiv": "EleutherAI/asdiv",
    "commonsense_qa": "tau/commonsense_qa",
    "gsm8k": "openai/gsm8k:main",
    "head_qa": "dvilares/head_qa:en",
    "logiqa": "lucasmccabe/logiqa",
    "math500": "HuggingFaceH4/MATH-500",
    "openbookqa": "allenai/openbookqa:main",
    "piqa": "ybisk/piqa",
    "sciq": "allenai/sciq",
    "svamp": "ChilleD/SVAMP",
    "wikitext2_raw": "Salesforce/wikitext:wikitext-2-raw-v1",
}
"""Hub data set (and configuration) of every suite that can be named without a path; after # its split, where it has but one, of
another name."""
SHUFFLED_TOGETHER = 10_000
"""Rows of a streamed data set."""
MOST_LINE = 2**24
"""Bytes of one line."""
_HALF = re.compile(r"[\ud800-\udfff]")


class Row:
    """One row. Columns are named with dots for nesting: ``choices.text``, also through a list of mappings."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        self.values, self.place = values, place

    def wrong(self, column: str, expected: object, found: object) -> ContractError:
        return ContractError(self.place, column, expected, found, "correct this row or the column's name")

    def value(self, column: str) -> Any:
        """What stands in ``column``; ContractError where it is absent."""
        found: Any = self.values
        for key in column.split("."):
            rows = found if isinstance(found, list) else [found]
            if not rows or not all(isinstance(row, dict) and key in row for row in rows):
                raise self.wrong(column, f"a column {key!r}", f"columns {legible(', '.join(self.values) or '(none)')}")
            found = [row[key] for row in found] if isinstance(found, list) else found[key]
        return found

    def text(self, column: str, *, blank: bool = False, strip: bool = True) -> str:
        """A text or number in ``column``, stripped; ContractError where it is something else, or blank and may not be."""
        return self._as_text(column, self.value(column), blank, strip)

    def texts(self, columns: str, *, strip: bool = True) -> list[str]:
        """A list in one column, or one text from each of several columns joined by commas."""
        names = [name.strip() for name in columns.split(",")]
        if len(names) > 1:
            return [self.text(name, strip=strip) for name in names]
        found = self.value(columns)
        if not isinstance(found, list):
            raise self.wrong(columns, "a list", type(found).__name__)
        return [self._as_text(columns, value, strip=strip) for value in found]

    def _as_text(self, column: str, value: object, blank: bool = False, strip: bool = True) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.wrong(column, "a text", type(value).__name__)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.wrong(column, "a text or a number", value)
        if isinstance(value, str) and _HALF.search(value):  # JSON can write it, and no encoding can
            raise self.wrong(column, "a text", "half of a character (a lone surrogate)")
        text = str(value)
        if not text.strip() and not blank:
            raise self.wrong(column, "a text", "a blank one")
        return text.strip() if strip else text


def located(path: str, suites: str) -> str:
    """Where ``path`` is read from: a suite's file in the folder ``suites``, or its split on the hub; a hub path at the commit
    to which its branch leads now; any other path as it stands. Raises ContractError for a suite that is not known or a
    branch that cannot be resolved."""
    if path.startswith("suite:"):
        match = SUITE.fullmatch(path)
        if match is None:
            raise ContractError(
                legible(path), "path", "suite:<kind>/<name>/<split>", "another form", "correct it in params.yaml"
            )
        if file := suite_file(path, suites):
            return file
        if match["name"] not in SUITES:
            known = ", ".join(SUITES)
            raise ContractError(path, "suite", f"one of {known}", match["name"], "name a file, or a hub path, instead")
        name, _, only = SUITES[match["name"]].partition("#")
        path = f"hub:{name}@main#{only or match['split']}"
    match = HUB.fullmatch(path) if path.startswith("hub:") else None
    if match is None or COMMIT.fullmatch(match["revision"]):
        return path
    return path.replace(f"@{match['revision']}#", f"@{_commit(path, match['name'], match['revision'])}#")


@cache
def _commit(path: str, name: str, revision: str) -> str:
    """To which commit a branch or tag of a hub data set leads."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # whatever the network or the hub may say
        said = legible(" ".join(str(error).split()), 200)
        todo = "check name and network, pin a commit, or say where a copy lies: make repro SUITES=<folder>"
        raise ContractError(path, "revision", "a branch or tag that the hub knows", said, todo) from None


def read_rows(path: str) -> Iterator[Row]:
    """Rows of ``path``, as :func:`located` gives it, in order; ContractError where it cannot be read or has none."""
    rows = _hub(path) if path.startswith("hub:") else _jsonl(Path(path))
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ContractError(path, "rows", "at least one", "none", "give a file with rows")


def file_facts(path: str) -> str:
    """What identifies the file at ``path`` for good: a hub path with its commit, or the name of a file with its sha256."""
    return path if path.startswith("hub:") else f"{Path(path).name} sha256:{sha256_file(Path(path))}"


def _jsonl(path: Path) -> Iterator[Row]:
    todo = "give one JSON object per line, in UTF-8"
    wrong_path = "correct the path in params.yaml (~ stands for nothing)"
    try:
        if path.exists() and not path.is_file():
            raise ContractError(path, "file", "a readable .jsonl file", "a folder, a pipe or a device", wrong_path)
        with path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MOST_LINE + 1), b""), start=1):
                if len(line) > MOST_LINE:
                    raise ContractError(f"{path}:{number}", "line", f"at most {MOST_LINE} bytes", "more", todo)
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise ContractError(place, "line", "JSON", legible(str(error)), todo) from None
                if not isinstance(values, dict):
                    raise ContractError(place, "line", "a JSON object", type(values).__name__, todo)
                yield Row(values, place)
    except OSError as error:
        raise ContractError(legible(str(path)), "file", "a readable .jsonl file", error.strerror, wrong_path) from None


def streamed_rows(path: str, seed: int) -> Iterator[Row]:
    """Rows of the hub data set ``path``, as :func:`located` gives it, in the random order of ``seed``, of which no more are
    fetched than are taken: its files in random order, and :data:`SHUFFLED_TOGETHER` rows shuffled at a time. ContractError
    where it cannot be read."""
    rows = _data_set(path, streaming=True).shuffle(seed=seed, buffer_size=SHUFFLED_TOGETHER)
    try:
        yield from from_dataset(rows, path, "shuffled row ")
    except Exception as error:  # whatever the network may say halfway
        raise _unread(path, "a stream that can be read to where there is enough", error) from None


def _hub(path: str) -> Iterator[Row]:
    yield from from_dataset(_data_set(path), path)


def _data_set(path: str, **how: bool) -> Any:
    match = HUB.fullmatch(path)
    if match is None or not COMMIT.fullmatch(match["revision"]):
        raise ContractError(legible(path), "path", HUB_FORM, "another form", "name revision and split")
    if Path(match["name"]).exists():  # the library would read it and forget the commit
        todo = "give a .jsonl file of it as path, or move it away"
        raise ContractError(path, "path", "a data set of the hub", f"a local folder {match['name']}", todo)
    import datasets

    try:
        return datasets.load_dataset(match["name"], match["config"], revision=match["revision"], split=match["split"], **how)
    except Exception as error:  # tables of any content reach the library, which raises all kinds of errors
        raise _unread(path, "one that loads", error) from None


def _unread(path: str, expected: str, error: Exception) -> ContractError:
    said = legible(" ".join(str(error).split()), 200)
    todo = "check name, commit and network, or say where a copy lies: SUITES=<folder>"
    return ContractError(path, "data set", expected, said, todo)


def from_dataset(rows: Any, path: str, numbered: str = "") -> Iterator[Row]:
    """Rows of a ``datasets.Dataset``, numbered from 1 like lines."""
    for number, values in enumerate(rows, start=1):
        yield Row(dict(values), f"{path}:{numbered}{number}")
