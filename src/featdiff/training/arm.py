"""What all arms that are trained here share: checkpoints at even intervals, logging, and the facts of the audit."""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
from collections.abc import Callable
from functools import partial
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

from featdiff.artifacts.artifact import ContractError, seal
from featdiff.config.models import LearnedParams
from featdiff.config.reading import legible
from featdiff.language.models import BLOCKS, blocks, load_model, save_model
from featdiff.pipeline.checkpoint import Scratch, require_finite
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import Sample
from featdiff.training.engine import Engine, gathered, unsharded

Log = Callable[[int, dict[str, float]], None]


class Recorder(TrainerCallback):
    """Writes the trainer's logs to the stage's record, keeps weights at even intervals, shows progress, saves checkpoints to
    resume from, and stops at NaN."""

    def __init__(
        self,
        out: Path,
        log: Log,
        checkpoints: int,
        keep: dict[str, str],
        shown: str,
        scratch: Scratch,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.out, self.log, self.checkpoints, self.keep, self.shown = out, log, checkpoints, keep, shown
        self.scratch, self.state = scratch, {} if state is None else state
        self.folder = (out if scratch.root is None else scratch.root) / "trainer"
        """Of the trainer's own checkpoints."""
        self.bar: tqdm[int] | None = None

    def train(self, trainer: Trainer) -> None:
        """Train from the newest whole checkpoint on, in place of the trainer's own printing."""
        self.trainer = trainer
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)
        folders = sorted(self.folder.glob("checkpoint-*"), key=lambda folder: -int(folder.name.rpartition("-")[2]))
        found = next(filter(self.scratch.whole, folders), None)
        if found:
            self.state.update(self.scratch.noted(found)["state"])
        with self.scratch.loop():
            trainer.train(resume_from_checkpoint=str(found) if found else None)

    def kept_steps(self, steps: int) -> dict[int, int]:
        """Updates after which weights are kept, each 1/checkpoints of ``steps``, and their numbers; the last is the model
        itself."""
        return {-(-number * steps // self.checkpoints): number for number in range(1, self.checkpoints)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        Engine.here().require_shards(model)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"train {self.out.name.split('.')[1]}",
            unit="step",
            disable=not state.is_world_process_zero,
        )
        for step, number in self.kept_steps(state.max_steps).items():
            if step <= state.global_step and state.is_world_process_zero:
                self._keep(number, self._lost)

    def _keep(self, number: int, save: Callable[[Path], None]) -> None:
        self.scratch.bring(f"kept/{number}", self.out / "checkpoints" / str(number), save)

    def _lost(self, folder: Path) -> None:
        """Weights kept before a checkpoint are gone, and only training from the start makes them again."""
        assert self.scratch.root is not None
        shutil.rmtree(self.scratch.root)
        raise ContractError(folder, "weights", "those kept before the kill", "none", "start again with dvc repro, from step 0")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Raise FloatingPointError before a gradient that is NaN or infinite reaches the weights."""
        norms = torch.stack([unsharded(weight.grad.norm()) for weight in model.parameters() if weight.grad is not None])
        require_finite({"grad_norm": norms.norm().item()}, state.global_step + 1, self.log, "lower the learning rate")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Log the series named in ``keep`` (trainer's name → ours); raise FloatingPointError at NaN or infinity."""
        point = {ours: float(logs[theirs]) for theirs, ours in self.keep.items() if theirs in logs}
        if "loss" not in point and "reward" not in point:
            return
        require_finite(point, state.global_step, self.log, "lower the learning rate")
        if self.bar is not None and self.shown in point:
            self.bar.set_postfix({self.shown: f"{point[self.shown]:.3f}"}, refresh=False)
        if state.is_world_process_zero:
            self.log(state.global_step, point)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep weights where that is due, and have the trainer save where that is."""
        if self.bar is not None:
            self.bar.update(1)
        if number := self.kept_steps(state.max_steps).get(state.global_step):
            save = saving(self.trainer)
            if state.is_world_process_zero:
                self._keep(number, save)
        if state.global_step < state.max_steps and self.scratch.due():  # the trainer takes one step more after the last
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal the trainer's checkpoint, which it writes in place; without the seal it does not count."""
        process_state().wait_for_everyone()
        if state.is_world_process_zero:
            folder = self.folder / f"checkpoint-{state.global_step}"
            self.scratch.note(folder, step=state.global_step, state=self.state)
            seal(folder)
        self.scratch.saved()


def load_trainable(base: Path, first: int | None) -> PreTrainedModel:
    """The model in ``base`` in float32, of which its ``first`` blocks alone require gradients, or all weights.

    Raises ContractError where it has fewer blocks."""
    model = load_model(base).float()
    if first is not None:
        every = blocks(model.base_model)
        if first > len(every):
            raise ContractError("params.yaml", "blocks", f"at most the {len(every)} of the base, or null", first, "change it")
        model.requires_grad_(False)
        every[:first].requires_grad_(True)
    return model


def adapter(params: LearnedParams, model: PreTrainedModel, seed: int) -> Any:
    """The configuration of ``params.lora`` for the trainer of ``model`` that is made next, None without; ``seed`` draws its
    first weights.

    Raises ContractError without the package peft, for targets that ``model`` has not, and where ranks share a model: merging
    takes whole weights."""
    if params.lora is None:
        return None
    if importlib.util.find_spec("peft") is None:
        raise ContractError("params.yaml", "lora", "the package peft installed", "no such module", "pip install -e .[peft]")
    if Engine.here().sharded:
        todo = "take a configuration without FSDP: an adapter takes little memory"
        raise ContractError("params.yaml", "lora", "null where ranks share a model", "an adapter", todo)
    maps = {name.rpartition(".")[2] for name, module in blocks(model.base_model).named_modules() if _is_map(module)}
    if unknown := [target for target in params.lora.targets if target not in maps]:
        raise ContractError("params.yaml", "lora.targets", f"of {', '.join(sorted(maps))}", legible(unknown[0]), "change it")
    from peft import LoraConfig

    torch.manual_seed(seed)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=params.lora.rank,
        lora_alpha=params.lora.alpha,
        target_modules=params.lora.targets,
        layers_to_transform=None if params.blocks is None else list(range(params.blocks)),
        layers_pattern=None if params.blocks is None else list(BLOCKS),
    )


def _is_map(module: torch.nn.Module) -> bool:
    return isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.ndim == 2


def saving(trainer: Trainer) -> Callable[[Path], None]:
    """Writes the model as it is now, whole and in float32, into a folder. Every rank must ask; the first may write."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):  # of a copy: what is added to weights and taken away again leaves them rounded
        model = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return partial(save_model, model, trainer.processing_class, weights=gathered(trainer))


def finish(trainer: Trainer, recorder: Recorder, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Save the final model to ``out``; returns its updates and checkpoints, with ``facts``, for the audit."""
    state, save = trainer.state, saving(trainer)
    if state.is_world_process_zero:
        save(out)
    kept = [*recorder.kept_steps(state.global_step), state.global_step]
    return {"updates": state.global_step, "checkpoints": kept, **facts, **Engine.here().facts()}


def token_counts(tokenizer: PreTrainedTokenizerFast, samples: list[Sample]) -> list[int]:
    """Tokens of each sample's prompt, solution and end, without a chat template."""
    return [len(tokenizer(sample.prompt + sample.solution)["input_ids"]) + 1 for sample in samples]


def common_arguments(params: Any, seed: int, engine: Engine, scratch: Path, batch: int, field: str) -> dict[str, Any]:
    """Trainer arguments on which all methods agree, for a global batch of ``batch`` sequences (``field`` of params.yaml).

    Where they depart from a library default: ``report_to``: tracking is ours. ``bf16`` and ``gradient_checkpointing``: TRL
    switches them on, and here the hardware's configuration does. ``logging_nan_inf_filter``: hides NaN. Raises ContractError
    when the batch cannot be shared out evenly."""
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
        **engine.arguments(),
        "report_to": "none",
        "save_strategy": "no",
        "save_total_limit": 2,
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
