"""Error-preserving edits of the residual stream at the hooked layer, and the reconstruction that is not.

    zero, scale   h' = h + Σ_{k∈S} (α − 1) f_k(h) d_k          α = 0 zeroes, α = 1 is an exact no-op
    add           h' = h + c Σ_{k∈S} f_k^max d_k               f_k^max: largest value of f_k in the donor
    transplant    h' = h + α Σ_{k∈S} (f_k(h^donor) − f_k(h)) d_k   donor: the tuned model
    reconstruct   h' = x̂(h)                                    encode and decode with nothing edited
and, with a direction v of the residual stream in place of features,
    push          h' = h + c v
    project       h' = h − ⟨h − μ, v⟩ v / ‖v‖²                  μ: mean of the original model, whose component is left
(scaling is the paper's; add and transplant are ours, because scaling cannot wake a silent feature; push and project are
what a feature has to beat)
Shapes: B batch, T token, D residual width, S features of the set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from featdiff.activations.store import ActivationSource, in_order
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader

WHOLE_PROMPT = ("prompt", "all")
"""Positions that include prompt tokens before the last."""
KINDS = ("zero", "scale", "add", "transplant", "reconstruct")
"""Edits of features."""


@torch.inference_mode()
def largest_values(crosscoder: Crosscoder, source: ActivationSource) -> Tensor:
    """Largest value of every feature [F] over the tokens of a source with one model, under the swap readout."""
    reader, largest_F = Reader(crosscoder, source.models[0]), torch.zeros(crosscoder.n_features)
    for rows in in_order(source, 0, source.rows):
        largest_F = torch.maximum(largest_F, reader(rows[:, 0]).amax(0))
    return largest_F


def in_pass(positions: str, *, prompt: bool) -> bool:
    """Whether a pass holds any of ``positions``: one pass is over the left-padded prompt, then one per later token (or
    one over an option's tokens)."""
    return positions == "all" or (positions == "generated") is not prompt


@dataclass
class Change:
    """An edit of the residual stream after ``layer`` blocks, at ``positions`` only."""

    kind: str
    layer: int
    positions: str
    dose: float
    """α of zero (0), scale and transplant; c of add and push."""
    donor: PreTrainedModel | None = field(default=None, init=False)

    @property
    def whole_prompt(self) -> bool:
        return self.positions in WHOLE_PROMPT

    def __call__(self, resid_BTD: Tensor, donor_BTD: Tensor | None, *, prompt: bool) -> Tensor:
        if not in_pass(self.positions, prompt=prompt):
            return resid_BTD
        change = self.change(resid_BTD.float(), donor_BTD)
        if self.positions == "prompt_last":
            change[:, :-1] = 0
        return resid_BTD + change.to(resid_BTD.dtype)

    def change(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        """What is added to the residual stream [B, T, D], at every position."""
        raise NotImplementedError


@dataclass
class DirectionEdit(Change):
    """A push along a direction, or a projection on what the original model has of it."""

    direction_D: Tensor
    original_mean_D: Tensor

    def change(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        if self.kind == "push":
            return (self.dose * self.direction_D).expand_as(resid_BTD).clone()
        unit_D = self.direction_D / self.direction_D.norm()
        return ((self.original_mean_D - resid_BTD) @ unit_D).unsqueeze(-1) * unit_D


@dataclass
class FeatureEdit(Change):
    """An edit of the features of ``reader`` (those of one set, or all for ``reconstruct``)."""

    reader: Reader
    largest_S: Tensor | None = None
    """f_k^max, for ``add``."""
    donor_reader: Reader | None = None

    def change(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        if self.kind == "reconstruct":
            return self.reader.reconstruct(resid_BTD) - resid_BTD
        return self._coefficients(resid_BTD, donor_BTD) @ self.reader.directions_FD

    def _coefficients(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        """How much of each decoder direction to add [B, T, S]."""
        if self.kind == "add":
            if self.largest_S is None:
                raise ValueError("the edit add needs the largest value of each feature")
            return (self.dose * self.largest_S).expand(*resid_BTD.shape[:2], -1)
        own = self.reader(resid_BTD)
        if self.kind in ("zero", "scale"):
            return (self.dose - 1) * own
        if self.kind == "transplant":
            if donor_BTD is None or self.donor_reader is None:
                raise ValueError("the edit transplant needs a donor model")
            return self.dose * (self.donor_reader(donor_BTD) - own)
        raise ValueError(f"unknown edit {self.kind}; known: {', '.join(KINDS)}")


@dataclass
class Editor:
    """Makes edits for one edited model from feature ids; keeps what all edits of a study share."""

    crosscoder: Crosscoder
    model: str
    layer: int
    device: torch.device
    largest_F: Tensor
    """Largest value of every feature in the donor [F]."""
    donor_name: str
    """The model whose values ``transplant`` brings in, by its name in the crosscoder: the tuned model."""
    donor: PreTrainedModel | None = None
    """That model itself; only ``transplant`` needs it."""
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    """Directions of the residual stream by name [D], and ``original_mean``."""

    def _reader(self, model: str, features: list[int] | None) -> Reader:
        return Reader(self.crosscoder, model, "swap", features).to(self.device)

    def edit(self, kind: str, features: list[int] | None, positions: str, dose: float) -> FeatureEdit:
        """The edit ``kind`` of ``features`` at ``positions``."""
        made = FeatureEdit(kind, self.layer, positions, dose, self._reader(self.model, features))
        if kind == "add":
            made.largest_S = self.largest_F[features].to(self.device)
        if kind == "transplant":
            made.donor, made.donor_reader = self.donor, self._reader(self.donor_name, features)
        return made

    def direct(self, kind: str, name: str, positions: str, dose: float) -> DirectionEdit:
        """The edit ``kind`` along the direction ``name``."""
        direction_D, mean_D = (self.directions[key].to(self.device) for key in (name, "original_mean"))
        return DirectionEdit(kind, self.layer, positions, dose, direction_D, mean_D)
