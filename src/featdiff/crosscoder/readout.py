"""Feature values of one model: the crosscoder has one code for all models, so a rule must say whose it is.

``swap``          the model's residual stream in every slot, then encode (also for checkpoints never fitted);
``slot``          only the model's own encoder block;
``contribution``  f_k ‖d_k^m‖ of the joint code: what feature k adds to this model's reconstruction.
All three are ours. Shapes: B token rows, M models, D residual width, F features.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.crosscoder.model import Crosscoder

Readout = Literal["swap", "slot", "contribution"]


class Reader:
    """Feature values of ``model`` from its raw residual stream alone, under ``swap`` or ``slot``.

    A checkpoint is read with the slot and scale of the arm it belongs to. ``features`` restricts the reader
    to some features (in that order), which is what an edit needs."""

    def __init__(
        self, crosscoder: Crosscoder, model: str, readout: Literal["swap", "slot"] = "swap", features: list[int] | None = None
    ) -> None:
        slot = crosscoder.slot(model)
        chosen = torch.arange(crosscoder.n_features) if features is None else torch.tensor(features, dtype=torch.long)
        self.mean_D, self.scale = crosscoder.mean, crosscoder.scale[slot].item()
        weights = crosscoder.W_enc.sum(0) if readout == "swap" else crosscoder.W_enc[slot]
        self.W_DF = weights[:, chosen].contiguous()
        self.b_F = crosscoder.b_enc[chosen]
        norms = crosscoder.decoder_norms()[chosen].sum(1)
        self.least_F = torch.zeros_like(norms) if crosscoder.loss == "l1" else crosscoder.threshold / norms.clamp(min=1e-12)
        self.directions_FD = crosscoder.W_dec[chosen, slot] / self.scale
        """Decoder rows of this model in raw units: what one unit of each feature adds to the residual stream."""
        self.offset_D = (crosscoder.b_dec[slot] + self.mean_D) / self.scale

    def to(self, device: torch.device) -> Reader:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def __call__(self, resid_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """Feature values of raw residual streams (any leading shape)."""
        f_BF = torch.relu((resid_BD.float() * self.scale - self.mean_D) @ self.W_DF + self.b_F)
        return f_BF * (f_BF > self.least_F)

    def reconstruct(self, resid_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Encode and decode in raw units."""
        return self(resid_BD) @ self.directions_FD + self.offset_D


def read_all(
    crosscoder: Crosscoder, resid: dict[str, Float[Tensor, "B D"]], readout: Readout
) -> dict[str, Float[Tensor, "B F"]]:
    """Feature values of every model of ``resid`` on the same tokens. ``contribution`` needs all models of the crosscoder."""
    if readout != "contribution":
        return {model: Reader(crosscoder, model, readout)(rows) for model, rows in resid.items()}
    missing = [model for model in crosscoder.models if model not in resid]
    if missing:
        raise KeyError(f"the contribution readout needs the residual streams of {', '.join(missing)} as well")
    f_BF = crosscoder.encode(crosscoder.normalise(torch.stack([resid[model] for model in crosscoder.models], dim=1)))
    return {model: f_BF * crosscoder.decoder_norms()[:, crosscoder.slot(model)] for model in resid}
