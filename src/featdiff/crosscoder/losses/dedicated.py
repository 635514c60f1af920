"""Dedicated features: every model has a part of the dictionary to itself, and the rest is shared.

After Dedicated Feature Crosscoders (arXiv 2602.11729), from public descriptions of them: hard masks on encoder and decoder, and
BatchTopK over the whole dictionary. Theirs are of two models of different architecture; here there may be any number.
B batch, M models, D residual width, F features.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor

from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.losses.batchtopk import BatchTopK
from featdiff.crosscoder.model import Crosscoder


def foreign(n_models: int, n_features: int, share: float) -> Bool[Tensor, "F M"]:
    """Which decoder and encoder rows stay zero. Each model in turn has the next ``int(share · n_features)`` features to itself,
    whose rows in all other models are foreign; the features after those are shared, without a foreign row.

    Raises ContractError where a model would get no feature, or none would be left to share."""
    own = int(share * n_features)
    if not 0 < own * n_models < n_features:
        expected = f"a share that leaves each of {n_models} models and their shared part at least one of {n_features} features"
        raise ContractError("params.yaml", "crosscoder.training.dedicated_share", expected, share, "change it")
    owner_F = torch.arange(n_features) // own
    return (owner_F[:, None] != torch.arange(n_models)) & (owner_F[:, None] < n_models)


class Dedicated(BatchTopK):
    """BatchTopK over a dictionary in which ``dedicated_share`` of the features is exclusive to each model.

    An exclusive feature reads and writes its own model alone, and counts in selection with the one norm that it has. Under the
    readout ``swap`` it reads any model's stream with its own model's encoder."""

    def __init__(self, crosscoder: Crosscoder, params: CrosscoderTraining, variance: float, accelerator: Accelerator) -> None:
        super().__init__(crosscoder, params, variance, accelerator)
        mask_FM = foreign(len(crosscoder.models), crosscoder.n_features, params.dedicated_share)
        mask_FM1 = mask_FM[:, :, None].to(crosscoder.W_dec.device)
        # A weight that is 0 and only ever gets the gradient 0 stays exactly 0 under Adam, whose moments of it are 0 as well. So
        # nothing but the weights themselves has to survive a kill, and the auxiliary loss cannot reach a foreign row either.
        for weight, mask in ((crosscoder.W_dec, mask_FM1), (crosscoder.W_enc, mask_FM1.permute(1, 2, 0))):
            weight.data.masked_fill_(mask, 0.0)
            weight.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0.0))
