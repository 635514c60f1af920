"""Which features move over the checkpoints of an arm, by two methods that can fail differently.

``fixed``: one dictionary reads every checkpoint's residual stream on the same tokens, with the swap readout. A feature's
change from the base is mean |f_k^checkpoint − f_k^base| · ‖d_k^arm‖₂. Ours. The base is where every arm starts.
``refit``: for every checkpoint, the crosscoder of base and final model is trained on with base and checkpoint. Its features
keep their numbers, and are ranked by NRN. The ranking is the paper's, the warm start is ours.
Two checkpoints are compared by the overlap |A ∩ B| / n of their top-n sets (the paper's measure). The floor of an overlap is
the last checkpoint done twice: with other tokens (fixed) or another seed (refit).
N token rows, D residual width, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.activations.store import READ_ROWS
from featdiff.activations.tensor import ActivationTensor
from featdiff.attribution.norms import nrn
from featdiff.config.params import BASE, CrosscoderTraining
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import feature_statistics
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.pipeline.checkpoint import Scratch


@torch.inference_mode()
def change_from_base(
    crosscoder: Crosscoder, base_ND: Float[Tensor, "N D"], checkpoint_ND: Float[Tensor, "N D"], arm: str
) -> Float[Tensor, " F"]:
    """Mean |f_k^checkpoint − f_k^base| · ‖d_k^arm‖₂ over token rows, in normalised units.

    Both inputs are raw residual streams on the same tokens. A checkpoint is read with the slot and scale of ``arm``. Raises
    KeyError where the crosscoder does not hold the base or the arm."""
    read_base, read_arm = Reader(crosscoder, BASE), Reader(crosscoder, arm)
    total = torch.zeros(crosscoder.n_features)
    for before, after in zip(base_ND.split(READ_ROWS), checkpoint_ND.split(READ_ROWS), strict=True):
        total += (read_arm(after) - read_base(before)).abs().sum(0)
    return total / len(base_ND) * crosscoder.decoder_norms()[:, crosscoder.slot(arm)]


def top_overlap(a_F: Float[Tensor, " F"], b_F: Float[Tensor, " F"], top: int) -> float:
    """|top-n of a ∩ top-n of b| / n, with n = ``top`` or all features where there are fewer."""
    n = min(top, len(a_F))
    return len(set(a_F.topk(n).indices.tolist()) & set(b_F.topk(n).indices.tolist())) / n


def refit(
    crosscoder: Crosscoder, acts_NMD: Float[Tensor, "N 2 D"], training: CrosscoderTraining, seed: int, label: str
) -> Float[Tensor, " F"]:
    """NRN of every feature after ``crosscoder``, that of base and arm, was trained on for ``training.steps`` steps.

    ``acts_NMD`` are raw activations of base and checkpoint. A feature that never fires on them gets −1. Raises ContractError
    where there are fewer rows than one batch."""
    source = ActivationTensor(crosscoder.models, acts_NMD)
    made, *_ = fit(source, crosscoder.loss, training, seed, lambda *_: None, label, scratch=Scratch(), warm=crosscoder)
    return torch.where(feature_statistics(made, source)["firing_rate"] > 0, nrn(made.W_dec), -1.0)


def overlap_rows(
    arm: str, method: str, ranked: Mapping[int, Tensor], floor: tuple[Tensor, Tensor], tops: list[int]
) -> list[dict[str, Any]]:
    """Overlap of every two checkpoints of one arm, for every n of ``tops``. ``ranked`` holds the values of all features [F] by
    checkpoint number. ``floor`` holds two such values of the last checkpoint; its row has a = b = 0."""
    pairs = {(a, b): (ranked[a], ranked[b]) for a in ranked for b in ranked} | {(0, 0): floor}
    return [
        {"arm": arm, "method": method, "top": top, "a": a, "b": b, "overlap": top_overlap(*values, top)}
        for top in tops
        for (a, b), values in pairs.items()
    ]


def trajectory_rows(arm: str, changes: Mapping[int, Tensor]) -> list[dict[str, Any]]:
    """Change and rank (1 is the largest change) of every feature at every checkpoint. Checkpoint 0 is the base: it has changed
    nothing and ranks nothing."""
    rows: list[dict[str, Any]] = []
    for number, change in changes.items():
        rank = change.argsort(descending=True).argsort() + 1
        rows += [
            {"arm": arm, "checkpoint": number, "feature_id": k, "change": value, "rank": place}
            for k, (value, place) in enumerate(zip(change.tolist(), rank.tolist(), strict=True))
        ]
    n_features = len(next(iter(changes.values())))
    return [{"arm": arm, "checkpoint": 0, "feature_id": k, "change": 0.0, "rank": None} for k in range(n_features)] + rows
