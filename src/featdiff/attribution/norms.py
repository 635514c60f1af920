"""Whose feature is it? Decoder norms of a crosscoder, compared between its models.

    NRN_k  = ‖d_k^T‖₁ / (‖d_k^O‖₁ + ‖d_k^T‖₁)      two models, O original, T tuned
    MAS_k^m = ‖d_k^m‖₁ / Σ_m' ‖d_k^m'‖₁            any number of models; sums to one
(both from the paper; F features, M models), and latent scaling (featdiff.attribution.scaling), which asks activations.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.attribution.scaling import LatentScaling
from featdiff.config.params import AttributionParams
from featdiff.crosscoder.model import Crosscoder


def mas(W_dec_FMD: Float[Tensor, "F M D"]) -> Float[Tensor, "F M"]:
    """Share of each model in the summed L1 norm of a feature's decoder rows; equal shares where all are zero."""
    norms_FM = W_dec_FMD.abs().sum(-1)
    total_F1 = norms_FM.sum(1, keepdim=True)
    return torch.where(total_F1 > 0, norms_FM / total_F1.clamp(min=torch.finfo(norms_FM.dtype).tiny), 1 / norms_FM.shape[1])


def nrn(W_dec_FMD: Float[Tensor, "F 2 D"]) -> Float[Tensor, " F"]:
    """Share of the tuned model (index 1): about 1 tuned-only, 0 base-only, 0.5 shared."""
    return mas(W_dec_FMD)[:, 1]


def classify(shares: list[float], models: list[str], params: AttributionParams) -> str:
    """Class of a feature by its decoder norms alone. Two models: ``shared`` inside the band of NRN, else the
    model it belongs to. Three and more: the model whose MAS dominates, ``shared`` where every model has at least
    half of an equal share, else ``mixed``."""
    if len(models) == 2:
        low, high = params.shared_band
        return "shared" if low <= shares[1] <= high else models[int(shares[1] > high)]
    largest = max(range(len(models)), key=shares.__getitem__)
    if shares[largest] > params.joint_dominance:
        return models[largest]
    return "shared" if min(shares) >= 0.5 / len(models) else "mixed"


def attribute(
    name: str, crosscoder: Crosscoder, features: dict[str, Tensor], scaling: LatentScaling, params: AttributionParams
) -> list[dict[str, Any]]:
    """One row per feature of one crosscoder: norm shares, class and activity; whose own it is by latent scaling; and
    whether both agree that it is one model's own (the full rule). Dead features are flagged, not classed."""
    shares_FM = mas(crosscoder.W_dec).tolist()
    owners = own(scaling, params)
    rows = []
    for k, shares in enumerate(shares_FM):
        dead = features["firing_rate"][k].item() == 0
        by_model = dict(zip(crosscoder.models, shares, strict=True))
        pair = len(crosscoder.models) == 2
        by_norm = "dead" if dead else classify(shares, crosscoder.models, params)
        rows.append(
            {
                "fit": name,
                "feature_id": k,
                "dead": dead,
                **{key: column[k].item() for key, column in features.items()},
                "nrn": shares[1] if pair else None,
                **{f"mas_{model}": None if pair else by_model.get(model) for model in ("base", "sft", "grpo")},
                "feature_class": by_norm,
                "scaling_owner": None if dead else owners[k],
                "specific": not dead and by_norm == owners[k],
            }
        )
    return rows


def own(scaling: LatentScaling, params: AttributionParams) -> list[str | None]:
    """For each feature the model whose own it is, against every other one, by latent scaling; None where there is none."""
    specific_MMF = scaling.specific(params.nu_error, params.nu_reconstruction)
    models = range(len(scaling.models))
    against_all_MF = torch.stack([torch.stack([specific_MMF[o, t] for o in models if o != t]).all(0) for t in models])
    return [scaling.models[int(row.nonzero()[0])] if row.any() else None for row in against_all_MF.T]


def class_counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Features per class for each crosscoder, and those that the full rule calls specific."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["fit"], Counter()).update([row["feature_class"]] + ["specific"] * row["specific"])
    return {fit: {"specific": 0} | dict(sorted(found.items())) for fit, found in counts.items()}
