"""Memory: how much is free, how much of it may be used to remember what could be computed again, and what becomes of freed."""

from __future__ import annotations

import ctypes
import math
import os
from typing import TYPE_CHECKING

import psutil

from featdiff.artifacts.artifact import ContractError
from featdiff.config.reading import legible

if TYPE_CHECKING:
    import torch

PROMPT_CACHE = "FEATDIFF_PROMPT_CACHE"
"""Environment variable: bytes of keys and values of prompts that are kept for further passes over the same questions
(featdiff.language.session.PromptCache). Set to 0, every pass reads its prompts again; what is computed stays the same."""
SHARE = 0.25
"""Part of the free memory that is used for it where that is not set. The rest is for what answers need beside it."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Options of glibc's allocator (malloc.h)."""


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors on ``device`` can take: of a GPU also what torch holds there and does not use, else those of this
    machine."""
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def prompt_cache_bytes(device: torch.device) -> int:
    """What $FEATDIFF_PROMPT_CACHE says, or :data:`SHARE` of what is free on ``device`` now.

    Raises ContractError where the variable is no number of bytes."""
    given = os.environ.get(PROMPT_CACHE)
    if not given:
        return int(SHARE * free_bytes(device))
    try:
        number = float(given)
    except ValueError:
        number = -1.0
    if not (math.isfinite(number) and number >= 0):
        expected = "a number of bytes, such as 4e9"
        raise ContractError(f"${PROMPT_CACHE}", "value", expected, legible(repr(given)), "correct it, or unset it")
    return int(number)


def keep_freed() -> None:
    """Let freed memory stay with this process, for its next allocation of that size.

    By default, glibc gives what is larger than 32 MiB back to Linux, which hands it out anew page by page, zeroed: a tensor of
    56 MB then takes 37 ms to fill for the first time, and 9 if its memory was here before. Elsewhere nothing happens."""
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)
