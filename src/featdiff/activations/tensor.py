"""Activations in memory as an :class:`~featdiff.activations.store.ActivationSource`.

N token rows, M models, D residual width, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.activations.mixing import require_batch


class ActivationTensor:
    """Raw activations [N, M, D] of ``models`` on the same tokens."""

    def __init__(self, models: list[str], acts_NMD: Float[Tensor, "N M D"]) -> None:
        self.models, self.acts_NMD = list(models), acts_NMD
        self.rows, self.d_model = acts_NMD.shape[0], acts_NMD.shape[2]

    def read(self, start: int, stop: int) -> Tensor:
        return self.acts_NMD[start:stop]

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int, skip: int = 0) -> Iterator[Tensor]:
        """Endless batches [B, M, D] over rows ``start`` to ``stop``, shuffled anew in every pass, without the first ``skip``.
        What a pass leaves over after its last full batch is dropped. Raises ContractError where there are fewer rows than one
        batch."""
        require_batch(batch, stop - start)
        while True:
            order = start + torch.randperm(stop - start, generator=generator)
            chosen = order[: len(order) // batch * batch].split(batch)
            for each in chosen[skip:]:
                yield self.acts_NMD[each]
            skip = max(0, skip - len(chosen))
