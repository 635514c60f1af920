"""Crosscoders and SAEs that were fitted elsewhere, in the forms that featdiff.crosscoder.exchange writes, and in our own.

What is in a folder says whose it is:
``sae_weights.safetensors``  SAELens (``save_model``), architectures standard and jumprelu. An SAE of one model becomes a
                             crosscoder whose slots are all alike: it reads every model with the same dictionary, so that
                             nothing can be one model's own, and its features are found and edited under the swap readout
``model.safetensors``        the science-of-finetuning fork of dictionary_learning (``CrossCoder``, ``BatchTopKCrossCoder``)
``weights.safetensors``      this project
Pickles (``ae.pt``) are refused. Their normaliser becomes ours, and what ours has no place for goes into the biases.

M models, D residual width, F features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featdiff.activations.store import ActivationSource, moments
from featdiff.artifacts.artifact import ContractError, one_line, read_json
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.config.reading import legible
from featdiff.crosscoder.fit import Fitted
from featdiff.crosscoder.model import Crosscoder

BLOCK = re.compile(r"(?:blocks\.(\d+)\.hook_resid_(pre|post)|(?:model\.)?layers\.(\d+))")
"""Names of a residual stream: the one before or after a block of TransformerLens, the output of a block of transformers."""
RELU, THRESHOLD, JUMPRELU = "relu", "threshold", "jumprelu"
"""What stands for the loss of a crosscoder that was fitted elsewhere: its activation, without a bound, with one for all
features, with one of each."""
GIVE = "give another folder"


def imported(folder: Path, source: ActivationSource, layer: int, params: CrosscoderTraining) -> Fitted:
    """The crosscoder in ``folder``, for the models of ``source`` in their order, of which it holds the stream after ``layer``
    blocks, in place of one that is fitted. It is measured on the rows that a fit would have held out.

    Raises ContractError where the folder holds none, one for another layer, width or number of models, or weights that are
    missing, of another shape or not finite."""
    crosscoder = _read(folder, source.models, layer)
    if crosscoder.d_model != source.d_model:
        raise ContractError(folder, "width", f"{source.d_model}, the models'", crosscoder.d_model, GIVE)
    train_rows = params.train_rows(source.rows)
    mean_MD, _ = moments(source, train_rows)
    return Fitted(crosscoder, crosscoder.normalise(mean_MD[None].float())[0], train_rows)


def _read(folder: Path, models: Sequence[str], layer: int) -> Crosscoder:
    if (folder / "sae_weights.safetensors").is_file():
        return _from_saelens(folder, models, layer)
    if (folder / "model.safetensors").is_file():
        return _from_dictionary_learning(folder, models)
    if (folder / "weights.safetensors").is_file():
        return _from_here(folder, models, layer)
    pickles = sorted(path.name for pattern in ("*.pt", "*.pth", "*.bin") for path in folder.glob(pattern))
    found = f"a pickle ({legible(pickles[0])})" if pickles else "nothing of these"
    expected = "sae_weights.safetensors, model.safetensors or weights.safetensors"
    raise ContractError(legible(str(folder)), "crosscoder", expected, found, "save it as safetensors, and give its folder")


class _Weights:
    """Tensors of a file in float32, each of a shape that is known and finite."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.found: Mapping[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ContractError(path, "content", "safetensors", one_line(str(error)), "save it again") from None

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def take(self, name: str, *shape: int) -> Tensor:
        tensor = self.found.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            raise ContractError(self.path, name, shape, "nothing" if tensor is None else tuple(tensor.shape), GIVE)
        if not torch.isfinite(tensor).all():
            raise ContractError(self.path, name, "finite numbers", "NaN or infinity", GIVE)
        return tensor.float()

    def sizes(self, name: str, dimensions: int) -> tuple[int, ...]:
        tensor = self.found.get(name)
        if tensor is None or tensor.ndim != dimensions:
            found = "nothing" if tensor is None else tuple(tensor.shape)
            raise ContractError(self.path, name, f"weights in {dimensions} dimensions", found, GIVE)
        return tuple(tensor.shape)


def _made(models: Sequence[str], loss: str, tensors: Mapping[str, Tensor]) -> Crosscoder:
    features, _, width = tensors["W_dec"].shape
    crosscoder = Crosscoder(list(models), width, features, loss)
    crosscoder.threshold = torch.zeros_like(tensors["threshold"])
    crosscoder.load_state_dict(dict(tensors))
    return crosscoder.eval().requires_grad_(False)


def _from_here(folder: Path, models: Sequence[str], layer: int) -> Crosscoder:
    crosscoder, of = Crosscoder.load(folder), read_json(folder / "config.json").get("layer")
    _require_models(folder, len(crosscoder.models), models)
    if of is not None and of != layer:
        raise ContractError(folder / "config.json", "layer", f"{layer}, that of activations.layer", of, GIVE)
    crosscoder.models = list(models)
    return crosscoder


def _from_dictionary_learning(folder: Path, models: Sequence[str]) -> Crosscoder:
    weights = _Weights(folder / "model.safetensors")
    m, d, f = weights.sizes("encoder.weight", 3)
    _require_models(weights.path, m, models)
    W_enc_MDF, b_enc_F = weights.take("encoder.weight", m, d, f), weights.take("encoder.bias", f)
    threshold = weights.take("threshold") if "threshold" in weights else torch.tensor(0.0)
    if threshold > 0:
        kind = _settings(folder / "config.json").get("code_normalization", "CROSSCODER")
        if kind != "CROSSCODER":
            expected = "CROSSCODER: features weighed by the sum of their decoder norms"
            raise ContractError(folder / "config.json", "code_normalization", expected, legible(str(kind)), GIVE)
    mean_MD, scale_M = torch.zeros(m, d), torch.ones(m)
    if "activation_mean" in weights:
        mean_MD = weights.take("activation_mean", m, d)
        if "activation_global_scale" in weights:
            scale_M = weights.take("activation_global_scale", m)
        else:
            scale_M = weights.take("target_rms") / weights.take("activation_std", m, d).square().sum(1).sqrt()
    # Theirs is (x − mean_m) · scale_m, ours x · scale_m − mean with one mean for all: what a model's own mean is beside that
    # one is a constant, and goes into the biases.
    shift_MD = mean_MD * scale_M[:, None]
    mean_D = shift_MD.mean(0)
    return _made(
        models,
        THRESHOLD if threshold > 0 else RELU,
        {
            "W_enc": W_enc_MDF,
            "b_enc": b_enc_F - torch.einsum("md,mdf->f", shift_MD - mean_D, W_enc_MDF),
            "W_dec": weights.take("decoder.weight", m, f, d).transpose(0, 1),
            "b_dec": weights.take("decoder.bias", m, d) + shift_MD - mean_D,
            "mean": mean_D,
            "scale": scale_M,
            "threshold": threshold,
        },
    )


def _from_saelens(folder: Path, models: Sequence[str], layer: int) -> Crosscoder:
    config, weights = _settings(folder / "cfg.json"), _Weights(folder / "sae_weights.safetensors")
    another = "give another SAE"
    known = {
        "architecture": (("standard", "jumprelu"), another),
        "normalize_activations": (("none", None), f"fold it into the weights, or {another}"),
        "reshape_activations": (("none", None), another),
    }
    for key, (allowed, todo) in known.items():
        if config.get(key) not in allowed:
            expected, found = " or ".join(str(each) for each in allowed if each), legible(str(config.get(key)))
            raise ContractError(folder / "cfg.json", key, expected, found, todo)
    _require_layer(folder / "cfg.json", config, layer)
    m, (d, f) = len(models), weights.sizes("W_enc", 2)
    W_enc_DF, b_enc_F = weights.take("W_enc", d, f), weights.take("b_enc", f)
    W_dec_FD, b_dec_D = weights.take("W_dec", f, d), weights.take("b_dec", d)
    if config.get("apply_b_dec_to_input"):
        b_enc_F = b_enc_F - b_dec_D @ W_enc_DF
    threshold = torch.tensor(0.0)
    if config["architecture"] == "jumprelu":
        # Ours is a bound on f_k Σ_m‖d_k^m‖, theirs on f_k. A feature that writes nothing has no such value: it is never active.
        norm_F = m * W_dec_FD.norm(dim=1)
        threshold = torch.where(norm_F > 0, weights.take("threshold", f).clamp(min=0) * norm_F, 1.0)
    return _made(
        models,
        JUMPRELU if threshold.ndim else RELU,
        {
            "W_enc": (W_enc_DF / m).expand(m, d, f),
            "b_enc": b_enc_F,
            "W_dec": W_dec_FD[:, None].expand(f, m, d),
            "b_dec": b_dec_D.expand(m, d),
            "mean": torch.zeros(d),
            "scale": torch.ones(m),
            "threshold": threshold,
        },
    )


def _settings(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ContractError(path, "content", "a mapping", type(found).__name__, GIVE)
    return found


def _require_models(path: Path, found: int, models: Sequence[str]) -> None:
    if found != len(models):
        raise ContractError(path, "models", f"{len(models)} ({', '.join(models)})", found, "name as many models, in its order")


def _require_layer(path: Path, config: Mapping[str, Any], layer: int) -> None:
    """Where an SAE says what it reads, it must be the stream after as many blocks as ``layer`` says."""
    metadata = config.get("metadata")
    hook = (metadata if isinstance(metadata, dict) else config).get("hook_name") or ""
    if not hook:
        return
    match = BLOCK.fullmatch(str(hook))
    after = match and (int(match[1] or match[3]) + (match[2] != "pre"))
    if after != layer:
        expected = f"blocks.{layer - 1}.hook_resid_post, the stream after {layer} blocks"
        raise ContractError(path, "hook_name", expected, legible(str(hook)), "change activations.layer, or give another SAE")
