"""Questions from files: suites with options, and math problems with a number, an expression or a letter to generate.

An adapter says under which columns of its hub data set a suite keeps question, options and answer, so one
reader serves the hub, a local file in the same schema, and (adapter ``columns``) any file of one's own.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import SuiteTask
from featdiff.config.reading import legible
from featdiff.config.values import Grading
from featdiff.tasks.expressions import readable
from featdiff.tasks.external import Row, located, read_rows
from featdiff.tasks.task import ANSWER, GENERATION, LETTERS, QUESTION, SPLITS, Sample, TaskInfo
from featdiff.tasks.verify import find_number, grade

LETTER_ONLY = "\nGive only the letter of the right option."
NEEDED, OPTIONAL = {"question", "answer"}, {"options", "labels", "context", "solution", "expression"}

# Columns: ``options`` is a list or several columns joined by commas; ``labels`` what the answer refers to;
# ``context`` is read before the question; ``solution`` is a worked one; ``expression`` an answer that is compared symbolically.
# SciQ's answer is the option's text.
ADAPTERS: dict[str, dict[str, str]] = {
    "openbookqa": {"question": "question_stem", "options": "choices.text", "labels": "choices.label", "answer": "answerKey"},
    "arc_challenge": {"question": "question", "options": "choices.text", "labels": "choices.label", "answer": "answerKey"},
    "commonsense_qa": {"question": "question", "options": "choices.text", "labels": "choices.label", "answer": "answerKey"},
    "sciq": {
        "question": "question",
        "options": "distractor1,distractor2,distractor3,correct_answer",
        "answer": "correct_answer",
    },
    "head_qa": {"question": "qtext", "options": "answers.atext", "labels": "answers.aid", "answer": "ra"},
    "logiqa": {"context": "context", "question": "query", "options": "options", "answer": "correct_option"},
    "piqa": {"question": "goal", "options": "sol1,sol2", "answer": "label"},
    "math500": {"question": "problem", "expression": "answer", "solution": "solution"},
    "aime": {"question": "problem", "expression": "answer"},
}

# How lm-evaluation-harness puts the question of each suite (the task files of its version 0.4.13). What it scores after it is a
# blank and an option, or after CommonsenseQA's listed options a blank and a letter. Texts are taken with their blanks.
HARNESS = {
    "openbookqa": "{question}",
    "arc_challenge": f"{QUESTION}{{question}}{ANSWER}",
    "commonsense_qa": f"{QUESTION}{{question}}{ANSWER}",
    "sciq": f"{{context}}\n{QUESTION}{{question}}{ANSWER}",
    "head_qa": f"{QUESTION}{{question}}{ANSWER}",
    "logiqa": f"Passage: {{context}}\n{QUESTION}{{question}}\nChoices:{ANSWER}",
    "piqa": f"{QUESTION}{{question}}{ANSWER}",
}
HARNESS_CONTEXT = {"sciq": "support", "logiqa": "context"}
LISTED_BY_HARNESS = ("commonsense_qa", "logiqa")
"""Suites whose options it shows, which therefore keep the file's order there."""


class Question(NamedTuple):
    """One row as read: ``answer`` is the number or expression to find, or the index of the right one of ``options``."""

    text: str
    options: tuple[str, ...]
    answer: str | int
    solution: str


def listed_prompt(prompt: str, options: tuple[str, ...]) -> str:
    """The prompt with its options listed as ``A. …``, for scoring or generating a letter; a prompt that lists them already
    stays as it is."""
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    if prompt.endswith((LETTER_ONLY + ANSWER, listed + ANSWER)):
        return prompt
    return prompt.removesuffix(ANSWER) + listed + ANSWER


def read_question(row: Row, columns: dict[str, str], harness: str | None = None) -> Question:
    """``row`` under ``columns``. The answer may be a label, an index from 0, the option's text or a letter,
    read in this order; ContractError names the row where it is none of them. With ``harness``, a suite of :data:`HARNESS`, the
    text is its whole prompt (without listed options), and no text is stripped."""
    if harness:
        context = row.text(HARNESS_CONTEXT[harness], blank=True, strip=False) if harness in HARNESS_CONTEXT else ""
        question = row.text(columns["question"], strip=harness == "commonsense_qa")
        text = HARNESS[harness].format(context=context.lstrip() if harness == "sciq" else context, question=question)
    else:
        text = row.text(columns["question"])
        if "context" in columns:
            text = f"{row.text(columns['context'])}\n{text}"
    solution = row.text(columns["solution"]) if "solution" in columns else ""
    if "options" not in columns:
        return Question(text, (), _value(row, columns), solution)
    options, labels = _options(row, columns, strip=not harness)
    return Question(text, tuple(options), _right(row, columns["answer"], options, labels), solution)


def _value(row: Row, columns: dict[str, str]) -> str:
    if "expression" in columns:
        said = row.text(columns["expression"])
        if not readable(said):
            raise row.wrong(columns["expression"], "a number, words or an expression in LaTeX", repr(said[:40]))
        return said
    said = row.text(columns["answer"])
    number = find_number(said)
    if number is None:
        raise row.wrong(columns["answer"], "a text with one number", repr(said[:40]))
    return number


def _options(row: Row, columns: dict[str, str], *, strip: bool) -> tuple[list[str], list[str]]:
    several = "," in columns["options"]
    found = None if several else row.value(columns["options"])
    if isinstance(found, dict):
        keyed = Row(found, row.place)
        options, labels = [keyed.text(key, strip=strip) for key in found], list(found)
    else:
        options, labels = row.texts(columns["options"], strip=strip), []
    if "labels" in columns:
        labels = row.texts(columns["labels"])
        if len(labels) != len(options):
            raise row.wrong(columns["labels"], f"{len(options)} labels", len(labels))
    if not 2 <= len(options) <= len(LETTERS):
        raise row.wrong(columns["options"], f"2 to {len(LETTERS)} options", len(options))
    return options, labels


def _right(row: Row, column: str, options: list[str], labels: list[str]) -> int:
    value, said = row.value(column), row.text(column)
    if labels:
        if said in labels:
            return labels.index(said)
        raise row.wrong(column, f"one of the labels {legible(', '.join(labels))}", repr(said[:40]))
    if isinstance(value, int):
        if 0 <= value < len(options):
            return value
        raise row.wrong(column, f"an index from 0 to {len(options) - 1}", legible(str(value)))
    if said in (stripped := [option.strip() for option in options]):
        return stripped.index(said)
    letter = LETTERS.find(said.upper()) if len(said) == 1 else -1
    if 0 <= letter < len(options):
        return letter
    raise row.wrong(column, "an index from 0, a letter or the text of an option", repr(said[:40]))


def columns_of(name: str, task: SuiteTask) -> dict[str, str]:
    """The columns that ``task`` reads; ContractError for one that cannot be used."""
    columns = ADAPTERS.get(task.adapter) or task.columns or {}
    field, known = f"prepare.tasks.{name}.columns", sorted(NEEDED | OPTIONAL)
    if missing := sorted(NEEDED - columns.keys() - ({"answer"} if "expression" in columns else set())):
        raise ContractError("params.yaml", field, f"a column for {missing[0]}", "none", f"add {missing[0]}: <column>")
    if unknown := sorted(columns.keys() - set(known)):
        raise ContractError("params.yaml", field, f"only {', '.join(known)}", unknown[0], "remove it")
    if "expression" in columns and (others := sorted({"answer", "options", "labels"} & columns.keys())):
        raise ContractError("params.yaml", field, f"expression or {others[0]}", "both", "remove one of them")
    if "options" not in columns and task.scoring != GENERATION:
        raise ContractError("params.yaml", field, f"options for scoring {task.scoring}", "none", "add options: <column>")
    return columns


class SuiteSource:
    """A file of questions as a :class:`featdiff.tasks.task.Source`.

    ``left_out`` counts the rows not used: ``duplicate`` (a prompt seen before in the file), ``ambiguous``
    (the right option's text stands there twice) and ``long`` (question and options above ``max_chars``).
    Options are shuffled by ``seed`` and question (SciQ's files always name the right one last), so that
    a question has the same prompt wherever it is drawn; those that lm-evaluation-harness shows in its prompts are not."""

    def __init__(
        self, name: str, task: SuiteTask, *, chat: bool, grading: Grading, max_chars: int, seed: int, suites: str
    ) -> None:
        self.path, self.columns, self.seed = located(task.path, suites), columns_of(name, task), seed
        self.letters = "options" in self.columns
        self.harness = task.adapter if task.prompt == "harness" else None
        self.left_out: Counter[str] = Counter()
        self.questions = self._read(max_chars)
        generated = task.scoring == GENERATION
        self.listed = generated and self.letters
        counts = Counter(len(question.options) for question in self.questions)
        self.info = TaskInfo(
            name=name,
            role=task.role,
            domain="math" if task.role == "train" or not self.letters else "questions",
            scoring=task.scoring,
            verifier="letter" if self.letters else "symbolic" if "expression" in self.columns else "number",
            grading=grading,
            chat=chat and generated,
            options=counts.most_common(1)[0][0] if counts else 0,
        )

    def _read(self, max_chars: int) -> list[Question]:
        kept: dict[str, Question] = {}
        for row in read_rows(self.path):
            question = read_question(row, self.columns, self.harness)
            if len(question.text) + sum(map(len, question.options)) > max_chars:
                self.left_out["long"] += 1
            elif isinstance(question.answer, int) and question.options.count(question.options[question.answer]) > 1:
                self.left_out["ambiguous"] += 1
            elif question.text in kept:
                self.left_out["duplicate"] += 1
            else:
                kept[question.text] = question
        return list(kept.values())

    def _sample(self, sample_id: str, split: str, question: Question) -> Sample:
        options, answer = question.options, str(question.answer)
        if isinstance(question.answer, int):
            order = list(range(len(options)))
            if self.harness not in LISTED_BY_HARNESS:
                order = np.random.default_rng([self.seed, *question.text.encode()]).permutation(len(options)).tolist()
            options, answer = tuple(options[i] for i in order), LETTERS[order.index(question.answer)]
        prompt = question.text if self.harness else f"{QUESTION}{question.text}{ANSWER}"
        if self.harness == "logiqa":
            prompt = listed_prompt(prompt, options)
        if self.listed:
            prompt = listed_prompt(prompt, options).removesuffix(ANSWER) + LETTER_ONLY + ANSWER
        solution = question.solution or (answer if self.listed and split == "train" else "")
        solution = solution if self.info.chat or not solution else f" {solution}"
        return Sample(sample_id, self.info.name, split, prompt, answer, options, solution)

    def _too_few(self, wanted: int, found: int, what: str) -> ContractError:
        left_out = ", ".join(f"{count} {why}" for why, count in self.left_out.items()) or "none"
        todo = "ask for fewer in params.yaml (prepare.samples, prepare.train_problems) or give a larger file"
        return ContractError(self.path, "rows", f"{wanted} {what}", f"{found} (left out: {left_out})", todo)

    def eval_samples(self, sizes: dict[str, int], rng: np.random.Generator) -> list[Sample]:
        wanted = sum(sizes.values())
        if len(self.questions) < wanted:
            raise self._too_few(wanted, len(self.questions), f"different questions for {self.info.name}")
        order = iter(rng.permutation(len(self.questions)).tolist())
        return [
            self._sample(f"{self.info.name}-{split}-{i:05d}", split, self.questions[next(order)])
            for split in SPLITS
            for i in range(sizes[split])
        ]

    def train_samples(self, count: int, banned: set[str], rng: np.random.Generator) -> list[Sample]:
        """Only rows whose solution ends in the right answer, as in the paper. Where a letter is asked for and the file has no
        solutions, the letter is the solution."""
        if "solution" not in self.columns and not self.listed:
            field = f"prepare.tasks.{self.info.name}.columns"
            raise ContractError("params.yaml", field, "a solution column for role train", "none", "add solution: <column>")
        kept: list[Sample] = []
        for index in rng.permutation(len(self.questions)).tolist():
            if len(kept) == count:
                return kept
            sample = self._sample(f"{self.info.name}-train-{len(kept):05d}", "train", self.questions[index])
            if sample.prompt not in banned and grade(self.info.verifier, sample, sample.solution).correct:
                kept.append(sample)
        if len(kept) < count:
            raise self._too_few(count, len(kept), "questions outside the evaluation splits with a right solution")
        return kept
