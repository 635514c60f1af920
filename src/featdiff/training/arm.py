"""What both post-training arms share: checkpoints at even intervals, logging, and the fairness audit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from featdiff.artifact import MANIFEST, ContractError, sha256_file, write_json
from featdiff.models import save_model
from featdiff.ranks import process_state

Log = Callable[[int, dict[str, float]], None]


class Recorder(TrainerCallback):
    """Writes the trainer's logs to the stage's record, saves weights at even intervals, shows progress, stops at NaN."""

    def __init__(self, out: Path, log: Log, checkpoints: int, keep: dict[str, str], shown: str) -> None:
        self.out, self.log, self.checkpoints, self.keep, self.shown = out, log, checkpoints, keep, shown
        self.trainer: Trainer | None = None
        self.saved: list[int] = []
        self.bar: tqdm[int] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Take the place of the trainer's own printing."""
        self.trainer = trainer
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"train {self.out.name.split('.')[1]}",
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Log the series named in ``keep`` (trainer's name → ours); raise FloatingPointError at NaN or infinity."""
        point = {ours: float(logs[theirs]) for theirs, ours in self.keep.items() if theirs in logs}
        if "loss" not in point and "reward" not in point:
            return
        for name, value in point.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {state.global_step}; lower the learning rate")
        if self.bar is not None and self.shown in point:
            self.bar.set_postfix({self.shown: f"{point[self.shown]:.3f}"}, refresh=False)
        if state.is_world_process_zero:
            self.log(state.global_step, point)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save a checkpoint at each 1/checkpoints of the updates; the last one is the model itself."""
        if self.bar is not None:
            self.bar.update(1)
        done = state.global_step * self.checkpoints // state.max_steps
        if done > len(self.saved) and done < self.checkpoints:
            self.saved.append(state.global_step)
            if state.is_world_process_zero and self.trainer is not None:
                model = self.trainer.accelerator.unwrap_model(self.trainer.model)
                tokenizer: PreTrainedTokenizerFast = self.trainer.processing_class
                save_model(model, tokenizer, self.out / "checkpoints" / str(done))


def finish(trainer: Trainer, recorder: Recorder, out: Path, base: Path, data: Path, facts: dict[str, float]) -> dict[str, Any]:
    """Save the final model and the audit that shows how the two arms compare; returns the audit."""
    state = trainer.state
    audit = {
        "base_manifest": sha256_file(base / MANIFEST),
        "problems_sha256": sha256_file(data / "train.parquet"),
        "updates": state.global_step,
        "checkpoints": [*recorder.saved, state.global_step],
        **facts,
    }
    if state.is_world_process_zero:
        save_model(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, out)
        write_json(out / "audit.json", audit)
    return audit


def common_arguments(params: Any, seed: int, model: PreTrainedModel, scratch: Path, batch: int, field: str) -> dict[str, Any]:
    """Trainer arguments on which both arms agree, for a global batch of ``batch`` sequences (``field`` of params.yaml).

    Where they depart from a library default: ``report_to``: tracking is ours. ``bf16``: TRL switches it on where the
    model is float32. ``gradient_checkpointing``: TRL switches it on; the models here fit. ``logging_nan_inf_filter``:
    hides NaN. Raises ContractError when the batch cannot be shared out evenly."""
    state = process_state()
    cpu, world = state.device.type == "cpu", state.num_processes
    micro, accumulation = per_process(batch, params.micro_batch_size, world, field)
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": params.lr,
        "warmup_steps": params.warmup_share,
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": cpu,
        "bf16": model.dtype == torch.bfloat16 and not cpu,
        "fp16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": not cpu,
        "ddp_find_unused_parameters": False if world > 1 else None,
    }


def per_process(total: int, micro: int, world: int, what: str) -> tuple[int, int]:
    """Micro batch and accumulation steps of one process for a global batch of ``total``.

    Raises ContractError when the batch cannot be shared out evenly."""
    if total % world:
        raise ContractError(
            "params.yaml", what, f"a multiple of {world} processes", total, "change it or the number of processes"
        )
    share = total // world
    micro = math.gcd(share, micro) if share % min(micro, share) else min(micro, share)
    return micro, share // micro
