"""How the hardware at hand trains a model (ours): in what it computes, whether each rank holds the whole model or a share,
whether activations wait for the backward pass or are computed again, whether texts are packed, and what draws completions. The
file that $ACCELERATE_CONFIG names says so, or the environment, and never params: two machines may train the same arm in
different ways.

Weights are float32 whatever computes. Each update of a small learning rate is smaller than the distance between two bfloat16
numbers, and would be rounded away: at a rate of 1e-6 most weights of a bfloat16 model never move (docs/method.md).
"""

from __future__ import annotations

import copy
import os
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from featdiff.artifacts.artifact import ContractError
from featdiff.processes.ranks import COLOCATE, PACK, PRECISION, SHARDED, process_state, vllm_asked

A = TypeVar("A", bound=TrainingArguments)
RECOMPUTE = "FEATDIFF_RECOMPUTE"
"""Environment variable: ``true`` has activations computed again in the backward pass, which saves memory and takes about a
third more time. ``fsdp_activation_checkpointing`` of an accelerate configuration says the same."""
HARDWARE = "$ACCELERATE_CONFIG"
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
"""What ``mixed_precision`` may say. Float16 would need its losses scaled."""


class Engine(NamedTuple):
    """How this process and its fellows train."""

    compute: torch.dtype
    """Of products of matrices, forwards and backwards; weights, gradients and the optimizer are float32."""
    sharded: bool
    """Whether each rank holds a share of every weight (FSDP2), and not all of it."""
    recompute: bool
    ranks: int
    packed: bool = False
    """Whether the texts of a micro batch stand in one row without padding, and see nothing of one another, where they are
    imitated."""
    vllm: str | None = None
    """``colocate``, or the address of the server, where vLLM draws GRPO's completions; None where our decoder does."""

    @classmethod
    def here(cls) -> Engine:
        """That of this process. Raises ContractError for one that is not supported."""
        precision = os.environ.get(PRECISION, "no")
        if precision not in PRECISIONS:
            raise ContractError(HARDWARE, "mixed_precision", " or ".join(PRECISIONS), precision, "change it")
        state = process_state()
        sharded, ranks = parse_flag_from_env(SHARDED), state.num_processes
        packed = parse_flag_from_env(PACK, state.device.type != "cpu")
        if sharded:
            # Shards of a checkpoint would be described by a pickle, which nothing here reads.
            wanted = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
            for name, value in wanted.items():
                if (found := os.environ.get(name, value)).lower() != value.lower():
                    field, todo = f"fsdp_config: {name.lower()}", "use a file of conf/accelerate/"
                    raise ContractError(HARDWARE, field, value, found, todo)
            if ranks < 2:
                todo = "raise it, or take a configuration without FSDP"
                raise ContractError(HARDWARE, "num_processes", "at least 2 that share a model", ranks, todo)
        recompute = parse_flag_from_env(RECOMPUTE) or (sharded and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"))
        return cls(PRECISIONS[precision], sharded, recompute, ranks, packed, vllm_asked())

    def facts(self) -> dict[str, str]:
        """For the audit: arms are comparable where these agree."""
        compute = str(self.compute).removeprefix("torch.")
        if self.compute is torch.float32 and process_state().device.type == "cuda":
            compute += " (TF32)"
        how, texts = "sharded" if self.sharded else "whole", ", imitated texts packed" if self.packed else ""
        return {"precision": f"float32 weights, {compute} compute", "engine": f"{how} model, ranks: {self.ranks}{texts}"}

    def decoder(self) -> dict[str, str]:
        """For the audit: what drew the completions, nothing where our decoder did."""
        if self.vllm is None:
            return {}
        where = ", in the ranks that train" if self.vllm == COLOCATE else " of the client; a server drew"
        return {"decoder": f"vLLM {version('vllm')}{where}"}

    def arguments(self) -> dict[str, Any]:
        """Those of a trainer that are its own."""
        return {"bf16": self.compute is torch.bfloat16, "fp16": False, "gradient_checkpointing": self.recompute}

    def ready(self, arguments: A) -> A:
        """``arguments``, with which the next trainer that is made in this process is of this engine."""
        if self.sharded:
            arguments.fsdp_plugin_args = {
                "fsdp_version": 2,
                "auto_wrap_policy": "transformer_based_wrap",
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
                "cpu_ram_efficient_loading": False,
                # The library would wrap blocks in modules of its own, and rename their weights; the trainer's way does not.
                "activation_checkpointing": False,
                # Left to itself the library also adds up the ranks' gradients in bfloat16.
                "mixed_precision_policy": MixedPrecisionPolicy(self.compute, torch.float32, torch.float32),
            }
            if process_state().device.type == "cpu":
                # Accelerate replicates a model without a word where it is asked to shard it on CPUs: they are not among the
                # kinds of devices for which it looks at that request (AcceleratorState). This is one of those kinds. The
                # device and the group of processes were chosen before, and stay.
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    def require_shards(self, model: torch.nn.Module) -> None:
        """Raise ContractError unless ``model`` is held as this engine says: a library that does otherwise does not tell."""
        for name, weight in model.named_parameters():
            split = isinstance(weight, DTensor) and weight.device_mesh.size() == self.ranks and weight.placements[0].is_shard()
            if split is not self.sharded:
                expected, found = ("in shards", "whole") if self.sharded else ("whole", "in shards")
                todo = "use a file of conf/accelerate/ as it is"
                raise ContractError(HARDWARE, f"weight {name}", f"{expected} on {self.ranks} ranks", found, todo)


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``, which every rank must ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(trainer: Trainer) -> dict[str, Tensor] | None:
    """The weights of a sharded model by name, on the first rank (none on others); None where each rank has them. Every rank
    must ask: one that saved by itself would wait for the others for ever."""
    if not any(isinstance(weight, DTensor) for weight in trainer.model.parameters()):
        return None
    state: dict[str, Any] = get_model_state_dict(
        trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    tied = trainer.model.all_tied_weights_keys
    return {name: weight for name, weight in state.items() if name not in tied}


class Replica:
    """A whole copy of a model that is to be sharded, in the dtype that computes. Ranks generate with it: they take unequal
    numbers of steps, and each step of the sharded model takes all of them."""

    def __init__(self, model: PreTrainedModel, compute: torch.dtype) -> None:
        self._model = copy.deepcopy(model).to(compute)

    @torch.no_grad()
    def like(self, sharded: torch.nn.Module, device: torch.device) -> PreTrainedModel:
        """It, with the weights that ``sharded`` has by now of those that are trained; every rank must ask."""
        own = dict(self._model.to(device).named_parameters())
        for name, weight in sharded.named_parameters():
            if weight.requires_grad:
                own[name].copy_(unsharded(weight))
        return self._model
