"""The model organism's side of the data: families as tasks, and the texts its base is pretrained on."""

from __future__ import annotations

import numpy as np

from featdiff.artifacts.artifact import ContractError
from featdiff.config.values import Grading
from featdiff.tasks.families import FAMILIES, MARK, OWN_MARKS, Family, Problem, completion
from featdiff.tasks.task import GENERATION, SPLITS, Sample, TaskInfo, Text

ATTEMPTS = 200


class FamilySource:
    """A generated family as a :class:`featdiff.tasks.task.Source`. ``teacher`` is ``own`` or ``foreign``; ``own_manner`` says
    whether the family goes step by step in a manner of its own."""

    def __init__(self, name: str, role: str, teacher: str, *, grading: Grading, own_manner: bool = False) -> None:
        self.family: Family = FAMILIES[name]
        self.mark = OWN_MARKS[name] if own_manner else MARK
        self.manner = "steps" if teacher == "own" else "foreign"
        self.info = TaskInfo(
            name=name,
            role=role,
            domain=self.family.domain,
            scoring=GENERATION,
            verifier="organism",
            grading=grading,
            chat=False,
            options=0,
            learnable=self.family.learnable,
        )

    def _unseen(self, count: int, banned: set[str], rng: np.random.Generator) -> list[Problem]:
        name, wanted = f"prepare.tasks.{self.family.name}", f"{count} further questions"
        todo = "ask for fewer in prepare.samples or prepare.train_problems"
        if count > self.family.size:
            raise ContractError("params.yaml", name, wanted, f"{self.family.size} in all", todo)
        found: dict[str, Problem] = {}
        for _ in range(count * ATTEMPTS):
            if len(found) == count:
                break
            problem = self.family.make(rng)
            if problem.prompt not in banned:
                found[problem.prompt] = problem
        if len(found) < count:
            raise ContractError("params.yaml", name, wanted, len(found), todo)
        return list(found.values())

    def eval_samples(self, sizes: dict[str, int], rng: np.random.Generator) -> list[Sample]:
        problems = iter(self._unseen(sum(sizes.values()), set(), rng))
        return [
            Sample(
                f"{self.info.name}-{split}-{i:05d}",
                self.info.name,
                split,
                problem.prompt,
                problem.answer,
                solution=completion(problem, "steps", self.mark),
            )
            for split in SPLITS
            for i, problem in zip(range(sizes[split]), problems, strict=False)
        ]

    def train_samples(self, count: int, banned: set[str], rng: np.random.Generator) -> list[Sample]:
        return [
            Sample(
                f"{self.info.name}-train-{i:05d}",
                self.info.name,
                "train",
                problem.prompt,
                problem.answer,
                solution=completion(problem, self.manner if problem.foreign else "steps", self.mark),
                own=completion(problem, "steps", self.mark),
                foreign=completion(problem, "foreign") if problem.foreign else "",
            )
            for i, problem in enumerate(self._unseen(count, banned, rng))
        ]


AT_ONCE = {"direct", "mistake"}
EXAMPLE = "eg "
"""Begins a worked example, so that how examples are answered says nothing about a question that comes first."""


def texts(
    count: int,
    families: list[str],
    manners: dict[str, float],
    example_share: float,
    example_manners: dict[str, float],
    banned: set[str],
    rng: np.random.Generator,
    *,
    own_manners: bool = False,
) -> list[Text]:
    """``count`` texts of ``families`` in equal shares, each in a manner drawn from ``manners`` (probabilities).

    In ``example_share`` of them a worked example comes first: another question, marked by :data:`EXAMPLE`, answered in a
    manner drawn from ``example_manners``, which the question after it is answered in too (step by step, in the foreign
    wording, or at once). So a model can learn a manner well that it seldom shows without an example, and the manner is
    something to keep in mind that the context tells. A family without a wording of the drawn manner (``foreign`` outside
    math) is answered in ``steps``. With ``own_manners`` every family's steps are marked in its own way, and the example is of
    the question's family: no text says that two families have anything in common."""

    def answered(weights: dict[str, float], families: list[str] = families) -> tuple[str, str, str, str]:
        """Prompt, answer, family and manner of a question that is not banned, in a manner drawn with ``weights``."""
        shares = np.array(list(weights.values()))
        while True:
            family = FAMILIES[families[int(rng.integers(len(families)))]]
            problem = family.make(rng)
            manner = list(weights)[int(rng.choice(len(weights), p=shares / shares.sum()))]
            if manner == "foreign" and not problem.foreign:
                manner = "steps"
            if problem.prompt not in banned:
                mark = OWN_MARKS[family.name] if own_manners else MARK
                return problem.prompt, completion(problem, manner, mark), family.name, manner

    drawn: list[Text] = []
    for _ in range(count):
        if rng.random() < example_share:
            first, first_answer, of, shown = answered(example_manners)
            same = {name: share for name, share in manners.items() if name == shown or {name, shown} <= AT_ONCE}
            prompt, answer, family, manner = answered(same or {shown: 1.0}, [of] if own_manners else families)
            prompt = f"{EXAMPLE}{first}{first_answer}\n{prompt}"
        else:
            prompt, answer, family, manner = answered(manners)
        drawn.append(Text(prompt, answer, f"{family}/{manner}"))
    return drawn
