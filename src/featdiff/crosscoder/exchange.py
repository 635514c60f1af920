"""Crosscoders in the formats of other libraries, with our normaliser folded in, so that they read raw residual streams as well:

``python -m featdiff.crosscoder.exchange dictionary_learning crosscoders/<fit> <folder>``
``python -m featdiff.crosscoder.exchange saelens crosscoders/<fit> <folder> --model <name> [--hook <point>]``

``dictionary_learning``  the science-of-finetuning fork: ``CrossCoder.from_pretrained(folder, from_hub=True)``, or
                         ``BatchTopKCrossCoder`` where there is a threshold; layers are the models, in the order of the fit
``saelens``              one model's swap readout (featdiff.crosscoder.readout) as ``SAE.load_from_disk(folder)``. It is a
                         JumpReLU SAE: x ↦ relu(x W + b), kept where above a cutoff of each feature

B rows, M models, D residual width, F features.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from featdiff.artifacts.artifact import ContractError, exported, write_json
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import say

CROSSCODER = 1
"""Their number for features that are weighed by the sum of their decoder norms, as ours are."""
SAELENS_FORMAT = "6.0.0"
"""Their first version with this form of settings; without it they are read as an older form."""


def to_dictionary_learning(crosscoder: Crosscoder, folder: Path) -> str:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``; returns the name of the class that loads them. Raises
    ContractError for a threshold of each feature, which theirs has not.

    Theirs normalises (x − mean_m) · scale_m, ours x · scale_m − mean: the same with mean_m = mean / scale_m. Their deviations
    are read only for whether there are any; these give the same scale."""
    m, d = len(crosscoder.models), crosscoder.d_model
    if crosscoder.threshold.ndim:
        todo = "write the readout of one model: saelens"
        raise ContractError("dictionary_learning", "threshold", "one for all features", "one of each", todo)
    scale_M1 = crosscoder.scale[:, None]
    tensors = {
        "encoder.weight": crosscoder.W_enc,
        "encoder.bias": crosscoder.b_enc,
        "decoder.weight": crosscoder.W_dec.transpose(0, 1),
        "decoder.bias": crosscoder.b_dec,
        "activation_mean": crosscoder.mean / scale_M1,
        "activation_std": (1 / (scale_M1 * d**0.5)).expand(m, d),
        "activation_global_scale": crosscoder.scale,
        "target_rms": torch.tensor(1.0),
        "code_normalization_id": torch.tensor(CROSSCODER),
    }
    config = {"activation_dim": d, "dict_size": crosscoder.n_features, "num_layers": m, "code_normalization": "CROSSCODER"}
    sparse = crosscoder.threshold.item() > 0
    if sparse:
        tensors |= {"threshold": crosscoder.threshold, "k": torch.tensor(1, dtype=torch.int)}
        config["k"] = 1  # of training, which is over: what is loaded uses the threshold
    _write(folder, "model.safetensors", tensors, "config.json", config)
    return "BatchTopKCrossCoder" if sparse else "CrossCoder"


def to_saelens(crosscoder: Crosscoder, model: str, folder: Path, hook: str = "") -> None:
    """Write ``cfg.json`` and ``sae_weights.safetensors`` into ``folder``: the swap readout of ``model``, in raw units.

    Raises KeyError for a model that was not part of the fit."""
    reader = Reader(crosscoder, model)
    tensors = {
        "W_enc": reader.W_DF * reader.scale,
        "b_enc": reader.b_F - reader.mean_D @ reader.W_DF,
        "threshold": reader.cutoff_F,
        "W_dec": reader.directions_FD,
        "b_dec": reader.offset_D,
    }
    config = {
        "architecture": "jumprelu",
        "d_in": crosscoder.d_model,
        "d_sae": crosscoder.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_FORMAT,
            "model_name": model,
            "hook_name": hook,
            "crosscoder_of": crosscoder.models,
            "loss": crosscoder.loss,
        },
    }
    _write(folder, "sae_weights.safetensors", tensors, "cfg.json", config)


def _write(folder: Path, weights: str, tensors: dict[str, Tensor], settings: str, config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / weights)
    write_json(folder / settings, config)


def main(words: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.crosscoder.exchange", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("format", choices=["dictionary_learning", "saelens"])
    parser.add_argument("crosscoder", type=Path, help="folder of the fit")
    parser.add_argument("folder", type=Path, help="where to write; must not exist, or be empty")
    parser.add_argument("--model", help="whose swap readout (saelens)")
    parser.add_argument("--hook", default="", help="where its residual stream is read, such as blocks.14.hook_resid_post")
    given = parser.parse_args(words)
    try:
        crosscoder = Crosscoder.load(given.crosscoder)
        if given.format == "saelens" and given.model not in crosscoder.models:
            models = ", ".join(crosscoder.models)
            raise ContractError(given.crosscoder, "--model", f"one of {models}", given.model or "none", "name one")
        with exported(given.folder) as folder:
            if given.format == "saelens":
                to_saelens(crosscoder, given.model, folder, given.hook)
                reader = "sae_lens.SAE.load_from_disk"
            else:
                reader = f"{to_dictionary_learning(crosscoder, folder)}.from_pretrained(…, from_hub=True)"
        print(f"{given.folder}: {reader}")
    except ContractError as error:
        say(str(error))
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
