"""Reading activation stores: several models side by side on the same tokens, in order or shuffled.

N token rows, M models, D residual width, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from featdiff.artifacts.artifact import ContractError, read_json

BLOCK_ROWS = 4096
"""Rows read together when shuffling: long enough for sequential reads, and short beside a buffer."""
BUFFER_ROWS = 1 << 18
"""Rows shuffled together."""
READ_ROWS = 8192
"""Rows read at once when going through a source in order."""


class ActivationSource(Protocol):
    """Raw activations of M models on the same tokens, wherever they are kept."""

    models: list[str]
    d_model: int
    rows: int

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` [n, M, D], float32."""

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int) -> Iterator[Tensor]:
        """Endless batches [B, M, D] over rows ``start`` to ``stop``. No row comes twice in a pass. Raises ContractError
        where there are fewer rows than one batch."""


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


def in_order(source: ActivationSource, start: int, stop: int) -> Iterator[Tensor]:
    """Rows ``start`` to ``stop`` in pieces [n, M, D] of at most ``READ_ROWS``."""
    for low in range(start, stop, READ_ROWS):
        yield source.read(low, min(low + READ_ROWS, stop))


def moments(source: ActivationSource, stop: int) -> tuple[Float[Tensor, "M D"], Float[Tensor, " M"]]:
    """Mean of rows 0 to ``stop`` and their mean squared distance to it, in one pass and float64."""
    square = torch.zeros(len(source.models), dtype=torch.float64)
    total = torch.zeros(len(source.models), source.d_model, dtype=torch.float64)
    for rows in map(Tensor.double, in_order(source, 0, stop)):
        total, square = total + rows.sum(0), square + rows.square().sum((0, 2))
    mean = total / stop
    # E‖x − mean‖² = E‖x‖² − ‖mean‖². The difference loses digits where the mean is large; float64 has them to lose.
    return mean, square / stop - mean.square().sum(1)


class ActivationStore:
    """Stores of several models on disk as one :class:`ActivationSource`.

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
            if not torch.equal(self.tokens(folder), self.tokens(self._folders[0])):
                raise ContractError(
                    folder / "tokens.safetensors", "token_id", f"the tokens of {self._folders[0]}", "others", "rerun: dvc repro"
                )
        self.layer, self.d_model = int(first["layer"]), int(first["d_model"])
        self._shards = [index["shards"][series] for index in indexes]
        self.rows = sum(shard["rows"] for shard in self._shards[0])
        if self.rows == 0:
            raise ContractError(self._folders[0], "rows", "at least one token", 0, "raise activations.tokens")

    @staticmethod
    def tokens(folder: Path) -> Tensor:
        """Token ids [N] of a store."""
        return load_file(folder / "tokens.safetensors")["token_id"]

    def read(self, start: int, stop: int) -> Tensor:
        return torch.stack([self._read_model(m, start, stop) for m in range(len(self.models))], dim=1)

    def _read_model(self, m: int, start: int, stop: int) -> Tensor:
        parts, offset = [], 0
        for shard in self._shards[m]:
            low, high = max(start - offset, 0), min(stop - offset, shard["rows"])
            if low < high:
                with safe_open(self._folders[m] / shard["file"], framework="pt") as handle:
                    parts.append(handle.get_slice("acts")[low:high].float())
            offset += shard["rows"]
        return torch.cat(parts)

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int) -> Iterator[Tensor]:
        """Endless batches [B, M, D] over rows ``start`` to ``stop``, every row once per pass. Raises ContractError where
        there are fewer rows than one batch.

        Blocks of rows are read in random order into a buffer, and the buffer is permuted as a whole: reads are sequential and
        rows are shuffled. Two rows of one block always come in the same buffer; a store that fits into the buffer is one
        buffer, and all its orders are equally likely."""
        require_batch(batch, stop - start)
        blocks = [(low, min(low + BLOCK_ROWS, stop)) for low in range(start, stop, BLOCK_ROWS)]
        per_buffer = max(1, BUFFER_ROWS // BLOCK_ROWS)
        resident = self.read(start, stop) if stop - start <= BUFFER_ROWS else None
        left = torch.empty(0, len(self.models), self.d_model)
        while True:
            order = torch.randperm(len(blocks), generator=generator).tolist()
            for group in range(0, len(blocks), per_buffer):
                chosen = [blocks[i] for i in order[group : group + per_buffer]]
                buffer = resident if resident is not None else torch.cat([self.read(low, high) for low, high in chosen])
                rows = torch.randperm(len(buffer), generator=generator)
                # The first rows complete the batch that the last buffer left unfinished, so that none is dropped between
                # buffers or passes. A last batch that is short stays in `left`.
                head = batch - len(left)
                for part in (rows[:head], *torch.split(rows[head:], batch)):
                    left = torch.cat([left, buffer[part]]) if len(left) else buffer[part]
                    if len(left) == batch:
                        yield left
                        left = left[:0]
