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

    def left(self, places: Tensor) -> None:
        self.free = torch.cat([self.free, places])
        self._read_on()

    def close(self) -> None:
        for each in (each for mix in self.coming for each in mix.reading):
            each.cancel()
        self.reader.shutdown()


def _mixes(start: int, stop: int, generator: torch.Generator) -> Iterator[_Mix]:
    """Endless passes over the rows: blocks in random order, as many together as a buffer holds."""
    blocks = [(low, min(low + BLOCK_ROWS, stop)) for low in range(start, stop, BLOCK_ROWS)]
    together = BUFFER_ROWS // BLOCK_ROWS
    while True:
        order = torch.randperm(len(blocks), generator=generator).tolist()
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

    Blocks of rows are read in random order, and the rows of as many as the buffer holds are permuted as a whole: reads are
    sequential and rows are shuffled. Two rows of one block always come in the same mix. Rows that fit into the buffer stay
    there, and all their orders are equally likely. If they do not, every batch that leaves makes room for as many rows of the
    next mix, which a thread reads meanwhile: after the first, no batch waits for more than a few blocks.

    Memory whatever the number of rows: C · (M · D · bytes of ``dtype`` + 48) for C = min(rows, ``BUFFER_ROWS``), two batches
    in ``dtype`` and one in float32, and what ``load`` needs for a block."""
    require_batch(batch, stop - start)
    capacity, mixes = min(stop - start, BUFFER_ROWS), _mixes(start, stop, generator)
    skip *= batch
    while skip >= len((mix := next(mixes)).order):
        skip -= len(mix.order)
    mixes = chain([mix], mixes)
    # Made by NumPy, which asks for large pages: rows are gathered from all over it.
    rows_CMD = torch.from_numpy(np.empty((capacity, models, width), f"i{dtype.itemsize}")).view(dtype)
    buffer = _Resident(rows_CMD, load, start, mixes) if capacity == stop - start else _Passing(rows_CMD, load, mixes)
    batch_BMD, filled = rows_CMD.new_empty(batch, models, width), 0
    try:
        for order in buffer:
            buffer.left(order[:skip])
            order, skip = order[skip:], 0
            # The first rows complete the batch that the last mix left unfinished, so that none is dropped between mixes or
            # passes. A last batch that is short stays as it is until then.
            for places in (order[: batch - filled], *order[batch - filled :].split(batch)):
                torch.index_select(rows_CMD, 0, places, out=batch_BMD[filled : filled + len(places)])
                buffer.left(places)
                filled += len(places)
                if filled == batch:
                    yield batch_BMD.to(torch.float32, copy=True)
                    filled = 0
    finally:
        buffer.close()
