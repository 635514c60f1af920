"""Sections ``teachers``, ``base``, ``arms`` and those of the methods, ``roles``, ``evaluate``, ``checkpoints``: which models
are compared, and what each is asked."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from featdiff.config.reading import closest
from featdiff.config.values import (
    Fraction,
    Length,
    Level,
    Many,
    Name,
    Params,
    Place,
    Positive,
    Rate,
    Resamples,
    Seed,
    Temperature,
)


class SamplingParams(Params):
    """Answers that are drawn from a model."""

    samples: Annotated[int, Field(ge=1, le=10**4)]
    """For every problem."""
    temperature: Temperature
    max_new_tokens: Length
    sampling_batch_size: Positive


class TeacherParams(SamplingParams):
    """A model whose right answers to the train problems are what arms are shown as solutions."""

    source: Place
    """In the forms of ``base.source``, but ``pretrain``."""
    dtype: Literal["float32", "bfloat16"]
    chat: bool
    """Whether it is asked through its tokenizer's chat template, or with the prompt as arms read it."""
    instruction: str
    """In a chat, what is said after the question."""

    @model_validator(mode="after")
    def _instruction_is_said(self) -> TeacherParams:
        if self.instruction and not self.chat:
            raise ValueError("instruction: said in a chat alone; set chat: true, or leave it empty")
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
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    """Of each process on a CPU, while all other stages wait for the base; None: as many as any stage has."""

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
    """Of the weights as they are saved and of what computes on them when they are read; that of every arm. Arms that are
    trained here are float32: a bfloat16 number has no room for what a small learning rate changes."""
    pretraining: Pretraining


class TrainedParams(Params):
    """What all methods say that change the base's weights here."""

    blocks: Positive | None
    """Of the model's blocks, the first so many are changed and nothing else is: what the arm learns then passes through the
    residual stream above them. Null: all weights."""


def _module(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", text):
        raise ValueError("the last part of a module's name, such as q_proj")
    return text


class LoRAParams(Params):
    """Low-rank changes in place of all weights (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank · B A, of which A and B are
    trained. What is saved, and read by the study, is the sum."""

    rank: Positive
    alpha: Rate
    targets: Annotated[list[Annotated[str, AfterValidator(_module)]], Field(min_length=1)]
    """Linear maps that are changed, by the last part of their names."""


class LearnedParams(TrainedParams):
    """What methods say that learn by gradients."""

    lora: LoRAParams | None
    """Null: weights themselves are trained. With ``blocks``, the maps of those blocks alone are changed."""


class SFTParams(LearnedParams):
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


class GRPOParams(LearnedParams):
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


class OwnAnswersParams(LearnedParams, SamplingParams):
    """Training on answers that the base gave itself."""

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


class NoiseParams(TrainedParams):
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
