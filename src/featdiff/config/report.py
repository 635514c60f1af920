"""Section ``report``: words on the page, and thresholds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from featdiff.config.values import Fraction, Level, Params, Positive, Rate, Resamples


class ReportParams(Params):
    """Words on the page and the rules behind the verdicts (featdiff.report.verdicts)."""

    title: str
    about: str
    """One sentence on this profile: which base, and what the study of it can show."""
    paper_model: Annotated[str, Field(min_length=1, max_length=100)] | None
    """Whose published figures (conf/published.yaml) the report shows beside this study's own; None: nobody's."""
    max_samples_shown: Positive
    confidence: Level
    """Level of the intervals around means over tasks."""
    bootstrap: Resamples
    min_effect: Fraction
    """Smallest change in accuracy that counts."""
    something_to_lose: Fraction
    """A base this far above chance on a task can be seen to forget it."""
    own_features_ratio: Rate
    """How many times as many features of its own as the tuned model the contrast must have to count as adding many."""
    min_own_share: Fraction
    """By what share of the live features it must have more than that."""
    early_share: Fraction
    """Checkpoints within this first share of training are early."""
    overlap_margin: Fraction
    """How much lower the overlap of early and last top features must be for those that keep changing, as a share of the way
    from chance to the overlap of one checkpoint read twice."""
    small_set: Fraction
    """Largest share of all features that a small set may have."""
    min_heldout: Positive
    """Tasks never used in selection on which the set must act."""
    alpha: Level
    """Largest p-value, after correction for the number of tasks, that counts."""
    power: Level
    """With which the smallest detectable effect would be found."""
    returned: Level
    """Share of the tuned model's answers that must be like those of the original once the set is taken away."""
    unread_margin: Fraction
    """How many more answers than the original's may then be unreadable: beyond it the drop is called damage."""
    selectivity: Rate
    """How many times as long a change the median control must need for half of the set's gain."""
    dictionary_margin: Fraction
    """What the set must do beyond the best single direction or random dictionary for the dictionary to be needed."""
    control_share: Fraction
    """Share of the set's effect that a set which ought to do nothing may have."""
    stable_effect: Fraction
    """Mean cosine, over pairs of crosscoder seeds, of the changes that their sets make, from which the set counts as stable."""
