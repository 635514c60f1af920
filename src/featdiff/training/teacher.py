"""Another model's solutions to the train problems, in place of those that came with them: sampled, and kept where the answer is
right (the paper's teacher). Problems that it never solved are left out for every arm, so that all arms have the same.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from featdiff.artifacts.tables import TRAIN
from featdiff.config.models import TeacherParams
from featdiff.language.evaluation import Evaluator
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import ANSWER, QUESTION, Sample, load_samples, load_tasks
from featdiff.training.imported import load_base, place
from featdiff.training.sampled import sampled_answers, summary


def solve(name: str, data: Path, out: Path, scratch: Scratch, params: TeacherParams, seed: int) -> dict[str, Any]:
    """Write into ``out`` the train problems of ``data`` that the teacher ``name`` solved, each with the first of its right
    answers as the solution, and all its answers. Returns how many there are. ContractError where it solved none."""
    model, tokenizer = load_base(params.source, params.dtype, f"teachers.{name}.source")
    tasks, samples = load_tasks(data), load_samples(data, "train")
    asked = [_put(sample, params) for sample in samples]
    as_asked = {task.name: replace(task, chat=params.chat) for task in tasks.values()}
    sizes = {"batch_size": params.sampling_batch_size, "max_new_tokens": params.max_new_tokens}
    evaluator = Evaluator(model.to(process_state().device), tokenizer, as_asked, **sizes)
    agreement = evaluator.with_vllm(asked, scratch, *where) if (where := place(params.source)) else {}
    draw = evaluator.vllm.generate if evaluator.vllm else None
    answers = sampled_answers(model, tokenizer, as_asked, asked, params, seed, scratch, draw)
    right = [found.solved(correct=True)[:1] for found in answers]
    facts = agreement | summary(answers, right, "a right one", params.source, out)
    # However the teacher was asked, an arm goes on from its own prompt: from "Answer:" with a blank, from others with none.
    solved = [
        replace(sample, solution=" " * sample.prompt.endswith(ANSWER) + first.solution.strip())
        for sample, several in zip(samples, right, strict=True)
        for first in several
    ]
    if process_state().is_main_process:
        TRAIN.write(out, [asdict(sample) for sample in solved])
        shutil.copyfile(data / "tasks.json", out / "tasks.json")
    return facts


def _put(sample: Sample, params: TeacherParams) -> Sample:
    """The problem as the teacher reads it: in a chat the question alone, and the instruction after it."""
    if not params.chat:
        return sample
    question = sample.prompt.removeprefix(QUESTION).removesuffix(ANSWER)
    return replace(sample, prompt=f"{question}\n{params.instruction}".strip())
