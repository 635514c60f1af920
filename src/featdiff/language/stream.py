"""One model with what it has read so far, fed step by step, whole or in two parts: the blocks up to a layer, which read texts,
and those above it, which read residual streams.

Shapes: B batch, U texts, T token, D residual width, V vocabulary.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from featdiff.language.cache import new_cache
from featdiff.language.models import block, blocks, truncate, with_shared_weights


class Halves(NamedTuple):
    """Two modules that share the weights of a model."""

    trunk: torch.nn.Module
    """Its blocks up to a layer."""
    upper: PreTrainedModel
    """The whole, in which those blocks do nothing: what follows takes over whatever a hook puts in place of their output."""


_TRUNKS: WeakKeyDictionary[PreTrainedModel, dict[int, torch.nn.Module]] = WeakKeyDictionary()
_HALVES: WeakKeyDictionary[PreTrainedModel, dict[int, Halves | None]] = WeakKeyDictionary()


def trunk(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The first ``layer`` blocks of ``model``, made once (:func:`featdiff.language.models.truncate`)."""
    known = _TRUNKS.setdefault(model, {})
    if layer not in known:
        known[layer] = truncate(model, layer)
    return known[layer]


def halves(model: PreTrainedModel, layer: int) -> Halves | None:
    """``model`` in two parts at ``layer``; None where they do not give what the whole gives, as in a model whose upper blocks
    read more of the lower ones than the residual stream."""
    known = _HALVES.setdefault(model, {})
    if layer not in known:
        known[layer] = made if _as_the_whole(model, made := _split(model, layer), layer) else None
    return known[layer]


def _split(model: PreTrainedModel, layer: int) -> Halves:
    def through(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states

    upper: PreTrainedModel = with_shared_weights(model)
    for each in blocks(upper.base_model)[:layer]:
        each.forward = through
    return Halves(trunk(model, layer), upper)


@torch.inference_mode()
def _as_the_whole(model: PreTrainedModel, made: Halves, layer: int) -> bool:
    """Whether both parts together give the logits of ``model``, for some tokens and for one more."""
    whole, parts = Stream(model), Stream(model)
    tokens = torch.arange(5, device=model.device)[None] % model.config.get_text_config().vocab_size
    for low, high in ((0, 4), (4, 5)):
        given = tokens[:, low:high], torch.ones_like(tokens[:, :high]), torch.arange(low, high, device=model.device)[None]
        expected = whole.feed(*given, 0)
        try:
            resid = parts.below(made.trunk, *given)
            handle = block(made.upper, layer).register_forward_hook(lambda *_, resid=resid: resid)
            try:
                found = parts.above(made.upper, layer, *given, 0)
            finally:
                handle.remove()
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError, AttributeError):
            return False
        if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
            return False
    return True


class Stream:
    """One model with its key-value cache. In two parts (:func:`halves`), what is below the layer may hold the texts of its
    rows once, while what is above holds every row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, new_cache(model)

    def feed(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, keep: int) -> Tensor:
        """Logits [B, keep, V] of the last ``keep`` positions (0 keeps all)."""
        return self._logits(self.model, self.cache, ids_BT, mask_BT, positions_BT, keep)

    def below(self, trunk: torch.nn.Module, ids_UT: Tensor, mask_UT: Tensor, positions_UT: Tensor) -> Tensor:
        """Residual stream [U, T, D] after the blocks of ``trunk``."""
        read = {"input_ids": ids_UT, "attention_mask": mask_UT, "position_ids": positions_UT}
        resid_UTD: Tensor = trunk(**read, past_key_values=self.cache, use_cache=True).last_hidden_state
        return resid_UTD

    def above(
        self, upper: PreTrainedModel, layer: int, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, keep: int
    ) -> Tensor:
        """Logits [B, keep, V] after the blocks above ``layer`` alone."""
        # Masks are made for the length that the first layer of each kind has. Below, this is what the texts have, which were
        # read already; so layers of the same kind above stand for those below.
        view, kinds = copy(self.cache), list(map(type, self.cache.layers))
        above = range(layer, len(kinds))
        stand_ins = [next((i for i in above if kinds[i] is kind), layer) for kind in kinds[:layer]]
        view.layers = [self.cache.layers[i] for i in (*stand_ins, *above)]
        return self._logits(upper, view, ids_BT, mask_BT, positions_BT, keep)

    @staticmethod
    def _logits(
        model: PreTrainedModel, cache: DynamicCache, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, keep: int
    ) -> Tensor:
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits
        return logits

    def select(self, rows: Tensor, layers: slice = slice(None)) -> None:
        """Keep ``rows`` of what was read, in their order, in ``layers``."""
        for layer in self.cache.layers[layers]:
            layer.batch_select_indices(rows)
