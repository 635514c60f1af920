"""What a killed stage goes on from: checkpoints and finished parts of its work, in a folder that lies outside DVC's outputs and
is named after everything that determines the result, so that nothing of another run can be taken up.

Whatever is kept is published as artifacts are (featdiff.artifacts.artifact): whole, with the sha256 of every file, and verified
before use. What is incomplete or damaged is said to be so, removed, and done again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from featdiff.artifacts import artifact
from featdiff.artifacts.artifact import ContractError
from featdiff.processes import signals
from featdiff.processes.ranks import largest, process_state, rank, shared_out
from featdiff.tracking.record import Record

T = TypeVar("T")
STATE, MADE = "state.json", "made"
KEPT = 2
"""Checkpoints kept: the newest, and the one before it."""


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Scratch:
    """Checkpoints (:meth:`save`, :meth:`load`), parts (:meth:`part`, :meth:`parts`) and files (:meth:`folder`) of one stage.
    Without a ``root`` nothing is kept.

    ``seconds`` is the interval between saves, and longer where a save takes more than ``share`` of it: the first rank
    times each one. 0 saves at every opportunity. Logged curves go with every checkpoint, so that what is logged after
    resuming follows without gap or repetition."""

    def __init__(
        self, root: Path | None = None, seconds: float = math.inf, share: float = 1.0, record: Record | None = None
    ) -> None:
        self.root, self.seconds, self.share, self.record = root, seconds, share, record
        self.interval = seconds
        """In force: what is lost by a kill at most, and one step."""
        self._saved, self._due, self._stop = time.monotonic(), 0.0, False
        self._parts: dict[str, Any] = {}
        self._pending: dict[str, Any] = {}
        self._asked: set[str] = set()
        self._said = False
        if root is not None:
            self._take_up(root)

    def _take_up(self, root: Path) -> None:
        for folder in sorted((root / "parts").glob("[0-9]*")):
            self._parts |= self._whole(folder, _read) or {}

    def of_rank(self) -> Scratch:
        """For parts of which each rank computes others. It has what any rank finished before, of however many there were; each
        writes into a folder of its own, since two that write into one would clash."""
        if self.root is None:
            return self
        state, ranks = process_state(), self.root / "ranks"
        own = self
        if state.num_processes > 1:
            own = Scratch(ranks / str(state.process_index), self.seconds, self.share)
        for root in [self.root, *sorted(ranks.glob("*"))]:
            if root != own.root:
                own._take_up(root)
        return own

    def _whole(self, folder: Path, read: Callable[[Path], T]) -> T | None:
        """What ``read`` makes of ``folder`` if it is as it was published; else None, and the folder is removed."""
        try:
            artifact.verify(folder)
        except (ContractError, OSError) as error:
            said = error.what if isinstance(error, ContractError) else error
            print(f"featdiff: not taken up: {said}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return read(folder)

    def folder(self, name: str, write: Callable[[Path], None]) -> Path:
        """The folder ``name`` as ``write`` made it, now or before. Needs a ``root``."""
        assert self.root is not None
        path = self.root / name
        if self.whole(path):
            self._say("finished parts")
        else:
            write(artifact.begin(path))
            artifact.publish(path)
        return path

    def _say(self, source: str) -> None:
        """Tell once what is gone on from."""
        if not self._said and process_state().is_main_process:
            print(f"featdiff: going on from {source}", file=sys.stderr, flush=True)
        self._said = True

    def bring(self, name: str, out: Path, write: Callable[[Path], None]) -> None:
        """Put the files that ``write`` makes in a folder into ``out``: those of folder ``name`` where it was made before."""
        if self.root is None:
            out.mkdir(parents=True, exist_ok=True)
            write(out)
        else:
            skip = shutil.ignore_patterns(artifact.MANIFEST)
            shutil.copytree(self.folder(name, write), out, copy_function=os.link, ignore=skip, dirs_exist_ok=True)

    def part(self, name: str, compute: Callable[[], T]) -> T:
        """The JSON value ``name``, computed now or before; values are written together, every ``seconds`` and where a signal
        asks to stop. Raises ValueError for a name asked for twice: it must say all that tells one value from the others."""
        if self.root is None:
            return compute()
        if name in self._asked:
            raise ValueError(f"part {name}: asked for twice")
        self._asked.add(name)
        if name in self._parts:
            self._say("finished parts")
            value: T = self._parts.pop(name)
            return value
        try:
            self._pending[name] = value = compute()
        except signals.Stopped:  # the stage does so for its own scratch; a method may keep parts in one of its own
            self.write_pending()
            raise
        if self._late():
            self.write_pending()
        return value

    def parts(self, jobs: Sequence[tuple[str, Callable[[], T]]], done: Callable[[str], object] = lambda _: None, /) -> list[T]:
        """The JSON values of ``jobs`` by name, in their order, each as :meth:`part` has it. Ranks share the work, and every one
        has all values in the end; ``done`` hears each name."""
        return shared_out([partial(self.part, *job) for job in jobs], done=lambda i: done(jobs[i][0]))

    def _late(self) -> bool:
        """Whether the interval is over, which starts the clock of a save."""
        self._due = time.monotonic()
        return self._due - self._saved >= self.interval

    def write_pending(self) -> None:
        """Write the parts that are not written yet, for a stage that is asked to stop between two of them."""
        if self.root is None:
            return
        with signals.deferred():  # a request in the middle of writing would lose what it is about
            self._due, values, self._pending = time.monotonic(), self._pending, {}
            if values:
                number = 1 + max((int(path.name) for path in (self.root / "parts").glob("[0-9]*")), default=-1)
                self.folder(f"parts/{number:06d}", lambda folder: _write(folder, values))
            self._next()

    def _next(self) -> None:
        """Start the next interval, in which the save that has just ended is at most ``share`` of the time."""
        self._saved = time.monotonic()
        cost = self._saved - self._due
        if self.seconds and cost / self.share > max(self.seconds, 1.2 * self.interval) and rank() == 0:
            signals.say(f"saving takes {cost:.0f} s: from now on every {cost / self.share:.0f} s, {self.share:.0%} of the time")
        self.interval = max(self.seconds, cost / self.share) if self.seconds else 0.0

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Around a loop that asks :meth:`due` after every step: a signal to stop waits for its checkpoint."""
        if self.root is None:
            yield
            return
        with signals.deferred():
            yield

    def due(self) -> bool:
        """Whether it is time to save, on any rank; every rank must ask after every step."""
        if self.root is None:
            return False
        late = self._late() and rank() == 0  # it writes; the others would take saving for cheap
        urgency = largest(2 if signals.asked() else int(late))
        self._stop = urgency == 2
        return urgency > 0

    def save(self, step: int, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Publish a checkpoint (the first rank does) and forget old ones. Raises Stopped where a signal asked for it."""
        if process_state().is_main_process:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

            def write(folder: Path) -> None:
                save_file(held, folder / "tensors.safetensors")
                self.note(folder, step=step, **facts)

            self.folder(f"checkpoints/{step:08d}", write)
            for old in self._checkpoints()[KEPT:]:
                shutil.rmtree(old)
        self.saved()

    def note(self, folder: Path, **facts: Any) -> None:
        """Write ``facts`` and the curves so far into ``folder``."""
        curves = self.record.curves() if self.record is not None else []
        _write(folder, {"facts": facts, "curves": curves})

    def noted(self, folder: Path) -> dict[str, Any]:
        """The facts in ``folder``, which are said; the curves go back to the record."""
        state = _read(folder)
        if self.record is not None:
            self.record.resume(state["curves"])
        facts: dict[str, Any] = state["facts"]
        self._say(f"step {facts['step']}")
        return facts

    def saved(self) -> None:
        """Start the next interval; raises Stopped where a signal asked for it."""
        self._next()
        if self._stop:
            raise signals.Stopped(signals.asked() or "a signal to another rank")

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint."""
        for folder in self._checkpoints():
            tensors = self._whole(folder, lambda folder: load_file(folder / "tensors.safetensors"))
            if tensors is not None:
                facts = self.noted(folder)
                return Checkpoint(int(facts.pop("step")), tensors, facts)
        return None

    def whole(self, folder: Path) -> bool:
        """Whether ``folder`` is as it was sealed; if not, it is removed."""
        return folder.exists() and self._whole(folder, bool) is not None

    def keep(self, write: Callable[[Path], None], **facts: Any) -> None:
        """Keep what ``write`` makes in a folder, with ``facts`` and the curves, in place of all checkpoints: it is the whole of
        what a stage has to make. Called by every rank; the first one writes. Needs a ``root``."""
        assert self.root is not None
        if rank() == 0:

            def whole(folder: Path) -> None:
                write(folder)
                self.note(folder, **facts)

            self.folder(MADE, whole)
            shutil.rmtree(self.root / "checkpoints", ignore_errors=True)

    def kept(self) -> bool:
        """Whether :meth:`keep` was done; every rank must ask."""
        return largest(int(rank() == 0 and self.root is not None and self.whole(self.root / MADE))) > 0

    def take(self, out: Path) -> dict[str, Any]:
        """Put what was kept into ``out``; returns its facts, and the curves go back to the record. For the first rank."""
        assert self.root is not None
        skip = shutil.ignore_patterns(artifact.MANIFEST, STATE)
        shutil.copytree(self.root / MADE, out, copy_function=os.link, ignore=skip, dirs_exist_ok=True)
        return self.noted(self.root / MADE)

    def _checkpoints(self) -> list[Path]:
        """Newest first, whole or not."""
        return sorted((self.root / "checkpoints").glob("[0-9]*"), reverse=True) if self.root is not None else []


def _write(folder: Path, value: Any) -> None:
    """As JSON in the order of its keys, which is that of columns."""
    (folder / STATE).write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _read(folder: Path) -> Any:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def require_finite(
    point: dict[str, float], step: int, log: Callable[[int, dict[str, float]], None], todo: str, label: str = ""
) -> None:
    """Log ``point`` and raise FloatingPointError if a number in it is NaN or infinite; ask before the optimizer's step, so
    that no checkpoint holds what came of it."""
    for name, value in point.items():
        if not math.isfinite(value):
            log(step, point)
            raise FloatingPointError(f"{label}{': ' * bool(label)}{name} is {value} at step {step}; {todo}")


def snapshot(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's state as one table of tensors."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": value for name, value in state.items()}
    return tensors


def restore(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    found: Checkpoint,
) -> None:
    """Put back what :func:`snapshot` took and ``rates`` of the schedule."""
    with torch.no_grad():
        for name, tensor in (dict(module.named_parameters()) | dict(module.named_buffers())).items():
            tensor.copy_(found.tensors[name])
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in found.tensors.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/")
            # Fused kernels take it that the moments of a weight lie in memory as it does itself.
            if tensor.shape == (weight := weights[int(i)]).shape:
                tensor = torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(i), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.last_epoch = found.step
    schedule._step_count = found.step + 1
    schedule._last_lr = found.facts["rates"]
    for group, rate in zip(optimizer.param_groups, found.facts["rates"], strict=True):
        group["lr"] = rate
