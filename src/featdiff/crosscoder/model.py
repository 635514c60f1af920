"""The crosscoder: one sparse code for the residual streams of any number of models.

    f = act(Σ_m x^m W_enc^m + b_enc)      x̂^m = f W_dec^m + b_dec^m      (docs/method.md, 6; Lindsey et al. 2024)

The input x^m is the residual stream of model m in normalised units: times a scale per model, minus one mean for all models.
The scale brings the standard deviation of a model's activations to 1 (over all coordinates together). The mean is the mean of
the models' scaled means: one for all of them, so that a shift of one stays visible. This normaliser is ours. The sources scale
by the mean norm and subtract nothing, and a mean that is larger than the features then fills the code (docs/golden.md).

B batch, M models, D residual width, F features. x [B, M, D], f [B, F], x̂ [B, M, D]; W_enc [M, D, F], b_enc [F],
W_dec [F, M, D] with rows d_k^m, b_dec [M, D]; scale [M], mean [D].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featdiff.artifacts.artifact import ContractError, read_json, write_json


class Crosscoder(nn.Module):
    """Weights, normaliser and threshold of a crosscoder. ``loss`` is the name of the loss that trained it, or
    says how one that was fitted elsewhere is active.

    The activation is a ReLU with a threshold on f_k Σ_m‖d_k^m‖₂. The loss sets the threshold while it trains
    (featdiff.crosscoder.losses), one for all features; at 0 the activation is the plain ReLU. What was fitted elsewhere may
    have one of each feature [F]. Only ``select`` and ``cutoffs`` read it."""

    mean: Tensor
    scale: Tensor
    threshold: Tensor

    def __init__(self, models: list[str], d_model: int, n_features: int, loss: str) -> None:
        super().__init__()
        self.models, self.d_model, self.n_features, self.loss = list(models), d_model, n_features, loss
        m = len(models)
        # A feature's encoder weights lie side by side, as its decoder's do: sparse gradients are sums of such rows, and come
        # to the optimizer without a copy.
        self.W_enc = nn.Parameter(torch.zeros(n_features, m, d_model).permute(1, 2, 0))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.zeros(n_features, m, d_model))
        self.b_dec = nn.Parameter(torch.zeros(m, d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(m))
        self.register_buffer("threshold", torch.zeros(()))

    def initialise(self, decoder_norm: float, generator: torch.Generator, *, tied: bool = True) -> None:
        """Give every decoder row a random direction and the norm ``decoder_norm``, and set the encoder to the decoder
        transposed. ``tied``: a feature has the same direction in all models."""
        with torch.no_grad():
            rows = torch.randn(self.n_features, 1 if tied else len(self.models), self.d_model, generator=generator)
            rows *= decoder_norm / rows.norm(dim=-1, keepdim=True)
            self.W_dec.copy_(rows.expand_as(self.W_dec))
            self.W_enc.copy_(self.W_dec.permute(1, 2, 0))

    def calibrate(self, mean_MD: Float[Tensor, "M D"], variance_M: Float[Tensor, " M"]) -> None:
        """Set scale and mean from the raw training rows' mean and mean squared distance to it, and the decoder's bias to their
        mean in normalised units: the best reconstruction while no feature has learnt anything."""
        self.scale.copy_((self.d_model / variance_M).sqrt())
        self.mean.copy_((mean_MD * self.scale[:, None]).mean(0))
        self.b_dec.data.copy_(self.normalise(mean_MD[None])[0])

    def normalise(self, resid_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        """Raw residual streams in normalised units."""
        return resid_BMD * self.scale[:, None] - self.mean

    def preactivations(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        """ReLU of the encoder, before any selection."""
        return torch.relu(self._linear(x_BMD))

    @torch.no_grad()
    def linear(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        """Σ_m x^m W_enc^m + b_enc, whose ReLU is the preactivations, without a graph."""
        return self._linear(x_BMD)

    def _linear(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        # One product of [B, M·D] and [M·D, F], whose second factor is the transpose of what lies in memory.
        return torch.addmm(self.b_enc, x_BMD.flatten(1), self.W_enc.flatten(0, 1))

    def select(self, f_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """Feature values at inference: the preactivations ``f_BF`` where f_k Σ_m‖d_k^m‖₂ is above the threshold, else 0."""
        return f_BF * (f_BF * self.decoder_norms().sum(1) > self.threshold)

    def cutoffs(self) -> Float[Tensor, " F"]:
        """The value that each feature must exceed to be active: the rule of ``select`` solved for f_k, for readers that hold
        only some features. The two agree up to the rounding of the product. At a threshold above 0 a feature without a
        decoder is never active."""
        return self.threshold / self.decoder_norms().sum(1).clamp(min=1e-12)

    def encode(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        """Joint code of all models at inference, from normalised inputs."""
        return self.select(self.preactivations(x_BMD))

    def decode(self, f_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B M D"]:
        """Reconstruction of every model's input, in normalised units."""
        return (f_BF @ self.W_dec.flatten(1)).unflatten(1, (len(self.models), self.d_model)) + self.b_dec

    def decoder_norms(self) -> Float[Tensor, "F M"]:
        """Norms ‖d_k^m‖₂ of the decoder rows, in normalised units."""
        return self.W_dec.norm(dim=-1)

    def slot(self, model: str) -> int:
        """Index of ``model`` among the models. Raises KeyError for a model that was not part of the fit."""
        if model not in self.models:
            raise KeyError(f"{model} is not one of this crosscoder's models ({', '.join(self.models)})")
        return self.models.index(model)

    def save(self, folder: Path, **facts: Any) -> None:
        """Write ``weights.safetensors`` and ``config.json`` (with ``facts``) into ``folder``."""
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
        """The crosscoder that :meth:`save` wrote into ``folder``, without gradients. Raises ContractError where a weight is
        missing or has another shape than its config says."""
        config = read_json(folder / "config.json")
        crosscoder = cls(config["models"], config["d_model"], config["n_features"], config["loss"])
        weights = load_file(folder / "weights.safetensors")
        if "threshold" in weights and weights["threshold"].shape == crosscoder.b_enc.shape:
            crosscoder.threshold = torch.zeros_like(crosscoder.b_enc.detach())
        for name, tensor in crosscoder.state_dict().items():
            found = tuple(weights[name].shape) if name in weights else "nothing"
            if found != tuple(tensor.shape):
                raise ContractError(
                    folder / "weights.safetensors", name, tuple(tensor.shape), found, "rerun its stage: dvc repro"
                )
        crosscoder.load_state_dict(weights)
        return crosscoder.eval().requires_grad_(False)
