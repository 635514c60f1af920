"""This process among the others of its stage. Nothing here imports torch before it is needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from featdiff.artifact import ContractError

if TYPE_CHECKING:
    from accelerate import PartialState


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_state() -> PartialState:
    """Rank, number of processes and device, as the launcher set them up.

    Raises ContractError when the launcher started processes that are not connected: each would take itself for
    the only one."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != world_size():
        todo = "use a file of conf/accelerate/ as it is"
        raise ContractError("$ACCELERATE_CONFIG", "connected processes", world_size(), state.num_processes, todo)
    return state


def largest(value: int) -> int:
    """The largest ``value`` of any rank; every rank must ask."""
    import torch
    from accelerate.utils import gather

    state = process_state()
    return value if state.num_processes == 1 else int(gather(torch.tensor([value], device=state.device)).max())
