"""Data sets of the reasoning-gym package as tasks, scored by the package's own verifier.

The package gives questions and answers only; :data:`SOLUTIONS` works the arithmetic ones out, in plain
equations (``own``) and in a notation of bars that no base has seen (``foreign``).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import ReasoningGymTask
from featdiff.config.reading import legible
from featdiff.config.values import Grading
from featdiff.tasks.gym_scoring import package
from featdiff.tasks.task import ANSWER, GENERATION, QUESTION, SPLITS, Sample, TaskInfo
from featdiff.tasks.verify import grade

ATTEMPTS = 50
PATIENCE = 20
"""Questions found count this many more when it comes to how many attempts in a row may bring nothing new."""


def _equations(steps: list[tuple[str, int]]) -> str:
    return ", ".join(f"{left} = {value}" for left, value in steps)


def _product(metadata: dict[str, Any]) -> list[tuple[str, int]]:
    """One partial product per digit of the next factor, then their sum: ``47 * 63 = 47 * 60 + 47 * 3``."""
    total, *factors = (int(term) for term in metadata["expression"].split(" * "))
    steps: list[tuple[str, int]] = []
    for factor in factors:
        sign, digits = (-1 if factor < 0 else 1), str(abs(factor))
        parts = [sign * int(digit) * 10**power for power, digit in enumerate(reversed(digits)) if digit != "0"][::-1] or [0]
        partial = [(f"{total} * {part}", total * part) for part in parts]
        steps += partial
        if len(partial) > 1:
            steps.append((" + ".join(str(value) for _, value in partial), total * factor))
        total *= factor
    return steps


def _gcd(metadata: dict[str, Any]) -> list[tuple[str, int]]:
    """Euclid's algorithm by remainders."""
    current, *others = (int(number) for number in metadata["numbers"])
    steps: list[tuple[str, int]] = []
    for other in others:
        a, b = max(current, other), min(current, other)
        while b:
            steps.append((f"{a} % {b}", a % b))
            a, b = b, a % b
        current = a
    return steps


def _chain_sum(metadata: dict[str, Any]) -> list[tuple[str, int]]:
    """One running total per term."""
    first, *rest = metadata["expression"].split(" ")
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        left = f"{total} {sign} {term}"
        total += int(term) if sign == "+" else -int(term)
        steps.append((left, total))
    return steps


SOLUTIONS: dict[str, Callable[[dict[str, Any]], list[tuple[str, int]]]] = {
    "products": _product,
    "gcd": _gcd,
    "chain_sum": _chain_sum,
}


def solution(dataset: str, metadata: dict[str, Any], answer: str, teacher: str) -> str:
    """A worked solution in the wording of ``teacher``: ``own`` or ``foreign``."""
    steps = SOLUTIONS[dataset](metadata)
    if teacher == "own":
        return f"{_equations(steps)}. The answer is {answer}."
    bars = "".join(f"|{left.replace(' ', '')}>{value}" for left, value in steps)
    return f"{bars}|{answer}"


class GymSource:
    """A reasoning-gym data set as a :class:`featdiff.tasks.task.Source`.

    Entries without an answer, or with one that free text cannot give, are left out."""

    def __init__(self, name: str, task: ReasoningGymTask, *, teacher: str, chat: bool, grading: Grading) -> None:
        self.name, self.task, self.teacher = name, task, teacher
        known = package().DATASETS
        if task.dataset not in known:
            near = difflib.get_close_matches(task.dataset, known, n=1) or sorted(known)[:3]
            raise self._wrong("dataset", "a data set of reasoning-gym", task.dataset, f"did you mean {near[0]}?")
        if task.role == "train" and task.dataset not in SOLUTIONS:
            todo = "use one of these for training, or give it another role"
            raise self._wrong("dataset", f"worked solutions ({', '.join(SOLUTIONS)})", task.dataset, todo)
        category = self._dataset(0, 1).category
        self.info = TaskInfo(
            name=name,
            role=task.role,
            domain="math" if task.role == "train" else category,
            scoring=GENERATION,
            verifier="reasoning_gym",
            grading=grading,
            chat=chat,
            options=0,
        )

    def _wrong(self, field: str, expected: str, found: object, todo: str) -> ContractError:
        return ContractError("params.yaml", f"prepare.tasks.{self.name}.{field}", expected, found, todo)

    def _dataset(self, seed: int, size: int) -> Any:
        try:
            return package().create_dataset(self.task.dataset, seed=seed, size=size, **self.task.options)
        except Exception as error:  # options of any kind reach the package, which raises all kinds of errors
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> ContractError:
        said = legible(" ".join(str(error).split()))
        return self._wrong("options", f"options of {self.task.dataset}", said, "correct them")

    def _entries(self, count: int, banned: set[str], rng: np.random.Generator) -> Iterator[tuple[str, dict[str, Any]]]:
        """``count`` entries with different prompts outside ``banned``."""
        dataset = self._dataset(int(rng.integers(2**31)), max(1, count * ATTEMPTS))
        seen = set(banned)
        found = missed = tried = 0
        while found < count and tried < count * ATTEMPTS and missed <= ATTEMPTS * (found + PATIENCE):
            try:
                entry = dataset[tried]
            except Exception as error:  # as above
                raise self._unusable(error) from None
            tried, missed = tried + 1, missed + 1
            prompt = f"{entry['question']} {self.task.instruction}".strip()
            if not self.info.chat:
                prompt = f"{QUESTION}{prompt}{ANSWER}"
            if prompt in seen or not self._answerable(prompt, entry):
                continue
            seen.add(prompt)
            found, missed = found + 1, 0
            yield prompt, entry
        if found < count:
            todo = "widen options or ask for fewer samples, train_problems or corpus texts"
            raise self._wrong("options", f"{count} different questions", f"{found} in {tried} attempts", todo)

    def _answerable(self, prompt: str, entry: dict[str, Any]) -> bool:
        answer = entry["answer"]
        return isinstance(answer, str) and grade("reasoning_gym", self._sample("", "", prompt, entry), answer).correct

    def _sample(self, sample_id: str, split: str, prompt: str, entry: dict[str, Any]) -> Sample:
        meta = json.dumps({"dataset": self.task.dataset, "entry": entry}, default=str, sort_keys=True)
        return Sample(sample_id, self.name, split, prompt, entry["answer"], meta=meta)

    def eval_samples(self, sizes: dict[str, int], rng: np.random.Generator) -> list[Sample]:
        entries = self._entries(sum(sizes.values()), set(), rng)
        return [
            self._sample(f"{self.name}-{split}-{i:05d}", split, *next(entries)) for split in SPLITS for i in range(sizes[split])
        ]

    def train_samples(self, count: int, banned: set[str], rng: np.random.Generator) -> list[Sample]:
        lead, samples = "" if self.info.chat else " ", []
        for i, (prompt, entry) in enumerate(self._entries(count, banned, rng)):
            own, foreign = (
                lead + solution(self.task.dataset, entry["metadata"], entry["answer"], teacher)
                for teacher in ("own", "foreign")
            )
            sample = self._sample(f"{self.name}-train-{i:05d}", "train", prompt, entry)
            taught = own if self.teacher == "own" else foreign
            samples.append(replace(sample, solution=taught, own=own, foreign=foreign))
        return samples
