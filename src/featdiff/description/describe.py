"""What the features of a set are: on what text they fire, where in an answer, and all that is known of them in one place.

Everything is read under the swap readout, in the tuned model and on the same tokens in the original. Nothing is decided on the
report split: it is read for the page of answers alone, where its tokens are shown. What is made is keyed by the part that a
model plays, ``original`` or ``tuned``, and not by its name.
N token rows, T token, P prompts (one answer each), S features of the set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from featdiff import stats
from featdiff.activations.residual import TokenStream
from featdiff.activations.store import ActivationStore
from featdiff.config.models import Roles
from featdiff.config.sets import DescribeParams
from featdiff.crosscoder.model import Crosscoder
from featdiff.description.manner import SET, manner_of_answers, manner_of_texts
from featdiff.description.next_token import next_token_effects
from featdiff.description.planting import planted
from featdiff.description.reading import PARTS, TUNED, Answered, FeatureReader, Reading, answered, by_part
from featdiff.language.models import truncate
from featdiff.language.session import Edit
from featdiff.stats import Interval
from featdiff.tasks.task import Sample, TaskInfo, Text

CORPUS = "corpus"
MOST_SHADED = 16
"""Features of which every token of the report questions is kept."""
POSITIONS = ("prompt", "prompt_last", "answer_first", "answer_rest")
"""The prompt before its last token, that token, the answer's first token, its others."""

Row = dict[str, Any]


def contexts(
    reading: Reading,
    sources: Sequence[str],
    labels: Sequence[str],
    starts: Sequence[int | None],
    features: list[int],
    tokenizer: PreTrainedTokenizerFast,
    params: DescribeParams,
    quantiles: Sequence[float] = (),
) -> Iterator[Row]:
    """The ``params.contexts`` strongest contexts of every feature for each of ``sources``, then one near each of ``quantiles``
    of its largest values in the texts of a source. A context is the tokens around a text's largest value in the tuned model,
    with the values in both models. A text has at most one and none where the feature is silent; of equal contexts one is kept.

    By text of ``reading``: ``sources`` say which group it is of, ``labels`` what it is called, ``starts`` where an answer
    begins, None for no answer."""
    value_TS, place_TS = reading.peaks
    values = {part: reading.split(part) for part in PARTS}
    skip = reading.stream.skip
    for s, k in enumerate(features):
        firing: dict[str, list[int]] = {source: [] for source in sources}
        for i in value_TS[:, s].argsort(descending=True, stable=True).tolist():
            if value_TS[i, s] > 0:
                firing[sources[i]].append(i)
        for source, texts in firing.items():  # texts from the strongest to the weakest
            # A quantile is a place in this order; where its text was kept before, the next one that is new stands for it.
            asked = [(0, None)] * params.contexts + [(round((1 - q) * (len(texts) - 1)), q) for q in quantiles if texts]
            known: set[tuple[int, ...]] = set()
            for first, quantile in asked:
                for i in texts[first:]:
                    ids, peak, start = reading.stream.texts[i][skip:], int(place_TS[i, s]), starts[i]
                    low, high = max(0, peak - params.window), min(len(ids), peak + params.window + 1)
                    window = tuple(ids[low:high])
                    if window in known:
                        continue
                    known.add(window)
                    yield {
                        "feature_id": k,
                        "source": source,
                        "rank": len(known),
                        "quantile": quantile,
                        "text": labels[i],
                        "peak": peak - low,
                        "answer_from": None if start is None else start - skip - low,
                        "tokens": [tokenizer.decode([token]) for token in window],
                        **{part: values[part][i][low:high, s].tolist() for part in PARTS},
                    }
                    break


def all_contexts(
    reading: Reading,
    answers: Answered,
    corpus: Reading,
    features: list[int],
    tokenizer: PreTrainedTokenizerFast,
    params: DescribeParams,
) -> list[Row]:
    """Contexts in the answers to every task, and in the corpus, there by quantile too."""
    labels, texts = [sample.sample_id for sample in answers.samples], range(len(corpus.stream.texts))
    none, number = [None for _ in texts], [f"{CORPUS}-{i:05d}" for i in texts]
    return [
        *contexts(reading, answers.tasks, labels, answers.starts, features, tokenizer, params),
        *contexts(corpus, [CORPUS for _ in texts], number, none, features, tokenizer, params, params.quantiles),
    ]


def by_token(reading: Reading, answers: Answered, features: list[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[Row]:
    """Every token of a question and the tuned model's answer to it, with the values of each feature of the first
    :data:`MOST_SHADED` that fires there in either model."""
    skip, values = reading.stream.skip, {part: reading.split(part) for part in PARTS}
    for i, (sample, ids, start) in enumerate(zip(answers.samples, answers.texts, answers.starts, strict=True)):
        tokens = [tokenizer.decode([token]) for token in ids[skip:]]
        for s, k in enumerate(features[:MOST_SHADED]):
            found = {part: values[part][i][:, s] for part in PARTS}
            if any(values_T.any() for values_T in found.values()):
                row = {"feature_id": k, "sample_id": sample.sample_id, "answer_from": start - skip, "tokens": tokens}
                yield row | {part: values_T.tolist() for part, values_T in found.items()}


def histograms(corpus: Reading, bins: int) -> list[Row]:
    """By feature, how many tokens of the corpus have a value in each of ``bins`` equal parts of what lies between 0 and
    ``upper``, the largest value in either model; silent tokens are left out."""
    found = []
    for s in range(corpus.values[TUNED].shape[1]):
        columns = {part: values_NS[:, s] for part, values_NS in corpus.values.items()}
        upper = max(column.max().item() for column in columns.values())
        counts = {
            part: torch.histc(column[column > 0], bins, 0.0, upper).int().tolist() if upper > 0 else [0] * bins
            for part, column in columns.items()
        }
        found.append({"upper": upper, **counts})
    return found


def alike(corpus: Reading, features: Sequence[int], least: float) -> list[list[int]]:
    """By feature, the others whose values in the tuned model correlate with its own over the tokens of the corpus, at
    ``least``; a feature that is silent there is like none."""
    values_NS = corpus.values[TUNED].double()
    centred_NS = values_NS - values_NS.mean(0)
    norms_S = centred_NS.norm(dim=0)
    correlation_SS = (centred_NS.T @ centred_NS) / (norms_S[:, None] * norms_S).clamp(min=1e-12)
    return [
        [features[j] for j in range(len(features)) if j != i and correlation_SS[i, j] >= least] for i in range(len(features))
    ]


def where_it_fires(reading: Reading, answers: Answered, params: DescribeParams, seed: int) -> list[list[Row]]:
    """By feature, mean value and firing rate in both models by position, over all tasks (``task`` None) and at the last prompt
    token for each task. A number is the mean over answers of an answer's own mean, and every task counts the same."""
    table: list[list[Row]] = [[] for _ in range(reading.values[TUNED].shape[1])]
    for part in PARTS:
        for position in POSITIONS:
            strata = _by_task(reading, part, position, answers)
            groups: dict[str | None, dict[str, NDArray[Any]]] = {None: strata} if strata else {}
            if position == "prompt_last":
                groups |= {task: {task: measured} for task, measured in strata.items()}
            for task, held in groups.items():
                for s, rows in enumerate(table):
                    value, rate = (
                        stats.mean_over_strata(
                            {name: measured[:, i, s] for name, measured in held.items()},
                            resamples=params.bootstrap,
                            confidence=params.confidence,
                            seed=seed,
                        )
                        for i in range(2)
                    )
                    rows.append({"model": part, "position": position, "task": task, "value": value, "rate": rate})
    return table


def _by_task(reading: Reading, part: str, position: str, answers: Answered) -> dict[str, NDArray[Any]]:
    """Mean value and firing rate [P, 2, S] of the answers that have tokens at ``position``, by task."""
    found: dict[str, list[Tensor]] = {}
    for values_TS, start, task in zip(reading.split(part), answers.starts, answers.tasks, strict=True):
        first = start - reading.stream.skip
        last = max(first - 1, 0)
        spans = (slice(0, last), slice(last, first), slice(first, first + 1), slice(first + 1, None))
        if len(span_TS := values_TS[dict(zip(POSITIONS, spans, strict=True))[position]]):
            found.setdefault(task, []).append(torch.stack([span_TS.mean(0), (span_TS > 0).float().mean(0)]))
    return {task: torch.stack(measured).numpy() for task, measured in found.items()}


@dataclass(frozen=True)
class Sources:
    """What a description is made from, opened; models, answers and stores by the names of the models."""

    roles: Roles
    crosscoder: Crosscoder
    layer: int
    """Blocks below the residual stream that the crosscoder was fitted on."""
    models: Mapping[str, PreTrainedModel]
    tokenizer: PreTrainedTokenizerFast
    tasks: Mapping[str, TaskInfo]
    samples: Sequence[Sample]
    answers: Mapping[str, list[Row]]
    """Graded answers."""
    texts: Sequence[Text]
    """The corpus."""
    corpus: TokenStream
    """The same as tokens."""
    stores: Mapping[str, ActivationStore]
    """What they hold begins with ``corpus``."""
    largest_F: Float[Tensor, " F"]
    """Largest value of every feature in the tuned model, f^max."""
    edits: Mapping[int, Edit]
    """For every feature of the set, the edit of the original model that adds f^max of it alone at the last prompt token."""


def describe(sources: Sources, params: DescribeParams, seed: int) -> tuple[dict[str, Any], list[Row], list[Row]]:
    """All that is known of every feature of ``sources.edits`` and of the set as a whole, the features' contexts, and their
    values at every token of the report questions. Intervals are :class:`Interval`, tokens ids (see :func:`written_out`)."""
    roles, tokenizer, features = sources.roles, sources.tokenizer, list(sources.edits)
    original, tuned = sources.models[roles.original], sources.models[roles.tuned]
    trunks = {roles.original: truncate(original, sources.layer), roles.tuned: truncate(tuned, sources.layer)}
    pad, graded = tokenizer.pad_token_id, by_part(sources.answers, roles)
    reader = FeatureReader(sources.crosscoder, trunks, roles, features, pad, params.batch_size)
    asked = tokenizer, sources.tasks, sources.samples, graded[TUNED]
    answers, reported = answered(*asked, params.samples), answered(*asked, params.shaded, split="report")
    corpus = reader.read_stores(sources.corpus, by_part(sources.stores, roles))
    reading = reader.read(TokenStream(answers.texts, corpus.stream.skip))
    written_SD = reader.readers[TUNED].directions_FD * sources.largest_F[features, None]
    effects = next_token_effects(original, tuned, answers.prompts, written_SD, sources.edits, pad, params, seed)
    lexical = planted(reader, [reading, corpus], corpus, params, seed)
    manner = {
        "answers": manner_of_answers(reading, answers, features, graded, params, seed),
        "texts": manner_of_texts(reader, tokenizer, sources.texts, params, seed),
    }
    positions = where_it_fires(reading, answers, params, seed)
    spread, same = histograms(corpus, params.bins), alike(corpus, features, params.alike)
    rates = {part: (values_NS > 0).double().mean(0).tolist() for part, values_NS in corpus.values.items()}

    def told(name: str) -> dict[str, dict[str, Row]]:
        return {what: {part: rows[name] for part, rows in judged.items()} for what, judged in manner.items()}

    described = {
        "features": [
            {
                "feature_id": k,
                "largest": sources.largest_F[k].item(),
                "corpus_rate": {part: rate_S[s] for part, rate_S in rates.items()},
                "histogram": spread[s],
                "alike": same[s],
                "positions": positions[s],
                "lexical": lexical[s],
                "manner": told(str(k)),
                **effects[k]._asdict(),
            }
            for s, k in enumerate(features)
        ],
        "set": {"manner": told(SET)},
        "prompts": len(answers.samples),
        "corpus_tokens": corpus.stream.rows,
        "corpus_texts": len(corpus.stream.texts),
    }
    shaded = by_token(reader.read(TokenStream(reported.texts, corpus.stream.skip)), reported, features, tokenizer)
    return described, all_contexts(reading, answers, corpus, features, tokenizer, params), list(shaded)


EMPTY: tuple[dict[str, Any], list[Row], list[Row]] = (
    {"features": [], "set": {"manner": {"answers": {}, "texts": {}}}, "prompts": 0, "corpus_tokens": 0, "corpus_texts": 0},
    [],
    [],
)
"""The description where localization found no set."""


def summary(described: dict[str, Any]) -> dict[str, Any]:
    """Of a description as written out: the number of features by verdict on their planted tokens, and by part of a model how
    well the set tells the manner of answers and of texts (precision, recall, AUROC)."""
    verdicts = Counter(feature["lexical"]["verdict"] for feature in described["features"])
    return {
        "features": len(described["features"]),
        "verdicts": dict(sorted(verdicts.items())),
        **{
            measure: {
                what: {part: row[measure]["value"] for part, row in judged.items() if row[measure]}
                for what, judged in described["set"]["manner"].items()
            }
            for measure in ("precision", "recall", "auroc")
        },
    }


def written_out(value: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """``value`` for JSON: intervals as mappings, and the text of a token beside its ``token_id``."""
    if isinstance(value, Interval):
        return {"value": value.value, "low": value.low, "high": value.high, "n": value.n}
    if isinstance(value, list):
        return [written_out(entry, tokenizer) for entry in value]
    if isinstance(value, dict):
        texts = {"token": tokenizer.decode([value["token_id"]])} if "token_id" in value else {}
        return {key: written_out(entry, tokenizer) for key, entry in value.items()} | texts
    return value
