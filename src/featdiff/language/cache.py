"""Keys and values of what a model has read, which grow in place and of which branches go their own way.

Shapes: B batch, H heads of keys and values, T token, K width of a head.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 16
"""Tokens for which room is made at least."""
MORE_ROOM = 8
"""The share of what is there, as one part of so many, for which room is made besides: so each token is copied a bounded number
of times however long an answer becomes."""


class GrowingLayer(DynamicLayer):
    """Keys and values [B, H, T, K] of one layer, the first tokens and rows of a memory with room for more.

    The library's own layer copies all that it holds for every token that is added, and for every row that leaves: a third
    of the time of a small model that answers a thousand questions at once."""

    def __init__(self) -> None:
        super().__init__()
        self._memory: tuple[Tensor, Tensor] | None = None
        """Of keys and of values; what is read of them are :attr:`keys` and :attr:`values`."""
        self._alone = True
        """Whether no branch reads the same memory."""

    def branch(self) -> GrowingLayer:
        """One that reads the same and writes elsewhere."""
        self._alone = False
        return copy(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, H, n, K] of n tokens; those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._memory is None or not self._alone or stop > self._memory[0].shape[-2]:
            self._move(stop, start, key_states, value_states)
        assert self._memory is not None
        rows = len(key_states)
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[:rows, :, start:stop] = new
        self._see(rows, stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in their order. In memory of its own, only rows that change their place move."""
        if not (tokens := self.get_seq_length()):
            return
        assert self._memory is not None
        if self._alone and len(indices) <= len(self.keys):
            moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
            if len(moved):
                for memory in self._memory:
                    memory[moved, :, :tokens] = memory[indices[moved], :, :tokens]
        else:
            self._memory = self.keys.index_select(0, indices), self.values.index_select(0, indices)
            self._alone = True
        self._see(len(indices), tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove and self.is_initialized:
            self._see(len(self.keys), self.get_seq_length() + tokens_to_remove)

    def _move(self, stop: int, start: int, *new: Tensor) -> None:
        """Into memory of its own for ``stop`` tokens, and more where this is not the first time: prompts that are kept for
        later passes never grow."""
        room = stop + (max(LEAST_ROOM, stop // MORE_ROOM) if start else 0)
        keys, values = (each.new_empty(*each.shape[:2], room, each.shape[-1]) for each in new)
        if start:
            keys[:, :, :start], values[:, :, :start] = self.keys, self.values
        self._memory, self._alone = (keys, values), True

    def _see(self, rows: int, tokens: int) -> None:
        assert self._memory is not None
        self.keys, self.values = (memory[:rows, :, :tokens] for memory in self._memory)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for ``model``, whose layers grow in place where the library's are of the plain kind; those with a window
    or of another kind stay the library's."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def branch(cache: DynamicCache) -> DynamicCache:
    """A cache that goes its own way from here, as ``cache`` may."""
    # The library's layers put new tensors into the layer object and leave the old ones, which other branches hold, as they
    # were: a shallow copy of each is enough.
    found = copy(cache)
    found.layers = [layer.branch() if isinstance(layer, GrowingLayer) else copy(layer) for layer in cache.layers]
    return found


def croppable(cache: DynamicCache) -> bool:
    """Whether the last tokens of ``cache`` can be forgotten."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def size(cache: DynamicCache) -> int:
    """Bytes that ``cache`` takes."""

    def taken(layer: object) -> int:
        held = (layer.keys, layer.values) if isinstance(layer, GrowingLayer) else vars(layer).values()
        return sum(value.nbytes for value in held if isinstance(value, Tensor))

    return sum(map(taken, cache.layers))
