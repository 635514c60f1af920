"""How deep does it lie? Two models stitched together: the first blocks of one, the others and the head of the other.

Stitching (Lenc and Vedaldi 2015; Bansal et al. 2021), here without a layer between the parts, as both models come from one
base. Of all edits of the residual stream after some block it is the largest, the whole stream at every position: a feature set
there can take away no more than it does (**ours**)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedModel

from featdiff.language.models import stitched

ORDERS = (("original", "tuned"), ("tuned", "original"))
"""Which part's blocks lie below, and whose above."""


def depths(blocks: int, hooked: int, most: int) -> list[int]:
    """Numbers of blocks below the seam, ``most`` at even distances and ``hooked``, the depth at which features are read; with
    none and with all of them there is no seam."""
    even = np.linspace(0, blocks, most + 2).round().astype(int)[1:-1]
    return sorted({int(depth) for depth in [*even, hooked] if 0 < depth < blocks})


def alike(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether the blocks of one fit on those of the other."""
    return all(
        getattr(one.config, name) == getattr(other.config, name) for name in ("model_type", "hidden_size", "num_hidden_layers")
    )


def seams(models: dict[str, PreTrainedModel], hooked: int, most: int) -> Iterator[tuple[str, int, PreTrainedModel]]:
    """Whose blocks lie below, how many, and the stitched model; ``models`` by part. Nothing where they do not fit."""
    if not alike(*models.values()):
        return
    for lower, upper in ORDERS:
        for depth in depths(models[lower].config.num_hidden_layers, hooked, most):
            yield lower, depth, stitched(models[lower], models[upper], depth)
