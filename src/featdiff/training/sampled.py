"""A model's answers to the train problems, sampled and graded: the base's own, from which rejection sampling and DPO learn, or
a teacher's.

An answer that was cut off at the limit counts neither as right nor as wrong: trained on, it would teach to end there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from featdiff import stats
from featdiff.artifacts.artifact import ContractError
from featdiff.artifacts.tables import SAMPLED_ANSWERS
from featdiff.config.models import SamplingParams
from featdiff.language.decode import generate
from featdiff.language.models import encode_prompts, end_tokens
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import Sample, TaskInfo
from featdiff.tasks.verify import grade

Draw = Callable[..., list[list[int]]]
"""Draws token ids after prompts as :func:`featdiff.language.decode.generate` does."""


class Answer(NamedTuple):
    """One sampled answer."""

    text: str
    correct: bool
    manner: str
    whole: bool
    """Whether the model ended it, before ``max_new_tokens``."""


class Answers(NamedTuple):
    """All answers to one problem."""

    sample: Sample
    drawn: list[Answer]

    def solved(self, *, correct: bool) -> list[Sample]:
        """The sample with each different whole answer that is right, or wrong, as its solution, in the order of drawing."""
        texts = dict.fromkeys(answer.text for answer in self.drawn if answer.whole and answer.correct is correct)
        return [replace(self.sample, solution=text) for text in texts]


def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: dict[str, TaskInfo],
    samples: list[Sample],
    params: SamplingParams,
    seed: int,
    scratch: Scratch,
    draw: Draw | None = None,
) -> list[Answers]:
    """``params.samples`` answers of ``model`` to each of ``samples``, in their order; ``draw`` takes the place of our decoder.

    Problems are asked in groups, each with a generator of its own: the ranks share the groups, the answers do not depend on
    how many ranks there are, and what was answered before a kill is not asked again."""
    state = process_state()
    root = None if scratch.root is None else scratch.root / "answers" / str(state.process_index)
    parts = Scratch(root, scratch.seconds, scratch.share)  # of this rank: two that write into one folder would clash
    size, given = params.sampling_batch_size, {}
    model = model.to(state.device)
    starts = range(state.process_index * size, len(samples), state.num_processes * size)
    for start in tqdm(starts, desc="answers", unit="group", disable=not state.is_main_process):
        generator = torch.Generator().manual_seed(stats.stream(seed, start))
        ask = partial(_ask, model, tokenizer, tasks, samples[start : start + size], params, generator, draw)
        given[start] = parts.part(f"from problem {start}", ask)
    everyone: dict[int, list[list[Any]]] = {start: drawn for found in gather_object([given]) for start, drawn in found.items()}
    drawn = [answers for start in sorted(everyone) for answers in everyone[start]]
    return [Answers(sample, [Answer(*answer) for answer in answers]) for sample, answers in zip(samples, drawn, strict=True)]


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: dict[str, TaskInfo],
    samples: list[Sample],
    params: SamplingParams,
    generator: torch.Generator,
    draw: Draw | None,
) -> list[list[Answer]]:
    asked = [sample for sample in samples for _ in range(params.samples)]
    prompts = [encode_prompts(tokenizer, [sample], chat=tasks[sample.task].chat)[0] for sample in asked]
    ends, pad = end_tokens(model, tokenizer), tokenizer.pad_token_id
    ours = partial(generate, model, ends=ends, pad=pad, batch_size=params.sampling_batch_size)
    ids = (draw or ours)(prompts, max_new_tokens=params.max_new_tokens, temperature=params.temperature, generator=generator)
    answers = []
    for sample, text, tokens in zip(asked, tokenizer.batch_decode(ids, skip_special_tokens=True), ids, strict=True):
        task = tasks[sample.task]
        graded = grade(task.verifier, sample, text, task.grading)
        answers.append(Answer(text, graded.correct, graded.manner, len(tokens) < params.max_new_tokens))
    return [answers[i : i + params.samples] for i in range(0, len(answers), params.samples)]


def summary(answers: list[Answers], used: list[list[Any]], what: str, model: Path | str, out: Path) -> dict[str, Any]:
    """Write all answers of ``model`` into ``out``; returns how many there are, and how much of them is
    taught. ``used`` holds what is taught of each problem. Raises ContractError where that is nothing: ``what`` is missing."""
    rows = [
        {"sample_id": sample.sample_id, "task": sample.task, **answer._asdict()}
        for sample, drawn in answers
        for answer in drawn
    ]
    right, whole = (sum(row[name] for row in rows) for name in ("correct", "whole"))
    if not any(used):
        todo = "sample more (samples, temperature, max_new_tokens), or train on problems that it sometimes solves"
        raise ContractError(model, "answers", f"{what} to at least one problem", f"{right} right of {len(rows)}", todo)
    if process_state().is_main_process:
        SAMPLED_ANSWERS.write(out, rows)
    return {
        "problems": len(answers),
        "problems_left_out": sum(not several for several in used),
        "answers": len(rows),
        "answers_right": right,
        "answers_cut": len(rows) - whole,
        "taught": sum(map(len, used)),
    }
