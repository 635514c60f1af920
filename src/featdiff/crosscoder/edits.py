"""Error-preserving edits of the residual stream at the hooked layer, and the reconstruction that is not.

    h' = h + c Δ(h)          the dose c: 0 is an exact no-op, and the change is linear in it
with Δ by kind
    zero         −Σ_{k∈S} f_k(h) d_k                        c = 1 takes the features away (the paper's α is 1 − c)
    scale        +Σ_{k∈S} f_k(h) d_k                        α = 1 + c
    add          +Σ_{k∈S} f_k^max d_k                       f_k^max: largest value of f_k in the tuned model
    transplant   Σ_{k∈S} (f_k(h^donor) − f_k(h)) d_k         c = 1 sets them to the donor's values on the same tokens
    reconstruct  x̂(h) − h                                   encode and decode with nothing edited
and for controls, which are as long as what they are held against
    push         v ‖Δ_S(h)‖                                 v: a direction of length 1
    as_long      Δ_R(h) ‖Δ_S(h)‖ / ‖Δ_R(h)‖                  R: other features; 0 where R does nothing
(zero and scale are the paper's; the others are ours: scaling cannot wake a silent feature, zeroing goes past the values
that the donor has, and a control that changes less than the set says nothing)
Shapes: B batch, T token, D residual width, S features of the set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from featdiff.activations.store import ActivationSource, in_order
from featdiff.config.models import Roles
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader

WHOLE_PROMPT = ("prompt", "all")
"""Positions that include prompt tokens before the last."""
KINDS = ("zero", "scale", "add", "transplant", "reconstruct")
"""Edits of features."""
SILENT = 1e-6
"""Length of a change below which there is none to make longer."""


@torch.inference_mode()
def largest_values(crosscoder: Crosscoder, source: ActivationSource, device: torch.device) -> Tensor:
    """Largest value of every feature [F] over the tokens of a source with one model, under the swap readout. It is read on
    ``device``; the result is on the CPU."""
    reader, largest_F = Reader(crosscoder, source.models[0]).to(device), torch.zeros(crosscoder.n_features, device=device)
    for rows in in_order(source, 0, source.rows):
        largest_F = torch.maximum(largest_F, reader(rows[:, 0].to(device)).amax(0))
    return largest_F.cpu()


def in_pass(positions: str, *, prompt: bool) -> bool:
    """Whether a pass holds any of ``positions``: one pass is over the left-padded prompt, then one per later token (or
    one over an option's tokens)."""
    return positions == "all" or (positions == "generated") is not prompt


@dataclass
class Change(ABC):
    """An edit of the residual stream after ``layer`` blocks, at ``positions`` only."""

    layer: int
    positions: str
    dose: float
    """c of this module."""
    donor: PreTrainedModel | None = field(default=None, init=False)

    @property
    def whole_prompt(self) -> bool:
        return self.positions in WHOLE_PROMPT

    @property
    def after_prompt(self) -> bool:
        return in_pass(self.positions, prompt=False)

    def __call__(self, resid_BTD: Tensor, donor_BTD: Tensor | None, *, prompt: bool) -> Tensor:
        if not in_pass(self.positions, prompt=prompt):
            return resid_BTD
        if self.positions != "prompt_last":
            return self._changed(resid_BTD, donor_BTD)
        last_B1D = self._changed(resid_BTD[:, -1:], None if donor_BTD is None else donor_BTD[:, -1:])
        return torch.cat([resid_BTD[:, :-1], last_B1D], dim=1)

    def _changed(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        change_BTD = self.dose * self.delta(resid_BTD.float(), donor_BTD)
        return resid_BTD + change_BTD.to(resid_BTD.dtype)

    @abstractmethod
    def delta(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        """Δ: what dose 1 adds to the residual stream [B, T, D], at every position."""


@dataclass
class FeatureEdit(Change):
    """An edit of the features of ``reader`` (those of one set, or all for ``reconstruct``)."""

    kind: str
    reader: Reader
    largest_S: Tensor | None = None
    """f_k^max, for ``add``."""
    donor_reader: Reader | None = None

    def delta(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        if self.kind == "reconstruct":
            return self.reader.reconstruct(resid_BTD) - resid_BTD
        return self.coefficients(resid_BTD, donor_BTD) @ self.reader.directions_FD

    def coefficients(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        """How much of each decoder direction Δ has [B, T, S]."""
        if self.kind == "add":
            if self.largest_S is None:
                raise ValueError("the edit add needs the largest value of each feature")
            return self.largest_S.expand(*resid_BTD.shape[:2], -1)
        own_BTS = self.reader(resid_BTD)
        if self.kind in ("zero", "scale"):
            return own_BTS if self.kind == "scale" else -own_BTS
        if self.kind == "transplant":
            if donor_BTD is None or self.donor_reader is None:
                raise ValueError("the edit transplant needs a donor model")
            return self.donor_reader(donor_BTD) - own_BTS
        raise ValueError(f"unknown edit {self.kind}; known: {', '.join(KINDS)}")


@dataclass
class Push(Change):
    """A push along a direction that is as long as the change of ``like``, token by token."""

    direction_D: Tensor
    """Of length 1."""
    like: FeatureEdit

    def __post_init__(self) -> None:
        self.donor = self.like.donor

    def delta(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        return self.like.delta(resid_BTD, donor_BTD).norm(dim=-1, keepdim=True) * self.direction_D


@dataclass
class AsLong(Change):
    """The change of ``of``, scaled to the length of that of ``like``, token by token."""

    of: FeatureEdit
    like: FeatureEdit

    def __post_init__(self) -> None:
        self.donor = self.like.donor

    def delta(self, resid_BTD: Tensor, donor_BTD: Tensor | None) -> Tensor:
        change_BTD, like_BTD = (edit.delta(resid_BTD, donor_BTD) for edit in (self.of, self.like))
        length_BT1 = change_BTD.norm(dim=-1, keepdim=True)
        factor_BT1 = like_BTD.norm(dim=-1, keepdim=True) / length_BT1.clamp(min=SILENT)
        return change_BTD * torch.where(length_BT1 > SILENT, factor_BT1, 0.0)


@dataclass
class Editor:
    """Makes edits for one edited model from feature ids; keeps what all edits of a study share."""

    crosscoder: Crosscoder
    model: str
    """By its name in the crosscoder, as ``donor_name``."""
    layer: int
    device: torch.device
    largest_F: Tensor
    """Largest value of every feature in the tuned model [F]."""
    donor_name: str
    """The model whose values ``transplant`` brings in: the original for a tuned model, the tuned one for the original."""
    donor: PreTrainedModel | None = None
    """That model itself; only ``transplant`` needs it."""

    @classmethod
    def of(cls, crosscoder: Crosscoder, layer: int, device: torch.device, tuned: ActivationSource, roles: Roles) -> Editor:
        """One that edits the tuned model, whose activations ``tuned`` holds, towards the original."""
        return cls(crosscoder, roles.tuned, layer, device, largest_values(crosscoder, tuned, device), roles.original)

    def like(self, other: Editor) -> Editor:
        """This dictionary's editor for the model and the donor of ``other``."""
        return replace(self, model=other.model, donor_name=other.donor_name, donor=other.donor)

    def reader(self, model: str, features: list[int] | None) -> Reader:
        """Reads ``features`` (all where None) of ``model`` under the swap readout."""
        return Reader(self.crosscoder, model, "swap", features).to(self.device)

    def edit(self, kind: str, features: list[int] | None, positions: str, dose: float) -> FeatureEdit:
        """The edit ``kind`` of ``features`` at ``positions``."""
        made = FeatureEdit(self.layer, positions, dose, kind, self.reader(self.model, features))
        if kind == "add":
            made.largest_S = (self.largest_F if features is None else self.largest_F[features]).to(self.device)
        if kind == "transplant":
            made.donor, made.donor_reader = self.donor, self.reader(self.donor_name, features)
        return made
