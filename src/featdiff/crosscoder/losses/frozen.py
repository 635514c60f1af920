"""A frozen random dictionary: what a set of features does that owes nothing to learned directions.

The decoder stays as it was drawn, the same direction in every model; encoder, biases and threshold learn, as in the frozen
decoders of Korznikov et al. 2026 (arXiv 2602.14111), by whose measures such dictionaries come close to learned ones.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.losses.batchtopk import BatchTopK
from featdiff.crosscoder.model import Crosscoder


class Frozen(BatchTopK):
    """BatchTopK whose decoder rows keep direction and norm."""

    def __init__(self, crosscoder: Crosscoder, params: CrosscoderTraining, variance: float, accelerator: Accelerator) -> None:
        super().__init__(crosscoder, params, variance, accelerator)
        # Under Adam a weight that only ever gets the gradient 0 stays as it is, bit for bit, also after a kill.
        crosscoder.W_dec.register_hook(torch.zeros_like)
