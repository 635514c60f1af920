"""Supervised fine-tuning on the teacher's worked solutions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import ContractError
from featdiff.config.models import SFTParams
from featdiff.language.models import load_tokenizer
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import Sample, load_samples, load_tasks
from featdiff.training.arm import Log, token_counts
from featdiff.training.imitation import imitate


def train(base: Path, data: Path, out: Path, scratch: Scratch, params: SFTParams, seed: int, log: Log) -> dict[str, Any]:
    """Fine-tune ``base`` on the train problems of ``data``; loss on the solution only. Returns the audit.

    Raises ContractError for a problem without a solution in the wording asked for, and for one that is too long."""
    process_state()
    samples = load_samples(data, "train")
    if params.teacher:
        samples = [_worded(sample, params.teacher, data) for sample in samples]
    for sample, length in zip(samples, token_counts(load_tokenizer(base), samples), strict=True):
        if length > params.max_length:
            expected = f"at most sft.max_length = {params.max_length} tokens"
            raise ContractError(data / "train.parquet", sample.sample_id, expected, length, "raise it")
    told = {"problems": len(samples)}
    epochs = {"num_train_epochs": params.epochs}
    return told | imitate(samples, load_tasks(data), base, out, scratch, params, seed, log, "sft.batch_size", **epochs)


def _worded(sample: Sample, teacher: str, data: Path) -> Sample:
    solution = getattr(sample, teacher)
    if not solution:
        todo = f"set teacher: null, or leave task {sample.task} out of the training domain"
        raise ContractError(data / "train.parquet", sample.sample_id, f"a solution in the wording {teacher}", "none", todo)
    return replace(sample, solution=solution)
