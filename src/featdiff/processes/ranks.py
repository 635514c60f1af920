"""This process among the others: the ranks of its stage, and those that started it. Nothing here imports torch before it is
needed."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from featdiff.artifacts.artifact import ContractError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

SHARDED = "ACCELERATE_USE_FSDP"
"""Environment variable, set by accelerate's launcher: whether its configuration has ranks share a model."""
PRECISION = "ACCELERATE_MIXED_PRECISION"
"""Environment variable, set by it as well: what arms compute in, ``no`` for what their weights are."""
VLLM = "FEATDIFF_VLLM"
"""Environment variable: what draws answers in place of our decoder. ``colocate`` is vLLM on the GPUs of a stage: for the
completions of GRPO, the solutions of teachers, and evaluation. ``http://<host>:<port>`` is a server of it, for GRPO alone."""
COLOCATE = "colocate"
PACK = "FEATDIFF_PACK"
"""Environment variable: whether the texts of a micro batch are packed into one row, where they are imitated."""

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def hardware() -> dict[str, Any]:
    """What a checkpoint of training depends on beside params: another hardware does not go on from it."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    vllm = os.environ.get(VLLM, "").partition(":")[0]  # a server that has moved is the same one
    said = {"ranks": world_size(), "threads": threads, "sharded": SHARDED in os.environ, "precision": os.environ.get(PRECISION)}
    packed = os.environ.get(PACK)
    return said | ({"vllm": vllm} if vllm else {}) | ({"packed": packed} if packed else {})


def vllm_asked() -> str | None:
    """What :data:`VLLM` says, None for nothing. Raises ContractError for another value, and without a GPU or vLLM."""
    value = os.environ.get(VLLM)
    if not value:
        return None
    from featdiff.config.reading import legible  # with YAML, which a launcher has no need of

    if value != COLOCATE and not re.fullmatch(r"http://[\w.-]+:\d{1,5}", value, re.ASCII):
        expected = f"{COLOCATE}, or http://<host>:<port> of a server"
        raise ContractError(f"${VLLM}", "value", expected, legible(value), "correct it, or unset it")
    if (device := process_state().device.type) != "cuda":
        raise ContractError(f"${VLLM}", "device", "a GPU", device, "unset it: our decoder needs none")
    if importlib.util.find_spec("vllm") is None:
        todo = "pip install -e .[vllm], or unset it"
        raise ContractError(f"${VLLM}", value, "the package vllm installed", "no such module", todo)
    return value


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
    if state.device.type == "cuda":
        import torch

        # Float32 models and crosscoders on tensor cores, with 10 bits of each factor and sums in float32 (TF32): without it an
        # H100 computes their products at a seventh of that pace. NVIDIA_TF32_OVERRIDE=0 is the driver's way to have none.
        torch.backends.cuda.matmul.allow_tf32 = True
    return state


def replicated() -> Accelerator:
    """One with which each rank holds the whole model and computes in its dtype. What $ACCELERATE_CONFIG says of shards and of
    mixed precision is for arms (featdiff.training.engine)."""
    from accelerate import Accelerator

    process_state()
    sharded = os.environ.pop(SHARDED, None)
    try:
        return Accelerator(mixed_precision="no")
    finally:
        if sharded is not None:
            os.environ[SHARDED] = sharded


def largest(value: int) -> int:
    """The largest ``value`` of any rank; every rank must ask."""
    import torch
    from accelerate.utils import gather

    state = process_state()
    return value if state.num_processes == 1 else int(gather(torch.tensor([value], device=state.device)).max())


def shared_out(jobs: Sequence[Callable[[], T]], label: str = "", done: Callable[[int], object] | None = None) -> list[T]:
    """What each of ``jobs`` gives, in their order, on every rank. Each rank takes the next job as soon as it is free, so what a
    job gives must not depend on who does it. ``label`` names a bar that the first rank shows; ``done`` hears the number of each
    job, of this rank as it ends and of others when all have."""
    from accelerate.utils import gather_object
    from tqdm import tqdm

    state = process_state()
    with tqdm(desc=label, total=len(jobs), unit="part", disable=not (label and jobs and state.is_main_process)) as bar:

        def tell(i: int) -> None:
            bar.update(1)
            if done:
                done(i)

        found = {}
        for i in range(len(jobs)) if state.num_processes == 1 else _taken(len(jobs)):
            found[i] = jobs[i]()
            tell(i)
        if state.num_processes > 1:
            for i, given in sorted(item for part in gather_object([found]) for item in part.items() if item[0] not in found):
                found[i] = given
                tell(i)
    return [found[i] for i in range(len(jobs))]


def _taken(count: int) -> Iterator[int]:
    """Numbers below ``count`` in ascending order, each on one rank alone: on the first that asks."""
    # A counter that all ranks share deals better than turns do: jobs differ in what they cost, and so do ranks where a core has
    # something else to do. Every rank comes here equally often, so that the counters' names agree.
    counters = _counters()
    name = str(next(_COUNTED))
    while (number := counters.add(name, 1) - 1) < count:
        yield number


_COUNTED = itertools.count()


@cache
def _counters() -> TCPStore:
    """Counters of all ranks, which the first one keeps; every rank must ask."""
    from accelerate.utils import gather_object
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, first = os.environ["MASTER_ADDR"], process_state().is_main_process
    own = TCPStore(host, 0, is_master=True, wait_for_workers=False) if first else None
    port = next(port for port in gather_object([own.port if own else 0]) if port)
    return own or TCPStore(host, port, is_master=False)


def leave() -> None:
    """Take down the group of processes, if there is one: a rank that ends with gloo's threads at work can abort."""
    if "torch" in sys.modules:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def ancestors() -> Iterator[tuple[int, list[str]]]:
    """This process, its parent and so on, as far as Linux tells: pid and command line."""
    pid = os.getpid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            parent = int(_stat_fields(pid)[1])
        except OSError:
            return
        yield pid, [os.fsdecode(part) for part in command]
        pid = parent


def _runs_stages(command: list[str]) -> bool:
    """Whether this is the command line of a dvc, or of what starts several."""
    return any(Path(part).name in ("dvc", "dvc.EXE") or part == "featdiff.pipeline.repro" for part in command[:3])


def pipeline_process() -> int | None:
    """Pid of the outermost process above this one that runs stages."""
    return next((pid for pid, command in reversed(list(ancestors())) if _runs_stages(command)), None)


def starters() -> list[int]:
    """Pids of the processes above this one, up to the outermost that runs stages: when one of them ends, so does this one."""
    above = list(ancestors())
    counted = [i for i, (_, command) in enumerate(above) if _runs_stages(command) or "featdiff.processes.launch" in command[:4]]
    return [pid for pid, _ in above[1 : max(counted, default=0) + 1]]


def _stat_fields(pid: int) -> list[str]:
    """Fields of ``/proc/<pid>/stat`` from the third (the state) on."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if it is gone. Tells a reused pid from the old one."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def alive(pid: int, start: int) -> bool:
    """Whether process ``pid`` of this machine, started at ``start``, still runs."""
    if sys.platform == "linux":
        return start != 0 and process_start(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
