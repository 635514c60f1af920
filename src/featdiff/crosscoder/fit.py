"""Fitting a crosscoder on an activation source: the training loop.

B batch, M models, D residual width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from featdiff.activations.store import ActivationSource, moments_in_turns
from featdiff.activations.turns import FIT, Turns, alone
from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.descent import Descent
from featdiff.crosscoder.losses.table import LOSSES
from featdiff.crosscoder.measure import batch_quality
from featdiff.crosscoder.model import Crosscoder
from featdiff.pipeline.checkpoint import Scratch, require_finite, restore, snapshot
from featdiff.processes.ranks import replicated

Log = Callable[[int, dict[str, float]], None]
"""Takes a step and its numbers."""


class Fitted(NamedTuple):
    """A crosscoder and what is needed to measure it."""

    crosscoder: Crosscoder
    mean_MD: Float[Tensor, "M D"]
    """Mean of the training rows in normalised units."""
    train_rows: int
    """The first rows of the source, on which it was fitted; the rest was held out."""


def _train_rows(rows: int, params: CrosscoderTraining, processes: int) -> int:
    """How many of ``rows`` are fitted on. Raises ContractError for rows or batches that cannot be shared out."""
    train_rows = params.train_rows(rows)
    if not 0 < train_rows < rows:
        field, found = "crosscoder.training.heldout_share", f"{params.heldout_share} of {rows} rows"
        raise ContractError("params.yaml", field, "a share that leaves rows on both sides", found, "change it")
    if params.batch_tokens % processes:
        field, expected = "crosscoder.training.batch_tokens", f"a multiple of {processes} (processes)"
        raise ContractError("params.yaml", field, expected, params.batch_tokens, "change it")
    return train_rows


def fit(
    source: ActivationSource,
    loss: str,
    params: CrosscoderTraining,
    seed: int,
    log: Log,
    label: str,
    *,
    scratch: Scratch,
    tied: bool = True,
    warm: Crosscoder | None = None,
) -> Fitted:
    """Train a crosscoder under ``loss`` (a name in ``LOSSES``) and return it without gradients.

    ``tied``: all models start from the same decoder rows. ``warm``: start from this crosscoder's weights instead, in its
    normalised units. ``log`` gets the curves every ``log_every`` steps; ``label`` names the fit in messages.
    The last ``heldout_share`` of the rows is not read. Raises ContractError for rows or batches that cannot be shared out,
    FloatingPointError at NaN or infinity."""
    return alone(fit_in_turns(source, loss, params, seed, log, label, scratch=scratch, tied=tied, warm=warm))


def fit_in_turns(
    source: ActivationSource,
    loss: str,
    params: CrosscoderTraining,
    seed: int,
    log: Log,
    label: str,
    *,
    scratch: Scratch,
    tied: bool = True,
    warm: Crosscoder | None = None,
) -> Turns[Fitted]:
    """:func:`fit`, step by step."""
    accelerator = replicated()
    train_rows = _train_rows(source.rows, params, accelerator.num_processes)
    mean_MD, variance_M = yield from moments_in_turns(source, train_rows)
    crosscoder = Crosscoder(source.models, source.d_model, params.n_features, loss)
    if warm is None:
        crosscoder.initialise(params.decoder_norm, torch.Generator().manual_seed(seed), tied=tied)
        crosscoder.calibrate(mean_MD, variance_M)
    else:
        crosscoder.load_state_dict(warm.state_dict())
    centre_MD = crosscoder.normalise(mean_MD[None].float())[0]
    variance = float((variance_M * crosscoder.scale.square()).sum())
    crosscoder.to(accelerator.device)
    objective = LOSSES[loss](crosscoder, params, variance, accelerator)
    descent = Descent(crosscoder, params.lr, accelerator)
    optimizer = descent.optimizer
    warmup, decay = (round(share * params.steps) for share in (params.warmup_share, params.decay_share))
    # Up, level, down to 0. transformers has such a schedule, and takes three seconds to import.
    schedule = LambdaLR(optimizer, lambda step: min(step / max(1, warmup), 1.0, (params.steps - step) / max(1, decay)))
    done, idle_F = 0, torch.zeros(crosscoder.n_features, device=accelerator.device)  # tokens since each feature fired
    if checkpoint := scratch.load():
        restore(crosscoder, optimizer, schedule, checkpoint)
        done, idle_F = checkpoint.step, checkpoint.tensors["idle"].to(accelerator.device)
    batches = source.shuffled(params.batch_tokens, torch.Generator().manual_seed(seed + 1), 0, train_rows, skip=done)
    bar = tqdm(
        total=params.steps,
        initial=done,
        desc=f"crosscoder {label}",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with scratch.loop(), bar:
        for step in range(done + 1, params.steps + 1):
            yield FIT, step
            # Every process draws the same global batch and takes every n-th row: B/n rows each, so that the mean of the
            # processes' gradients is the gradient of the mean over the batch.
            rows_BMD = next(batches)[accelerator.process_index :: accelerator.num_processes]
            x_BMD = crosscoder.normalise(rows_BMD.to(accelerator.device))
            result = objective(x_BMD, step, idle_F >= params.dead_after_tokens)
            # Counted after the loss: a feature that was dead when the step began is trained as dead in it, even if it fires.
            fired_F = accelerator.reduce(result.count_F, "sum") > 0
            idle_F = torch.where(fired_F, 0, idle_F + params.batch_tokens)
            result.total.backward()
            descent.step(step, result.total)
            schedule.step()
            bar.update(1)
            logs, saves = step % params.log_every == 0 or step == 1, scratch.due()
            if logs or saves or step == params.steps:
                number, point = descent.told()
                require_finite(point, number, log, "lower crosscoder.training.lr", label)
            if logs:
                dead_F = idle_F >= params.dead_after_tokens
                point = batch_quality(source.models, result, x_BMD, centre_MD.to(x_BMD.device), dead_F) | point
                log(step, point)
                bar.set_postfix(l0=f"{point['l0']:.1f}", fve=f"{point[f'fve/{source.models[0]}']:.3f}", refresh=False)
            # Last: a checkpoint is the state between two steps, with its curve logged, from which the next step follows.
            if saves:
                scratch.save(step, snapshot(crosscoder, optimizer) | {"idle": idle_F}, rates=schedule.get_last_lr())
    return Fitted(crosscoder.eval().requires_grad_(False), centre_MD, train_rows)
