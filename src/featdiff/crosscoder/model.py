"""The crosscoder: one sparse code for the residual streams of any number of models.

    f = act(Σ_m x^m W_enc^m + b_enc)      x̂^m = f W_dec^m + b_dec^m      (docs/method.md, 6; Lindsey et al. 2024)

Inputs are residual streams times a scale per model that brings their standard deviation to one (all coordinates together),
minus the mean of the models' means. (The sources scale by the mean norm and take nothing off; a mean larger than the features
then eats the code, see docs/golden.md. One mean for all models, so that a shift of one of them stays visible. Ours.)
Shapes: B batch, M models, D residual width, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featdiff.artifact import ContractError, read_json, write_json


class Crosscoder(nn.Module):
    """Weights, normaliser and activation of a crosscoder. ``loss`` (``l1`` or ``batchtopk``) decides the activation:
    ReLU, or ReLU with a threshold on f_k Σ_m‖d_k^m‖ that training estimated."""

    mean: Tensor
    scale: Tensor
    threshold: Tensor

    def __init__(self, models: list[str], d_model: int, n_features: int, loss: str) -> None:
        super().__init__()
        self.models, self.d_model, self.n_features, self.loss = list(models), d_model, n_features, loss
        m = len(models)
        self.W_enc = nn.Parameter(torch.zeros(m, d_model, n_features))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.zeros(n_features, m, d_model))
        self.b_dec = nn.Parameter(torch.zeros(m, d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(m))
        self.register_buffer("threshold", torch.zeros(()))

    def initialise(self, decoder_norm: float, generator: torch.Generator, *, tied: bool = True) -> None:
        """Decoder rows in random directions of norm ``decoder_norm`` each, one direction for all models where ``tied``;
        encoder = decoder transposed."""
        with torch.no_grad():
            rows = torch.randn(self.n_features, 1 if tied else len(self.models), self.d_model, generator=generator)
            rows *= decoder_norm / rows.norm(dim=-1, keepdim=True)
            self.W_dec.copy_(rows.expand_as(self.W_dec))
            self.W_enc.copy_(self.W_dec.permute(1, 2, 0))

    def normalise(self, resid_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        """Raw residual streams to the origin and scale of the crosscoder."""
        return resid_BMD * self.scale[:, None] - self.mean

    def preactivations(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        """ReLU of the encoder, before any selection, as one matrix product over all models."""
        return torch.relu(torch.addmm(self.b_enc, x_BMD.flatten(1), self.W_enc.flatten(0, 1)))

    def select(self, f_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """Feature values at inference: unchanged for ReLU, thresholded for BatchTopK."""
        if self.loss == "l1":
            return f_BF
        return f_BF * (f_BF * self.decoder_norms().sum(1) > self.threshold)

    def encode(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        """Joint code of normalised inputs, as used at inference."""
        return self.select(self.preactivations(x_BMD))

    def decode(self, f_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B M D"]:
        """Reconstructions of the normalised inputs."""
        return (f_BF @ self.W_dec.flatten(1)).unflatten(1, (len(self.models), self.d_model)) + self.b_dec

    def decoder_norms(self) -> Float[Tensor, "F M"]:
        """L2 norms ‖d_k^m‖₂ of the decoder rows."""
        return self.W_dec.norm(dim=-1)

    def slot(self, model: str) -> int:
        """Index of ``model`` among the models; raises KeyError for one that was not part of the fit."""
        if model not in self.models:
            raise KeyError(f"{model} is not one of this crosscoder's models ({', '.join(self.models)})")
        return self.models.index(model)

    def save(self, folder: Path, **facts: Any) -> None:
        """Write ``weights.safetensors`` and ``config.json``."""
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}, folder / "weights.safetensors"
        )
        scale = dict(zip(self.models, self.scale.tolist(), strict=True))
        config = {
            "models": self.models,
            "d_model": self.d_model,
            "n_features": self.n_features,
            "loss": self.loss,
            "scale": scale,
        }
        write_json(folder / "config.json", config | facts)

    @classmethod
    def load(cls, folder: Path) -> Crosscoder:
        """The crosscoder in ``folder``; raises ContractError when shapes disagree with its config."""
        config = read_json(folder / "config.json")
        crosscoder = cls(config["models"], config["d_model"], config["n_features"], config["loss"])
        weights = load_file(folder / "weights.safetensors")
        for name, tensor in crosscoder.state_dict().items():
            found = tuple(weights[name].shape) if name in weights else "nothing"
            if found != tuple(tensor.shape):
                raise ContractError(
                    folder / "weights.safetensors", name, tuple(tensor.shape), found, "rerun its stage: dvc repro"
                )
        crosscoder.load_state_dict(weights)
        return crosscoder.eval().requires_grad_(False)
