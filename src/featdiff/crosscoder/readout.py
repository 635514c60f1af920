"""Feature values of one model. A crosscoder has one code for all models, so a rule must say what one model's values are.

``swap``          encode the model's residual stream in every slot. It also reads checkpoints that were not part of the fit.
``slot``          encode it in the model's own slot, with zeros in the others.
``contribution``  f_k ‖d_k^m‖₂ of the joint code: how much feature k adds to this model's reconstruction.
All three are ours. B token rows, M models, D residual width, F features.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.config.values import Readout
from featdiff.crosscoder.model import Crosscoder


class Reader:
    """Reads feature values of ``model`` from its raw residual stream alone, under ``swap`` or ``slot``.

    A checkpoint is read with the slot and scale of the arm that it belongs to. With ``features`` the reader holds these
    features only, in this order, as an edit needs. Raises KeyError for a model outside the fit."""

    def __init__(
        self, crosscoder: Crosscoder, model: str, readout: Literal["swap", "slot"] = "swap", features: list[int] | None = None
    ) -> None:
        slot = crosscoder.slot(model)
        chosen = torch.arange(crosscoder.n_features) if features is None else torch.tensor(features, dtype=torch.long)
        self.mean_D, self.scale = crosscoder.mean, crosscoder.scale[slot].item()
        # The same x in every slot: Σ_m x W_enc^m = x Σ_m W_enc^m, one product of [B, D] and [D, F] instead of M.
        weights_MDF = crosscoder.W_enc[..., chosen]
        self.W_DF = (weights_MDF.sum(0) if readout == "swap" else weights_MDF[slot]).contiguous()
        self.b_F = crosscoder.b_enc[chosen]
        self.cutoff_F = crosscoder.cutoffs()[chosen]
        self.directions_FD = crosscoder.W_dec[chosen, slot] / self.scale
        """Decoder rows of this model in raw units [F, D]: what one unit of each feature adds to the residual stream."""
        # x̂ = resid · scale − mean, solved for resid; this is its constant part.
        self.offset_D = (crosscoder.b_dec[slot] + self.mean_D) / self.scale

    def to(self, device: torch.device) -> Reader:
        """Move to ``device`` and return itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def __call__(self, resid_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """Feature values of raw residual streams of any leading shape and float type, in float32."""
        f_BF = torch.relu((resid_BD.float() * self.scale - self.mean_D) @ self.W_DF + self.b_F)
        return f_BF * (f_BF > self.cutoff_F)

    def reconstruct(self, resid_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The residual stream rebuilt from this reader's features, in raw units."""
        return self(resid_BD) @ self.directions_FD + self.offset_D


def read_all(
    crosscoder: Crosscoder, resid: dict[str, Float[Tensor, "B D"]], readout: Readout
) -> dict[str, Float[Tensor, "B F"]]:
    """Feature values of every model of ``resid`` on the same tokens, from raw residual streams. They are read where the
    crosscoder is; the result is on the CPU.

    Raises KeyError for a model outside the fit, and under ``contribution`` where a model of the crosscoder is missing."""
    device = crosscoder.b_enc.device
    if readout != "contribution":
        return {model: Reader(crosscoder, model, readout)(rows.to(device)).cpu() for model, rows in resid.items()}
    missing = [model for model in crosscoder.models if model not in resid]
    if missing:
        raise KeyError(f"the contribution readout needs the residual streams of {', '.join(missing)} as well")
    rows_BMD = torch.stack([resid[model] for model in crosscoder.models], dim=1).to(device)
    f_BF = crosscoder.encode(crosscoder.normalise(rows_BMD))
    return {model: (f_BF * crosscoder.decoder_norms()[:, crosscoder.slot(model)]).cpu() for model in resid}
