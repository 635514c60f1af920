"""Section ``prepare``: tasks, splits, texts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from featdiff.config.reading import flatten, legible
from featdiff.config.values import REPORTED, Fraction, Grading, Many, Name, Params, Place, Positive, Role

SUITE = re.compile(r"suite:(?P<kind>[a-z0-9_]+)/(?P<name>[a-z0-9_]+)/(?P<split>[a-z0-9_]+)")
ON_THE_HUB = "hub"


def suite_file(path: str, suites: str) -> str | None:
    """The file of the suite ``path`` in the folder ``suites``; None for a path that names no suite, and where they are found
    on the hub."""
    match = SUITE.fullmatch(path)
    if match is None or suites == ON_THE_HUB:
        return None
    return f"{suites}/{match['kind']}/{match['name']}/{match['split']}.jsonl"


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


HARNESS_SCORING = {
    "openbookqa": ("option_text", "option_text_norm"),
    "arc_challenge": ("option_text", "option_text_norm"),
    "commonsense_qa": ("option_letter",),
    "sciq": ("option_text", "option_text_norm"),
    "head_qa": ("option_text", "option_text_norm"),
    "logiqa": ("option_text", "option_text_norm"),
    "piqa": ("option_text", "option_text_norm"),
}
"""Rules under which lm-evaluation-harness scores each suite: ``option_text`` is its acc, ``option_text_norm`` its acc_norm, and
``option_letter`` its acc where the letters are what is scored."""


class SuiteTask(Params):
    """Questions with options, or with an answer to generate, from a local jsonl file or a hub data set, read by one adapter."""

    source: Literal["suite"]
    role: Role
    adapter: Literal[
        "openbookqa", "arc_challenge", "commonsense_qa", "sciq", "head_qa", "logiqa", "piqa", "math500", "aime", "columns"
    ]
    """The suite whose columns the file has; ``columns`` takes any file through ``columns`` below."""
    path: Place
    """``suite:<kind>/<name>/<split>`` (found where ``prepare.suites`` says), a local ``.jsonl`` file, or
    ``hub:<owner>/<name>[:<config>]@<commit or branch>#<split>``."""
    scoring: Literal["option_text", "option_text_norm", "option_letter", "generation"]
    prompt: Literal["own", "harness"]
    """How a question is put: ``own`` (the same way for every suite), or as lm-evaluation-harness puts this suite's, for figures
    that can be held against published ones."""
    columns: dict[str, str] | None
    """For the adapter ``columns``: which column holds ``question`` and ``answer``, and where there are any
    ``options`` (a list, or several columns joined by commas), ``labels``, ``context``, ``solution``. ``expression`` in place of
    ``answer``: any mathematical answer, compared symbolically; else an answer without options is one number."""

    @model_validator(mode="after")
    def _columns_fit(self) -> SuiteTask:
        if (self.adapter == "columns") != (self.columns is not None):
            raise ValueError("columns: needed with adapter columns, and null with every other adapter")
        return self

    @model_validator(mode="after")
    def _harness_scores_so(self) -> SuiteTask:
        if self.prompt == "harness":
            known = HARNESS_SCORING.get(self.adapter)
            if known is None:
                raise ValueError(f"prompt: harness is known for {', '.join(HARNESS_SCORING)}; use own with {self.adapter}")
            if self.scoring not in known:
                raise ValueError(f"scoring: {' or '.join(known)} with prompt harness and adapter {self.adapter}")
        return self


Task = Annotated[FamilyTask | ReasoningGymTask | SuiteTask, Field(discriminator="source")]


class SplitSizes(Params):
    find: Positive
    """Samples per task on which features are found."""
    tune: Positive
    """Samples per task on which dose and positions are chosen."""
    report: Positive
    """Samples per task on which effects are reported."""
    reported: Positive
    """Samples per task of role ``reported``, which has no other split."""

    def of(self, role: Role) -> dict[str, int]:
        """Samples of a task of this role, by split."""
        if role == REPORTED:
            return {"find": 0, "tune": 0, "report": self.reported}
        return {"find": self.find, "tune": self.tune, "report": self.report}


ORGANISM = "organism"
GENERAL = "general"


class TextSource(Params):
    """One file or data set that general text comes from."""

    path: Place
    """In the same forms as a task's; of a hub data set no more is fetched than is taken."""
    column: str
    """Which column holds the text, with dots for nesting; the texts of a list, such as the turns of a conversation, are
    joined."""
    share: Fraction
    """Of the general text."""


Texts = Annotated[
    Annotated[Place, Tag("place")] | Annotated[dict[Name, TextSource], Tag("sources")],
    Discriminator(lambda found: "sources" if isinstance(found, dict) else "place"),
]


class CorpusParams(Params):
    """Text on which crosscoders are fitted."""

    texts: Many
    """Number of texts."""
    math_share: Fraction
    """Share of worked math among the texts; the rest is general text."""
    general: Texts
    """``organism`` (generated texts of every family), a jsonl file or ``hub:…`` with a column ``text``, or several sources by
    name."""
    max_chars: Positive
    """Texts are cut to this many characters."""

    @property
    def sources(self) -> dict[str, TextSource]:
        """Where general text comes from, by what it is called in the corpus; nothing where it is generated."""
        if self.general == ORGANISM:
            return {}
        if isinstance(self.general, str):
            return {GENERAL: TextSource(path=self.general, column="text", share=1.0)}
        return self.general

    @model_validator(mode="after")
    def _shares_are_all(self) -> CorpusParams:
        if self.sources and abs((total := sum(source.share for source in self.sources.values())) - 1) > 1e-6:
            raise ValueError(f"general: the shares of its sources add up to {total:g}, and must to 1")
        return self


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
    manners: Literal["shared", "own"]
    """Whether all families go step by step in one manner, or each in a manner of its own, of which an example of another
    family says nothing."""


class PrepareParams(Params):
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    train_problems: Many
    """Problems that arms are trained on, over all tasks with a role of ``trained_on``."""
    trained_on: Annotated[list[Role], Field(min_length=1)]
    """Roles of the tasks whose problems those are: ``train``, and for a study that must not find anything, others as well."""
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
        if "train" not in self.trained_on:
            raise ValueError("trained_on leaves out the role train; add it")
        trained = {name: task for name, task in self.tasks.items() if task.role in self.trained_on}
        if others := [name for name, task in trained.items() if task.role != "train" and task.source != "family"]:
            raise ValueError(f"trained_on: {others[0]} is not generated here, and has solutions in the role train only")
        return self
