"""The tables that stages write: one schema each, checked where rows are written and where they are read.

What a column means is in docs/artifacts.md, which a test holds against these schemas. The files themselves say of every column
that it may hold null, as they always have; where null may really stand is said and checked here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featdiff.artifacts.artifact import NOTHING, ContractError

Row = dict[str, Any]
Columns = list[pa.Field]
TYPES = {pa.string(): "text", pa.int64(): "int", pa.float64(): "float", pa.bool_(): "bool"}
REPORT, RERUN = "report this", "rerun the stage that makes it"


def fields(of: pa.DataType, names: str, *, null: bool = False) -> Columns:
    """Columns of one type, their names in one string; ``null``: a value may be missing."""
    return [pa.field(name, of, nullable=null) for name in names.split()]


text, integer, number, flag = (partial(fields, of) for of in TYPES)
texts, numbers = (partial(fields, pa.list_(of)) for of in (pa.string(), pa.float64()))


def interval(name: str) -> Columns:
    """A number with its interval, all of which may be missing."""
    return number(f"{name} {name}_low {name}_high", null=True)


def in_words(field: pa.Field) -> str:
    """What a column holds, as docs/artifacts.md says it: ``int``, ``float, null``, ``list of text``."""
    of = field.type
    word = f"list of {TYPES[of.value_type]}" if pa.types.is_list(of) else TYPES[of]
    return f"{word}, null" if field.nullable else word


class Table:
    """One table: where it lies among the artifacts, and its columns in their order."""

    def __init__(self, name: str, *groups: Columns) -> None:
        self.name, self.file = name, name.rpartition("/")[2]
        self.schema = pa.schema([field for group in groups for field in group])

    @property
    def columns(self) -> list[str]:
        """Their names."""
        names: list[str] = self.schema.names
        return names

    def kept(self, row: Row) -> Row:
        """The columns of this table out of a ``row`` that holds more."""
        return {name: row[name] for name in self.columns}

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        """Write ``rows`` into ``folder``. Raises ContractError for one that lacks a column or has another, for a value of
        another type, for null where none may be, and for NaN: what does not exist is null."""
        known = set(self.columns)
        for row in rows:
            if row.keys() != known:
                self._require_names(self.name, row, REPORT)
        self.write_columns(folder, {name: [row[name] for row in rows] for name in self.columns})

    def write_columns(self, folder: Path, values: Mapping[str, Sequence[Any]]) -> None:
        """:meth:`write` of rows that come as columns, all of one length."""
        self._require_names(self.name, values, REPORT)
        made = [self._made(field, values[field.name]) for field in self.schema]
        pq.write_table(pa.table(made, names=self.columns), folder / self.file, compression="zstd")

    def read(self, folder: Path, columns: str = "", **only: Any) -> list[Row]:
        """Rows of the table in ``folder``: all ``columns`` or those named in one string, all rows or those that have the values
        of ``only``. Raises ContractError for a file that is missing, unreadable, or not of this schema."""
        path, wanted = folder / self.file, columns.split() or self.columns
        filters = [(name, "=", value) for name, value in only.items()] or None
        try:
            self._require_types(path, pq.read_schema(path))
            found = pq.read_table(path, columns=wanted, filters=filters)
        except FileNotFoundError:
            raise ContractError(path, "file", "a table", NOTHING, RERUN) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise ContractError(path, "content", "a parquet table", _line(error), RERUN) from None
        for name in wanted:
            _require_values(path, self.schema.field(name), found.column(name), RERUN)
        rows: list[Row] = found.to_pylist()
        return rows

    def count(self, folder: Path, where: Mapping[str, Sequence[Any]]) -> int:
        """How many rows of the table in ``folder`` have one of the values of each column of ``where``."""
        filters = [(name, "in", list(values)) for name, values in where.items()] or None
        return int(pq.read_table(folder / self.file, columns=self.columns[:1], filters=filters).num_rows)

    def _made(self, field: pa.Field, values: Sequence[Any]) -> pa.Array:
        """The column ``field`` with ``values``."""
        try:
            column = pa.array(values)  # its own type: asked for integers, it would take 0.5 for 0
            found = "" if _fits(column.type, field.type) else column.type
            column = column if found else column.cast(field.type)
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            found = _line(error)
        if found:
            raise ContractError(self.name, field.name, in_words(field), found, REPORT)
        _require_values(self.name, field, column, REPORT)
        return column

    def _require_names(self, file: Path | str, found: Collection[str], todo: str) -> None:
        """Raise ContractError for the first column that is missing or unknown."""
        for field in self.schema:
            if field.name not in found:
                raise ContractError(file, field.name, in_words(field), NOTHING, todo)
        if unknown := sorted(set(found) - set(self.columns)):
            raise ContractError(file, unknown[0], "no such column", "one", todo)

    def _require_types(self, path: Path, found: pa.Schema) -> None:
        self._require_names(path, found.names, RERUN)
        for field in self.schema:
            if (of := found.field(field.name).type) != field.type:
                raise ContractError(path, field.name, f"{in_words(field)} ({field.type})", of, RERUN)


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type are values of the other: of the same, none at all, or whole numbers for floats."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _fits(found.value_type, wanted.value_type)
    return found in (wanted, pa.null()) or (found, wanted) == (pa.int64(), pa.float64())


def _require_values(file: Path | str, field: pa.Field, column: pa.Array | pa.ChunkedArray, todo: str) -> None:
    """Raise ContractError for null where ``field`` or a list of it has none, and for NaN."""
    listed = pa.types.is_list(field.type)
    single = pc.list_flatten(column) if listed else column
    if (column.null_count and not field.nullable) or (listed and single.null_count):
        raise ContractError(file, field.name, in_words(field), "null", todo)
    if pa.types.is_floating(single.type) and pc.any(pc.is_nan(single)).as_py():
        raise ContractError(file, field.name, in_words(field), "NaN", todo)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# ---- data
SAMPLE = [*text("sample_id task split prompt answer"), *texts("options"), *text("solution meta own foreign")]
TEXT = text("prompt completion source")
TRAIN = Table("data/train.parquet", SAMPLE)
EVAL = Table("data/eval.parquet", SAMPLE)
CORPUS = Table("data/corpus.parquet", TEXT)
PRETRAIN = Table("data/pretrain.parquet", TEXT)

# ---- arms and teachers
SAMPLED_ANSWERS = Table(
    "models/<arm>/answers.parquet", text("sample_id task text"), flag("correct"), text("manner"), flag("whole")
)
COMPLETIONS = Table(
    "models/<arm>/completions.parquet", integer("call"), text("task prompt answer completion manner"), number("reward")
)

# ---- answers and accuracy
ANSWER = [
    *text("sample_id task split mode"),
    *integer("draw"),
    *text("completion"),
    *text("parsed", null=True),
    *flag("correct"),
    *text("manner"),
    *flag("strict flexible"),
]
EVAL_SAMPLES = Table("evals/<model>/samples.parquet", ANSWER)
EVAL_ACCURACY = Table(
    "evals/<model>/accuracy.parquet",
    text("task role domain split mode"),
    flag("primary"),
    integer("n"),
    number("accuracy low high strict flexible parse_failures steps foreign direct"),
)

CHECKPOINT = [*text("arm"), *integer("checkpoint"), *integer("step", null=True), *number("share")]
CHECKPOINT_SAMPLES = Table(
    "checkpoints/<arm>/samples.parquet", CHECKPOINT, text("role task sample_id"), flag("correct"), text("manner")
)
CHECKPOINT_ACCURACY = Table(
    "checkpoints/<arm>/accuracy.parquet", CHECKPOINT, text("task role"), integer("n"), number("accuracy low high steps")
)
CHECKPOINT_DIVERGENCE = Table(
    "checkpoints/<arm>/divergence.parquet",
    CHECKPOINT,
    text("task", null=True),
    text("role"),
    integer("n"),
    number("forward_kl forward_low forward_high reverse_kl reverse_low reverse_high"),
)

# ---- attribution
FEATURE = [*text("fit"), *integer("feature_id")]
FEATURES = Table(
    "analysis/attribution/features.parquet",
    FEATURE,
    flag("dead"),
    number("firing_rate max_activation mean_activation"),
    number("nrn", null=True),
    numbers("mas", null=True),
    text("feature_class"),
    flag("tested"),
    text("scaling_owner", null=True),
    flag("specific"),
    flag("halves_agree", null=True),
)
SCALING = Table(
    "analysis/attribution/scaling.parquet",
    FEATURE,
    text("pair owner other"),
    number("nu_error nu_reconstruction beta_error beta_reconstruction", null=True),
    number("beta_error_owner beta_reconstruction_owner", null=True),
    flag("specific"),
)

# ---- dynamics
OVERLAP = Table("analysis/dynamics/<arm>/overlap.parquet", text("arm method"), integer("top a b"), number("overlap"))
TRAJECTORIES = Table(
    "analysis/dynamics/<arm>/trajectories.parquet",
    text("arm"),
    integer("checkpoint feature_id"),
    number("change"),
    integer("rank", null=True),
)
BOOTSTRAP = Table(
    "analysis/dynamics/<arm>/bootstrap.parquet",
    text("arm"),
    integer("checkpoint draw"),
    number("overlap ceiling chance change"),
)

# ---- localization and description
SCORES = Table("analysis/localize/scores.parquet", text("task"), integer("feature_id"), number("score frequency"))
SWEEP = Table(
    "analysis/localize/sweep.parquet",
    number("threshold"),
    integer("size"),
    number("expected_independent expected_shuffled p_shuffled jaccard"),
)
STITCHED = Table(
    "analysis/stitch/samples.parquet",
    text("lower"),
    integer("depth"),
    text("task sample_id"),
    flag("correct"),
    text("manner"),
)
CONTEXTS = Table(
    "analysis/describe/contexts.parquet",
    integer("feature_id"),
    text("source"),
    integer("rank"),
    number("quantile", null=True),
    text("text"),
    integer("peak"),
    integer("answer_from", null=True),
    texts("tokens"),
    numbers("original tuned"),
)
TOKEN_VALUES = Table(
    "analysis/describe/tokens.parquet",
    integer("feature_id"),
    text("sample_id"),
    integer("answer_from"),
    texts("tokens"),
    numbers("original tuned"),
)
PROBES = Table(
    "analysis/describe/probes.parquet",
    text("of models"),
    integer("n"),
    number("steps"),
    integer("tasks"),
    text("probe", null=True),
    integer("columns", null=True),
    interval("auc"),
    interval("accuracy"),
    interval("minus_dense"),
    text("reason"),
)

# ---- interventions
CONTROL = [*text("control"), *integer("set_draw")]
EDITED = [*text("purpose model"), *CONTROL]
SETTING = [*text("edit positions"), *number("dose")]
SEARCH = Table(
    "analysis/intervene/<side>/search.parquet",
    text("purpose"),
    CONTROL,
    SETTING,
    number("norm acting unscaled"),
    text("task role"),
    integer("n"),
    number("accuracy steps unread"),
    flag("chosen"),
)
EDITED_SAMPLES = Table("analysis/intervene/<side>/samples.parquet", EDITED, ANSWER)
OUTCOMES = Table("analysis/intervene/<side>/outcomes.parquet", text("purpose"), CONTROL, text("sample_id"), flag("correct"))
EFFECTS = Table(
    "analysis/intervene/<side>/effects.parquet",
    text("purpose model task role subset"),
    integer("n"),
    number("unread_toward"),
    CONTROL,
    number("accuracy baseline effect low high steps flexible unread alike steps_baseline alike_baseline"),
    number("random_low random_high", null=True),
    flag("beyond_random", null=True),
    number("p_random", null=True),
    number("p_mcnemar"),
    interval("start_nats"),
    interval("rest_nats"),
)
COLLATERAL = Table("analysis/intervene/<side>/collateral.parquet", EDITED, number("perplexity change low high"), integer("n"))
SENSITIVITY = Table(
    "analysis/intervene/<side>/sensitivity.parquet",
    text("purpose varied choice"),
    integer("size"),
    SETTING,
    number("effect random median", null=True),
)
