"""What the sections of params.yaml are made of: a strict frozen class, names, and numbers with bounds.

Importing this module and those of the sections must stay cheap (no torch).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
"""Owner and name of something on the hub, as a regular expression; no path leads out of a folder in this form."""


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError("a name is 1 to 40 lowercase letters, digits and underscores, and starts with a letter")
    return text


Name = Annotated[str, AfterValidator(_name)]
"""Becomes the name of a file, of a DVC stage or of an artifact."""
# Upper bounds tell a typo from a plan: each is at least ten times what models of 8B parameters, a million features and
# 400 million tokens need. None says that a machine can do it.
Positive = Annotated[int, Field(gt=0, le=10**6)]
Length = Annotated[int, Field(gt=0, le=131_072)]
"""Tokens of one text."""
Many = Annotated[int, Field(gt=0, le=5 * 10**7)]
"""Texts, problems, updates, features, tokens of one update."""
Tokens = Annotated[int, Field(gt=0, le=10**11)]
"""Tokens of a stream."""
Resamples = Annotated[int, Field(gt=0, le=10**5)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Place = Annotated[str, Field(min_length=1, max_length=4096)]
"""A path, or another form that says where something comes from."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Level = Annotated[float, Field(gt=0, lt=1)]
"""A probability that is neither 0 nor 1: of an interval, of a test."""
Temperature = Annotated[float, Field(ge=0.01, le=100)]
Rate = Annotated[float, Field(gt=0)]
BASE = "base"
"""Name of the model from which every arm starts."""
Role = Literal["train", "find", "control", "heldout", "reported"]
REPORTED: Role = "reported"
"""Of a task that is asked without edits and decides nothing."""
Position = Literal["prompt_last", "prompt", "generated", "all"]
Grading = Literal["strict", "flexible"]
Readout = Literal["swap", "slot", "contribution"]
"""What "the value of a feature in one model" means (featdiff.crosscoder.readout)."""
LossName = Literal["batchtopk", "l1", "dedicated", "delta", "frozen"]
"""Keys of ``featdiff.crosscoder.losses.table.LOSSES``, which cannot be asked here: it imports torch."""
