"""What readers see of a model: its label, and one colour with one meaning on every page."""

from __future__ import annotations

from collections.abc import Mapping

from featdiff.config.models import Arm, Roles

ORIGINAL, CONTRAST, TUNED = "#858d99", "#d9760d", "#2f7fd0"
FURTHER = ("#1f9e89", "#8c6bb1", "#c44e52", "#b08d3c", "#5b7f2b", "#64748b")
"""Colours of arms without a role, in their order; they start again where there are more arms."""


class Names:
    """Labels and colours of the models of one study; ``arms`` is the section of that name in params.yaml."""

    def __init__(self, roles: Roles, arms: Mapping[str, Arm]) -> None:
        self.arms = arms
        self._colours: dict[str, str] = {roles.original: ORIGINAL, roles.tuned: TUNED}
        if roles.contrast:
            self._colours[roles.contrast] = CONTRAST
        for model, colour in list(self._colours.items()):
            self._colours.setdefault(self.first(model), colour)
        further = [arm for arm in arms if self.first(arm) == arm and arm not in self._colours]
        self._colours |= {arm: FURTHER[i % len(FURTHER)] for i, arm in enumerate(further)}

    def first(self, model: str) -> str:
        """The arm that ``model`` repeats with another seed; a model that repeats none is its own first."""
        found = self.arms.get(model)
        return next((name for name, arm in self.arms.items() if found and arm.repeats(found)), model)

    def label(self, model: str) -> str:
        """``base``, ``SFT`` (an arm called like its method), ``SFT, seed 1`` (a repeat), or the name with blanks."""
        if (arm := self.arms.get(model)) is None:
            return model.replace("_", " ")
        if (first := self.first(model)) != model:
            return f"{self.label(first)}, seed {arm.seed}"
        return model.upper() if model == arm.method else model.replace("_", " ")

    def colour(self, model: str) -> str:
        """Grey for the original, orange for the contrast, blue for the tuned model; a repeat looks like its arm."""
        return self._colours.get(model) or self._colours.get(self.first(model), FURTHER[-1])
