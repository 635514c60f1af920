"""Is a feature a detector of tokens? Its own top tokens, planted in text where it is silent.

N token rows, S features of the set, P neutral texts, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featdiff import stats
from featdiff.activations.residual import TokenStream
from featdiff.config.sets import DescribeParams
from featdiff.description.reading import TUNED, FeatureReader, Reading
from featdiff.stats import Interval

Floats = NDArray[np.float64]
Row = dict[str, Any]


class Plan(NamedTuple):
    """What is planted for one feature."""

    original: dict[int, list[float]]
    """Its top tokens, the most common first, with its values in the tuned model at those of its strongest contexts."""
    texts: list[list[int]]
    """Neutral texts, cut at a place where a planted token goes."""
    silent: int
    """How many of them it is silent in from start to end."""


def plan(readings: Sequence[Reading], corpus: Reading, s: int, params: DescribeParams, rng: np.random.Generator) -> Plan:
    """What is planted for the feature in column ``s``: its top tokens, and the texts that they go into.

    Top tokens are those of its ``params.planted_texts`` strongest contexts in each of ``readings``, one context per text. The
    texts are that many of the corpus in which it is silent; where it fires in every text, those in which its largest value is
    lowest. Each is cut at a random token on which the feature is silent."""
    most = params.planted_texts
    strongest: dict[int, list[float]] = {}
    for reading in readings:
        values, places = (column_TS[:, s] for column_TS in reading.peaks)
        for i in values.argsort(descending=True, stable=True)[:most].tolist():
            if values[i] > 0:
                token = reading.stream.texts[i][reading.stream.skip + int(places[i])]
                strongest.setdefault(token, []).append(values[i].item())
    common = sorted(strongest.items(), key=lambda entry: -len(entry[1]))[: params.planted_tokens]
    parts, peaks = corpus.split(TUNED), corpus.peaks[0][:, s].numpy()
    shuffled = rng.permutation(len(peaks))
    texts = []
    for i in shuffled[peaks[shuffled].argsort(kind="stable")][:most].tolist():
        places = (parts[i][:, s] == 0).nonzero().squeeze(1) + corpus.stream.skip
        if len(places := places[places > 0]):
            texts.append(corpus.stream.texts[i][: int(rng.choice(places.numpy()))])
    return Plan(dict(common), texts, min(len(texts), int((peaks == 0).sum())))


def planted(
    reader: FeatureReader, readings: Sequence[Reading], corpus: Reading, params: DescribeParams, seed: int
) -> list[Row]:
    """One row per feature, with a row for each of its top ``tokens``. All values are those of the tuned model.

    ``original`` is the mean value at the token in the feature's strongest contexts, ``planted`` the mean value where the token
    was planted, and ``ratio`` the second over the first, with an interval from resampled texts of both. ``rate`` is the share
    of plantings that wake the feature, ``natural`` the share of these tokens in the corpus on which it fires. ``silent`` counts
    the neutral texts in which the feature is silent throughout.

    The verdict on a token is ``token`` where the ratio's interval lies above ``params.token_detector``, ``context`` where it
    lies below, ``undecided`` between, and ``untested`` where no text has a silent place. A feature is ``token`` if any of its
    tokens is, and ``context`` if all are. The strongest contexts are the highest of many values: that lowers the ratio."""
    rng = np.random.default_rng(seed)
    plans = [plan(readings, corpus, s, params, rng) for s in range(len(reader.features))]
    texts = [[*text, token] for made in plans for token in made.original for text in made.texts]
    values_N = np.empty(0)
    if texts:
        read_NS = reader.read(TokenStream(texts, skip=0), [TUNED]).values[TUNED]
        owners = [s for s, made in enumerate(plans) for _ in range(len(made.original) * len(made.texts))]
        values_N = read_NS[torch.tensor([len(text) for text in texts]).cumsum(0) - 1, torch.tensor(owners)].numpy()
    rows, low = [], 0
    for s, made in enumerate(plans):
        tokens = []
        for token, original in made.original.items():
            high = low + len(made.texts)
            tokens.append(_token_row(token, np.array(original), values_N[low:high], _natural(corpus, s, token), params, seed))
            low = high
        found = {row["verdict"] for row in tokens}
        verdict = "untested" if not found else "token" if "token" in found else found.pop() if len(found) == 1 else "undecided"
        rows.append({"verdict": verdict, "silent": made.silent, "tokens": tokens})
    return rows


def _natural(corpus: Reading, s: int, token: int) -> Floats:
    """Share of this token on which the feature fires in the tuned model, for every text of the corpus that has it."""
    places = corpus.token_ids == token
    owners, fires = corpus.owners[places], (corpus.values[TUNED][places, s] > 0).double()
    counts = torch.bincount(owners, minlength=1)
    return (torch.bincount(owners, weights=fires, minlength=1) / counts)[counts > 0].numpy()


def _token_row(token: int, original_P: Floats, planted_P: Floats, natural_P: Floats, params: DescribeParams, seed: int) -> Row:
    def mean(values: Floats) -> Interval | None:
        found = stats.bootstrap_mean(values, resamples=params.bootstrap, confidence=params.confidence, seed=seed)
        return found if found.n else None

    row: Row = {"token_id": token, "original": mean(original_P), "planted": mean(planted_P), "natural": mean(natural_P)}
    if not len(planted_P):
        return row | {"verdict": "untested", "rate": None, "ratio": None}
    rng = np.random.default_rng(seed)
    after_R, before_R = (
        values[stats.resample(len(values), params.bootstrap, rng)].mean(1) for values in (planted_P, original_P)
    )
    low, high = np.quantile(after_R / before_R, [(1 - params.confidence) / 2, (1 + params.confidence) / 2])
    bound = params.token_detector
    return row | {
        "verdict": "token" if low > bound else "context" if high < bound else "undecided",
        "rate": mean((planted_P > 0).astype(np.float64)),
        "ratio": Interval(float(planted_P.mean() / original_P.mean()), float(low), float(high), len(planted_P)),
    }
