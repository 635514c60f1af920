"""The features of a set read in the original and in the tuned model on the same tokens, under the swap readout.

Two kinds of text are read: the tuned model's own answers to questions of the find split, and the corpus, whose activations are
stored. What is read is kept by the part that a model plays: ``original`` or ``tuned``.
N token rows, T token, S features of the set, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from featdiff.activations.residual import TokenStream, read_residual
from featdiff.activations.store import ActivationStore, in_order
from featdiff.config.models import Roles
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.localization.flipped import answer_text, sequences
from featdiff.tasks.task import Sample, TaskInfo

ORIGINAL, TUNED = PARTS = ("original", "tuned")
"""The parts that two models play in a description."""
T = TypeVar("T")


def by_part(by_model: Mapping[str, T], roles: Roles) -> dict[str, T]:
    """What ``by_model`` holds of the original and of the tuned model, by part."""
    return {ORIGINAL: by_model[roles.original], TUNED: by_model[roles.tuned]}


@dataclass(frozen=True)
class Reading:
    """Values of the features at every kept token of some texts."""

    stream: TokenStream
    values: Mapping[str, Float[Tensor, "N S"]]
    """By part."""

    def split(self, part: str) -> tuple[Tensor, ...]:
        """Values [T, S] of every text."""
        return self.values[part].split([len(ids) - self.stream.skip for ids in self.stream.texts])

    @cached_property
    def token_ids(self) -> Int[Tensor, " N"]:
        """Ids of the kept tokens."""
        return torch.tensor([token for ids in self.stream.texts for token in ids[self.stream.skip :]])

    @cached_property
    def owners(self) -> Int[Tensor, " N"]:
        """Number of the text that each kept token is of."""
        lengths = torch.tensor([len(ids) - self.stream.skip for ids in self.stream.texts])
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    @cached_property
    def peaks(self) -> tuple[Tensor, Tensor]:
        """Largest value in the tuned model, and its place among the kept tokens, by text and feature."""
        found = [values_TS.max(0) for values_TS in self.split(TUNED)]
        return torch.stack([values for values, _ in found]), torch.stack([places for _, places in found])


class FeatureReader:
    """Reads ``features`` in both models. ``trunks`` are by model and stop at the crosscoder's layer."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        trunks: Mapping[str, torch.nn.Module],
        roles: Roles,
        features: list[int],
        pad: int,
        batch_size: int,
    ) -> None:
        self.features, self.pad, self.batch_size = features, pad, batch_size
        self.trunks = by_part(trunks, roles)
        self.readers = by_part({model: Reader(crosscoder, model, "swap", features) for model in trunks}, roles)

    @torch.inference_mode()
    def read(self, stream: TokenStream, parts: Sequence[str] = PARTS) -> Reading:
        """Run the models of ``parts`` over the texts."""
        values = {}
        for part in parts:
            resid_ND = read_residual(self.trunks[part], stream, self.batch_size, self.pad, torch.float32)
            values[part] = self.readers[part](resid_ND)
        return Reading(stream, values)

    @torch.inference_mode()
    def read_stores(self, stream: TokenStream, stores: Mapping[str, ActivationStore]) -> Reading:
        """Read what ``stores``, by part, hold of ``stream``: the first texts of theirs."""
        values = {
            part: torch.cat([reader(rows[:, 0]) for rows in in_order(stores[part], 0, stream.rows)])
            for part, reader in self.readers.items()
        }
        return Reading(stream, values)


class Answered(NamedTuple):
    """Questions of one split with the answers one model gave under each task's own scoring rule."""

    samples: list[Sample]
    texts: list[list[int]]
    """Token ids of prompt and answer."""
    starts: list[int]
    """Tokens of each prompt."""

    @property
    def prompts(self) -> list[list[int]]:
        return [ids[:start] for ids, start in zip(self.texts, self.starts, strict=True)]

    @property
    def tasks(self) -> list[str]:
        return [sample.task for sample in self.samples]


def answered(
    tokenizer: PreTrainedTokenizerFast,
    tasks: Mapping[str, TaskInfo],
    samples: Sequence[Sample],
    rows: Sequence[dict[str, Any]],
    most: int,
    split: str = "find",
) -> Answered:
    """The first ``most`` questions of every task on ``split``, with the answers in ``rows``."""
    found = Answered([], [], [])
    for name, task in tasks.items():
        given = {row["sample_id"]: row for row in rows if row["task"] == name and row["mode"] == task.primary_mode}
        chosen = [sample for sample in samples if sample.task == name and sample.split == split][:most]
        if chosen:
            answers = [answer_text(task, given[sample.sample_id]) for sample in chosen]
            texts, starts = sequences(tokenizer, task, chosen, answers)
            found.samples.extend(chosen)
            found.texts.extend(texts)
            found.starts.extend(starts)
    return found
