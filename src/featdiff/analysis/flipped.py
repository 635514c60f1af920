"""Flipped samples (base wrong, GRPO right) and the feature values of both models on them.

S samples, T token, D residual width, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from featdiff.activations.harvest import TokenStream, read_residual
from featdiff.config import LocalizeParams
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import read_all
from featdiff.evaluation import primary_mode
from featdiff.models import encode_prompts
from featdiff.tasks.suites import listed_prompt
from featdiff.tasks.task import GENERATION, Sample, TaskInfo

OPTION_LETTER = "option_letter"


def answer_text(task: TaskInfo, row: dict[str, Any]) -> str:
    """What a model answered in ``row``, as the task's scoring rule reads it: a letter, an option's text or its own text."""
    return str(row["parsed"] if task.scoring == OPTION_LETTER else row["completion"])


def flipped_answers(
    base_rows: list[dict[str, Any]], tuned_rows: list[dict[str, Any]], tasks: dict[str, TaskInfo], split: str
) -> dict[str, dict[str, str]]:
    """Per task, the samples of ``split`` that base fails and the tuned model solves under the task's own
    scoring rule: sample_id → the tuned model's answer text."""

    def primary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            row["sample_id"]: row for row in rows if row["split"] == split and row["mode"] == primary_mode(tasks[row["task"]])
        }

    before, after = primary(base_rows), primary(tuned_rows)
    flipped: dict[str, dict[str, str]] = {name: {} for name in tasks}
    for sample_id, row in after.items():
        if row["correct"] and not before[sample_id]["correct"]:
            flipped[row["task"]][sample_id] = answer_text(tasks[row["task"]], row)
    return flipped


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


def feature_differences(
    crosscoder: Crosscoder,
    trunks: dict[str, torch.nn.Module],
    tokenizer: PreTrainedTokenizerFast,
    task: TaskInfo,
    samples: list[Sample],
    answers: list[str],
    params: LocalizeParams,
) -> Tensor:
    """f^GRPO − f^base [S, F] on identical tokens (prompt and GRPO's own answer), averaged over the positions of
    ``params.positions``: the last prompt token, the answer's tokens, or all but the first token."""
    texts, starts = sequences(tokenizer, task, samples, answers)
    stream = TokenStream(texts, skip=0)
    resid = {
        name: read_residual(trunk, stream, params.batch_size, tokenizer.pad_token_id, torch.float32)
        for name, trunk in trunks.items()
    }
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0).tolist()
    kept: list[int] = []
    owner: list[int] = []
    for i, start in enumerate(starts):
        low, high = offsets[i], offsets[i + 1]
        spans = {"prompt_last": (low + start - 1, low + start), "answer": (low + start, high), "all": (low + 1, high)}
        span = spans[params.positions]
        kept += range(*span)
        owner += [i] * (span[1] - span[0])
    values = read_all(crosscoder, {name: rows[kept] for name, rows in resid.items()}, params.readout)
    difference = values["grpo"] - values["base"]
    members = torch.tensor(owner)
    total = torch.zeros(len(samples), crosscoder.n_features).index_add_(0, members, difference)
    return total / torch.bincount(members, minlength=len(samples)).clamp(min=1).unsqueeze(1)


def needed_models(crosscoder: Crosscoder, readout: str) -> list[str]:
    """Models whose residual streams the readout needs."""
    return crosscoder.models if readout == "contribution" else ["base", "grpo"]
