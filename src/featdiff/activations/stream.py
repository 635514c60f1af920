"""Residual streams that are not kept: the models run again wherever rows of them are read.

Their texts go through them in the batches in which a store is harvested, so that every row has the bits that the store would
have. n rows, D residual width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from featdiff.activations.mixing import overlaps
from featdiff.activations.residual import TokenStream, batches, read_batch, require_finite_stream, shards
from featdiff.artifacts.artifact import ContractError, hash_json, sha256_file
from featdiff.language.models import load_model, truncate
from featdiff.processes.ranks import process_state

TEXTS = "texts.safetensors"


class Streamed(NamedTuple):
    """What the index of a store says that has no shards."""

    batch_size: int
    shard_rows: int
    """The rows of a shard that there would be: batches are made up within it."""
    pad: int
    series: Mapping[str, Sequence[Any]]
    """Folder of the model, :func:`fingerprint` of its weights and number of texts that it reads, by series."""


def fingerprint(folder: Path) -> str:
    """Hash of the configuration and the weights in a model folder. Raises ContractError where there are none."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if len(files) == 1 or not files[0].is_file():
        raise ContractError(
            folder, "weights", "the model, which streamed activations are read from", "none", "rerun: dvc repro"
        )
    return _hashed(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=64)
def _hashed(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files with size and time of change: what has neither changed since is not read again."""
    return hash_json({path.name: sha256_file(path) for path, *_ in files})


@lru_cache(maxsize=3)
def _loaded(path: Path, layer: int, weights: str) -> torch.nn.Module:
    """The trunk of the model in ``path``, whose :func:`fingerprint` is ``weights``. The last three are kept: a stage that goes
    through many crosscoders reads rows of the same models for each."""
    return truncate(load_model(path), layer).to(process_state().device)


def forget() -> None:
    """Let go of the models that are kept."""
    _loaded.cache_clear()


class Runs:
    """The ``series`` of the model that the index of ``folder`` names, which runs when rows are read.

    Batches that were read last stay at hand, no more than one shard has rows: so a pass in order runs each batch once. Reading
    here and there runs whole batches for the rows that are wanted of them, and few of them go to waste where a shard is short
    beside what is read at once. Raises ContractError where the model's folder is missing or its weights are not those that the
    index names."""

    def __init__(self, folder: Path, index: Mapping[str, Any], series: str) -> None:
        self._streamed, self._layer = Streamed(**index["streamed"]), index["layer"]
        path, weights, texts = self._streamed.series[series]
        self.path, self.dtype, self._weights = Path(path), getattr(torch, index["dtype"]), weights
        if fingerprint(self.path) != weights:
            found = "others than when it was written"
            raise ContractError(self.path, "weights", f"those of {folder / 'index.json'}", found, "rerun: dvc repro")
        stream = TokenStream.load(folder / TEXTS, int(index["drop_first_token"])).part(0, texts)
        self._shards = shards(stream, self._streamed.shard_rows)
        self._ends = list(accumulate(shard.rows for shard in self._shards))
        self.rows = stream.rows
        self.most_held = max((shard.rows for shard in self._shards), default=0)
        self.held = 0
        """Rows at hand, at most ``most_held``."""
        self._at_hand: OrderedDict[tuple[int, int], list[Tensor]] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def _trunk(self) -> torch.nn.Module:
        return _loaded(self.path, self._layer, self._weights)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows ``start`` to ``stop`` [n, D] in stretches that lie anyhow, each with its place after ``start``."""
        for i, low, high in overlaps(self._ends, start, stop):
            shard = self._shards[i]
            ends = np.cumsum(shard.kept) + (self._ends[i] - shard.rows)
            wanted = {text: (a, b, int(ends[text] - shard.kept[text])) for text, a, b in overlaps(ends.tolist(), low, high)}
            for number, chosen in enumerate(batches(shard, self._streamed.batch_size)):
                if not wanted.keys().isdisjoint(chosen):
                    for text, acts in zip(chosen, self._read(i, number, chosen), strict=True):
                        if text in wanted:
                            a, b, begin = wanted[text]
                            yield a - start, acts[a - begin : b - begin]

    def _read(self, i: int, number: int, chosen: list[int]) -> list[Tensor]:
        """Rows of the ``chosen`` texts of shard ``i``, which are its batch ``number``."""
        with self._lock:  # rows are read ahead in a thread
            if (i, number) in self._at_hand:
                self._at_hand.move_to_end((i, number))
                return self._at_hand[i, number]
            rows = int(self._shards[i].kept[chosen].sum())
            while self.held + rows > self.most_held:
                _, oldest = self._at_hand.popitem(last=False)
                self.held -= sum(map(len, oldest))
            found = read_batch(self._trunk, self._shards[i], chosen, self._streamed.pad, self.dtype)
            require_finite_stream(self.path, found)
            self._at_hand[i, number] = found
            self.held += rows
            return found
