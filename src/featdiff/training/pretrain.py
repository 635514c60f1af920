"""Pretraining of the model organism's base on packed rows.

Texts of a row do not see each other: position ids restart with every text, from which the model builds a
block-diagonal mask. Shapes: R row, T token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, get_wsd_schedule

from featdiff.artifacts.artifact import ContractError
from featdiff.config.models import Pretraining
from featdiff.language.models import character_tokenizer, organism_model
from featdiff.pipeline.checkpoint import Scratch, require_finite, restore, snapshot
from featdiff.processes.ranks import replicated
from featdiff.tasks.task import Text

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"


class Rows(NamedTuple):
    """Packed texts."""

    ids_RT: Tensor
    positions_RT: Tensor
    weight_RT: Tensor
    """Loss weight of each token as a target; 0 for BOS and padding."""


def pack(texts: list[Text], tokenizer: PreTrainedTokenizerFast, row_tokens: int, prompt_weight: float) -> Rows:
    """Texts, each with BOS and EOS, in rows of ``row_tokens``; what does not fit starts the next row.

    Raises ContractError for a text longer than a row."""
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    completions = tokenizer([text.completion for text in texts], add_special_tokens=False)["input_ids"]
    rows: list[tuple[list[int], list[int], list[float]]] = []
    ids: list[int] = []
    positions: list[int] = []
    weight: list[float] = []
    for prompt, completion, text in zip(prompts, completions, texts, strict=True):
        length = len(prompt) + len(completion) + 1
        if length > row_tokens:
            raise ContractError(
                "params.yaml", "base.pretraining.row_tokens", f"at least {length}", row_tokens, f"raise it for {text.prompt!r}"
            )
        if len(ids) + length > row_tokens:
            rows.append((ids, positions, weight))
            ids, positions, weight = [], [], []
        ids = [*ids, *prompt, *completion, tokenizer.eos_token_id]
        positions = [*positions, *range(length)]
        weight = [*weight, 0.0, *[prompt_weight] * (len(prompt) - 1), *[1.0] * (len(completion) + 1)]
    rows.append((ids, positions, weight))
    shape = (len(rows), row_tokens)
    packed = Rows(torch.full(shape, tokenizer.pad_token_id), torch.arange(row_tokens).expand(shape).clone(), torch.zeros(shape))
    for i, (row_ids, row_positions, row_weight) in enumerate(rows):
        length = len(row_ids)
        packed.ids_RT[i, :length] = torch.tensor(row_ids)
        packed.positions_RT[i, :length] = torch.tensor(row_positions)
        packed.positions_RT[i, length:] = torch.arange(row_tokens - length)
        packed.weight_RT[i, :length] = torch.tensor(row_weight)
    return packed


def pretrain(
    texts: list[Text], params: Pretraining, seed: int, log: Callable[[int, dict[str, float]], None], scratch: Scratch
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train a base from scratch on ``texts``; learning rate: linear warm-up, constant, linear decay to 0 over the
    last ``decay_share`` of the steps. The vocabulary is every printable ASCII character, so that it depends on no
    other data.

    Raises ContractError when there are fewer texts than the steps need, FloatingPointError when loss or gradient is not
    finite."""
    accelerator = replicated()
    tokenizer = character_tokenizer([ALPHABET])
    rows = pack(texts, tokenizer, params.row_tokens, params.prompt_weight)
    rows_per_step = params.batch_tokens // params.row_tokens
    needed, found = params.steps * rows_per_step, len(rows.ids_RT)
    if found < needed:
        more = int(np.ceil(len(texts) * needed / found))
        raise ContractError(
            "params.yaml",
            "prepare.pretrain.texts",
            f"about {more} for base.pretraining.steps",
            len(texts),
            "raise it or train less",
        )
    model = organism_model(params, tokenizer, seed)
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    undecayed = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": params.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=params.lr, betas=(0.9, 0.95), fused=True)
    decay = round(params.decay_share * params.steps)
    schedule = get_wsd_schedule(optimizer, params.warmup_steps, decay, num_training_steps=params.steps, decay_type="linear")
    model, optimizer = accelerator.prepare(model, optimizer)
    share = rows_per_step // accelerator.num_processes
    inner = accelerator.unwrap_model(model)
    checkpoint = scratch.load()
    if checkpoint:
        restore(inner, optimizer, schedule, checkpoint)
    done = checkpoint.step if checkpoint else 0
    bar = tqdm(total=params.steps, initial=done, desc="pretrain base", unit="step", disable=not accelerator.is_main_process)
    with _threads(params.threads), scratch.loop(), bar:
        for step in range(done + 1, params.steps + 1):
            start = (step - 1) * rows_per_step + accelerator.process_index * share
            ids, positions, weight = (part[start : start + share].to(accelerator.device) for part in rows)
            loss = _loss(model, ids, positions, weight)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            point = {"loss": loss.item(), "grad_norm": float(norm), "learning_rate": schedule.get_last_lr()[0]}
            require_finite(point, step, log, "lower base.pretraining.lr")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update(1)
            if step % 25 == 0 or step == 1:
                log(step, point)
                bar.set_postfix(loss=f"{point['loss']:.3f}")
            if scratch.due():
                scratch.save(step, snapshot(inner, optimizer), rates=schedule.get_last_lr())
    return inner.eval(), tokenizer


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of this process compute; none: as many as before. Afterwards it is as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loss(model: torch.nn.Module, ids_RT: Tensor, positions_RT: Tensor, weight_RT: Tensor) -> Tensor:
    logits_RTV = model(input_ids=ids_RT, position_ids=positions_RT, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits_RTV.flatten(0, 1), ids_RT[:, 1:].flatten(), reduction="none")
    weight = weight_RT[:, 1:].flatten()
    return (loss * weight).sum() / weight.sum()
