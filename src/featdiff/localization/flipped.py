"""Flipped samples (the original model is wrong, the tuned one right) and the feature values of both models on them.

S samples, K kept positions, D residual width, F features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from featdiff.activations.residual import TokenStream, read_residual
from featdiff.config.models import Roles
from featdiff.config.values import Readout
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import read_all
from featdiff.language.models import encode_prompts
from featdiff.tasks.suites import listed_prompt
from featdiff.tasks.task import GENERATION, Sample, TaskInfo

OPTION_LETTER = "option_letter"


def answer_text(task: TaskInfo, row: dict[str, Any]) -> str:
    """What a model answered in ``row``, as the task's scoring rule reads it: a letter, an option's text or its own text."""
    return str(row["parsed"] if task.scoring == OPTION_LETTER else row["completion"])


def flipped_answers(
    original_rows: list[dict[str, Any]], tuned_rows: list[dict[str, Any]], tasks: dict[str, TaskInfo], split: str
) -> dict[str, dict[str, str]]:
    """By task, the samples of ``split`` that the original model fails and the tuned one solves under the task's own scoring
    rule: sample_id → the tuned model's answer text."""

    def primary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            row["sample_id"]: row for row in rows if row["split"] == split and row["mode"] == tasks[row["task"]].primary_mode
        }

    before, after = primary(original_rows), primary(tuned_rows)
    flipped: dict[str, dict[str, str]] = {name: {} for name in tasks}
    for sample_id, row in after.items():
        if row["correct"] and not before[sample_id]["correct"]:
            flipped[row["task"]][sample_id] = answer_text(tasks[row["task"]], row)
    return flipped


def find_tasks(
    flipped: dict[str, dict[str, str]], tasks: dict[str, TaskInfo], least: int
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Of ``flipped`` (see :func:`flipped_answers`) the tasks on which features are sought, and for those with fewer samples
    than ``least``, which are left out, why."""
    sought = {name: answers for name, answers in flipped.items() if tasks[name].role == "find"}
    few = {name: f"{len(answers)} flipped samples, {least} needed" for name, answers in sought.items() if len(answers) < least}
    return {name: answers for name, answers in sought.items() if name not in few}, few


def sequences(
    tokenizer: PreTrainedTokenizerFast, task: TaskInfo, samples: list[Sample], answers: list[str]
) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompt and answer (see :func:`answer_text`) as the task's scoring rule reads them, and the length of
    each prompt."""
    if task.scoring == OPTION_LETTER:
        prompts = tokenizer([listed_prompt(sample.prompt, sample.options) for sample in samples])["input_ids"]
    else:
        prompts = encode_prompts(tokenizer, samples, chat=task.chat and task.scoring == GENERATION)
    joint = answers if task.scoring == GENERATION else [f" {answer}" for answer in answers]
    ends = tokenizer(joint, add_special_tokens=False)["input_ids"]
    return [prompt + end for prompt, end in zip(prompts, ends, strict=True)], [len(prompt) for prompt in prompts]


class FlippedStreams(NamedTuple):
    """Residual streams of several models at the chosen positions of a task's flipped samples."""

    resid: dict[str, Float[Tensor, "K D"]]
    """By model, K kept positions of all samples one after the other."""
    owner: Int[Tensor, " K"]
    """Which sample each row belongs to."""
    samples: int

    def mean(self, rows: Float[Tensor, "K X"]) -> Float[Tensor, "S X"]:
        """Mean of ``rows`` over the positions of each sample."""
        total = torch.zeros(self.samples, rows.shape[1]).index_add_(0, self.owner, rows)
        return total / torch.bincount(self.owner, minlength=self.samples).clamp(min=1).unsqueeze(1)


def read_flipped(
    trunks: dict[str, torch.nn.Module],
    tokenizer: PreTrainedTokenizerFast,
    task: TaskInfo,
    samples: list[Sample],
    answers: list[str],
    batch_size: int,
) -> dict[str, FlippedStreams]:
    """What every model of ``trunks`` (by name, cut off at the hooked layer) reads on identical tokens, each sample's prompt and
    its answer of ``answers``. By positions: ``prompt_last``, ``answer`` (the answer's tokens), ``all`` (all but the first)."""
    texts, starts = sequences(tokenizer, task, samples, answers)
    stream = TokenStream(texts, skip=0)
    resid = {
        name: read_residual(trunk, stream, batch_size, tokenizer.pad_token_id, torch.float32) for name, trunk in trunks.items()
    }
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0).tolist()
    kept: dict[str, list[int]] = {}
    owner: dict[str, list[int]] = {}
    for i, start in enumerate(starts):
        low, high = offsets[i], offsets[i + 1]
        spans = {"prompt_last": (low + start - 1, low + start), "answer": (low + start, high), "all": (low + 1, high)}
        for positions, span in spans.items():
            kept.setdefault(positions, []).extend(range(*span))
            owner.setdefault(positions, []).extend([i] * (span[1] - span[0]))
    return {
        positions: FlippedStreams(
            {name: rows[chosen] for name, rows in resid.items()}, torch.tensor(owner[positions]), len(samples)
        )
        for positions, chosen in kept.items()
    }


def feature_differences(
    crosscoder: Crosscoder, reading: FlippedStreams, readout: Readout, roles: Roles
) -> Float[Tensor, "S F"]:
    """f^tuned − f^original of each sample, averaged over its positions."""
    values = read_all(crosscoder, reading.resid, readout)
    return reading.mean(values[roles.tuned] - values[roles.original])
