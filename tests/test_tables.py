"""Tables: rows that are not of their schema are refused where they are written, files that are not where they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featdiff.artifacts import tables
from featdiff.artifacts.artifact import ContractError
from featdiff.artifacts.tables import SWEEP, Table, flag, integer, interval, number, numbers, text, texts

TABLE = Table(
    "evals/<model>/things.parquet",
    text("name"),
    integer("n"),
    number("share"),
    flag("right"),
    texts("words"),
    interval("gain"),
    numbers("parts", null=True),
)
MISSING = {"gain": None, "gain_low": None, "gain_high": None, "parts": None}
FULL = {"name": "a", "n": 1, "share": 0.5, "right": True, "words": ["x", "y"]}
FULL |= {"gain": 0.1, "gain_low": -0.1, "gain_high": 0.3, "parts": [0.5, 0.5]}
ROWS = [FULL, FULL | MISSING | {"name": "b", "words": []}]
FILE = "things.parquet"


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    TABLE.write(tmp_path, ROWS)
    assert TABLE.read(tmp_path) == ROWS
    assert TABLE.read(tmp_path, "n name") == [{"name": row["name"], "n": 1} for row in ROWS]
    assert TABLE.read(tmp_path, "n", name="b", right=True) == [{"n": 1}]
    assert TABLE.read(tmp_path, name="c") == []
    assert TABLE.kept(FULL | {"more": 1}) == FULL


def test_rows_and_columns_give_the_same_bytes(tmp_path: Path) -> None:
    TABLE.write(tmp_path, ROWS)
    by_rows = (tmp_path / FILE).read_bytes()
    TABLE.write(tmp_path, [dict(reversed(row.items())) for row in ROWS])
    assert (tmp_path / FILE).read_bytes() == by_rows, "the order of keys says nothing"
    TABLE.write_columns(tmp_path, {name: [row[name] for row in ROWS] for name in TABLE.columns})
    assert (tmp_path / FILE).read_bytes() == by_rows


@pytest.mark.parametrize("rows", [[], [FULL | MISSING]], ids=["no rows", "only nulls"])
def test_columns_have_their_types_whatever_is_in_them(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    TABLE.write(tmp_path, rows)
    assert pq.read_schema(tmp_path / FILE).types == TABLE.schema.types
    assert TABLE.read(tmp_path) == rows


def test_numbers_of_numpy_and_whole_floats_are_numbers(tmp_path: Path) -> None:
    TABLE.write(tmp_path, [FULL | {"n": np.int64(3), "share": 1, "right": np.bool_(False), "gain": np.float64(0.25)}])
    (row,) = TABLE.read(tmp_path)
    assert (row["n"], row["share"], row["right"], row["gain"]) == (3, 1.0, False, 0.25)
    assert isinstance(row["share"], float)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a null": ({"name": None}, "name: expected text, found null"),
    "a null in a list": ({"words": ["x", None]}, "words: expected list of text, found null"),
    "no list": ({"words": None}, "words: expected list of text, found null"),
    "a null in a list that may be null": ({"parts": [0.5, None]}, "parts: expected list of float, null, found null"),
    "NaN": ({"share": float("nan")}, "share: expected float, found NaN"),
    "NaN for null": ({"gain_low": float("nan")}, "gain_low: expected float, null, found NaN"),
    "NaN in a list": ({"parts": [0.5, float("nan")]}, "parts: expected list of float, null, found NaN"),
    "NaN for a number": ({"n": float("nan")}, "n: expected int, found "),
    "a share for a number": ({"n": 0.5}, "n: expected int, found "),
    "a number too large": ({"n": 1 << 63}, "n: expected int, found "),
    "a truth for a number": ({"n": True}, "n: expected int, found "),
    "a number for a truth": ({"right": 1}, "right: expected bool, found "),
    "a number for a text": ({"name": 1}, "name: expected text, found "),
    "a text for a list": ({"words": "xy"}, "words: expected list of text, found "),
    "an unknown column": ({"more": 1}, "more: expected no such column, found one"),
}


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD)
def test_a_bad_row_among_good_ones_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError) as caught:
        TABLE.write(tmp_path, [*ROWS, FULL | change])
    assert str(caught.value).startswith(f"{TABLE.name}: {said}")
    assert str(caught.value).endswith("; report this")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / FILE).exists()


def test_a_row_without_a_column_is_no_row(tmp_path: Path) -> None:
    short = {name: value for name, value in FULL.items() if name != "gain"}
    with pytest.raises(ContractError, match=r"things\.parquet: gain: expected float, null, found nothing; report this"):
        TABLE.write(tmp_path, [FULL, short])
    with pytest.raises(ContractError, match=r"things\.parquet: n: expected int, found nothing; report this"):
        TABLE.write_columns(tmp_path, {"name": []})


FILES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a lost column": (lambda table: table.drop_columns(["gain"]), "gain: expected float, null, found nothing"),
    "an unknown column": (lambda table: table.append_column("more", table["n"]), "more: expected no such column, found one"),
    "another type": (
        lambda table: table.set_column(1, "n", table["n"].cast(pa.float64())), "n: expected int (int64), found double",
    ),
    "no type": (
        lambda table: table.set_column(4, "words", pa.nulls(2)),
        "words: expected list of text (list<item: string>), found null",
    ),
    "a null": (lambda table: table.set_column(1, "n", pa.array([1, None])), "n: expected int, found null"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), FILES.values(), ids=FILES)
def test_a_file_of_another_schema_is_refused(tmp_path: Path, change: Callable[[pa.Table], pa.Table], said: str) -> None:
    TABLE.write(tmp_path, ROWS)
    pq.write_table(change(pq.read_table(tmp_path / FILE)), tmp_path / FILE)
    with pytest.raises(ContractError) as caught:
        TABLE.read(tmp_path, "n name", name="b") if said.startswith("more") else TABLE.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / FILE}: {said}")
    assert str(caught.value).endswith("; rerun the stage that makes it")


def test_missing_and_broken_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"things\.parquet: file: expected a table, found nothing; rerun the stage"):
        TABLE.read(tmp_path)
    (tmp_path / FILE).write_bytes(b"PAR1 but not really")
    with pytest.raises(ContractError, match=r"content: expected a parquet table, found .*; rerun the stage"):
        TABLE.read(tmp_path)


def test_every_table_has_a_name_of_its_own_and_a_column_once() -> None:
    known = [table for table in vars(tables).values() if isinstance(table, Table)]
    assert len({table.name for table in known}) == len(known) > 20
    assert [table.name for table in known if len(set(table.columns)) < len(table.columns)] == []
    assert (SWEEP.file, SWEEP.columns[:2]) == ("sweep.parquet", ["threshold", "size"])


def test_no_other_module_writes_or_reads_parquet() -> None:
    root = Path(__file__).parents[1]
    files = [*(root / "src").rglob("*.py"), *(root / "stages").glob("*.py")]
    assert [path.name for path in files if "pyarrow" in path.read_text(encoding="utf-8")] == ["tables.py"]
