"""Whose feature is it? Decoder norms of a crosscoder, compared between its models.

    NRN_k  = ‖d_k^T‖₁ / (‖d_k^O‖₁ + ‖d_k^T‖₁)      two models, O original, T tuned
    MAS_k^m = ‖d_k^m‖₁ / Σ_m' ‖d_k^m'‖₁            any number of models; sums to one
(both from the paper; F features, M models)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.config import AttributionParams
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
    name: str, crosscoder: Crosscoder, features: dict[str, Tensor], params: AttributionParams
) -> list[dict[str, Any]]:
    """One row per feature of one crosscoder: norms shares, class and activity. Dead features are flagged, not classed."""
    shares_FM = mas(crosscoder.W_dec).tolist()
    rows = []
    for k, shares in enumerate(shares_FM):
        dead = features["firing_rate"][k].item() == 0
        by_model = dict(zip(crosscoder.models, shares, strict=True))
        pair = len(crosscoder.models) == 2
        rows.append(
            {
                "fit": name,
                "feature_id": k,
                "dead": dead,
                **{key: column[k].item() for key, column in features.items()},
                "nrn": shares[1] if pair else None,
                **{f"mas_{model}": None if pair else by_model.get(model) for model in ("base", "sft", "grpo")},
                "feature_class": "dead" if dead else classify(shares, crosscoder.models, params),
            }
        )
    return rows


def class_counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Features per class for each crosscoder."""
    fits = dict.fromkeys(row["fit"] for row in rows)
    return {fit: dict(sorted(Counter(row["feature_class"] for row in rows if row["fit"] == fit).items())) for fit in fits}
