"""Which features move over the checkpoints of an arm, by two methods that can fail differently.

``fixed``: one dictionary reads every checkpoint's residual stream on the same tokens, with the swap readout. A feature's
change from the base is mean |f_k^checkpoint − f_k^base| · ‖d_k^arm‖₂. Ours. The base is where every arm starts.
``refit``: for every checkpoint, the crosscoder of base and final model is trained on with base and checkpoint. Its features
keep their numbers, and are ranked by NRN. The ranking is the paper's, the warm start is ours.
Two checkpoints are compared by the overlap |A ∩ B| / n of their top-n sets (the paper's measure). The floor of an overlap is
the last checkpoint done twice: with other tokens (fixed) or another seed (refit).
How well an overlap is known is told by a bootstrap over blocks of texts, for ``fixed`` alone.
N token rows, K blocks of texts, R resamples, D residual width, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featdiff.activations.store import READ_ROWS
from featdiff.activations.tensor import ActivationTensor
from featdiff.attribution.norms import nrn
from featdiff.config.dictionary import CrosscoderTraining, DynamicsParams
from featdiff.config.values import BASE
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import feature_statistics
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.pipeline.checkpoint import Scratch

BLOCKS = 64
"""Blocks of texts that are resampled; even and odd ones are the two halves."""


@torch.inference_mode()
def change_from_base(
    crosscoder: Crosscoder, base_ND: Float[Tensor, "N D"], checkpoint_ND: Float[Tensor, "N D"], arm: str
) -> Float[Tensor, " F"]:
    """Mean |f_k^checkpoint − f_k^base| · ‖d_k^arm‖₂ over token rows, in normalised units.

    Both inputs are raw residual streams on the same tokens. A checkpoint is read with the slot and scale of ``arm``, where the
    crosscoder is; the result is on the CPU. Raises KeyError where the crosscoder does not hold the base or the arm."""
    total = torch.zeros(crosscoder.n_features, device=crosscoder.b_enc.device)
    for change_NF in _changes(crosscoder, base_ND, checkpoint_ND, arm):
        total += change_NF.sum(0)
    return (total / len(base_ND) * crosscoder.decoder_norms()[:, crosscoder.slot(arm)]).cpu()


def _changes(
    crosscoder: Crosscoder, base_ND: Float[Tensor, "N D"], checkpoint_ND: Float[Tensor, "N D"], arm: str
) -> Iterator[Float[Tensor, "n F"]]:
    """|f_k^checkpoint − f_k^base| of every row, in pieces, where the crosscoder is."""
    read_base, read_arm, device = Reader(crosscoder, BASE), Reader(crosscoder, arm), crosscoder.b_enc.device
    for before, after in zip(base_ND.split(READ_ROWS), checkpoint_ND.split(READ_ROWS), strict=True):
        yield (read_arm(after.to(device)) - read_base(before.to(device))).abs()


def text_blocks(text_N: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The block of each row, from 0: at most ``BLOCKS`` of whole, consecutive texts, about as many in each. Tokens of one text
    are no independent samples."""
    place_N = torch.unique_consecutive(text_N, return_inverse=True)[1]
    texts = int(place_N[-1]) + 1
    return place_N * min(BLOCKS, texts) // texts


@torch.inference_mode()
def block_changes(
    crosscoder: Crosscoder,
    base_ND: Float[Tensor, "N D"],
    checkpoint_ND: Float[Tensor, "N D"],
    arm: str,
    block_N: Int[Tensor, " N"],
) -> Float[Tensor, "K F"]:
    """:func:`change_from_base` as a sum over the rows of each block, in place of the mean over all."""
    total_KF = torch.zeros(int(block_N.max()) + 1, crosscoder.n_features, device=crosscoder.b_enc.device)
    pieces = _changes(crosscoder, base_ND, checkpoint_ND, arm)
    for block_n, change_NF in zip(block_N.split(READ_ROWS), pieces, strict=True):
        total_KF.index_add_(0, block_n.to(total_KF.device), change_NF)
    return (total_KF * crosscoder.decoder_norms()[:, crosscoder.slot(arm)]).cpu()


def bootstrap_rows(
    arm: str,
    changes: Mapping[int, Float[Tensor, "K F"]],
    rows_K: Float[Tensor, " K"],
    tops: list[int],
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """How well each checkpoint's overlap with the last one is known; ``changes`` are the sums of :func:`block_changes` by
    checkpoint, ``rows_K`` the rows of each block. Draw 0 has every block once; in the others blocks are drawn with replacement
    within their half. Equal blocks and an equal seed give equal draws, so that arms are compared draw by draw.

    ``overlap``: of the checkpoint read on one half of the blocks with the last read on the other, mean of both ways round. No
    token is read for both sides: tokens in common would make any two checkpoints alike. ``chance``: n / F. ``ceiling``: what
    two checkpoints alike would give, from either with itself across the halves, the geometric mean of what they have above
    chance (Spearman's correction for attenuation): an early checkpoint, which has changed less, is read less surely. All three
    are means over the n of ``tops`` that are less than F. ``change`` is the sum over features of the mean change, on all
    blocks. No rows where there are fewer than four blocks, or no such n."""
    n_blocks, n_features = next(iter(changes.values())).shape
    sizes = [top for top in tops if top < n_features]
    if n_blocks < 4 or not sizes:
        return []
    generator = torch.Generator().manual_seed(seed)
    weights_HRK = torch.zeros(2, resamples + 1, n_blocks)
    for half, weights_RK in enumerate(weights_HRK):
        own = torch.arange(half, n_blocks, 2)
        drawn_RK = own[torch.randint(len(own), (resamples, len(own)), generator=generator)]
        weights_RK[1:].scatter_add_(1, drawn_RK, torch.ones(drawn_RK.shape))
        weights_RK[0, own] = 1
    rows_HR1 = (weights_HRK @ rows_K).unsqueeze(-1)
    means = {number: (weights_HRK @ change_KF) / rows_HR1 for number, change_KF in changes.items()}
    whole = {number: (weights_HRK.sum(0) @ change_KF).sum(1) / rows_HR1.sum((0, 2)) for number, change_KF in changes.items()}
    top_sets = {number: [_top(mean_HRF, top) for top in sizes] for number, mean_HRF in means.items()}
    last, chance = top_sets[max(changes)], sum(sizes) / len(sizes) / n_features

    def overlap(a: list[Tensor], b: list[Tensor]) -> Tensor:
        each = [(a_HRF & b_HRF.flip(0)).sum(-1).double().mean(0) / n for a_HRF, b_HRF, n in zip(a, b, sizes, strict=True)]
        return torch.stack(each).mean(0)

    def ceiling(a: list[Tensor]) -> Tensor:
        own_R, last_R = ((overlap(sets, sets) - chance).clamp(min=0) for sets in (a, last))
        return chance + (own_R * last_R).sqrt()

    return [
        {"arm": arm, "checkpoint": number, "draw": draw, "overlap": found, "ceiling": most, "chance": chance, "change": change}
        for number, sets in top_sets.items()
        for draw, (found, most, change) in enumerate(
            zip(overlap(sets, last).tolist(), ceiling(sets).tolist(), whole[number].tolist(), strict=True)
        )
    ]


def _top(values_HRF: Float[Tensor, "H R F"], top: int) -> Bool[Tensor, "H R F"]:
    """Which features are among the ``top`` largest."""
    return torch.zeros(values_HRF.shape, dtype=torch.bool).scatter_(-1, values_HRF.topk(top).indices, value=True)


class Followed(NamedTuple):
    """Tables of one arm read in one dictionary, as lists of rows."""

    overlap: list[dict[str, Any]]
    trajectories: list[dict[str, Any]]
    bootstrap: list[dict[str, Any]]


def follow(
    arm: str,
    crosscoder: Crosscoder,
    slot: str,
    base_ND: Float[Tensor, "N D"],
    checkpoints: Mapping[int, Float[Tensor, "N D"]],
    text_N: Int[Tensor, " N"],
    params: DynamicsParams,
    seed: int,
) -> Followed:
    """The method ``fixed`` for the ``checkpoints`` of ``arm`` by number, raw streams on the tokens of ``base_ND`` and read with
    the slot of ``slot``. ``text_N`` says which text each row is of."""
    last = checkpoints[max(checkpoints)]
    changes = {i: change_from_base(crosscoder, base_ND, acts_ND, slot) for i, acts_ND in checkpoints.items()}
    odd, even = (change_from_base(crosscoder, base_ND[part::2], last[part::2], slot) for part in (0, 1))
    block_N = text_blocks(text_N)
    sums = {i: block_changes(crosscoder, base_ND, acts_ND, slot, block_N) for i, acts_ND in checkpoints.items()}
    return Followed(
        overlap_rows(arm, "fixed", changes, (odd, even), params.top),
        trajectory_rows(arm, changes),
        bootstrap_rows(arm, sums, block_N.bincount().float(), params.top, params.bootstrap, seed),
    )


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
    return torch.where(feature_statistics(made, source)["firing_rate"] > 0, nrn(made.W_dec).cpu(), -1.0)


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
