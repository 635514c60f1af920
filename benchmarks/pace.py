"""The pace at which contestants take turns. Read by every contestant, in whatever environment it lives: PyTorch alone.

A contestant is a process that prints one JSON value a line: ``null`` once it is ready, then the seconds of each step of a block
for every line that it reads, and at the end what it found. So contestants can be timed in turns, block by block, and what the
machine does meanwhile meets all of them.

B batch, I = M·D inputs, F features.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor


def say(found: object) -> None:
    print(json.dumps(found), flush=True)


def case() -> dict[str, float]:
    """The numbers of the case, which are the first argument."""
    return json.loads(sys.argv[1])


def planted_rows(inputs: int, rows: int, seed: int = 0, directions: int = 2048, active: int = 24, noise: float = 0.1) -> Tensor:
    """Rows [rows, I] of mean square 1: sparse sums of random directions, and noise. What a dictionary finds in activations."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(directions, inputs, generator=generator)
    chosen = torch.randint(directions, (rows, active), generator=generator)
    weights = torch.empty(rows, active).exponential_(generator=generator)
    found = torch.nn.functional.embedding_bag(chosen, table, per_sample_weights=weights, mode="sum")
    found += noise * found.std() * torch.randn(found.shape, generator=generator)
    found -= found.mean(0)
    return found / found.square().mean().sqrt()


class Paced(Iterator[Tensor]):
    """Endless batches of ``rows``, shuffled anew in every pass. From one batch to the next is one step of whoever asks for
    them; after ``block`` of them the next waits for a line."""

    def __init__(self, rows: Tensor, batch: int, block: int) -> None:
        self.rows, self.batch, self.block = rows, batch, block
        self.order, self.next, self.generator = torch.empty(0, dtype=torch.long), 0, torch.Generator().manual_seed(1)
        self.seconds: list[float] = []
        self.start: float | None = None

    def __next__(self) -> Tensor:
        if self.start is None:
            say(None)
            sys.stdin.readline()
        else:
            self.seconds.append(perf_counter() - self.start)
        if len(self.seconds) == self.block:
            say(self.seconds)
            self.seconds = []
            sys.stdin.readline()
        self.start = perf_counter()
        if self.next + self.batch > len(self.order):
            self.order, self.next = torch.randperm(len(self.rows), generator=self.generator), 0
        chosen = self.order[self.next : self.next + self.batch]
        self.next += self.batch
        return self.rows[chosen]

    def finish(self) -> None:
        """Say how long the last step took."""
        assert self.start is not None
        say([*self.seconds, perf_counter() - self.start])


def timed(step: Callable[[], object], block: int, found: Callable[[], object] = lambda: None) -> None:
    """Blocks of ``step`` for as long as lines come, and what was ``found`` at the end."""
    step()
    say(None)
    while sys.stdin.readline().strip():
        seconds = []
        for _ in range(block):
            start = perf_counter()
            step()
            seconds.append(perf_counter() - start)
        say(seconds)
    say(found())


def sparse_bias(x_BI: Tensor, W_IF: Tensor, active: float) -> float:
    """Encoder bias, one for all features, under which ``active`` of them fire on a row, on average."""
    f_BF = x_BI @ W_IF
    return -float(f_BF.flatten().kthvalue(f_BF.numel() - int(active * len(x_BI))).values)


def explained(x_BI: Tensor, rebuilt_BI: Tensor) -> float:
    """Fraction of variance explained."""
    return 1 - float((x_BI - rebuilt_BI).square().sum() / (x_BI - x_BI.mean(0)).square().sum())
