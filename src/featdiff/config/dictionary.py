"""Sections ``activations``, ``crosscoder``, ``attribution``, ``dynamics``: what is read of the models and fitted to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from featdiff.config.values import Fraction, Length, LossName, Many, Name, Params, Positive, Rate, Resamples, Seed, Tokens


class ActivationsParams(Params):
    source: Literal["activations", "models"]
    """Folder out of which crosscoders read their rows: ``activations``, where every row is kept, or ``models``, which run again
    for every pass over the rows, and nothing is kept. The rows are the same to the bit."""
    layer: int | Literal["middle"]
    """Residual stream after this many blocks; ``middle`` is half of them, rounded down."""
    tokens: Tokens
    """Tokens of the stream; the corpus is read from its start until there are enough."""
    checkpoint_tokens: Tokens
    """Tokens harvested for each checkpoint, the first of the same stream. ``dynamics`` fits crosscoders on them."""
    max_length: Length
    """Longest text in tokens; longer ones are cut."""
    drop_first_token: bool
    """Leave out the first token of every text (its activation is an outlier in most models)."""
    batch_size: Positive
    dtype: Literal["float32", "bfloat16"]
    shard_rows: Many
    """Rows of a file. With ``source: models`` nothing is written, but batches are made up within so many rows: little beside
    4096, of which rows are read together when they are shuffled, else most of what a model computes is not used."""


AGAIN = "again"
"""Name of a model's second appearance in a crosscoder with itself."""
PAIR = "pair_"
"""How the crosscoder of base and an arm is called, before the name of the arm."""
SHARED, NEW, MIXED, DEAD, SPECIFIC = "shared", "new", "mixed", "dead", "specific"
"""What a feature may be beside one model's own (featdiff.attribution.norms), so that no arm can have such a name."""


class Fit(Params):
    """One crosscoder. In ``crosscoder.fits`` ``models`` names three inputs for dvc.yaml: a pair repeats its last model. A null
    pair is one model three times, which is then compared with itself, or two repeats of an arm: what such a fit calls specific
    is an error of the method."""

    models: Annotated[list[Name], Field(min_length=2)]
    loss: LossName | Literal["imported"]
    seed: Seed
    source: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """``imported``: folder of a crosscoder or an SAE that was fitted elsewhere (featdiff.crosscoder.imported)."""

    @model_validator(mode="after")
    def _fitted_or_brought(self) -> Fit:
        if (self.loss == "imported") is (self.source is None):
            raise ValueError("loss: imported needs the folder that it comes from as source, and no other loss has one")
        return self

    @property
    def slots(self) -> dict[str, str]:
        """Names of the models in this crosscoder, first the original, and whose activations each reads."""
        slots: dict[str, str] = {model: model for model in self.models}
        return slots if len(slots) > 1 else slots | {AGAIN: self.models[0]}


class PairFits(Params):
    """The crosscoders of the base and each arm, which need not be listed."""

    loss: LossName
    seed: Seed


class CrosscoderTraining(Params):
    """How every crosscoder is trained. A loss reads the numbers that carry its name and ignores those of other losses."""

    n_features: Many
    batch_tokens: Many
    """Tokens per step, over all processes."""
    steps: Many
    lr: Rate
    warmup_share: Fraction
    """Share of the steps over which the learning rate rises."""
    decay_share: Fraction
    """Last share of the steps over which it falls to 0."""
    k: Positive
    """BatchTopK: active features per token, on average over a batch."""
    aux_k: Positive
    """BatchTopK: dead features per token that rebuild the error of the others."""
    aux_weight: Annotated[float, Field(ge=0)]
    """BatchTopK: weight of that rebuilding in the loss."""
    dead_after_tokens: Tokens
    """A feature that has not fired for this many tokens counts as dead."""
    l1_weight: Rate
    """ReLU+L1: λ."""
    l1_warmup_share: Fraction
    """ReLU+L1: share of the steps over which λ rises from 0."""
    decoder_norm: Rate
    """Norm of each model's decoder rows at the start."""
    heldout_share: Fraction
    """Share of the tokens kept out of the fit, on which FVE and L0 are measured."""
    log_every: Positive
    """Steps from one point of the curves to the next."""
    dedicated_share: Fraction = 0.05
    """Dedicated features: share of the dictionary that each model has to itself."""
    delta_share: Fraction = 0.25
    """Delta features: share of the dictionary that must explain the difference between the models."""
    delta_weight: Rate = 1.0
    """Delta features: weight of that difference in the loss."""

    def train_rows(self, rows: int) -> int:
        """How many of ``rows`` are fitted on; the rest is held out."""
        return rows - int(rows * self.heldout_share)

    @model_validator(mode="after")
    def _k_features_exist(self) -> CrosscoderTraining:
        if self.k > self.n_features:
            raise ValueError(f"k = {self.k} is more than n_features = {self.n_features}")
        return self


class CrosscoderParams(Params):
    training: CrosscoderTraining
    fits: Annotated[dict[Name, Fit], Field(min_length=1)]
    """Of two or three models each; made again when the activations of one of them change."""
    wide: dict[Name, Fit]
    """Of more models; made again when any activations change."""
    pairs: PairFits

    @model_validator(mode="after")
    def _three_inputs(self) -> CrosscoderParams:
        for name, fit in self.fits.items():
            if len(fit.models) != 3:
                raise ValueError(
                    f"fits.{name}.models has {len(fit.models)} entries, not 3; a pair repeats its last model, and more than "
                    f"three models go to crosscoder.wide"
                )
        names = [*self.fits, *self.wide]
        if wrong := [name for name in names if name.startswith(PAIR) or names.count(name) > 1]:
            raise ValueError(f"{wrong[0]}: a name in both fits and wide, or one that begins with {PAIR}; take another")
        return self


class AttributionParams(Params):
    shared_band: Annotated[list[float], Field(min_length=2, max_length=2)]
    """NRN between these bounds is called shared; below is the first model's alone, above the second's."""
    joint_dominance: Fraction
    """MAS share above which a feature of a crosscoder of three and more models is called one model's own."""
    scaling_tokens: Tokens
    """Most tokens on which latent scaling is computed: the first of those that the crosscoder was not fitted on."""
    nu_error: Fraction
    """A feature is one model's own below this ratio of its error scaling in another model."""
    nu_reconstruction: Fraction
    """And below this ratio of its reconstruction scaling."""


class DynamicsParams(Params):
    fit: Name
    """The crosscoder that serves as fixed dictionary."""
    top: Annotated[list[Positive], Field(min_length=1)]
    """Sizes n of the top-n sets whose overlap over checkpoints is reported."""
    bootstrap: Resamples
    """Of blocks of texts, for the intervals of overlap and change."""
    arms: list[Name]
    """Arms whose checkpoints are read."""
    refit_steps: Many
    """Steps for which they are trained on."""
    refit_lr: Rate
    """Learning rate of those steps, in place of the one of ``crosscoder.training``."""
