"""What a task is: samples with prompts and answers, a rule that grades an answer, a role in the study.

Generated families, reasoning-gym data sets and question suites all become the same two tables (train and
eval rows) plus one :class:`TaskInfo` each, so that no later stage knows where a question came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from featdiff.artifacts.artifact import ContractError, read_json, write_json
from featdiff.artifacts.tables import CORPUS, EVAL, PRETRAIN, TRAIN
from featdiff.config.values import REPORTED, Grading

TABLES = {"train": TRAIN, "eval": EVAL, "corpus": CORPUS, "pretrain": PRETRAIN}
"""Of the data artifact, by the field of :class:`Data` that is in it."""
SPLITS = ("find", "tune", "report")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GENERATION = "generation"
QUESTION, ANSWER = "Question: ", "\nAnswer:"
"""How a question of the outside world is put without a chat template."""


@dataclass(frozen=True)
class TaskInfo:
    """One task as later stages see it (a row of ``data/tasks.json``)."""

    name: str
    role: str
    """``train``, ``find``, ``control``, ``heldout`` or ``reported`` (featdiff.config.values.Role)."""
    domain: str
    """``math`` for the training domain, otherwise what the task is about."""
    scoring: str
    """``generation``, or a likelihood rule: ``option_text``, ``option_text_norm``, ``option_letter``."""
    verifier: str
    """Name of the grading rule for generated answers (featdiff.tasks.verify)."""
    grading: Grading
    """Which of that rule's two verdicts counts, in reward, evaluation and interventions."""
    chat: bool
    """Whether prompts go through the tokenizer's chat template when answers are generated."""
    options: int
    """Number of options of a question, 0 where there are none (the most common number where it varies)."""
    learnable: bool = True
    """False for a negative control: an ability that no training can elicit."""

    @property
    def edited(self) -> bool:
        """Whether it is asked under edits and described, too."""
        return self.role != REPORTED

    @property
    def chance(self) -> float:
        """Accuracy of a random guess among the options; 0 without options."""
        return 1 / self.options if self.options else 0.0

    @property
    def primary_mode(self) -> str:
        """How answers that count are got: ``greedy`` decoding, or its likelihood rule."""
        return "greedy" if self.scoring == GENERATION else self.scoring


@dataclass(frozen=True)
class Sample:
    """One question. ``solution`` is a right worked answer: the teacher's for SFT, in evaluation one in the base's own wording
    (empty where none is known); ``meta`` is JSON for the verifier.

    With options, ``answer`` is the letter of the right one (texts can repeat, letters cannot)."""

    sample_id: str
    task: str
    split: str
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    solution: str = ""
    meta: str = ""
    own: str = ""
    """Of a train problem, the solution in the wording ``own``, whatever the teacher's is; empty where there is only one."""
    foreign: str = ""
    """The same in the wording ``foreign``."""

    @property
    def right_option(self) -> int:
        """Index of the right option; ValueError for a sample without options."""
        if not self.options:
            raise ValueError(f"sample {self.sample_id} has no options")
        return LETTERS.index(self.answer)


@dataclass(frozen=True)
class Text:
    """One text of a corpus: ``prompt`` (may be empty) and what follows it."""

    prompt: str
    completion: str
    source: str


class Source(Protocol):
    """Where the samples of one task come from."""

    info: TaskInfo

    def eval_samples(self, sizes: dict[str, int], rng: np.random.Generator) -> list[Sample]:
        """``sizes[split]`` samples for each split, no prompt twice."""

    def train_samples(self, count: int, banned: set[str], rng: np.random.Generator) -> list[Sample]:
        """``count`` samples with solutions whose prompts are not in ``banned``; only for role ``train``."""


@dataclass
class Data:
    """The data artifact in memory."""

    tasks: list[TaskInfo]
    train: list[Sample]
    eval: list[Sample]
    corpus: list[Text]
    pretrain: list[Text] = field(default_factory=list)

    def check(self) -> None:
        """Raise ContractError unless ids are unique and no prompt is in two splits."""
        seen: dict[str, Sample] = {}
        ids: set[str] = set()
        for sample in [*self.train, *self.eval]:
            if sample.sample_id in ids:
                raise ContractError("data", "sample_id", "unique ids", f"{sample.sample_id} twice", "report this")
            ids.add(sample.sample_id)
            other = seen.setdefault(sample.prompt, sample)
            if other is not sample and other.split != sample.split:
                raise ContractError(
                    "data",
                    f"prompt {sample.prompt[:40]!r}",
                    f"only in split {other.split} ({other.task})",
                    f"also in split {sample.split} ({sample.task})",
                    "remove the duplicate from one of the files",
                )
        banned = {sample.prompt for sample in self.eval}
        for text in [*self.corpus, *self.pretrain]:
            if text.prompt in banned:
                raise ContractError(
                    "data", f"prompt {text.prompt[:40]!r}", "no evaluation prompt in a corpus", "one", "report this"
                )

    def save(self, folder: Path) -> None:
        write_json(folder / "tasks.json", [asdict(task) for task in self.tasks])
        for name, table in TABLES.items():
            table.write(folder, [vars(row) for row in getattr(self, name)])


def load_tasks(data: Path) -> dict[str, TaskInfo]:
    """The tasks of a data artifact by name, in the order of params.yaml."""
    return {row["name"]: TaskInfo(**row) for row in read_json(data / "tasks.json")}


def load_samples(data: Path, table: str) -> list[Sample]:
    """``train`` or ``eval`` rows of a data artifact."""
    return [Sample(**row | {"options": tuple(row["options"])}) for row in TABLES[table].read(data)]


def first_of_each(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first ``count`` samples of every task, in their order."""
    seen: Counter[str] = Counter()
    kept = []
    for sample in samples:
        seen[sample.task] += 1
        if seen[sample.task] <= count:
            kept.append(sample)
    return kept


def load_texts(data: Path, table: str) -> list[Text]:
    """``corpus`` or ``pretrain`` rows of a data artifact."""
    return [Text(**row) for row in TABLES[table].read(data)]
