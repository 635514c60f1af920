"""Parameters: one frozen class per section of params.yaml.

No class here holds a default: every number in force stands in params.yaml, where DVC can see it. The exception are the numbers
of losses that no profile uses (``CrosscoderTraining``). A key that no class knows is an error that names it. Importing this
module must stay cheap (no torch).
"""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from featdiff.config.reading import PARAMS, ConfigError, closest, flatten, legible, read_yaml, refuse_secrets


class Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
"""Owner and name of something on the hub, as a regular expression; no path leads out of a folder in this form."""


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError("a name is 1 to 40 lowercase letters, digits and underscores, and starts with a letter")
    return text


Name = Annotated[str, AfterValidator(_name)]
"""Becomes the name of a file, of a DVC stage or of an artifact."""
# Upper bounds tell a typo from a plan: each is at least ten times what models of 8B parameters, a million features and
# 400 million tokens need. None says that a machine can do it.
Positive = Annotated[int, Field(gt=0, le=10**6)]
Length = Annotated[int, Field(gt=0, le=131_072)]
"""Tokens of one text."""
Many = Annotated[int, Field(gt=0, le=5 * 10**7)]
"""Texts, problems, updates, features, tokens of one update."""
Tokens = Annotated[int, Field(gt=0, le=10**11)]
"""Tokens of a stream."""
Resamples = Annotated[int, Field(gt=0, le=10**5)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Place = Annotated[str, Field(min_length=1, max_length=4096)]
"""A path, or another form that says where something comes from."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Level = Annotated[float, Field(gt=0, lt=1)]
"""A probability that is neither 0 nor 1: of an interval, of a test."""
Temperature = Annotated[float, Field(ge=0.01, le=100)]
Rate = Annotated[float, Field(gt=0)]
BASE = "base"
"""Name of the model from which every arm starts."""
Role = Literal["train", "find", "control", "heldout"]
Position = Literal["prompt_last", "prompt", "generated", "all"]
Grading = Literal["strict", "flexible"]
Readout = Literal["swap", "slot", "contribution"]
"""What "the value of a feature in one model" means (featdiff.crosscoder.readout)."""
LossName = Literal["batchtopk", "l1", "dedicated", "delta", "frozen"]
"""Keys of ``featdiff.crosscoder.losses.table.LOSSES``, which cannot be asked here: it imports torch."""


class FamilyTask(Params):
    """A generated family of the model organism (featdiff.tasks.families)."""

    source: Literal["family"]
    role: Role


class ReasoningGymTask(Params):
    """A data set of the reasoning-gym package, scored by that package's own verifier."""

    source: Literal["reasoning_gym"]
    role: Role
    dataset: str
    """Name of the reasoning-gym data set, such as ``chain_sum``."""
    options: dict[str, Any]
    """Keyword arguments of that data set's configuration."""
    instruction: str
    """Sentence added after the question, such as "Give the final answer only."."""

    @model_validator(mode="after")
    def _options_are_small(self) -> ReasoningGymTask:
        for key, value in flatten(self.options).items():
            if isinstance(value, int) and abs(value) > 10**6:
                raise ValueError(f"options.{legible(key)} = {legible(str(value))} is beyond a million")
        return self


class SuiteTask(Params):
    """Questions with options, from a local jsonl file or a hub data set, read by one adapter."""

    source: Literal["suite"]
    role: Role
    adapter: Literal["openbookqa", "arc_challenge", "commonsense_qa", "sciq", "head_qa", "logiqa", "piqa", "columns"]
    """The suite whose columns the file has; ``columns`` takes any file through ``columns`` below."""
    path: Place
    """``suite:<kind>/<name>/<split>`` (found where ``prepare.suites`` says), a local ``.jsonl`` file, or
    ``hub:<owner>/<name>[:<config>]@<commit or branch>#<split>``."""
    scoring: Literal["option_text", "option_text_norm", "option_letter", "generation"]
    columns: dict[str, str] | None
    """For the adapter ``columns``: which column holds ``question`` and ``answer``, and where there are any
    ``options`` (a list, or several columns joined by commas), ``labels``, ``context``, ``solution``."""

    @model_validator(mode="after")
    def _columns_fit(self) -> SuiteTask:
        if (self.adapter == "columns") != (self.columns is not None):
            raise ValueError("columns: needed with adapter columns, and null with every other adapter")
        return self


Task = Annotated[FamilyTask | ReasoningGymTask | SuiteTask, Field(discriminator="source")]


class SplitSizes(Params):
    find: Positive
    """Samples per task on which features are found."""
    tune: Positive
    """Samples per task on which dose and positions are chosen."""
    report: Positive
    """Samples per task on which effects are reported."""


class CorpusParams(Params):
    """Text on which crosscoders are fitted."""

    texts: Many
    """Number of texts."""
    math_share: Fraction
    """Share of worked math among the texts; the rest is general text."""
    general: Place
    """``organism`` (generated texts of every family) or a jsonl file with a ``text`` column, or ``hub:…``."""
    max_chars: Positive
    """Texts are cut to this many characters."""


class PretrainTexts(Params):
    """Texts from which the organism's base is pretrained."""

    texts: Annotated[int, Field(ge=0, le=5 * 10**7)]
    """How many; 0 where the base comes from elsewhere."""
    steps_share: Fraction
    """Share answered step by step without an example: the rarer, the more it takes to tip the base into it."""
    direct_right_share: Fraction
    """Among the answers given at once, the share that is right."""
    example_share: Fraction
    """Share of texts (of the corpus too) in which a worked example in the same manner comes first."""
    example_steps_share: Fraction
    """Share of the examples that go step by step."""


class PrepareParams(Params):
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    train_problems: Many
    """Problems for SFT and GRPO, over all tasks with role ``train``."""
    teacher: Literal["own", "foreign"]
    """Wording of the SFT solutions: the base's own or one it has never seen."""
    chat: bool
    """Whether prompts are put in the tokenizer's chat template (likelihood scoring never does)."""
    grading: Grading
    """Which verdict on a generated answer is the reward and the accuracy: ``strict`` (a marked answer that names one value)
    or ``flexible`` (the last value of the text, which can be gamed); the other is recorded beside it (docs/grading.md)."""
    suites: Place
    """Where paths that begin with ``suite:`` are found: ``hub``, or a folder of jsonl files in the schemas of the hub's data
    sets, ``<folder>/<kind>/<name>/<split>.jsonl``."""
    max_question_chars: Positive
    """Questions of suites that are longer than this, options included, are left out."""
    samples: SplitSizes
    corpus: CorpusParams
    pretrain: PretrainTexts

    @model_validator(mode="after")
    def _has_training_domain(self) -> PrepareParams:
        if not any(task.role == "train" for task in self.tasks.values()):
            raise ValueError("no task has role: train; give at least one a training role")
        if not any(task.role == "find" for task in self.tasks.values()):
            raise ValueError("no task has role: find; features need at least one task to be found on")
        return self


class Pretraining(Params):
    """Pretraining of the organism: packed rows, AdamW, warm-up then constant then linear decay."""

    layers: Positive
    d_model: Positive
    d_mlp: Positive
    heads: Positive
    row_tokens: Length
    """Tokens in one packed row; samples in a row do not see each other."""
    batch_tokens: Many
    """Tokens per update, over all processes."""
    steps: Many
    lr: Rate
    warmup_steps: Annotated[int, Field(ge=0, le=5 * 10**7)]
    decay_share: Fraction
    """Last share of the steps over which the learning rate falls linearly to 0."""
    prompt_weight: Fraction
    """Loss weight of prompt tokens, which are random and cannot be predicted."""
    weight_decay: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _can_be_built(self) -> Pretraining:
        weights = self.layers * self.d_model * (4 * self.d_model + 3 * self.d_mlp)
        if weights > 10**9:
            raise ValueError(f"layers, d_model and d_mlp make {weights:.1e} weights, and an organism has at most 1e9")
        if self.d_model // self.heads % 2 or self.d_model < 2 * self.heads:
            raise ValueError(f"d_model = {self.d_model} over heads = {self.heads} must give an even width of at least 2")
        if self.batch_tokens < self.row_tokens:
            raise ValueError(f"batch_tokens = {self.batch_tokens} is less than one row, row_tokens = {self.row_tokens}")
        return self


class BaseParams(Params):
    source: Place
    """``pretrain``, a local model folder, ``gguf:<package>`` (a GGUF file inside an installed package),
    or ``hub:<owner>/<name>@<commit>``."""
    dtype: Literal["float32", "bfloat16"]
    pretraining: Pretraining


class SFTParams(Params):
    """Supervised fine-tuning on the teacher's solutions."""

    teacher: Literal["own", "foreign"] | None
    """Wording of the solutions: the base's own or one it has never seen; null for what ``prepare.teacher`` says."""
    schedule: Literal["linear", "constant_with_warmup"]
    """Of the learning rate after its warm-up."""
    epochs: Annotated[float, Field(gt=0, le=10**4)]
    batch_size: Positive
    """Problems per update, over all processes."""
    micro_batch_size: Positive
    """Problems per forward pass of one process."""
    lr: Rate
    warmup_share: Fraction
    max_length: Length
    """Tokens; a longer sample is an error in `prepare`, never cut silently."""
    checkpoints: Positive
    """Checkpoints kept, evenly spaced, the last being the final model."""


class GRPOParams(Params):
    """Reinforcement learning by GRPO, in which the final answer alone is rewarded."""

    steps: Many
    """Optimizer updates."""
    prompts_per_step: Positive
    """Different prompts per update, over all processes."""
    rollouts: Annotated[int, Field(ge=2, le=10**4)]
    """Completions per prompt, the group of GRPO."""
    micro_batch_size: Positive
    """Completions per forward and backward pass of one process."""
    lr: Rate
    warmup_share: Fraction
    temperature: Temperature
    max_new_tokens: Length
    beta: Annotated[float, Field(ge=0)]
    """Weight of the KL term against the base; 0 leaves it out."""
    epsilon: Rate
    """Clip range of the importance ratio."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"]
    scale_rewards: Literal["group", "batch", "none"]
    checkpoints: Positive

    @model_validator(mode="after")
    def _batches_fit(self) -> GRPOParams:
        completions = self.prompts_per_step * self.rollouts
        if completions % self.micro_batch_size:
            raise ValueError(
                f"prompts_per_step x rollouts = {completions} is not a multiple of micro_batch_size = {self.micro_batch_size}"
            )
        if self.steps % self.checkpoints:
            raise ValueError(f"steps = {self.steps} is not a multiple of checkpoints = {self.checkpoints}")
        return self


class OwnAnswersParams(Params):
    """Training on answers that the base gave itself."""

    samples: Annotated[int, Field(ge=1, le=10**4)]
    """Answers sampled from the base for every problem."""
    temperature: Temperature
    max_new_tokens: Length
    sampling_batch_size: Positive
    schedule: Literal["linear", "constant_with_warmup"]
    steps: Many
    """Optimizer updates; what is taught is gone through as often as that takes."""
    batch_size: Positive
    """Answers, or pairs of them, per update, over all processes."""
    micro_batch_size: Positive
    lr: Rate
    warmup_share: Fraction
    checkpoints: Positive


class RFTParams(OwnAnswersParams):
    """Rejection sampling: the base's own right answers, then the loss of SFT on them."""

    kept: Positive
    """Different right answers kept for a problem, at most."""


class DPOParams(OwnAnswersParams):
    """Direct preference optimisation: of the base's own answers to a problem, a right one before a wrong one."""

    samples: Annotated[int, Field(ge=2, le=10**4)]
    """Answers sampled from the base for every problem, of which a pair takes two."""
    pairs: Positive
    """Pairs kept for a problem, at most."""
    beta: Rate
    """Strength of the pull to the base."""


class ImportedParams(Params):
    """A finished model that comes from elsewhere."""

    source: Place | None
    """A model folder, a folder of a PEFT adapter (merged on arrival), or ``hub:<owner>/<name>@<commit>``; each arm names its
    own, so the section of params.yaml says null."""
    checkpoints: list[Place]
    """Earlier checkpoints of it in order, in the same forms."""
    dtype: Literal["float32", "bfloat16"]


class NoiseParams(Params):
    """The base with noise on its weights, which was taught nothing."""

    size: Annotated[float, Field(gt=0, le=10)]
    """Length of the noise over that of the base's weights, all tensors together."""
    checkpoints: Positive
    """Equal steps to the whole noise, each of which is kept."""


METHODS: dict[str, type[Params]] = {
    "sft": SFTParams,
    "grpo": GRPOParams,
    "rft": RFTParams,
    "dpo": DPOParams,
    "imported": ImportedParams,
    "noise": NoiseParams,
}
"""How an arm may come from the base: a section of params.yaml, and a module of featdiff.training of that name."""


def _method(text: str) -> str:
    if text not in METHODS:
        raise ValueError(f"no method; {closest(text, METHODS)}")
    return text


Method = Annotated[str, AfterValidator(_method)]


class Arm(BaseModel):
    """One model that is compared with the base: its method, and the numbers of the method that it changes. Arms that differ in
    their seed alone are repeats of the first of them."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    method: Method
    seed: Seed = 0
    """Added to the study's seed."""

    @property
    def changes(self) -> dict[str, Any]:
        """What it changes of its method's section."""
        return dict(self.model_extra or {})

    def repeats(self, other: Arm) -> bool:
        """Whether it differs from ``other`` in the seed alone, if at all."""
        return (self.method, self.changes) == (other.method, other.changes)


class Roles(Params):
    """Who plays which part in the claims."""

    original: Name
    """The model before; what the tuned one gained is gained over it."""
    tuned: Name
    """The model whose features are sought, switched off in it and on in the original."""
    contrast: Name | None
    """Another arm from the same base, for what only one of the two does; null without one."""

    @property
    def models(self) -> list[str]:
        """All that there are, the original first."""
        return [name for name in (self.original, self.contrast, self.tuned) if name is not None]


class EvaluateParams(Params):
    batch_size: Positive
    max_new_tokens: Length
    draws: Annotated[int, Field(ge=0, le=10**4)]
    """Sampled answers per question beside the greedy one."""
    temperature: Temperature
    confidence: Level
    bootstrap: Resamples
    """Resamples behind each interval."""


class CheckpointsParams(Params):
    """What is asked of every kept checkpoint of every arm."""

    questions: Positive
    """Questions of the report split per task, the first of them."""
    prompts: Positive
    """Of these, the questions per task on which the KL divergence from the base is measured."""
    batch_size: Positive
    max_new_tokens: Length
    confidence: Level
    bootstrap: Resamples


class ActivationsParams(Params):
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
    loss: LossName
    seed: Seed

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


class DescribeParams(Params):
    """What is read to say what the features of the set are (featdiff.description.describe)."""

    samples: Positive
    """Questions of the find split per task, read with the tuned model's own answers."""
    corpus_tokens: Tokens
    """Tokens of the corpus that are searched for contexts, the first of the stream of ``activations``."""
    contexts: Positive
    """Strongest contexts kept per feature for each task and for the corpus."""
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


class ResumeParams(Params):
    """Going on after a kill; part of no stage's signature."""

    every_seconds: Annotated[float, Field(ge=0)]
    """Work that a killed stage loses at most, rounded up to a whole step; 0 saves after every one."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Largest share of a stage's time that goes into saving: where one save is dear (large models), the interval grows."""


class ReportParams(Params):
    """Words on the page and the rules behind the verdicts (featdiff.report.verdicts)."""

    title: str
    about: str
    """One sentence on this profile: which base, and what the study of it can show."""
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


class Study(Params):
    """The whole of params.yaml."""

    profile: Name
    seed: Seed
    prepare: PrepareParams
    base: BaseParams
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    roles: Roles
    sft: SFTParams
    grpo: GRPOParams
    rft: RFTParams
    dpo: DPOParams
    imported: ImportedParams
    noise: NoiseParams
    evaluate: EvaluateParams
    checkpoints: CheckpointsParams
    activations: ActivationsParams
    crosscoder: CrosscoderParams
    attribution: AttributionParams
    dynamics: DynamicsParams
    localize: LocalizeParams
    describe: DescribeParams
    intervene: InterveneParams
    report: ReportParams
    resume: ResumeParams

    def numbers(self, name: str) -> Any:
        """The numbers in force for the arm ``name``: its method's section with its own changes."""
        arm = self.arms[name]
        section = getattr(self, arm.method).model_dump()
        if unknown := [key for key in arm.changes if key not in section]:
            raise ConfigError(f"params.yaml: arms.{name}.{legible(unknown[0])}: unknown key; {closest(unknown[0], section)}")
        return parse(METHODS[arm.method], section | arm.changes, f"params.yaml: arms.{name}")

    def repeats(self, name: str) -> list[str]:
        """The arm ``name`` and those that differ from it in their seed alone, in their order; a base has none but itself."""
        if name not in self.arms:
            return [name]
        return [other for other, arm in self.arms.items() if arm.repeats(self.arms[name])]

    @property
    def models(self) -> list[str]:
        """The base and every arm."""
        return [BASE, *self.arms]

    @property
    def fits(self) -> dict[str, Fit]:
        """Every crosscoder by name, those of ``crosscoder.pairs`` last."""
        pairs = {
            f"{PAIR}{arm}": Fit(models=[BASE, arm], loss=self.crosscoder.pairs.loss, seed=self.crosscoder.pairs.seed)
            for arm in self.arms
        }
        return self.crosscoder.fits | self.crosscoder.wide | pairs

    def null(self, fit: str) -> bool:
        """Whether nothing in this crosscoder can be specific: a model with itself, or repeats of one arm."""
        first, *others = dict.fromkeys(self.fits[fit].models)
        return all(other in self.repeats(first) for other in others)

    @model_validator(mode="after")
    def _models_exist(self) -> Study:
        if reserved := {BASE, AGAIN, SHARED, NEW, MIXED, DEAD, SPECIFIC} & set(self.arms):
            raise ValueError(f"arms.{min(reserved)}: this name is taken; choose another")
        for name, arm in self.arms.items():
            if arm.method == "imported" and self.numbers(name).source is None:
                raise ValueError(f"arms.{name}.source: missing; name the model that is imported")
            self.numbers(name)
        named = {f"crosscoder.fits.{fit}.models": found.models for fit, found in self.crosscoder.fits.items()}
        named |= {f"crosscoder.wide.{fit}.models": found.models for fit, found in self.crosscoder.wide.items()}
        named |= {"roles": self.roles.models, "dynamics.arms": self.dynamics.arms}
        known = {key: list(self.arms) if key == "dynamics.arms" else self.models for key in named}
        for key, models in named.items():
            if absent := [model for model in models if model not in known[key]]:
                raise ValueError(f"{key}: {absent[0]!r} is no arm; {closest(absent[0], known[key])}")
        if len(set(self.roles.models)) != len(self.roles.models) or self.roles.tuned not in self.arms:
            raise ValueError("roles: original, tuned and contrast are different models, and tuned is an arm")
        return self

    @model_validator(mode="after")
    def _fits_exist(self) -> Study:
        for section in ("dynamics", "localize"):
            fit = getattr(self, section).fit
            if fit not in self.fits:
                raise ValueError(f"{section}.fit = {fit} is not in crosscoder.fits; {closest(fit, self.fits)}")
        needed = {self.roles.original, self.roles.tuned}
        if missing := sorted(needed - set(self.fits[self.localize.fit].models)):
            raise ValueError(
                f"localize.fit = {self.localize.fit} does not hold {', '.join(missing)}, which roles name; take another fit"
            )
        if BASE not in self.fits[self.dynamics.fit].models:
            raise ValueError(f"dynamics.fit = {self.dynamics.fit} does not hold {BASE}, where arms start; take another fit")
        first, other = self.fits[self.localize.fit], self.localize.random_dictionary
        for key, names in {"seeds": self.localize.seeds, "random_dictionary": [other] if other else []}.items():
            for name in names:
                if name not in self.fits or self.fits[name].models != first.models:
                    raise ValueError(
                        f"localize.{key}: {name} is no fit of the models of {self.localize.fit}; add it or leave it out"
                    )
        if other and self.fits[other].loss != "frozen":
            raise ValueError(f"localize.random_dictionary: {other} has another loss than frozen; take another fit")
        return self

    @model_validator(mode="after")
    def _tokens_give_a_batch(self) -> Study:
        training = self.crosscoder.training
        for name in ("tokens", "checkpoint_tokens"):  # those of the fits, and those of their refits on checkpoints
            tokens = getattr(self.activations, name)
            if (rows := training.train_rows(tokens)) < training.batch_tokens:
                raise ValueError(
                    f"activations.{name} = {tokens} leaves {rows} to fit on, less than one batch of "
                    f"crosscoder.training.batch_tokens = {training.batch_tokens}; raise the one or lower the other"
                )
        return self


P = TypeVar("P", bound=Params)


def _is_class(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _walk(annotation: Any, location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The keys of ``location`` as they stand in the file (pydantic puts members of unions among them), and the
    names allowed where the last of them stands (none where any name is)."""
    keys: list[str] = []
    allowed: list[str] = []
    for part in location:
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if get_origin(annotation) in (Union, UnionType):
            classes = [member for member in get_args(annotation) if _is_class(member)]
            tagged = [member for member in classes if part in get_args(member.model_fields["source"].annotation)]
            if not tagged:
                break
            annotation = tagged[0]
            continue
        keys.append(str(part))
        allowed = list(annotation.model_fields) if _is_class(annotation) else []
        if str(part) in allowed:
            annotation = annotation.model_fields[str(part)].annotation
        else:
            annotation = get_args(annotation)[-1] if get_origin(annotation) in (dict, list) else None
    return keys, allowed


def parse(cls: type[P], data: Any, source: str) -> P:
    """``data`` as ``cls``; raises ConfigError with one line naming ``source``, key, found and expected."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        keys, allowed = _walk(cls, first["loc"])
        key, found = ".".join(legible(part) for part in keys if part != "[key]") or "(top level)", first["input"]
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = f"unknown key; {closest(keys[-1], allowed)}"
            found = keys[-1]
        elif first["type"] == "missing":
            said, found = "missing", "nothing"
        elif first["type"] == "float_type" and isinstance(found, str) and any(map(str.isdigit, found)):
            said += ", without quotes and with a decimal point before any exponent"
        alike = [other for other in others if _walk(cls, other["loc"])[0] == keys]  # other members of one union
        said = " or ".join([said, *(other["msg"] for other in alike)])
        shown = "" if isinstance(found, (dict, BaseModel)) else f" (found {legible(repr(found))})"
        rest = f" [and {len(others) - len(alike)} more]" if len(others) > len(alike) else ""
        raise ConfigError(f"{source}: {key}: {said}{shown}; edit {source}{rest}") from None


def load_study(path: Path = PARAMS) -> Study:
    """Every parameter in force."""
    data = read_yaml(path)
    refuse_secrets(data, str(path))
    return parse(Study, data, str(path))
