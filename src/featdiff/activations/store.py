"""Reading activation stores: several models side by side on the same tokens, in order or shuffled.

N token rows, M models, D residual width, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from featdiff.artifact import ContractError, read_json

BLOCK_ROWS = 4096
BUFFER_ROWS = 1 << 18
READ_ROWS = 8192


class ActivationSource(Protocol):
    """Activations of M models on the same tokens, whether stored or streamed."""

    models: list[str]
    d_model: int
    rows: int

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` [n, M, D], float32."""

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int) -> Iterator[Tensor]:
        """Endless batches [B, M, D] over rows ``start`` to ``stop``, every row once per pass."""


def in_order(source: ActivationSource, start: int, stop: int) -> Iterator[Tensor]:
    """Rows ``start`` to ``stop`` in pieces [n, M, D] of at most ``READ_ROWS``."""
    for low in range(start, stop, READ_ROWS):
        yield source.read(low, min(low + READ_ROWS, stop))


class ActivationStore:
    """Stores of several models on disk as one :class:`ActivationSource`.

    Raises ContractError unless all stores hold the same tokens, layer width and first-token policy."""

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
        """Random blocks are read into a buffer that is permuted as a whole: sequential reads, shuffled rows.

        A store that fits into the buffer stays there, perfectly shuffled from the first pass on. What a buffer
        leaves over starts the next batch. Raises ContractError where there are fewer rows than one batch."""
        if stop - start < batch:
            expected = f"at most {stop - start} (rows at hand)"
            raise ContractError("params.yaml", "crosscoder.training.batch_tokens", expected, batch, "lower it")
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
                head = batch - len(left)
                for part in (rows[:head], *torch.split(rows[head:], batch)):
                    left = torch.cat([left, buffer[part]]) if len(left) else buffer[part]
                    if len(left) == batch:
                        yield left
                        left = left[:0]
