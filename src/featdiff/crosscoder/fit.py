"""Fitting a crosscoder on an activation source, and what it turned out to be.

N token rows, B batch, M models, D residual width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import get_wsd_schedule

from featdiff.activations.store import ActivationSource, in_order
from featdiff.artifact import ContractError
from featdiff.config import CrosscoderTraining
from featdiff.crosscoder.losses import Loss, batch_top_k, batchtopk_loss, l1_loss
from featdiff.crosscoder.model import Crosscoder
from featdiff.ranks import process_state
from featdiff.resume import Scratch, require_finite, restore, snapshot

THRESHOLD_MEMORY = 0.99
GUESS = 0.8


def _statistics(source: ActivationSource, stop: int) -> tuple[Tensor, Tensor]:
    """Mean [M, D] of rows 0 to ``stop`` and their mean squared distance [M] to it."""
    square = torch.zeros(len(source.models), dtype=torch.float64)
    total = torch.zeros(len(source.models), source.d_model, dtype=torch.float64)
    for rows in map(Tensor.double, in_order(source, 0, stop)):
        total, square = total + rows.sum(0), square + rows.square().sum((0, 2))
    mean = total / stop
    return mean, square / stop - mean.square().sum(1)


class _Step:
    """One update under either loss; keeps what the losses need between steps."""

    def __init__(self, crosscoder: Crosscoder, params: CrosscoderTraining, variance: float, accelerator: Accelerator) -> None:
        self.crosscoder, self.params, self.variance, self.accelerator = crosscoder, params, variance, accelerator
        self.idle_F = torch.zeros(crosscoder.n_features, device=accelerator.device)
        self.step = 0

    def __call__(self, x_BMD: Tensor) -> Loss:
        params = self.params
        if self.crosscoder.loss == "l1":
            ramp = min(1.0, (self.step + 1) / max(1.0, params.l1_warmup_share * params.steps))
            loss = l1_loss(self.crosscoder, x_BMD, params.l1_weight * ramp)
        else:
            f_BF = self.crosscoder.preactivations(x_BMD)
            cutoff = self._cutoff(f_BF.detach())
            dead_F = self.idle_F >= params.dead_after_tokens
            loss = batchtopk_loss(self.crosscoder, x_BMD, cutoff, dead_F, params.aux_k, params.aux_weight, self.variance, f_BF)
            with torch.no_grad():
                memory = THRESHOLD_MEMORY if self.step else 0.0
                self.crosscoder.threshold.mul_(memory).add_(cutoff, alpha=1 - memory)
        fired_F = self.accelerator.reduce((loss.fired > 0).any(0).float(), "sum") > 0
        self.idle_F = torch.where(fired_F, 0, self.idle_F + params.batch_tokens)
        self.step += 1
        return loss

    @torch.no_grad()
    def _cutoff(self, f_BF: Tensor) -> Tensor:
        """Cutoff of the whole batch, over all processes: each sends only what can be among the largest."""
        value = f_BF * self.crosscoder.decoder_norms().sum(1)
        count = self.params.k * self.params.batch_tokens
        if self.accelerator.num_processes > 1:
            value = self.accelerator.gather(value.flatten().topk(min(count, value.numel())).values)
        return batch_top_k(value, count, self.crosscoder.threshold * GUESS if self.step else None)


def fit(
    source: ActivationSource,
    loss: str,
    params: CrosscoderTraining,
    seed: int,
    log: Callable[[int, dict[str, float]], None],
    label: str,
    *,
    scratch: Scratch,
    tied: bool = True,
    warm: Crosscoder | None = None,
) -> tuple[Crosscoder, dict[str, Any], dict[str, Tensor]]:
    """Train a crosscoder; returns it with final metrics and per-feature statistics [F]. ``tied``: all models start from
    the same decoder rows. ``warm``: start from this crosscoder instead, its mean, scale and threshold with it.

    The last ``heldout_share`` of the rows is kept out for FVE and L0. Raises ContractError for rows or batches that
    cannot be shared out, FloatingPointError at NaN or infinity."""
    process_state()
    accelerator = Accelerator()
    train_rows = source.rows - int(source.rows * params.heldout_share)
    if not 0 < train_rows < source.rows:
        field, found = "crosscoder.training.heldout_share", f"{params.heldout_share} of {source.rows} rows"
        raise ContractError("params.yaml", field, "a share that leaves rows on both sides", found, "change it")
    if params.batch_tokens % accelerator.num_processes:
        field, expected = "crosscoder.training.batch_tokens", f"a multiple of {accelerator.num_processes} (processes)"
        raise ContractError("params.yaml", field, expected, params.batch_tokens, "change it")
    crosscoder = Crosscoder(source.models, source.d_model, params.n_features, loss)
    mean_MD, variance_M = _statistics(source, train_rows)
    if warm is None:
        crosscoder.initialise(params.decoder_norm, torch.Generator().manual_seed(seed), tied=tied)
        crosscoder.scale.copy_((source.d_model / variance_M).sqrt())
        crosscoder.mean.copy_((mean_MD * crosscoder.scale[:, None]).mean(0))
        crosscoder.b_dec.data.copy_(crosscoder.normalise(mean_MD[None])[0])
    else:
        crosscoder.load_state_dict(warm.state_dict())
    centre_MD = crosscoder.normalise(mean_MD[None].float())[0]
    variance = float((variance_M * crosscoder.scale.square()).sum())
    crosscoder.to(accelerator.device)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=params.lr, fused=True)
    warmup, decay = (round(share * params.steps) for share in (params.warmup_share, params.decay_share))
    schedule = get_wsd_schedule(optimizer, warmup, decay, num_training_steps=params.steps, decay_type="linear")
    batches = source.shuffled(params.batch_tokens, torch.Generator().manual_seed(seed + 1), 0, train_rows)
    take = _Step(crosscoder, params, variance, accelerator)
    if checkpoint := scratch.load():
        restore(crosscoder, optimizer, schedule, checkpoint)
        take.step, take.idle_F = checkpoint.step, checkpoint.tensors["idle"].to(accelerator.device)
    done = take.step
    for _ in range(done):  # the same rows in the same order; reading is cheap beside a step
        next(batches)
    bar = tqdm(
        total=params.steps,
        initial=done,
        desc=f"crosscoder {label}",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with scratch.loop(), bar:
        for step in range(done + 1, params.steps + 1):
            rows_BMD = next(batches)[accelerator.process_index :: accelerator.num_processes]
            x_BMD = crosscoder.normalise(rows_BMD.to(accelerator.device))
            result = take(x_BMD)
            result.total.backward()
            if accelerator.num_processes > 1:
                for weight in crosscoder.parameters():
                    weight.grad = accelerator.reduce(weight.grad, "mean")
            norm = torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), 1.0)
            point = {"loss": result.total.item(), "grad_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]}
            require_finite(point, step, log, "lower crosscoder.training.lr", label)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update(1)
            if step % params.log_every == 0 or step == 1:
                dead_F = take.idle_F >= params.dead_after_tokens
                point = _quality(result, x_BMD, centre_MD.to(x_BMD.device), source.models, dead_F) | point
                log(step, point)
                bar.set_postfix(l0=f"{point['l0']:.1f}", fve=f"{point[f'fve/{source.models[0]}']:.3f}", refresh=False)
            if scratch.due():
                scratch.save(step, snapshot(crosscoder, optimizer) | {"idle": take.idle_F}, rates=schedule.get_last_lr())
    crosscoder.eval().requires_grad_(False)
    metrics = measure(crosscoder, source, centre_MD, train_rows, source.rows)
    features = feature_statistics(crosscoder, source)
    metrics["dead_share"] = float((features["firing_rate"] == 0).float().mean())
    return crosscoder, metrics, features


def _quality(result: Loss, x_BMD: Tensor, mean_MD: Tensor, models: list[str], dead_F: Tensor) -> dict[str, float]:
    error_M = result.error.square().sum((0, 2))
    spread_M = (x_BMD - mean_MD).square().sum((0, 2))
    fve = {f"fve/{model}": 1 - (error_M[m] / spread_M[m]).item() for m, model in enumerate(models)}
    l0 = (result.fired > 0).float().sum(1).mean().item()
    return {"l0": l0, "dead": dead_F.float().mean().item(), **fve}


@torch.inference_mode()
def measure(crosscoder: Crosscoder, source: ActivationSource, mean_MD: Tensor, start: int, stop: int) -> dict[str, Any]:
    """FVE per model (1 − squared error / squared distance to the training mean) and mean L0 on rows ``start`` to ``stop``."""
    device = crosscoder.b_enc.device
    error_M, spread_M, active = torch.zeros(len(source.models)), torch.zeros(len(source.models)), 0.0
    for rows in in_order(source, start, stop):
        x = crosscoder.normalise(rows.to(device))
        f = crosscoder.encode(x)
        error_M += (x - crosscoder.decode(f)).square().sum((0, 2)).cpu()
        spread_M += (x - mean_MD.to(device)).square().sum((0, 2)).cpu()
        active += (f > 0).sum().item()
    fve = {model: 1 - (error_M[m] / spread_M[m]).item() for m, model in enumerate(source.models)}
    return {"fve": fve, "l0": active / (stop - start), "heldout_rows": stop - start}


@torch.inference_mode()
def feature_statistics(crosscoder: Crosscoder, source: ActivationSource) -> dict[str, Tensor]:
    """Per feature over all rows: firing rate, mean value when firing, largest value [F]."""
    device = crosscoder.b_enc.device
    count, total, largest = (torch.zeros(crosscoder.n_features, device=device) for _ in range(3))
    for rows in in_order(source, 0, source.rows):
        f = crosscoder.encode(crosscoder.normalise(rows.to(device)))
        count += (f > 0).sum(0)
        total += f.sum(0)
        largest = torch.maximum(largest, f.amax(0))
    statistics = {"firing_rate": count / source.rows, "mean_activation": total / count.clamp(min=1), "max_activation": largest}
    return {name: tensor.cpu() for name, tensor in statistics.items()}
