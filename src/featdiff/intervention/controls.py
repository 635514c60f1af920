"""What a feature set is held against: feature sets and directions that change the residual stream as much as it does.

A control that changes less than the set, or nothing, could not refute it. Every control but single features therefore makes,
token by token, a change of the length of the set's own (featdiff.crosscoder.edits: push, as_long), and is tried at the same
positions and doses.

F features, S features of the set, Q questions, D residual width. All of it is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from featdiff import stats
from featdiff.attribution.norms import mas
from featdiff.config.sets import InterveneParams
from featdiff.crosscoder.edits import SILENT, AsLong, Change, Editor, Push
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention.purposes import DIRECTIONS, RANDOM, RANDOM_DICTIONARY, RANDOM_DIRECTION, SET, SINGLE

NEIGHBOURS = 10
LEAST_ACTING = 0.9
"""Share of the questions on which a random set must act."""


class Setting(NamedTuple):
    """One way to edit."""

    edit: str
    positions: str
    dose: float


@dataclass(frozen=True)
class Control:
    """The set itself or something to hold it against; edits features or pushes along a direction of length 1."""

    name: str
    number: int = 0
    features: tuple[int, ...] = ()
    direction_D: Tensor | None = None
    editor: Editor | None = None
    """Of the dictionary that the features are of, where it is another one; model and donor are not read."""

    @property
    def label(self) -> str:
        """Name and number."""
        return f"{self.name} {self.number}"

    def change(self, editor: Editor, found: Sequence[int], setting: Setting) -> Change:
        """Its edit under ``setting``, as long as that of the set ``found``."""
        like = editor.edit(setting.edit, list(found), setting.positions, setting.dose)
        if self.direction_D is not None:
            return Push(like.layer, like.positions, like.dose, self.direction_D.to(editor.device), like)
        if self.name in (SET, *SINGLE):
            return editor.edit(setting.edit, list(self.features), setting.positions, setting.dose)
        maker = editor if self.editor is None else self.editor.like(editor)
        own = maker.edit(setting.edit, list(self.features), setting.positions, setting.dose)
        return AsLong(like.layer, like.positions, like.dose, own, like)


class Reach(NamedTuple):
    """How far one edit moves the residual stream at the last token of the prompts, at dose 1."""

    norm: float
    """Mean of ‖Δh‖ / ‖h‖ over questions."""
    acting: float
    """Share of the questions on which it moves at all."""
    unscaled: float
    """Mean length relative to the set's before it was made as long; 1 for directions."""


def reach(change: Change, resid_Q1D: Tensor, donor_Q1D: Tensor) -> Reach:
    """How far ``change`` moves these streams at dose 1."""
    delta_Q = change.delta(resid_Q1D, donor_Q1D).norm(dim=-1)[:, 0]
    unscaled = 1.0
    if isinstance(change, AsLong):
        lengths = [edit.delta(resid_Q1D, donor_Q1D).norm(dim=-1).mean().item() for edit in (change.of, change.like)]
        unscaled = lengths[0] / lengths[1] if lengths[1] else 0.0
    share_Q = delta_Q / resid_Q1D.norm(dim=-1)[:, 0]
    return Reach(share_Q.mean().item(), (delta_Q > SILENT).double().mean().item(), unscaled)


def lengths(editor: Editor, edit: str, resid_Q1D: Tensor, donor_Q1D: Tensor) -> Float[np.ndarray, "Q F"]:
    """How much each feature alone changes each stream under ``edit`` at dose 1: |c_k| ‖d_k‖."""
    whole = editor.edit(edit, None, "prompt_last", 1.0)
    coefficients_QF = whole.coefficients(resid_Q1D, donor_Q1D)[:, 0].abs()
    found: NDArray[np.float32] = (coefficients_QF * whole.reader.directions_FD.norm(dim=-1)).cpu().numpy()
    return found


def random_sets(features: Sequence[int], length_QF: Float[np.ndarray, "Q F"], draws: int, seed: int) -> list[tuple[int, ...]]:
    """``draws`` different sets of the size of ``features`` and without any of them, each of which acts on at least
    :data:`LEAST_ACTING` of the questions.

    Each feature is replaced by one drawn from its nearest neighbours in acting rate and mean contribution (logarithms,
    standardised) over the questions asked at the position edited: ``length_QF`` is what each feature alone changes there.
    Where neighbours give too few such sets, more are taken in; where all features do, fewer sets come back, and none where
    fewer features act than one set needs: then nothing is known of chance, and claims about the set stay open."""
    rng = np.random.default_rng(seed)
    acting_QF = length_QF > SILENT
    rate_F, mean_F = acting_QF.mean(0), length_QF.mean(0)
    live = np.flatnonzero(rate_F > 0)
    pool = np.setdiff1d(live, features)
    if len(pool) < len(features):
        return []
    with np.errstate(divide="ignore"):
        described = np.stack([np.log(rate_F), np.log(mean_F)], axis=1)
    spread = described[live].std(axis=0)
    described = (described - described[live].mean(axis=0)) / np.where(spread > 0, spread, 1)
    neighbours = min(len(pool), max(NEIGHBOURS, len(features) + 1))
    sets: dict[frozenset[int], tuple[int, ...]] = {}
    for attempt in range(draws * 40):
        if len(sets) == draws:
            break
        if attempt and attempt % (draws * 4) == 0:
            neighbours = min(len(pool), neighbours * 2)
        drawn = _draw(features, pool, described, neighbours, rng)
        if acting_QF[:, list(drawn)].any(1).mean() >= LEAST_ACTING:
            sets.setdefault(frozenset(drawn), drawn)
    return list(sets.values())


def _draw(
    features: Sequence[int], pool: NDArray[np.int64], described: NDArray[np.float64], neighbours: int, rng: np.random.Generator
) -> tuple[int, ...]:
    drawn: list[int] = []
    for feature in features:
        target = np.nan_to_num(described[feature], neginf=described[pool].min())
        free = np.setdiff1d(pool, drawn)
        near = free[np.argsort(((described[free] - target) ** 2).sum(axis=1), kind="stable")[:neighbours]]
        drawn.append(int(rng.choice(near)))
    return tuple(drawn)


def random_directions(d_model: int, draws: int, seed: int) -> list[Tensor]:
    """Directions of length 1, uniform over the sphere."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(draws, d_model, generator=generator)
    return list(torch.nn.functional.normalize(drawn, dim=-1))


def comparison_sets(
    features: Sequence[int], mas_FM: Float[np.ndarray, "F M"], original: int, length_QF: Float[np.ndarray, "Q F"]
) -> dict[str, tuple[int, ...]]:
    """Two sets of the same size whose decoder norms say that they are not the tuned model's own: ``shared`` has the
    most even shares of all models, ``base_specific`` the largest share of the original model (column ``original``).

    Taken among features outside the set that act on at least half of the questions at the position edited; where there are
    too few, among those that act on most."""
    rate_F = (length_QF > SILENT).mean(0)
    pool = np.setdiff1d(np.flatnonzero(rate_F > 0), features)
    active = pool[rate_F[pool] >= 0.5]
    if len(active) < len(features):
        active = pool[np.argsort(-rate_F[pool], kind="stable")[: len(features)]]
    evenness, own = mas_FM[active].max(1) - mas_FM[active].min(1), -mas_FM[active, original]
    return {
        name: tuple(active[np.argsort(order, kind="stable")[: len(features)]].tolist())
        for name, order in (("shared", evenness), ("base_specific", own))
    }


@dataclass(frozen=True)
class Draws:
    """How many controls of each kind are drawn, and what they are drawn from."""

    random_sets: int
    random_directions: int
    single_features: int
    mas_FM: Float[np.ndarray, "F M"]
    original: int
    """Column of the original model."""
    shuffled: Sequence[int]
    """The set that the same search finds where a coin decides which model is the tuned one."""
    directions: Mapping[str, Tensor]
    """Those of :data:`DIRECTIONS`, from the original to the tuned model [D]."""
    seed: int
    random_dictionary: Control | None = None

    @classmethod
    def of(
        cls,
        params: InterveneParams,
        crosscoder: Crosscoder,
        original: str,
        found: Mapping[str, Any],
        editors: Mapping[str, Editor],
        directions: Mapping[str, Tensor],
        seed: int,
    ) -> Draws:
        """For sets of one crosscoder, which holds the model ``original``. ``found`` is what localization wrote, ``editors``
        make edits in other crosscoders, by fit."""
        counts = (params.random_sets, params.random_directions, params.single_features)
        shares_FM, column = mas(crosscoder.W_dec).numpy(), crosscoder.slot(original)
        other = found["random_dictionary"]
        rival = other and Control(RANDOM_DICTIONARY, 0, tuple(other["features"]), editor=editors[other["fit"]])
        return cls(*counts, shares_FM, column, found["shuffled"], directions, seed, rival)

    def controls(self, found: Sequence[int], sign: int, length_QF: Float[np.ndarray, "Q F"]) -> list[Control]:
        """The set ``found`` and everything to hold it against in one model, whose accuracy a claim says to move to ``sign``;
        ``length_QF`` is what each feature changes at the questions asked (:func:`lengths`)."""
        made = [Control(SET, 0, tuple(found))]
        made += [Control(name, 0, members) for name, members in self._sets(found, length_QF).items()]
        made += [self.random_dictionary] if self.random_dictionary else []
        for name in DIRECTIONS:
            if (length := self.directions[name].norm()) > 0:
                made.append(Control(name, 0, direction_D=sign * self.directions[name] / length))
        drawn = random_sets(found, length_QF, self.random_sets, stats.stream(self.seed, sign > 0))
        made += [Control(RANDOM, number, members) for number, members in enumerate(drawn)]
        d_model = len(self.directions[DIRECTIONS[0]])
        pushes = random_directions(d_model, self.random_directions, stats.stream(self.seed, sign > 0, 1))
        made += [Control(RANDOM_DIRECTION, number, direction_D=direction) for number, direction in enumerate(pushes)]
        if 1 < len(found) <= self.single_features:
            made += [Control("alone", i, (k,)) for i, k in enumerate(found)]
            made += [Control("without", i, tuple(other for other in found if other != k)) for i, k in enumerate(found)]
        return made

    def _sets(self, found: Sequence[int], length_QF: Float[np.ndarray, "Q F"]) -> dict[str, tuple[int, ...]]:
        compared = comparison_sets(found, self.mas_FM, self.original, length_QF)
        return compared | {"shuffled": tuple(self.shuffled)}
