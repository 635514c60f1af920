"""Reading activation stores: several models side by side on the same tokens, in order or shuffled.

N token rows, M models, D residual width, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from featdiff.activations.mixing import Shared, mixed, overlaps, put
from featdiff.activations.turns import MEAN, Turns, alone
from featdiff.artifacts.artifact import ContractError, read_json

READ_ROWS = 8192
"""Rows read at once when going through a source in order."""
SUM_ROWS = 64
"""Of them held in float64 at once, a multiple of 16."""
COMPARED_ROWS = 2**20
"""Rows of which token ids are compared at once."""


class ActivationSource(Protocol):
    """Raw activations of M models on the same tokens, wherever they are kept."""

    models: list[str]
    d_model: int
    rows: int

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` [n, M, D], float32."""

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int, skip: int = 0) -> Iterator[Tensor]:
        """Endless batches [B, M, D] over rows ``start`` to ``stop``, from the one after the first ``skip`` on. No row comes
        twice in a pass. Raises ContractError where there are fewer rows than one batch."""


def pieces(start: int, stop: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Where pieces of at most ``most`` rows, by default ``READ_ROWS``, begin and end between ``start`` and ``stop``."""
    for low in range(start, stop, most := most or READ_ROWS):
        yield low, min(low + most, stop)


def in_order(source: ActivationSource, start: int, stop: int, most: int | None = None) -> Iterator[Tensor]:
    """Rows ``start`` to ``stop`` in :func:`pieces` [n, M, D]."""
    return (source.read(*piece) for piece in pieces(start, stop, most))


def moments(source: ActivationSource, stop: int) -> tuple[Float[Tensor, "M D"], Float[Tensor, " M"]]:
    """Mean of rows 0 to ``stop`` and their mean squared distance to it, in one pass and float64."""
    return alone(moments_in_turns(source, stop))


def moments_in_turns(source: ActivationSource, stop: int) -> Turns[tuple[Float[Tensor, "M D"], Float[Tensor, " M"]]]:
    """:func:`moments`, piece by piece."""
    square = torch.zeros(len(source.models), dtype=torch.float64)
    total = torch.zeros(len(source.models), source.d_model, dtype=torch.float64)
    for low, high in pieces(0, stop):
        yield MEAN, low
        part, part_square = _sums(source, low, high)
        total, square = total + part, square + part_square
    mean = total / stop
    # E‖x − mean‖² = E‖x‖² − ‖mean‖². The difference loses digits where the mean is large; float64 has them to lose.
    return mean, square / stop - mean.square().sum(1)


def _sums(source: ActivationSource, start: int, stop: int) -> tuple[Float[Tensor, "M D"], Float[Tensor, " M"]]:
    """Σ x and Σ ‖x‖² over rows ``start`` to ``stop`` in float64.

    They are added up as one thread of PyTorch adds up ``READ_ROWS`` rows of several models, to the last bit: sixteen rows,
    sixteen such sums and sixteen of those, and the squares row by row. But only a few rows at a time are in float64, which a
    cache holds; all of them at once take many times as long."""
    rest, sums, squares = torch.zeros(len(source.models), source.d_model, dtype=torch.float64), [], []
    for piece in in_order(source, start, stop, 8 * SUM_ROWS):
        for rows in map(Tensor.double, piece.split(SUM_ROWS)):
            whole = len(rows) // 16
            sums.append(rows[: 16 * whole].unflatten(0, (whole, 16)).sum(1))
            rest = rows[16 * whole :].sum(0)  # none but in the last of them
            squares.append(rows.square().sum(2))
    level = torch.cat(sums)
    for _ in range(2):
        whole = len(level) // 16
        rest += level[16 * whole :].sum(0)
        level = level[: 16 * whole].unflatten(0, (whole, 16)).sum(1)
    return rest + level.sum(0), torch.cat(squares).cumsum(0)[-1]


class _Part(Protocol):
    """One series of one model."""

    rows: int

    @property
    def dtype(self) -> torch.dtype:
        """In which its rows come."""

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows ``start`` to ``stop`` [n, D] in stretches in any order, each with its place after ``start``."""


def _part(folder: Path, index: Mapping[str, Any], series: str) -> _Part:
    if "streamed" not in index:
        return _Shards(folder, index, series)
    from featdiff.activations.stream import Runs  # with transformers, which takes seconds

    return Runs(folder, index, series)


class _Shards:
    """The ``series`` of one model that lies in the shards of ``folder``."""

    def __init__(self, folder: Path, index: Mapping[str, Any], series: str) -> None:
        self._folder, self._shards = folder, index["shards"][series]
        self._ends = list(accumulate(shard["rows"] for shard in self._shards))
        self.rows = sum(shard["rows"] for shard in self._shards)

    @property
    def dtype(self) -> torch.dtype:
        return next(acts.dtype for _, acts in self.stretches(0, 1))

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        # Mapped and not copied; what is mapped is let go with the tensor.
        for i, low, high in overlaps(self._ends, start, stop):
            first = self._ends[i] - self._shards[i]["rows"]
            with safe_open(self._folder / self._shards[i]["file"], framework="pt") as handle:
                yield low - start, handle.get_slice("acts")[low - first : high - first]


def _token_ids(folder: Path) -> Iterator[Tensor]:
    """Token ids of a store, ``COMPARED_ROWS`` at a time."""
    file, name = folder / "tokens.safetensors", "token_id"
    with safe_open(file, framework="pt") as handle:
        rows = handle.get_slice(name).get_shape()[0]
    for start, stop in pieces(0, rows, COMPARED_ROWS):
        # Opened for each: what was read of a mapped file counts as memory until the mapping is let go.
        with safe_open(file, framework="pt") as handle:
            yield handle.get_slice(name)[start:stop]


def _same_tokens(folder: Path, other: Path) -> bool:
    """Whether two stores hold the same token ids."""
    ended = torch.empty(0, dtype=torch.int32)
    both = zip_longest(_token_ids(folder), _token_ids(other), fillvalue=ended)
    return all(torch.equal(*pair) for pair in both)


class ActivationStore:
    """Stores of several models as one :class:`ActivationSource`: rows that lie on disk, or models that are run for them, as
    the index of each says.

    ``folders`` are the stores by model; ``series`` is ``acts`` (the final model) or ``checkpoint<i>``. Raises ContractError
    unless all stores hold the same tokens, layer, width, tokenizer and first-token policy, and at least one row."""

    def __init__(self, folders: dict[str, Path], series: str = "acts") -> None:
        self.models = list(folders)
        self._folders = list(folders.values())
        indexes = [read_json(folder / "index.json") for folder in self._folders]
        first = indexes[0]
        for folder, index in zip(self._folders, indexes, strict=True):
            for field in ("rows", "d_model", "layer", "drop_first_token", "tokenizer"):
                if index[field] != first[field]:
                    raise ContractError(
                        folder / "index.json",
                        field,
                        f"{first[field]} as in {self._folders[0]}",
                        index[field],
                        "rerun: dvc repro",
                    )
            if folder != self._folders[0] and not _same_tokens(folder, self._folders[0]):
                raise ContractError(
                    folder / "tokens.safetensors", "token_id", f"the tokens of {self._folders[0]}", "others", "rerun: dvc repro"
                )
        self.layer, self.d_model = int(first["layer"]), int(first["d_model"])
        # A model that is compared with itself is read once.
        read = {folder: _part(folder, index, series) for folder, index in zip(self._folders, indexes, strict=True)}
        self._parts = [(part, [m for m, one in enumerate(self._folders) if one == folder]) for folder, part in read.items()]
        self.rows = self._parts[0][0].rows
        if self.rows == 0:
            raise ContractError(self._folders[0], "rows", "at least one token", 0, "raise activations.tokens")

    def read(self, start: int, stop: int) -> Tensor:
        rows_NMD = torch.empty(stop - start, len(self.models), self.d_model)
        for part, slots in self._parts:
            for at, acts in part.stretches(start, stop):
                for m in slots:
                    rows_NMD[at : at + len(acts), m] = acts
        return rows_NMD

    def _load(self, start: int, stop: int, rows_CMD: Tensor, places: Tensor) -> None:
        for part, slots in self._parts:
            for at, acts in part.stretches(start, stop):
                for m in slots:
                    put(rows_CMD, places[at : at + len(acts)], m, acts)

    def _kept(self) -> torch.dtype:
        """In which rows of several models lie side by side."""
        dtypes = {part.dtype for part, _ in self._parts}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int, skip: int = 0) -> Iterator[Tensor]:
        """Mixed by :func:`~featdiff.activations.mixing.mixed`, which says what memory it takes."""
        return mixed(self._load, len(self.models), self.d_model, self._kept(), batch, generator, start, stop, skip)

    def shared(self) -> Shared:
        """A buffer of its rows, from which several take shuffled ones."""
        return Shared(self._load, len(self.models), self.d_model, self._kept(), self.rows)


class SharedStore:
    """Stores of several models that are read once for several who go through them in turns (featdiff.activations.turns): what
    one has asked for is at hand for those that ask for it next. Raises ContractError as :class:`ActivationStore` does.

    Memory: one buffer as of one who reads all models, and ``READ_ROWS`` rows of them in float32."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.whole = ActivationStore(folders)
        self._first, self._read = 0, torch.empty(0)

    @cached_property
    def buffer(self) -> Shared:
        return self.whole.shared()

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` [n, M, D] of all models, with the ones after them, for those that go on in order."""
        if not (self._first <= start and stop <= self._first + len(self._read)):
            self._read = torch.empty(0)  # before there is as much again
            self._read = self.whole.read(start, max(stop, min(start + READ_ROWS, self.whole.rows)))
            self._first = start
        return self._read[start - self._first : stop - self._first]


class SharedSource:
    """What one of them reads: the models that ``slots`` names, under its names for them."""

    def __init__(self, store: SharedStore, slots: Mapping[str, str]) -> None:
        self.models, self.rows, self._store = list(slots), store.whole.rows, store
        self.layer, self.d_model = store.whole.layer, store.whole.d_model
        self._columns = torch.tensor([store.whole.models.index(model) for model in slots.values()])

    def read(self, start: int, stop: int) -> Tensor:
        return self._store.read(start, stop).index_select(1, self._columns)

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int, skip: int = 0) -> Iterator[Tensor]:
        for rows_BMD in self._store.buffer.mixed(batch, generator, start, stop, skip):
            yield rows_BMD.index_select(1, self._columns)
