"""Finding few among many: which entries exceed a floor, the largest of them, and their order by feature.

On CPUs NumPy does these several times faster than PyTorch (comparing 4 times, finding 6, sorting rows 15, at 1,024 x 8,192), on
one thread; elsewhere PyTorch does them where the tensors lie. Both give the same result. Nothing here has a gradient.
B batch rows, F features, C of them, E entries.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def above(f_BF: Float[Tensor, "B F"], floor: Float[Tensor, " F"] | float) -> Bool[Tensor, " *places"]:
    """Which entries lie above ``floor``."""
    if not _on_cpu(f_BF):
        return f_BF > floor
    values_BF = f_BF.numpy()
    return torch.from_numpy(values_BF > (floor.numpy() if isinstance(floor, Tensor) else values_BF.dtype.type(floor)))


def places(mask: Bool[Tensor, " *places"]) -> Int[Tensor, " E"]:
    """Ascending places of what is set, in the flattened tensor. On a GPU the host waits for their number."""
    if not _on_cpu(mask):
        return mask.flatten().nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def largest_of_rows(value_BC: Float[Tensor, "B C"], count: int) -> Float[Tensor, "B 1"]:
    """The ``count``-th largest value of every row."""
    if not _on_cpu(value_BC):
        return value_BC.topk(count, dim=1).values[:, -1:]
    sorted_BC = np.sort(value_BC.numpy(), axis=1)  # sorting whole rows is faster than NumPy's and PyTorch's partial ways
    return torch.from_numpy(sorted_BC[:, value_BC.shape[1] - count, None].copy())


def order_of(number_E: Int[Tensor, " E"], numbers: int) -> Int[Tensor, " E"]:
    """The places of ``number_E``, whose values are below ``numbers``, by ascending value; equal ones stay in their order."""
    if not _on_cpu(number_E):
        return number_E.argsort(stable=True)
    short = np.uint16 if numbers <= 1 << 16 else np.int64  # 16 bits are sorted by counting, not by comparing
    return torch.from_numpy(np.argsort(number_E.numpy().astype(short), kind="stable"))
