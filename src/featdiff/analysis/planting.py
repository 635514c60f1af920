"""Is a feature a detector of tokens? Its own top tokens, planted in text where it is silent.

N token rows, S features of the set, P neutral texts, R bootstrap resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featdiff import stats
from featdiff.activations.harvest import TokenStream
from featdiff.analysis.lens import Lens, Reading
from featdiff.config import DescribeParams
from featdiff.stats import Interval


class Plan(NamedTuple):
    """What is planted for one feature."""

    tokens: list[int]
    """Its top tokens, the most common first."""
    original: list[float]
    """Its values in GRPO at those of its strongest contexts whose token is one of them."""
    texts: list[list[int]]
    """Neutral texts, cut at a place where a planted token goes."""
    silent: int
    """How many of them it is silent in from start to end."""


def plan(readings: Sequence[Reading], corpus: Reading, s: int, params: DescribeParams, rng: np.random.Generator) -> Plan:
    """Top tokens of the feature in column ``s`` (of the ``params.planted_texts`` strongest contexts over all ``readings``, one
    per text), and that many corpus texts in which it is silent, or nearest to it where it fires in every text, each cut at
    a random token on which it is silent."""
    most = params.planted_texts
    strongest: list[tuple[float, int]] = []
    for reading in readings:
        values, places = (column_TS[:, s] for column_TS in reading.peaks)
        for i in values.argsort(descending=True, stable=True)[:most].tolist():
            if values[i] > 0:
                strongest.append((values[i].item(), reading.stream.texts[i][reading.stream.skip + int(places[i])]))
    strongest = sorted(strongest, key=lambda pair: -pair[0])[:most]
    tokens = [token for token, _ in Counter(token for _, token in strongest).most_common(params.planted_tokens)]
    parts, peaks = corpus.split("grpo"), corpus.peaks[0][:, s].numpy()
    shuffled = rng.permutation(len(peaks))
    texts = []
    for i in shuffled[peaks[shuffled].argsort(kind="stable")][:most].tolist():
        places = (parts[i][:, s] == 0).nonzero().squeeze(1) + corpus.stream.skip
        if len(places := places[places > 0]):
            texts.append(corpus.stream.texts[i][: int(rng.choice(places.numpy()))])
    original = [value for value, token in strongest if token in tokens]
    return Plan(tokens, original, texts, min(len(texts), int((peaks == 0).sum())))


def planted(
    lens: Lens, readings: Sequence[Reading], corpus: Reading, params: DescribeParams, seed: int
) -> list[dict[str, Any]]:
    """One row per feature. ``original`` and ``planted`` are mean values in GRPO at the tokens of its strongest contexts and at
    the planted ones, ``ratio`` is their quotient (texts of either resampled); ``rate`` says how often planting wakes the
    feature, ``natural`` on how many of the same tokens in the corpus it fires, ``silent`` how many of the neutral texts are
    silent throughout.

    The verdict is ``token`` where the ratio's interval lies above ``params.token_detector``, ``context`` where it lies
    below, ``undecided`` between, ``untested`` for a feature that never fires. The strongest contexts are the
    highest of many values: that makes the ratio smaller, so a token detector whose value varies may count as undecided."""
    rng = np.random.default_rng(seed)
    plans = [plan(readings, corpus, s, params, rng) for s in range(len(lens.features))]
    texts = [[*text, token] for made in plans for text in made.texts for token in made.tokens]
    columns = [np.empty((0, 0))] * len(plans)
    if texts:
        read_NS = lens.read(TokenStream(texts, skip=0), ["grpo"]).values["grpo"]
        last_NS = read_NS[torch.tensor([len(text) for text in texts]).cumsum(0) - 1].numpy()
        ends = np.cumsum([len(made.texts) * len(made.tokens) for made in plans])[:-1]
        parts = np.split(last_NS, ends)
        columns = [
            part[:, s].reshape(len(made.texts), len(made.tokens))
            for s, (part, made) in enumerate(zip(parts, plans, strict=True))
        ]
    return [
        _row(made, values, _natural(corpus, s, made.tokens), params, seed)
        for s, (made, values) in enumerate(zip(plans, columns, strict=True))
    ]


def _natural(corpus: Reading, s: int, tokens: list[int]) -> NDArray[Any]:
    """Share of these tokens on which the feature fires in GRPO, for every text of the corpus that has any."""
    rows = torch.isin(corpus.token_ids, torch.tensor(tokens, dtype=torch.long))
    owners, fires = corpus.owners[rows], (corpus.values["grpo"][rows, s] > 0).double()
    counts = torch.bincount(owners, minlength=1)
    return (torch.bincount(owners, weights=fires, minlength=1) / counts)[counts > 0].numpy()


def _row(made: Plan, values: NDArray[Any], natural: NDArray[Any], params: DescribeParams, seed: int) -> dict[str, Any]:
    """``values``: at the planted tokens, by text and token."""

    def mean(numbers: NDArray[Any]) -> Interval:
        return stats.bootstrap_mean(numbers, resamples=params.bootstrap, confidence=params.confidence, seed=seed)

    row: dict[str, Any] = {
        "silent": made.silent,
        "tokens": [{"token_id": token} for token in made.tokens],
        "natural": mean(natural) if len(natural) else None,
    }
    if not values.size:
        return row | {"verdict": "untested", "original": None, "planted": None, "rate": None, "ratio": None}
    original, by_text = np.array(made.original), values.mean(1)
    rng = np.random.default_rng(seed)
    after_R, before_R = (array[stats.resample(len(array), params.bootstrap, rng)].mean(1) for array in (by_text, original))
    low, high = np.quantile(after_R / before_R, [(1 - params.confidence) / 2, (1 + params.confidence) / 2])
    bound = params.token_detector
    return row | {
        "verdict": "token" if low > bound else "context" if high < bound else "undecided",
        "original": mean(original),
        "planted": mean(by_text),
        "rate": mean((values > 0).mean(1)),
        "ratio": Interval(float(by_text.mean() / original.mean()), float(low), float(high), len(by_text)),
    }
