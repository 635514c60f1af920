"""Parameters: the whole of params.yaml, whose sections are the classes of ``data``, ``models``, ``dictionary``, ``sets`` and
``report`` beside this file.

No class holds a default: every number in force stands in params.yaml, where DVC can see it. The exception are the numbers
of losses that no profile uses (``CrosscoderTraining``). A key that no class knows is an error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from featdiff.config.data import PrepareParams
from featdiff.config.dictionary import (
    AGAIN,
    DEAD,
    MIXED,
    NEW,
    PAIR,
    SHARED,
    SPECIFIC,
    ActivationsParams,
    AttributionParams,
    CrosscoderParams,
    DynamicsParams,
    Fit,
)
from featdiff.config.models import (
    METHODS,
    Arm,
    BaseParams,
    CheckpointsParams,
    DPOParams,
    EvaluateParams,
    GRPOParams,
    ImportedParams,
    NoiseParams,
    RFTParams,
    Roles,
    SFTParams,
    TeacherParams,
)
from featdiff.config.parse import parse
from featdiff.config.reading import PARAMS, ConfigError, closest, legible, read_yaml, refuse_secrets
from featdiff.config.report import ReportParams
from featdiff.config.sets import DescribeParams, InterveneParams, LocalizeParams, StitchParams
from featdiff.config.values import BASE, Name, Params, Place, Seed


class ResumeParams(Params):
    """Going on after a kill; part of no stage's signature."""

    every_seconds: Annotated[float, Field(ge=0)]
    """Work that a killed stage loses at most, rounded up to a whole step; 0 saves after every one."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Largest share of a stage's time that goes into saving: where one save is dear (large models), the interval grows."""


class Study(Params):
    """The whole of params.yaml."""

    profile: Name
    seed: Seed
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    """Of each process of a stage on a CPU, and part of no stage's signature; None: all cores. One thread leaves the other cores
    to other stages, and gives the same bytes whatever number of cores there is."""
    prepare: PrepareParams
    teachers: dict[Name, TeacherParams]
    """Models that solve the train problems."""
    problems: Place
    """The folder with the train problems of all arms and their solutions: ``data``, or ``teachers/<name>``."""
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
    stitch: StitchParams
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
    def _problems_are_made(self) -> Study:
        if self.problems not in (made := ["data", *(f"teachers/{name}" for name in self.teachers)]):
            raise ValueError(f"problems: {legible(self.problems)} is no folder of problems; {closest(self.problems, made)}")
        return self

    @model_validator(mode="after")
    def _models_compute_alike(self) -> Study:
        """Residual streams that are computed in different precision differ by its rounding, whatever was learned."""
        for name in self.arms:
            dtype = getattr(self.numbers(name), "dtype", "float32")
            if dtype != self.base.dtype:
                how = "as imported" if self.arms[name].method == "imported" else "as all that are trained here"
                raise ValueError(f"base.dtype = {self.base.dtype}, and arms.{name} is {dtype}, {how}; make the two equal")
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


def load_study(path: Path = PARAMS) -> Study:
    """Every parameter in force."""
    data = read_yaml(path)
    refuse_secrets(data, str(path))
    return parse(Study, data, str(path))
