"""Shuffled batches of rows that are read in blocks: a buffer of fixed size in which blocks are mixed.

M models, D residual width, B batch, C rows of the buffer, n rows of a block.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from featdiff.artifacts.artifact import ContractError

BLOCK_ROWS = 4096
"""Rows read together when shuffling: long enough for sequential reads, and short beside a buffer."""
BUFFER_ROWS = 1 << 18
"""Rows shuffled together, a multiple of ``BLOCK_ROWS``."""
Load = Callable[[int, int, Tensor, Tensor], None]
"""Puts rows ``start`` to ``stop`` into a buffer [C, M, D], at the places [n] given."""


def require_batch(batch: int, rows: int) -> None:
    """Raise ContractError unless ``rows`` give at least one batch."""
    if rows < batch:
        raise ContractError(
            "params.yaml",
            "crosscoder.training.batch_tokens",
            f"at most {rows} (rows at hand)",
            batch,
            "lower it, or raise activations.tokens or activations.checkpoint_tokens",
        )


def overlaps(ends: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Parts that rows ``start`` to ``stop`` lie in, where ``ends`` says with which row each part ends: number of the part, and
    which of the rows are in it."""
    while start < stop:
        i = bisect_right(ends, start)
        high = min(ends[i], stop)
        yield i, start, high
        start = high


def put(rows_CMD: Float[Tensor, "C M D"], places: Int[Tensor, " n"], m: int, acts: Float[Tensor, "n D"]) -> None:
    """Rows of model ``m`` to their places in a buffer."""
    # As integers of the same size: NumPy, which moves whole rows where PyTorch moves numbers, has no bfloat16.
    bits = torch.int16 if rows_CMD.element_size() == 2 else torch.int32
    rows_CMD.view(bits).numpy()[places.numpy(), m] = acts.to(rows_CMD.dtype).view(bits).numpy()


class _Mix:
    """Blocks whose rows are shuffled together."""

    def __init__(self, blocks: list[tuple[int, int]], generator: torch.Generator) -> None:
        self.blocks = blocks
        ends = np.cumsum([high - low for low, high in blocks]).tolist()
        # It is settled which row comes when; so blocks may be read in the order in which they lie on the disk.
        self.unread = deque(sorted((low, high, end) for (low, high), end in zip(blocks, ends, strict=True)))
        self.order = torch.randperm(ends[-1], generator=generator)
        self.places = torch.empty(ends[-1], dtype=torch.long)
        """Of its rows in the buffer."""
        self.reading: list[Future[None]] = []


class _Resident:
    """A buffer that holds all rows, which are read once."""

    def __init__(self, rows_CMD: Tensor, load: Load, start: int, mixes: Iterator[_Mix]) -> None:
        self.rows_CMD, self.mixes = rows_CMD, mixes
        for places in torch.arange(len(rows_CMD)).split(BLOCK_ROWS):
            load(start + int(places[0]), start + int(places[-1]) + 1, rows_CMD, places)

    def __iter__(self) -> Iterator[Tensor]:
        """Places in the buffer in the order of the rows that leave it, mix by mix."""
        return (mix.order for mix in self.mixes)

    def rows(self) -> Tensor:
        """The buffer, with the rows of the mix in hand."""
        return self.rows_CMD

    def left(self, places: Tensor) -> None:
        """The rows at ``places`` have left."""

    def close(self) -> None:
        """No more rows are asked for."""


class _Passing:
    """A buffer through which rows pass: those that leave make room for those of the next mix."""

    def __init__(self, rows_CMD: Tensor, load: Load, mixes: Iterator[_Mix]) -> None:
        self.rows_CMD, self.load, self.mixes = rows_CMD, load, mixes
        self.free = torch.arange(len(rows_CMD))
        self.coming: deque[_Mix] = deque()
        self.reader = ThreadPoolExecutor(1, "rows")
        self._read_on()

    def _read_on(self) -> None:
        """Have blocks read for which there is room."""
        while True:
            if not self.coming or not self.coming[-1].unread:
                self.coming.append(next(self.mixes))
            mix = self.coming[-1]
            low, high, end = mix.unread[0]
            if (n := high - low) > len(self.free):
                return
            mix.unread.popleft()
            places, self.free = self.free[:n], self.free[n:]
            mix.places[end - n : end] = places
            mix.reading.append(self.reader.submit(self.load, low, high, self.rows_CMD, places))

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            # All of it is being read by now: whatever left before it has made room, and no mix is larger than the buffer.
            mix = self.coming.popleft()
            for each in mix.reading:
                each.result()
            yield mix.places[mix.order]

    def rows(self) -> Tensor:
        return self.rows_CMD

    def left(self, places: Tensor) -> None:
        self.free = torch.cat([self.free, places])
        self._read_on()

    def close(self) -> None:
        for each in (each for mix in self.coming for each in mix.reading):
            each.cancel()
        self.reader.shutdown()


class _FromShared:
    """What one of several takes from a buffer that they share."""

    def __init__(self, shared: Shared, mixes: Iterator[_Mix]) -> None:
        first = next(mixes)
        self.shared, self.blocks, self.mixes = shared, first.blocks, chain([first], mixes)

    def rows(self) -> Tensor:
        return self.shared.rows(self.blocks)

    def __iter__(self) -> Iterator[Tensor]:
        for mix in self.mixes:
            self.blocks = mix.blocks
            yield mix.order

    def left(self, places: Tensor) -> None:
        """The rows at ``places`` have left for this one, and not for others."""

    def close(self) -> None:
        """No more rows are asked for."""


def _mixes(start: int, stop: int, generator: torch.Generator) -> Iterator[_Mix]:
    """Endless passes over the rows: blocks in random order, as many together as a buffer holds."""
    blocks = [(low, min(low + BLOCK_ROWS, stop)) for low in range(start, stop, BLOCK_ROWS)]
    together = BUFFER_ROWS // BLOCK_ROWS
    # Which blocks come together, and when, is the same whatever the generator: so one read of them serves several fits
    # (Shared). Where all of them do there is nothing to choose, and they stay in their order; it is drawn all the same.
    arranging = generator if len(blocks) <= together else torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(blocks), generator=arranging).tolist()
        if len(blocks) <= together:
            order.sort()
        for first in range(0, len(blocks), together):
            yield _Mix([blocks[i] for i in order[first : first + together]], generator)


def mixed(
    load: Load,
    models: int,
    width: int,
    dtype: torch.dtype,
    batch: int,
    generator: torch.Generator,
    start: int,
    stop: int,
    skip: int = 0,
) -> Iterator[Float[Tensor, "B M D"]]:
    """Endless batches in float32 over rows ``start`` to ``stop``, every row once per pass; the first ``skip`` batches are left
    out: what is drawn for them is drawn, and what only they need is not read. Raises ContractError where there are fewer rows
    than one batch.

    Blocks of rows are read in random order, the same for every ``generator``, and the rows of as many as the buffer holds are
    permuted as a whole by it: reads are sequential and rows are shuffled. Two rows of one block always come in the same mix.
    Rows that fit into the buffer stay there, and all their orders are equally likely. If they do not, every batch that leaves
    makes room for as many rows of the next mix, which a thread reads meanwhile: after the first, no batch waits for more than a
    few blocks.

    Memory whatever the number of rows: C · (M · D · bytes of ``dtype`` + 48) for C = min(rows, ``BUFFER_ROWS``), two batches
    in ``dtype`` and one in float32, and what ``load`` needs for a block."""
    mixes, skip = _from(start, stop, batch, generator, skip)
    rows_CMD = _room(min(stop - start, BUFFER_ROWS), models, width, dtype)
    whole = len(rows_CMD) == stop - start
    buffer = _Resident(rows_CMD, load, start, mixes) if whole else _Passing(rows_CMD, load, mixes)
    yield from _batches(buffer, batch, skip)


def _from(start: int, stop: int, batch: int, generator: torch.Generator, skip: int) -> tuple[Iterator[_Mix], int]:
    """Mixes from the one on in which the first batch after ``skip`` begins, and how many of its rows come before that."""
    require_batch(batch, stop - start)
    mixes = _mixes(start, stop, generator)
    skip *= batch
    while skip >= len((mix := next(mixes)).order):
        skip -= len(mix.order)
    return chain([mix], mixes), skip


def _room(rows: int, models: int, width: int, dtype: torch.dtype) -> Float[Tensor, "C M D"]:
    # Made by NumPy, which asks for large pages: rows are gathered from all over it.
    return torch.from_numpy(np.empty((rows, models, width), f"i{dtype.itemsize}")).view(dtype)


def _batches(buffer: _Resident | _Passing | _FromShared, batch: int, skip: int) -> Iterator[Float[Tensor, "B M D"]]:
    ready: Tensor | None = None
    rows_CMD = buffer.rows()
    batch_BMD, filled = rows_CMD.new_empty(batch, *rows_CMD.shape[1:]), 0
    try:
        for order in buffer:
            buffer.left(order[:skip])
            order, skip = order[skip:], 0
            # The first rows complete the batch that the last mix left unfinished, so that none is dropped between mixes or
            # passes. A last batch that is short stays as it is until then. It is taken before the one before it is given:
            # whoever shares the buffer needs nothing of a mix after its last batch.
            for places in (order[: batch - filled], *order[batch - filled :].split(batch)):
                if ready is not None and filled + len(places) == batch:
                    yield ready
                    ready = None
                torch.index_select(buffer.rows(), 0, places, out=batch_BMD[filled : filled + len(places)])
                buffer.left(places)
                filled += len(places)
                if filled == batch:
                    ready, filled = batch_BMD.to(torch.float32, copy=True), 0
            if ready is not None:
                yield ready
                ready = None
    finally:
        buffer.close()


class Shared:
    """A buffer that holds one mix at a time, from which several take their rows, each in its own order. Memory is that of
    :func:`mixed`, once for all of them."""

    def __init__(self, load: Load, models: int, width: int, dtype: torch.dtype, rows: int) -> None:
        self._load, self._held = load, list[tuple[int, int]]()
        self._rows_CMD = _room(min(rows, BUFFER_ROWS), models, width, dtype)

    def mixed(
        self, batch: int, generator: torch.Generator, start: int, stop: int, skip: int = 0
    ) -> Iterator[Float[Tensor, "B M D"]]:
        """The batches of :func:`mixed`."""
        mixes, skip = _from(start, stop, batch, generator, skip)
        yield from _batches(_FromShared(self, mixes), batch, skip)

    def rows(self, blocks: list[tuple[int, int]]) -> Float[Tensor, "C M D"]:
        """The buffer, with the rows of ``blocks`` one after the other at its start; read where it holds others."""
        if blocks != self._held:
            self._held = []  # what could not be read whole must not be taken for it
            ends = np.cumsum([high - low for low, high in blocks]).tolist()
            for (low, high), end in sorted(zip(blocks, ends, strict=True)):
                self._load(low, high, self._rows_CMD, torch.arange(end - (high - low), end))
            self._held = blocks
        return self._rows_CMD
