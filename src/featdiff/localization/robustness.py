"""Would the selection have come out otherwise? Thresholds, shuffled identities, other crosscoder seeds, other readouts.

All of it is ours. S samples, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from featdiff.crosscoder.model import Crosscoder
from featdiff.localization.localize import above_threshold, jaccard, raised, score

Differences = Mapping[str, Float[Tensor, "S F"]]


def shuffled_identities(differences: Differences, generator: torch.Generator) -> dict[str, Float[Tensor, "S F"]]:
    """``differences`` as if, sample by sample, a coin had decided which of the two models is the tuned one."""
    return {task: rows * (torch.randint(2, (len(rows), 1), generator=generator) * 2 - 1) for task, rows in differences.items()}


def common(differences: Differences, threshold: float, largest_set: float = 1.0) -> list[int]:
    """Features that reach ``threshold`` of the largest score on every task, at most ``largest_set`` of all."""
    scores = [score(rows) for rows in differences.values()]
    threshold = raised(scores, threshold, largest_set)
    return torch.stack([above_threshold(each, threshold) for each in scores]).all(0).nonzero()[:, 0].tolist()


def strongest(differences: Differences, count: int) -> list[int]:
    """The ``count`` features whose share of the largest score is highest on the task where it is lowest."""
    scores = [score(rows) for rows in differences.values()]
    return torch.stack([value / value.amax().clamp(min=1e-12) for value in scores]).amin(0).topk(count).indices.tolist()


def sweep(
    differences: Differences, thresholds: list[float], features: list[int], shuffles: int, generator: torch.Generator
) -> list[dict[str, Any]]:
    """The selection at each threshold: size, its expectation if the tasks chose independently and if identities are
    shuffled (with the share of shuffles that give as many), and its Jaccard index with ``features``."""
    scores = {task: score(rows) for task, rows in differences.items()}
    n_features = len(next(iter(scores.values())))
    null = [shuffled_identities(differences, generator) for _ in range(shuffles)]
    rows = []
    for threshold in thresholds:
        chosen = common(differences, threshold)
        sizes = [int(above_threshold(value, threshold).sum()) for value in scores.values()]
        drawn = [len(common(shuffled, threshold)) for shuffled in null]
        rows.append(
            {
                "threshold": threshold,
                "size": len(chosen),
                "expected_independent": n_features * float(np.prod([size / n_features for size in sizes])),
                "expected_shuffled": float(np.mean(drawn)),
                "p_shuffled": (1 + sum(size >= len(chosen) for size in drawn)) / (1 + shuffles),
                "jaccard": jaccard(set(chosen), set(features)),
            }
        )
    return rows


@torch.no_grad()
def mutual_matches(a: Crosscoder, b: Crosscoder) -> tuple[Int[Tensor, " F"], Float[Tensor, " F"]]:
    """For every feature of ``a`` the feature of ``b`` it is matched with, −1 where the two are not each other's best,
    and the cosine of their decoder rows, taken over all models at once; on the CPU, wherever the crosscoders are."""
    rows = [torch.nn.functional.normalize(crosscoder.W_dec.flatten(1), dim=1) for crosscoder in (a, b)]
    cosine = rows[0] @ rows[1].T
    best, partner = cosine.max(1)
    mutual = cosine.argmax(0)[partner] == torch.arange(len(partner), device=partner.device)
    return torch.where(mutual, partner, -1).cpu(), best.cpu()


def seed_stability(sets: Mapping[str, list[int]], crosscoders: Mapping[str, Crosscoder], least_cosine: float) -> dict[str, Any]:
    """How the sets found with several seeds agree, features matched by mutual-best cosine of at least ``least_cosine``:
    Jaccard index per pair of fits and its mean, and for each feature of the first fit its partner in the others."""
    names = list(sets)
    pairs: dict[str, float] = {}
    partners: dict[int, dict[str, dict[str, Any]]] = {feature: {} for feature in sets[names[0]]}
    for i, first in enumerate(names):
        for other in names[i + 1 :]:
            match, cosine = mutual_matches(crosscoders[first], crosscoders[other])
            found = {k: int(match[k]) for k in sets[first] if match[k] >= 0 and cosine[k] >= least_cosine}
            shared = sum(partner in sets[other] for partner in found.values())
            union = len(sets[first]) + len(sets[other]) - shared
            pairs[f"{first} · {other}"] = shared / union if union else 0.0
            for k in sets[first] if i == 0 else []:
                partner = found.get(k)
                partners[k][other] = {"feature": partner, "cosine": cosine[k].item(), "selected": partner in sets[other]}
    mean = float(np.mean(list(pairs.values()))) if pairs else None
    return {"sets": dict(sets), "jaccard": pairs, "mean_jaccard": mean, "partners": {str(k): v for k, v in partners.items()}}
