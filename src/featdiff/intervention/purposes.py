"""What is asked of a feature set: which model is edited, which way a claim says that its accuracy moves, and the names of what
it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featdiff import stats
from featdiff.config.models import Roles

ZERO_TUNED, ZERO_CONTRAST, AMPLIFY_ORIGINAL = "zero_tuned", "zero_contrast", "amplify_original"
REPEAT = "repeat_"
"""Begins the name of zeroing the set in a repeat of the tuned model, before the name of the repeat."""

REMOVE, AMPLIFY = "remove", "amplify"
SIDES = (REMOVE, AMPLIFY)
"""What is done to the set, each by a stage of its own: all purposes but the last take it away."""

SET = "set"
SINGLE = ("alone", "without")
"""Controls that edit one feature of the set, or all but one, as long as they are."""
RANDOM, RANDOM_DIRECTION = "random", "random_direction"
DRAWN = (RANDOM, RANDOM_DIRECTION)
"""Controls of which many are drawn: their spread is what chance gives."""
DIRECTIONS = ("mean_difference", "first_component", "set_change")
"""Directions that tell the two models apart, without features or as the mean of what the set changes."""
RANDOM_DICTIONARY = "random_dictionary"
"""As many features of a frozen random dictionary, found in it by the same search."""
RIVALS = (*DIRECTIONS, RANDOM_DICTIONARY)
"""What does without learned features, and was found with the tuned model at hand as the set was."""


@dataclass(frozen=True)
class Purpose:
    """One question that is put to the set."""

    name: str
    model: str
    """The edited model."""
    alike: str
    """The model whose slot of the crosscoder reads it, where the crosscoder does not hold the edited model itself."""
    toward: str
    """The model that the edited one is to become like: the donor of a transplant, to whose answers its own are compared."""

    @property
    def sign(self) -> int:
        """Direction in which the claim says that accuracy moves."""
        return sign_of(self.name)

    @property
    def side(self) -> str:
        """What it does to the set, one of :data:`SIDES`."""
        return side_of(self.name)

    @property
    def chosen(self) -> bool:
        """Whether its setting is chosen on the tune split; any other purpose takes over what was chosen for ``zero_tuned``."""
        return self.name in (ZERO_TUNED, AMPLIFY_ORIGINAL)

    def slot_in(self, models: Sequence[str]) -> str | None:
        """The slot by which a crosscoder of ``models`` reads the edited model; None where it has none for it."""
        return next((name for name in (self.model, self.alike) if name in models), None)


def purposes(roles: Roles, repeats: Sequence[str]) -> list[Purpose]:
    """Is the set necessary in the tuned model, is it that model's alone (with a contrast model), is it sufficient in the
    original, and is it necessary in ``repeats`` of the tuned model (itself is left out), in which it was not found?"""
    toward = {ZERO_TUNED: roles.original, ZERO_CONTRAST: roles.original, AMPLIFY_ORIGINAL: roles.tuned}
    edited = {ZERO_TUNED: roles.tuned, ZERO_CONTRAST: roles.contrast, AMPLIFY_ORIGINAL: roles.original}
    found = [Purpose(name, model, model, toward[name]) for name, model in edited.items() if model is not None]
    return found + [Purpose(f"{REPEAT}{name}", name, roles.tuned, roles.original) for name in repeats if name != roles.tuned]


def needed(side: str, asked: Sequence[Purpose]) -> list[Purpose]:
    """Those of ``asked`` whose models one ``side`` edits or compares with: its own, and both whose settings are chosen."""
    return [purpose for purpose in asked if purpose.side == side or purpose.chosen]


def side_of(purpose: str) -> str:
    """What the purpose of this name does to the set, one of :data:`SIDES`."""
    return AMPLIFY if purpose == AMPLIFY_ORIGINAL else REMOVE


def sign_of(purpose: str) -> int:
    """Direction in which the claim behind the purpose of this name says that accuracy moves."""
    return 1 if side_of(purpose) == AMPLIFY else -1


def against_draws(effect: float, draws: Sequence[float], sign: int) -> dict[str, Any]:
    """What the effects of random sets say of ``effect``: their 5th and 95th percentile, whether it lies beyond all of them in
    the direction ``sign``, and its permutation p. All None without draws."""
    if not draws:
        return dict.fromkeys(("random_low", "random_high", "beyond_random", "p_random"))
    low, high = np.quantile(draws, [0.05, 0.95]).tolist()
    return {
        "random_low": low,
        "random_high": high,
        "beyond_random": sign * effect > max(sign * value for value in draws),
        "p_random": stats.draws_p(effect, draws, sign),
    }
