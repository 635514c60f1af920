"""Is a feature really one model's own? Latent scaling tests on activations what decoder norms suggest.

    β_k^{m,t} = Σ_x f_k ⟨y_k^m, d_k^t⟩ / (‖d_k^t‖² Σ_x f_k²)      ν_k^{o,t} = β_k^{o,t} / β_k^{t,t}
    error:           y_k^m = x^m − x̂^m + f_k d_k^m     what no other feature explains; finds complete shrinkage
    reconstruction:  y_k^m = x̂^m                       what all features together say; finds latent decoupling

(Minder, Dumas et al. 2025, arXiv 2504.02922; as in their code x̂ holds the decoder's bias.) β is the least-squares scale
at which f_k d_k^t explains y^m; ν compares model o with model t, to which the feature would belong. f is the joint code,
x is normalised. On rows that a crosscoder was fitted on, β is too near 1 where features have learnt the noise of these rows;
so the stage reads rows that were held out of the fit (ours). N token rows, M models (o, t among them), D residual width,
F features.
"""

from __future__ import annotations

from itertools import permutations
from math import isnan
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featdiff.activations.store import ActivationSource, in_order
from featdiff.crosscoder.model import Crosscoder

LEAST_BETA = 1e-3
"""A feature that explains less than this share of itself in its own model has no ratio."""


class LatentScaling(NamedTuple):
    """β of every feature for every pair of models, float64 on the CPU; NaN for a feature that never fires or whose
    decoder row in t is zero."""

    models: list[str]
    error_MMF: Float[Tensor, "M M F"]
    """β of model m's error with feature k put back (first index) along model t's decoder row (second index)."""
    reconstruction_MMF: Float[Tensor, "M M F"]
    """The same of model m's reconstruction."""

    def tested(self) -> Bool[Tensor, " F"]:
        """Whether a feature fires on the rows that were read; without that nothing is known of it."""
        return self.error_MMF.isfinite().flatten(0, 1).any(0)

    def specific(self, nu_error: float, nu_reconstruction: float) -> Bool[Tensor, "M M F"]:
        """Whether a feature is t's (second index) and not o's (first): |ν_ε| and ν_r below their bounds, 0.2 and 0.5 in
        the source.

        We take |ν_ε|. A feature that acts in o with the opposite sign is not t's own.
        And for a feature of o alone, whose row in t is next to nothing, ν is large and may have either sign. ν_r keeps its
        sign, because the bias pushes it both ways."""
        return (ratio(self.error_MMF).abs() < nu_error) & (ratio(self.reconstruction_MMF) < nu_reconstruction)


def ratio(beta_MMF: Float[Tensor, "M M F"]) -> Float[Tensor, "M M F"]:
    """ν = β_o / β_t of every ordered pair o, t; NaN where β_t is not clearly positive."""
    own_MF = beta_MMF.diagonal().T
    return beta_MMF / torch.where(own_MF > LEAST_BETA, own_MF, torch.nan)


@torch.inference_mode()
def latent_scaling(crosscoder: Crosscoder, source: ActivationSource, start: int, stop: int) -> LatentScaling:
    """β over rows ``start`` to ``stop`` of raw activations, read once in pieces.

    All pairs of models share three sums in float64: Σ f_k², Σ f_k (x − x̂) and Σ f_k x̂, together 2·M·D·F + F numbers.
    Raises ValueError unless the source holds the crosscoder's models in their order."""
    if list(source.models) != crosscoder.models:
        raise ValueError(f"the crosscoder is of {', '.join(crosscoder.models)}, the activations of {', '.join(source.models)}")
    device, inputs = crosscoder.b_enc.device, len(crosscoder.models) * crosscoder.d_model
    square_F = torch.zeros(crosscoder.n_features, dtype=torch.float64, device=device)
    error_IF, rebuilt_IF = (torch.zeros(inputs, *square_F.shape, dtype=torch.float64, device=device) for _ in range(2))
    for rows in in_order(source, start, stop):
        x_NMD = crosscoder.normalise(rows.to(device))
        f_NF = crosscoder.encode(x_NMD)
        rebuilt_NMD = crosscoder.decode(f_NF)
        square_F += f_NF.square().sum(0)
        error_IF += (x_NMD - rebuilt_NMD).flatten(1).T @ f_NF
        rebuilt_IF += rebuilt_NMD.flatten(1).T @ f_NF
    W_FMD, shape = crosscoder.W_dec.double(), (len(crosscoder.models), crosscoder.d_model)
    gram_MMF = torch.einsum("fmd,ftd->mtf", W_FMD, W_FMD)
    whole_MF = gram_MMF.diagonal().T * square_F
    error_MMF = torch.einsum("mdf,ftd->mtf", error_IF.unflatten(0, shape), W_FMD) + gram_MMF * square_F
    rebuilt_MMF = torch.einsum("mdf,ftd->mtf", rebuilt_IF.unflatten(0, shape), W_FMD)
    return LatentScaling(crosscoder.models, (error_MMF / whole_MF).cpu(), (rebuilt_MMF / whole_MF).cpu())


def scaling_rows(name: str, scaling: LatentScaling, nu_error: float, nu_reconstruction: float) -> list[dict[str, Any]]:
    """One row per ordered pair of models and feature of the crosscoder ``name``: is the feature ``owner``'s and not
    ``other``'s? A number that does not exist is None."""
    tables_MMF = {
        "nu_error": ratio(scaling.error_MMF),
        "nu_reconstruction": ratio(scaling.reconstruction_MMF),
        "beta_error": scaling.error_MMF,
        "beta_reconstruction": scaling.reconstruction_MMF,
    }
    specific_MMF = scaling.specific(nu_error, nu_reconstruction)
    rows: list[dict[str, Any]] = []
    for o, t in permutations(range(len(scaling.models)), 2):
        other, owner = scaling.models[o], scaling.models[t]
        columns = {key: table[o, t].tolist() for key, table in tables_MMF.items()}
        columns |= {f"{key}_owner": tables_MMF[key][t, t].tolist() for key in ("beta_error", "beta_reconstruction")}
        for k, specific in enumerate(specific_MMF[o, t].tolist()):
            numbers = {key: None if isnan(column[k]) else column[k] for key, column in columns.items()}
            pair = {"pair": f"{owner}-{other}", "owner": owner, "other": other}
            rows.append({"fit": name, "feature_id": k} | pair | numbers | {"specific": specific})
    return rows
