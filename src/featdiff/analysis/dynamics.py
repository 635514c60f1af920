"""Which features move, and when, told in two ways that can fail differently.

``fixed``: every checkpoint's residual stream on the same tokens is read in one dictionary with the swap readout; a
feature's change against the base is mean |f_k^checkpoint − f_k^base| · ‖d_k‖ (ours). ``refit``: a crosscoder of base and
checkpoint, started from the one of base and final model and trained on, so that its features keep their numbers; ranked
by NRN (the paper's ranking). Top-n sets of checkpoints are compared by their overlap |A ∩ B| / n (the paper's measure),
against a floor: the last checkpoint done twice, with other tokens (fixed) or another seed (refit).
N token rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.activations.store import READ_ROWS
from featdiff.activations.tensor import ActivationTensor
from featdiff.analysis.attribution import nrn
from featdiff.config import CrosscoderTraining
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.resume import Scratch


@torch.inference_mode()
def change_from_base(crosscoder: Crosscoder, base: Tensor, tuned: Tensor, arm: str) -> Float[Tensor, " F"]:
    """Mean |Δf_k| · ‖d_k^arm‖ over token rows (base and tuned [N, D], raw) in normalised units."""
    read_base, read_arm = Reader(crosscoder, "base"), Reader(crosscoder, arm)
    total = torch.zeros(crosscoder.n_features)
    for before, after in zip(base.split(READ_ROWS), tuned.split(READ_ROWS), strict=True):
        total += (read_arm(after) - read_base(before)).abs().sum(0)
    return total / len(base) * crosscoder.decoder_norms()[:, crosscoder.slot(arm)]


def top_overlap(a_F: Float[Tensor, " F"], b_F: Float[Tensor, " F"], top: int) -> float:
    """|top-n of a ∩ top-n of b| / n."""
    n = min(top, len(a_F))
    return len(set(a_F.topk(n).indices.tolist()) & set(b_F.topk(n).indices.tolist())) / n


def refit(
    crosscoder: Crosscoder, acts_NMD: Float[Tensor, "N 2 D"], training: CrosscoderTraining, seed: int, label: str
) -> Float[Tensor, " F"]:
    """NRN of every feature after ``crosscoder`` was trained on for ``training.steps`` on a checkpoint's activations; −1
    for features that never fire on them."""
    source = ActivationTensor(crosscoder.models, acts_NMD)
    made, _, statistics = fit(
        source, crosscoder.loss, training, seed, lambda *_: None, label, scratch=Scratch(), warm=crosscoder
    )
    return torch.where(statistics["firing_rate"] > 0, nrn(made.W_dec), -1.0)


def overlap_rows(
    arm: str, method: str, ranked: Mapping[int, Tensor], floor: tuple[Tensor, Tensor], tops: list[int]
) -> list[dict[str, Any]]:
    """Overlap of every pair of checkpoints of one arm for every n, ``ranked`` by checkpoint number; and of the last one
    done twice, the ``floor``, as a = b = 0."""
    pairs = {(a, b): (ranked[a], ranked[b]) for a in ranked for b in ranked} | {(0, 0): floor}
    return [
        {"arm": arm, "method": method, "top": top, "a": a, "b": b, "overlap": top_overlap(*values, top)}
        for top in tops
        for (a, b), values in pairs.items()
    ]


def trajectory_rows(arm: str, changes: Mapping[int, Tensor]) -> list[dict[str, Any]]:
    """Change and rank of every feature at every checkpoint (0, the base, has changed nothing and ranks nothing)."""
    rows: list[dict[str, Any]] = []
    for number, change in changes.items():
        rank = change.argsort(descending=True).argsort() + 1
        rows += [
            {"arm": arm, "checkpoint": number, "feature_id": k, "change": value, "rank": place}
            for k, (value, place) in enumerate(zip(change.tolist(), rank.tolist(), strict=True))
        ]
    n_features = len(next(iter(changes.values())))
    return [{"arm": arm, "checkpoint": 0, "feature_id": k, "change": 0.0, "rank": None} for k in range(n_features)] + rows
