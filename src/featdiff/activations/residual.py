"""The token stream that all models read, and a model's residual stream on it. N token rows, B batch, T token, D width."""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import DTypeLike
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import ActivationsParams
from featdiff.language.models import left_pad
from featdiff.tasks.task import Text

TOKENIZED_TEXTS = 1000
"""Texts that are turned into tokens together."""


class StoredIds:
    """Token ids in a file of int32, of which only those come into memory that are asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __getitem__(self, where: slice) -> Int[np.ndarray, " T"]:
        # Not mapped: pages of a mapped file count as memory of the process once they were read.
        size = np.dtype(np.int32).itemsize
        return np.frombuffer(os.pread(self._file.fileno(), size * (where.stop - where.start), size * where.start), np.int32)


class PackedTexts(Sequence[list[int]]):
    """Texts as token ids that lie one after the other, in an array or in a file, and 16 bytes a text beside them: the
    ``lengths`` of texts and where they end (``ends``)."""

    def __init__(
        self, ids: Int[np.ndarray, " T"] | StoredIds, lengths: Int[np.ndarray, " texts"], ends: Int[np.ndarray, " texts"]
    ) -> None:
        self._ids, self.lengths, self.ends = ids, lengths, ends

    @property
    def ids(self) -> Int[np.ndarray, " T"]:
        """Tokens of all texts."""
        return self._ids[int(self.ends[0] - self.lengths[0]) : int(self.ends[-1])] if len(self) else np.empty(0, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, which: int) -> list[int]: ...
    @overload
    def __getitem__(self, which: slice) -> PackedTexts: ...
    def __getitem__(self, which: int | slice) -> list[int] | PackedTexts:
        if isinstance(which, slice):
            return PackedTexts(self._ids, self.lengths[which], self.ends[which])
        end = int(self.ends[which])
        found: list[int] = self._ids[end - int(self.lengths[which]) : end].tolist()
        return found


class TokenStream:
    """Texts as token ids. First tokens are still in place: the model must read them, even where their rows are left out."""

    def __init__(self, texts: Sequence[list[int]], skip: int) -> None:
        self.texts, self.skip = texts, skip
        """Tokens left out at the start of every text: 1 under the first-token policy, else 0."""

    @cached_property
    def kept(self) -> Int[np.ndarray, " texts"]:
        """Rows that each text gives."""
        texts = self.texts
        lengths = texts.lengths if isinstance(texts, PackedTexts) else np.array(list(map(len, texts)), dtype=np.int64)
        return lengths - self.skip

    @property
    def rows(self) -> int:
        """Token rows that the stream gives."""
        return int(self.kept.sum())

    def part(self, start: int, stop: int) -> TokenStream:
        """Texts ``start`` to ``stop``."""
        return TokenStream(self.texts[start:stop], self.skip)

    def first(self, rows: int) -> TokenStream:
        """The fewest texts from the start that give at least ``rows`` rows together, or all where they give fewer."""
        return self.part(0, int(np.searchsorted(np.cumsum(self.kept), rows)) + 1)

    @cached_property
    def packed(self) -> PackedTexts:
        """Its texts."""
        return self.texts if isinstance(self.texts, PackedTexts) else packed(self.texts)

    def save(self, path: Path) -> None:
        """Write ``ids`` [T], int32, of all texts one after the other, and the ``lengths`` of the texts, int64."""
        texts = self.packed
        ids = (texts[low : low + TOKENIZED_TEXTS].ids for low in range(0, len(texts), TOKENIZED_TEXTS))
        whole = {"ids": (np.int32, int(texts.lengths.sum())), "lengths": (np.int64, len(texts))}
        save_in_pieces(path, whole, {"ids": ids, "lengths": [texts.lengths]})

    @classmethod
    def load(cls, path: Path, skip: int) -> TokenStream:
        """What :meth:`save` wrote."""
        found = load_file(path)
        lengths = found["lengths"].numpy()
        return cls(PackedTexts(found["ids"].numpy(), lengths, np.cumsum(lengths)), skip)

    def columns(self, before: int = 0) -> dict[str, Int[np.ndarray, " N"]]:
        """Of every row its ``token_id``, the number of its text (``text_id``) and its place there (``position``). There are
        as many texts ``before`` these."""
        texts = self.packed
        first = np.repeat((np.cumsum(self.kept) - self.kept).astype(np.int32), self.kept)
        left_out = (np.cumsum(texts.lengths) - texts.lengths)[:, None] + np.arange(self.skip)
        return {
            "token_id": np.delete(texts.ids, left_out.ravel()),
            "text_id": np.repeat(np.arange(before, before + len(texts), dtype=np.int32), self.kept),
            "position": np.arange(self.skip, self.skip + self.rows, dtype=np.int32) - first,
        }

    def save_columns(self, path: Path) -> None:
        """Write :meth:`columns`, each [N], int32."""
        texts = self.packed

        def pieces(name: str) -> Iterator[Int[np.ndarray, " n"]]:
            for low in range(0, len(texts), TOKENIZED_TEXTS):
                yield TokenStream(texts[low : low + TOKENIZED_TEXTS], self.skip).columns(low)[name]

        names = list(self.part(0, 0).columns())
        save_in_pieces(path, dict.fromkeys(names, (np.int32, self.rows)), {name: pieces(name) for name in names})


def packed(texts: Iterable[list[int]]) -> PackedTexts:
    """``texts`` in a temporary file."""
    file, lengths = tempfile.TemporaryFile(), array("q")  # noqa: SIM115  (open as long as the texts)
    for each in texts:
        file.write(array("i", each))
        lengths.append(len(each))
    file.flush()
    held = np.frombuffer(lengths, dtype=np.int64)
    return PackedTexts(StoredIds(file), held, np.cumsum(held))


def save_in_pieces(
    path: Path, whole: Mapping[str, tuple[DTypeLike, int]], pieces: Mapping[str, Iterable[np.ndarray[Any, Any]]]
) -> None:
    """Write a safetensors file of arrays that are never in memory as a ``whole``, of which type and length are given, but in
    ``pieces``."""
    sizes = {name: np.dtype(kind).itemsize * length for name, (kind, length) in whole.items()}
    # The library writes whole arrays. A mapping that nobody has written to reads as zeros and takes no memory. And tensors end
    # the file, one directly after the other, so that what is written over them from the first on meets each in its place.
    zeros = mmap.mmap(-1, max(1, *sizes.values()), flags=mmap.MAP_PRIVATE)
    save_file({name: np.frombuffer(zeros, kind, length) for name, (kind, length) in whole.items()}, path)
    with safe_open(path, framework="np") as handle:
        order = handle.offset_keys()
    with path.open("r+b") as file:
        file.seek(-sum(sizes.values()), os.SEEK_END)
        for name in order:
            for piece in pieces[name]:
                file.write(np.ascontiguousarray(piece, whole[name][0]).data)


def token_stream(texts: list[Text], tokenizer: PreTrainedTokenizerFast, params: ActivationsParams) -> TokenStream:
    """The first texts of the corpus that give ``params.tokens`` rows, as tokens. The last text is whole, so there can be a few
    rows more. Raises ContractError where the corpus gives fewer."""
    skip, rows = int(params.drop_first_token), 0

    def read() -> Iterator[list[int]]:
        nonlocal rows
        for low in range(0, len(texts), TOKENIZED_TEXTS):
            together = [text.prompt + text.completion for text in texts[low : low + TOKENIZED_TEXTS]]
            for ids in tokenizer(together, truncation=True, max_length=params.max_length)["input_ids"]:
                if len(ids) > skip and rows < params.tokens:
                    rows += len(ids) - skip
                    yield ids
            if rows >= params.tokens:
                return

    stream = TokenStream(packed(read()), skip)
    if rows < params.tokens:
        raise ContractError(
            "params.yaml",
            "activations.tokens",
            f"at most {rows} (the corpus)",
            params.tokens,
            "lower it or raise prepare.corpus.texts",
        )
    return stream


def shards(stream: TokenStream, shard_rows: int) -> list[TokenStream]:
    """Whole texts in groups of at least ``shard_rows`` rows; the last group may have fewer."""
    found, start, rows = [], 0, 0
    for end, kept in enumerate(stream.kept.tolist(), start=1):
        rows += kept
        if rows >= shard_rows or end == len(stream.texts):
            found.append(stream.part(start, end))
            start, rows = end, 0
    return found


def batches(stream: TokenStream, batch_size: int) -> list[list[int]]:
    """Numbers of the texts that a model reads together."""
    # Texts of similar length share a batch, so that little of the work is padding. The longest come first: what does not fit
    # into memory fails at once. Batches never reach over a shard, so a shard made again after a kill has the same bytes.
    order = np.argsort(-stream.kept, kind="stable").tolist()
    return [order[low : low + batch_size] for low in range(0, len(order), batch_size)]


@torch.inference_mode()
def read_batch(trunk: torch.nn.Module, stream: TokenStream, chosen: list[int], pad: int, dtype: torch.dtype) -> list[Tensor]:
    """Residual stream [n, D] at the kept tokens of each of the ``chosen`` texts. ``trunk`` is a model that ends after the layer
    to read."""
    ids, mask, positions = left_pad([stream.texts[i] for i in chosen], pad, next(trunk.parameters()).device)
    resid_BTD = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    # Padding is on the left: a text's last tokens are the last ones of its row.
    return [resid_BTD[row, -int(stream.kept[i]) :].to(dtype).cpu() for row, i in enumerate(chosen)]


def read_residual(trunk: torch.nn.Module, stream: TokenStream, batch_size: int, pad: int, dtype: torch.dtype) -> Tensor:
    """Residual stream [N, D] at every kept token of ``stream``, in its order. ``batch_size`` counts texts."""
    parts: list[Tensor] = [torch.empty(0)] * len(stream.texts)
    for chosen in batches(stream, batch_size):
        for i, part in zip(chosen, read_batch(trunk, stream, chosen, pad, dtype), strict=True):
            parts[i] = part
    return torch.cat(parts)


def require_finite_stream(model: Path, acts: Iterable[Tensor]) -> None:
    """Raise ContractError for a residual stream of the ``model`` that is not finite."""
    if not all(torch.isfinite(each).all() for each in acts):
        raise ContractError(model, "residual stream", "finite values", "NaN or infinity", "check the model")
