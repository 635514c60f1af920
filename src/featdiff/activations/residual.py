"""The token stream that all models read, and a model's residual stream on it. N token rows, B batch, T token, D width."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import ActivationsParams
from featdiff.language.models import left_pad
from featdiff.tasks.task import Text

TOKENIZED_TEXTS = 1000
"""Texts that are turned into tokens together."""


class PackedTexts(Sequence[list[int]]):
    """Texts as token ids that lie one after the other in one array: 4 bytes a token and 16 a text."""

    def __init__(self, ids: Int[np.ndarray, " T"], lengths: Int[np.ndarray, " texts"]) -> None:
        self.ids, self.lengths = ids, lengths
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, which: int) -> list[int]: ...
    @overload
    def __getitem__(self, which: slice) -> PackedTexts: ...
    def __getitem__(self, which: int | slice) -> list[int] | PackedTexts:
        if isinstance(which, slice):
            start, stop, _ = which.indices(len(self))
            low, high = (int(self.ends[i - 1]) if i else 0 for i in (start, max(start, stop)))
            return PackedTexts(self.ids[low:high], self.lengths[start:stop])
        end = int(self.ends[which])
        found: list[int] = self.ids[end - int(self.lengths[which]) : end].tolist()
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

    def save(self, path: Path) -> None:
        texts = self.texts if isinstance(self.texts, PackedTexts) else packed(self.texts)
        save_file({"ids": torch.tensor(texts.ids), "lengths": torch.tensor(texts.lengths)}, path)

    @classmethod
    def load(cls, path: Path, skip: int) -> TokenStream:
        """What :meth:`save` wrote."""
        found = load_file(path)
        return cls(PackedTexts(found["ids"].numpy(), found["lengths"].numpy()), skip)

    def columns(self) -> dict[str, Int[np.ndarray, " N"]]:
        """Of every row its ``token_id``, the number of its text (``text_id``) and its place there (``position``)."""
        texts = self.texts if isinstance(self.texts, PackedTexts) else packed(self.texts)
        first = np.repeat((np.cumsum(self.kept) - self.kept).astype(np.int32), self.kept)
        left_out = (texts.ends - texts.lengths)[:, None] + np.arange(self.skip)
        return {
            "token_id": np.delete(texts.ids, left_out.ravel()),
            "text_id": np.repeat(np.arange(len(texts), dtype=np.int32), self.kept),
            "position": np.arange(self.skip, self.skip + self.rows, dtype=np.int32) - first,
        }


def packed(texts: Iterable[list[int]]) -> PackedTexts:
    """``texts`` in one array."""
    ids, lengths = array("i"), array("i")
    for each in texts:
        ids.extend(each)
        lengths.append(len(each))
    return PackedTexts(np.frombuffer(ids, dtype=np.int32), np.frombuffer(lengths, dtype=np.int32).astype(np.int64))


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
