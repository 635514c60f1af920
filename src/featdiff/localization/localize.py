"""Finding the features that carry what the tuned model gained, from samples that the original fails and the tuned one solves.

    Score_k = E[f_k^tuned − f_k^original] over a task's flipped samples, on identical token sequences (the paper).
A feature counts for a task from ``threshold`` of the task's largest score; the set is the intersection over tasks (the paper).
Where that is too large a part of the dictionary, the threshold is raised (ours).
S samples, F features.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from featdiff.config.sets import LocalizeParams


def score(difference_SF: Float[Tensor, "S F"]) -> Float[Tensor, " F"]:
    """Mean difference of the feature values over flipped samples."""
    return difference_SF.mean(0)


def above_threshold(score_F: Float[Tensor, "*R F"], threshold: float) -> Bool[Tensor, "*R F"]:
    """Which features reach ``threshold`` of the largest score; never one whose score is not positive."""
    largest = score_F.amax(-1, keepdim=True)
    return (score_F >= threshold * largest) & (score_F > 0)


def raised(scores: Collection[Float[Tensor, " F"]], threshold: float, largest_set: float) -> float:
    """``threshold``, or as much more as leaves at most ``largest_set`` of the features, but one at least, that reach it on
    every task of ``scores``."""
    least_F = torch.stack([each / each.amax().clamp(min=1e-12) for each in scores]).amin(0).sort(descending=True).values
    most = max(1, int(largest_set * len(least_F)))
    if most == len(least_F) or least_F[most] < threshold:
        return threshold
    return least_F[most - 1 : most + 1].double().mean().item()  # between the last that is in and the first that is not


class Selection(NamedTuple):
    """What localization found."""

    status: str
    """``found``, ``too_few_flipped`` (no task has enough samples) or ``empty_intersection``."""
    features: list[int]
    threshold: float
    """The one in force."""
    per_task: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    expected_intersection: float
    """Size of the intersection if the tasks' sets of these sizes were drawn independently."""
    frequency: dict[int, float]
    """Share of bootstrap resamples in which a feature is in the intersection, for features above 0."""
    overlap: dict[str, dict[str, float]]
    """Jaccard index between the tasks' sets."""
    scores: dict[str, NDArray[np.float64]]
    task_frequency: dict[str, NDArray[np.float64]]
    """Per task, share of resamples in which each feature reaches the threshold."""


def select(
    differences: dict[str, Float[Tensor, "S F"]], skipped: dict[str, str], params: LocalizeParams, seed: int
) -> Selection:
    """Score, threshold and intersect over the tasks of ``differences``; resample flipped samples for stability.

    Tasks with fewer than ``params.min_flipped`` samples must already be in ``skipped`` (name → reason)."""
    if not differences:
        return Selection("too_few_flipped", [], params.threshold, {}, skipped, 0.0, {}, {}, {}, {})
    scores = {task: score(difference) for task, difference in differences.items()}
    threshold = raised(scores.values(), params.threshold, params.largest_set)
    chosen = {task: above_threshold(value, threshold) for task, value in scores.items()}
    common = torch.stack(list(chosen.values())).all(0)
    n_features = len(common)
    generator = torch.Generator().manual_seed(seed)
    always = torch.ones(params.bootstrap, n_features, dtype=torch.bool)
    task_frequency = {}
    for task, difference in differences.items():
        drawn_RS = torch.randint(len(difference), (params.bootstrap, len(difference)), generator=generator)
        counts_RS = torch.zeros(params.bootstrap, len(difference)).scatter_add_(
            1, drawn_RS, torch.ones_like(drawn_RS, dtype=torch.float32)
        )
        kept_RF = above_threshold(counts_RS @ difference / len(difference), threshold)
        task_frequency[task] = kept_RF.double().mean(0).numpy()
        always &= kept_RF
    frequency = always.double().mean(0)
    sets = {task: set(mask.nonzero().squeeze(1).tolist()) for task, mask in chosen.items()}
    return Selection(
        status="found" if common.any() else "empty_intersection",
        features=common.nonzero().squeeze(1).tolist(),
        threshold=threshold,
        per_task={
            task: {"n_flipped": len(differences[task]), "max_score": scores[task].max().item(), "selected": sorted(sets[task])}
            for task in differences
        },
        skipped=skipped,
        expected_intersection=n_features * float(np.prod([len(members) / n_features for members in sets.values()])),
        frequency={k: frequency[k].item() for k in frequency.nonzero().squeeze(1).tolist()},
        overlap={a: {b: jaccard(sets[a], sets[b]) for b in sets} for a in sets},
        scores={task: value.double().numpy() for task, value in scores.items()},
        task_frequency=task_frequency,
    )


def jaccard(a: set[int], b: set[int]) -> float:
    """|a ∩ b| / |a ∪ b|; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 0.0


def as_json(found: Selection, params: LocalizeParams) -> dict[str, Any]:
    """The selection as ``features.json``."""
    settings = {"fit": params.fit, "readout": params.readout, "positions": params.positions}
    kept = ("status", "features", "threshold", "per_task", "skipped", "expected_intersection", "overlap")
    facts = {name: value for name, value in found._asdict().items() if name in kept}
    return settings | facts | {"frequency": {str(k): share for k, share in found.frequency.items()}}


def score_rows(found: Selection) -> list[dict[str, Any]]:
    """Score and bootstrap frequency of every feature on every task."""
    return [
        {"task": task, "feature_id": k, "score": float(value), "frequency": float(found.task_frequency[task][k])}
        for task, scores in found.scores.items()
        for k, value in enumerate(scores)
    ]
