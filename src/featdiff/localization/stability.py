"""How far the sets that several crosscoder seeds find agree: in their effect, in the subspace they span, in their ids.

Features of two dictionaries may differ one by one and still do the same: ids are the least stable of the three. All of it is
ours. S questions, K features of a set, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import subspace_angles
from torch import Tensor
from torch.nn.functional import cosine_similarity

EXPLAINED = 0.9
"""Share of the summed squares of the changes that their leading components hold."""
DRAWS = 200
"""Random subspaces behind the cosine that is expected of unrelated ones."""


def task_mean(per_task: Mapping[str, Float[Tensor, "S D"]]) -> Float[Tensor, " D"]:
    """Mean of the tasks' means: every task counts the same."""
    return torch.stack([rows.mean(0) for rows in per_task.values()]).mean(0)


def leading_components(change_SD: Float[Tensor, "S D"]) -> Float[Tensor, "K D"]:
    """The fewest right singular vectors of the changes that hold ``EXPLAINED`` of their squares; none where nothing changes.
    The mean is not taken off: it is part of what the set does."""
    _, values, rows_DD = torch.linalg.svd(change_SD.double(), full_matrices=False)
    energy = values.square().cumsum(0)
    if energy[-1] == 0:
        return change_SD[:0]
    return rows_DD[: int((energy < EXPLAINED * energy[-1]).sum()) + 1]


def span_cosine(a_KD: Float[Tensor, "K D"], b_LD: Float[Tensor, "L D"]) -> float:
    """Mean cosine of the principal angles between the spans of two sets of rows: 1 where the smaller lies in the larger, 0
    where they are orthogonal or one of them has no span."""
    if not (a_KD.any() and b_LD.any()):
        return 0.0
    return float(np.cos(subspace_angles(a_KD.T.double().numpy(), b_LD.T.double().numpy())).mean())


def random_span_cosine(k: int, other: int, d_model: int, seed: int) -> float:
    """What :func:`span_cosine` is on average for random subspaces of ``k`` and ``other`` dimensions.

    One of the two may be spanned by the first axes, because the other one is turned at random."""
    k, other = min(k, d_model), min(other, d_model)
    if not (k and other):
        return 0.0
    rng = np.random.default_rng(seed)
    drawn = (np.linalg.qr(rng.standard_normal((d_model, k)))[0][:other] for _ in range(DRAWS))
    return float(np.mean([np.linalg.svd(rows, compute_uv=False).mean() for rows in drawn]))


def effect_stability(
    changes: Mapping[str, Mapping[str, Float[Tensor, "S D"]]],
    rows: Mapping[str, Float[Tensor, "K D"]],
    mean_difference_D: Float[Tensor, " D"],
    seed: int,
) -> dict[str, Any]:
    """Agreement of several fits' sets. ``changes``: by fit and task, what the set adds to the residual stream of each question
    (:meth:`featdiff.localization.search.Search.set_changes`); ``rows``: by fit, decoder rows of the set in the same units.

    ``effect``: by pair of fits the cosine of the mean changes, every task counting the same, and the mean over questions of the
    cosine of their changes. ``mean_difference``: by fit the cosine of the mean change with tuned − original.
    ``subspace``: by pair the mean cosine of the principal angles between the spans of the decoder rows and between those of the
    leading components of the changes, each with what random subspaces of these sizes give. A set that changes nothing agrees
    with none: its cosines are 0. The two means are over pairs; None of one fit alone."""
    means = {fit: task_mean(per_task) for fit, per_task in changes.items()}
    every = {fit: torch.cat(list(per_task.values())) for fit, per_task in changes.items()}
    components = {fit: leading_components(change_SD) for fit, change_SD in every.items()}
    effect: dict[str, dict[str, float]] = {}
    subspace: dict[str, dict[str, float]] = {}
    for a, b in combinations(changes, 2):
        pair = f"{a} · {b}"
        effect[pair] = {
            "mean_change": cosine_similarity(means[a], means[b], dim=0).item(),
            "per_question": cosine_similarity(every[a], every[b], dim=1).mean().item(),
        }
        subspace[pair] = {}
        for name, spans in (("decoder", rows), ("change", components)):
            sizes = len(spans[a]), len(spans[b])
            subspace[pair][name] = span_cosine(spans[a], spans[b])
            subspace[pair][f"{name}_random"] = random_span_cosine(*sizes, len(mean_difference_D), seed)
    return {
        "effect": effect,
        "mean_effect": float(np.mean([found["mean_change"] for found in effect.values()])) if effect else None,
        "mean_difference": {fit: cosine_similarity(mean_D, mean_difference_D, dim=0).item() for fit, mean_D in means.items()},
        "subspace": subspace,
        "mean_subspace": float(np.mean([found["decoder"] for found in subspace.values()])) if subspace else None,
    }
