"""A verdict per claim: rules written before the numbers, applied to tables.

A claim is a conjunction of criteria; each holds, fails, or stays open where the data cannot tell. All hold:
supported. One fails: not supported. Otherwise: undecided. That an effect was not seen is no failure where one of
the size that counts could have been missed (:func:`told`). Thresholds are in the section ``report`` of
params.yaml. The word causal is used of an effect only where it lies beyond the 95th percentile of matched random sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from featdiff.stats import Interval

Status = Literal["supported", "not supported", "undecided"]


@dataclass(frozen=True)
class Criterion:
    """One condition of a claim, what was found of it in words with its numbers, and whether it ``holds``: None where the data
    cannot tell."""

    condition: str
    found: str
    holds: bool | None

    @property
    def text(self) -> str:
        """Condition and finding in one sentence."""
        return f"{self.condition}: {self.found}"


@dataclass(frozen=True)
class Verdict:
    key: str
    claim: str
    status: Status
    evidence: str
    """One sentence or two with numbers, n and interval."""
    weakest_link: str
    criteria: tuple[Criterion, ...]
    estimates: dict[str, Interval] = field(default_factory=dict)
    """The numbers that decide it, by what they measure."""


def decide(criteria: Sequence[Criterion]) -> Status:
    """The conjunction of ``criteria`` under three values; without criteria nothing is decided."""
    if any(criterion.holds is False for criterion in criteria):
        return "not supported"
    return "supported" if criteria and all(criterion.holds for criterion in criteria) else "undecided"


def settled(yes: bool, no: bool) -> bool | None:
    """True, False, or open."""
    return True if yes else False if no else None


def at_least(estimate: Interval | None, bound: float) -> bool | None:
    """Whether an effect is ``bound`` or more and not zero: True if the mean reaches it and the interval is above
    zero, False if the interval ends below ``bound``, None between."""
    if estimate is None:
        return None
    return settled(estimate.value >= bound and estimate.low > 0, estimate.high < bound)


def told(estimate: Interval | None, bound: float) -> bool:
    """Whether the questions tell of an effect at all: that there is one, or that it is less than ``bound``. Where they do
    not, a comparison with controls that comes out against a claim is noise, and leaves it open."""
    return estimate is not None and (estimate.low > 0 or estimate.high < bound)


def reversed_sign(estimate: Interval | None) -> Interval | None:
    """The same difference taken the other way round."""
    return estimate and estimate._replace(value=-estimate.value, low=-estimate.high, high=-estimate.low)
