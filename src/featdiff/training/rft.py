"""Rejection sampling: the loss of SFT on the base's own right answers (Yuan et al. 2023, arXiv 2308.01825).

What reinforcement learning also has is left out: answers are sampled once, from the base, and wrong ones teach nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featdiff.config.models import RFTParams
from featdiff.language.models import load_model, load_tokenizer
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import load_samples, load_tasks
from featdiff.training.arm import Log
from featdiff.training.imitation import imitate
from featdiff.training.sampled import sampled_answers, summary


def train(base: Path, data: Path, out: Path, scratch: Scratch, params: RFTParams, seed: int, log: Log) -> dict[str, Any]:
    """Train ``base`` on at most ``params.kept`` different right answers of its own to each train problem of ``data``; writes
    all answers. Returns the audit. Problems without a right answer are left out; ContractError where that is every one."""
    tasks, samples = load_tasks(data), load_samples(data, "train")
    answers = sampled_answers(load_model(base), load_tokenizer(base), tasks, samples, params, seed, scratch)
    right = [found.solved(correct=True)[: params.kept] for found in answers]
    facts = summary(answers, right, "a right one", base, out)
    taught = [sample for several in right for sample in several]
    return facts | imitate(taught, tasks, base, out, scratch, params, seed, log, "rft.batch_size", max_steps=params.steps)
