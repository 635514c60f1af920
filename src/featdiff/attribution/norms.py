"""Whose feature is it? Decoder norms of a crosscoder, compared between its models.

    NRN_k   = ‖d_k^T‖₁ / (‖d_k^O‖₁ + ‖d_k^T‖₁)     two models, O original, T tuned
    MAS_k^m = ‖d_k^m‖₁ / Σ_m' ‖d_k^m'‖₁            any number of models; sums to one
The paper has them for two and for three models; crosscoders of many were fitted on the snapshots of a pretraining (Ge et al.
2025, arXiv 2509.17196). From three models on, a feature may be new without being one model's own: every tuned model has it and
the original does not. That class is ours. Latent scaling (featdiff.attribution.scaling) asks the activations whether the norms
are right.
F features, M models, the first of which is the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.attribution.scaling import LatentScaling
from featdiff.config.dictionary import DEAD, MIXED, NEW, SHARED, SPECIFIC, AttributionParams
from featdiff.crosscoder.model import Crosscoder


def mas(W_dec_FMD: Float[Tensor, "F M D"]) -> Float[Tensor, "F M"]:
    """Share of each model in the summed L1 norm of a feature's decoder rows; equal shares where all are zero."""
    norms_FM = W_dec_FMD.abs().sum(-1)
    total_F1 = norms_FM.sum(1, keepdim=True)
    return torch.where(total_F1 > 0, norms_FM / total_F1.clamp(min=torch.finfo(norms_FM.dtype).tiny), 1 / norms_FM.shape[1])


def nrn(W_dec_FMD: Float[Tensor, "F 2 D"]) -> Float[Tensor, " F"]:
    """Share of the second of two models: about 1 where the feature is its own, 0 where it is the first's, 0.5 where both
    have it."""
    return mas(W_dec_FMD)[:, 1]


def classify(shares: list[float], models: list[str], params: AttributionParams) -> str:
    """Class of a feature by its ``shares``, the MAS of ``models``, of which the first is the original.

    Two models: ``shared`` inside the band of NRN, else the model it belongs to. Three and more: the model whose MAS dominates;
    ``shared`` where every model has at least half of an equal share; ``new`` where NRN says so for every two models, which
    means above the band for each tuned model against the original, and inside it for any two tuned models; else ``mixed``."""
    low, high = params.shared_band
    if len(models) == 2:
        return SHARED if low <= shares[1] <= high else models[int(shares[1] > high)]
    largest = max(range(len(models)), key=shares.__getitem__)
    if shares[largest] > params.joint_dominance:
        return models[largest]
    if min(shares) >= 0.5 / len(models):
        return SHARED
    original, *tuned = shares
    gained = all(share > high * (original + share) for share in tuned)
    return NEW if gained and all(low <= b / (a + b) <= high for a, b in combinations(tuned, 2)) else MIXED


def attribute(
    name: str,
    crosscoder: Crosscoder,
    features: dict[str, Tensor],
    scaling: LatentScaling,
    params: AttributionParams,
    halves: Sequence[LatentScaling] = (),
) -> list[dict[str, Any]]:
    """One row per feature of the crosscoder ``name``: its class by decoder norms (with ``nrn`` for two models, with ``mas`` in
    the order of the models for more), its owner by latent scaling, and whether it is ``specific``: both say the same. A feature
    that never fires is ``dead``; it is ``tested`` if it fires on the rows of ``scaling``, without which it has no owner.
    ``features`` are statistics of every feature [F], with ``firing_rate`` among them. ``halves`` is latent scaling on two
    halves of the rows; ``halves_agree``: both call the feature specific or neither does, None where one has not tested it."""
    owners, pair = own(scaling, params), len(crosscoder.models) == 2
    tested, owners_of_halves = scaling.tested().tolist(), [own(half, params) for half in halves]
    tested_twice = torch.stack([half.tested() for half in halves]).all(0).tolist() if halves else [False] * len(tested)
    rows = []
    for k, shares in enumerate(mas(crosscoder.W_dec).tolist()):
        dead = features["firing_rate"][k].item() == 0
        by_norm = DEAD if dead else classify(shares, crosscoder.models, params)
        rows.append(
            {
                "fit": name,
                "feature_id": k,
                "dead": dead,
                **{key: column[k].item() for key, column in features.items()},
                "nrn": shares[1] if pair else None,
                "mas": None if pair else shares,
                "feature_class": by_norm,
                "tested": not dead and tested[k],
                "scaling_owner": None if dead else owners[k],
                "specific": not dead and by_norm == owners[k],
                "halves_agree": len({by_norm == half[k] for half in owners_of_halves}) == 1 if tested_twice[k] else None,
            }
        )
    return rows


def own(scaling: LatentScaling, params: AttributionParams) -> list[str | None]:
    """Whose each feature is by latent scaling: a model that has it against every other one; ``new`` where each tuned model has
    it against the original (the first model) and none against another tuned one; None for any other feature."""
    specific_MMF = scaling.specific(params.nu_error, params.nu_reconstruction)
    itself_MM1 = torch.eye(len(scaling.models), dtype=torch.bool)[:, :, None]
    own_MF = (specific_MMF | itself_MM1).all(0)
    new_F = specific_MMF[0, 1:].all(0) & ~specific_MMF[1:, 1:].flatten(0, 1).any(0)
    return [
        scaling.models[int(own_M.nonzero()[0])] if own_M.any() else NEW if new else None
        for own_M, new in zip(own_MF.T, new_F.tolist(), strict=True)
    ]


def class_counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Features per class for each crosscoder, and those that the full rule calls specific."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["fit"], Counter()).update([row["feature_class"]] + [SPECIFIC] * row["specific"])
    return {fit: {SPECIFIC: 0} | dict(sorted(found.items())) for fit, found in counts.items()}
