"""Sections ``localize``, ``stitch``, ``describe``, ``intervene``: how a set of features is found, read and tested."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from featdiff.config.values import Fraction, Length, Level, Name, Params, Position, Positive, Rate, Readout, Resamples, Tokens


class LocalizeParams(Params):
    fit: Name
    """The crosscoder in which features are found."""
    seeds: list[Name]
    """The same crosscoder with other seeds: does the set come out again?"""
    random_dictionary: Name | None
    """A crosscoder with a frozen random dictionary, in which the same search finds a set to hold the found one against."""
    least_cosine: Fraction
    """Decoder cosine from which two features that are each other's best match across seeds count as the same."""
    readout: Readout
    positions: Literal["prompt_last", "answer", "all"]
    """Where scores are taken."""
    threshold: Fraction
    """A feature counts for a task from this share of the task's largest score."""
    largest_set: Fraction
    """Share of all features that a set may have; where more reach the threshold on every task, it is raised."""
    thresholds: Annotated[list[Fraction], Field(min_length=1)]
    """Of the sweep that shows what hangs on that share."""
    shuffles: Resamples
    """Of the models' identities, for the size of the set by chance."""
    min_flipped: Positive
    """Fewest samples that the original model fails and the tuned one solves for a task to take part."""
    bootstrap: Resamples
    batch_size: Positive

    @property
    def fits(self) -> list[str]:
        """Every crosscoder in which a set is sought."""
        return [self.fit, *self.seeds, *([self.random_dictionary] if self.random_dictionary else [])]


class StitchParams(Params):
    """Original and tuned model stitched together at several depths (featdiff.localization.stitching)."""

    depths: Positive
    """Seams at even distances; there is one at the hooked layer as well."""
    questions: Positive
    """Questions of the report split per task, the first of them."""
    batch_size: Positive
    max_new_tokens: Length


class DescribeParams(Params):
    """What is read to say what the features of the set are (featdiff.description.describe)."""

    samples: Positive
    """Questions of the find split per task, read with the tuned model's own answers."""
    shaded: Positive
    """Questions of the report split per task, every token of which is kept for the page of answers."""
    corpus_tokens: Tokens
    """Tokens of the corpus that are searched for contexts, the first of the stream of ``activations``."""
    contexts: Positive
    """Strongest contexts kept per feature for each task and for the corpus."""
    quantiles: list[Level]
    """Of a feature's largest values in the texts of the corpus in which it fires: a context is kept near each."""
    bins: Positive
    """Of the histogram of a feature's values in the corpus."""
    alike: Level
    """Correlation of values in the corpus from which two features count as telling the same."""
    window: Length
    """Tokens shown on either side of a context's strongest one."""
    tokens: Positive
    """Tokens named per feature as promoted, suppressed, more likely and less likely."""
    planted_tokens: Positive
    """A feature's own top tokens that are planted in neutral text."""
    planted_texts: Positive
    """Neutral texts per feature, and strongest contexts that they are held against."""
    token_detector: Fraction
    """Share of its value in those contexts that planting alone must reach for a feature to be called a token detector."""
    probe_features: Annotated[list[Positive], Field(min_length=1)]
    """Features that a sparse probe of the manner reads; a probe for each number (featdiff.description.probe)."""
    probe_least: Positive
    """Questions of a task that must have a step-by-step answer, and another one, for probes to be asked about it."""
    probe_penalty: Rate
    """Weight of half the squared coefficients in the fit of a probe, beside the summed log-loss of its standardised rows."""
    confidence: Level
    bootstrap: Resamples
    batch_size: Positive


class InterveneParams(Params):
    """How a feature set is tested, and against what (featdiff.intervention)."""

    positions: Annotated[list[Position], Field(min_length=1)]
    """Tried on the tune split, the gentlest first."""
    remove: Annotated[list[Literal["zero", "transplant"]], Field(min_length=1)]
    """Edits tried to take the set away from the tuned model: its features to zero, or to the values of the original."""
    amplify: Annotated[list[Literal["scale", "add", "transplant"]], Field(min_length=1)]
    """Edits tried to amplify it in the original model."""
    doses: Annotated[list[Rate], Field(min_length=1)]
    """Tried on the tune split; widened until they span from hardly an effect to saturation (featdiff.crosscoder.edits says what
    dose 1 is)."""
    most_of_effect: Level
    """Share of the largest effect that the chosen setting, the gentlest, must have."""
    random_sets: Annotated[int, Field(ge=20, le=10**5)]
    """Random sets of features that act on the questions asked, each made as long as the set; the word causal needs an effect
    beyond the 95th percentile of them."""
    random_directions: Annotated[int, Field(ge=1, le=10**5)]
    """Random directions, pushed as far."""
    other_draws: Positive
    """How many of both are tried in models in which nothing is chosen: the contrast and repeats of the tuned model."""
    control_questions: Positive
    """Questions per task of the tune split on which the setting of a control is chosen."""
    draw_questions: Positive
    """Questions per task of the report split that are asked under random sets and directions, of which many are drawn."""
    single_features: Annotated[int, Field(ge=0, le=10**6)]
    """Up to this size of the set, each feature is also edited alone and left out."""
    collateral_texts: Positive
    """Texts of the corpus, from its end, whose perplexity is measured under every edit."""
    collateral_tokens: Length
    """Longest of them; longer ones are cut."""
    tolerance: Fraction
    """Change of accuracy below which a larger dose adds nothing."""
    confidence: Level
    bootstrap: Resamples
    batch_size: Positive
    """Questions under edits that are answered at once."""
    max_new_tokens: Length
