"""The features of a set read in base and GRPO on the same tokens, under the swap readout.

Two kinds of text: GRPO's own answers to questions of the find split, and the corpus, whose activations are stored.
N token rows, T token, S features of the set, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from featdiff.activations.residual import TokenStream, read_residual
from featdiff.activations.store import ActivationStore, in_order
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.language.evaluation import primary_mode
from featdiff.localization.flipped import answer_text, sequences
from featdiff.tasks.task import Sample, TaskInfo

MODELS = ("base", "grpo")


@dataclass(frozen=True)
class Reading:
    """Values of the features at every kept token of some texts."""

    stream: TokenStream
    values: Mapping[str, Float[Tensor, "N S"]]
    """By model."""

    def split(self, model: str) -> tuple[Tensor, ...]:
        """Values [T, S] of every text."""
        return self.values[model].split([len(ids) - self.stream.skip for ids in self.stream.texts])

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
        """Largest value in GRPO, and its place among the kept tokens, by text and feature."""
        found = [values_TS.max(0) for values_TS in self.split("grpo")]
        return torch.stack([values for values, _ in found]), torch.stack([places for _, places in found])


class Lens:
    """Reads ``features`` in both models. ``trunks`` stop at the crosscoder's layer."""

    def __init__(
        self, crosscoder: Crosscoder, trunks: Mapping[str, torch.nn.Module], features: list[int], pad: int, batch_size: int
    ) -> None:
        self.features, self.trunks, self.pad, self.batch_size = features, trunks, pad, batch_size
        self.readers = {model: Reader(crosscoder, model, "swap", features) for model in MODELS}

    @torch.inference_mode()
    def read(self, stream: TokenStream, models: Sequence[str] = MODELS) -> Reading:
        """Run ``models`` over the texts."""
        values = {}
        for model in models:
            resid_ND = read_residual(self.trunks[model], stream, self.batch_size, self.pad, torch.float32)
            values[model] = self.readers[model](resid_ND)
        return Reading(stream, values)

    @torch.inference_mode()
    def read_stores(self, stream: TokenStream, stores: Mapping[str, ActivationStore]) -> Reading:
        """Read what ``stores`` hold of ``stream``, the first texts of theirs."""
        values = {
            model: torch.cat([self.readers[model](rows[:, 0]) for rows in in_order(stores[model], 0, stream.rows)])
            for model in MODELS
        }
        return Reading(stream, values)


class Answered(NamedTuple):
    """Questions of the find split with the answers one model gave under each task's own scoring rule."""

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
) -> Answered:
    """The first ``most`` questions of every task on the find split, with the answers in ``rows``."""
    found = Answered([], [], [])
    for name, task in tasks.items():
        given = {row["sample_id"]: row for row in rows if row["task"] == name and row["mode"] == primary_mode(task)}
        chosen = [sample for sample in samples if sample.task == name and sample.split == "find"][:most]
        if chosen:
            answers = [answer_text(task, given[sample.sample_id]) for sample in chosen]
            texts, starts = sequences(tokenizer, task, chosen, answers)
            found.samples.extend(chosen)
            found.texts.extend(texts)
            found.starts.extend(starts)
    return found
