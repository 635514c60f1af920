"""Does a feature tell the manner of the answer? Ground truth where the manner can be read off an answer's text.

The rule under test: a feature that fires at the last prompt token means that the answer is given step by step. Its value
there depends on the prompt alone, the manner of a sampled answer does not: with q_p the share of step-by-step answers to
prompt p,

    precision = Σ_p fires_p q_p / Σ_p fires_p          recall = Σ_p fires_p q_p / Σ_p q_p
    AUROC = Σ_ab q_a (1 − q_b) [v_a > v_b] / Σ_ab q_a (1 − q_b)          a tie counts half
(ours; the same as over single answers, with every prompt counting once). Intervals resample prompts. Where a model draws
the manner by lot, no feature can tell it, and AUROC is .5 however well a feature stands for the manner: prompts that show
one say more (:func:`in_a_manner`).
P prompts, S features of the set, R bootstrap resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from featdiff import stats
from featdiff.activations.residual import TokenStream
from featdiff.config.sets import DescribeParams
from featdiff.description.reading import PARTS, Answered, FeatureReader, Reading
from featdiff.language.evaluation import GREEDY, SAMPLED
from featdiff.stats import Interval
from featdiff.tasks.task import Text

Floats = NDArray[np.float64]
Judged = dict[str, dict[str, Any]]
"""By feature id, and for the whole set."""
MANNERS = ("steps", "foreign", "direct", "mistake")
"""How the organism's texts are answered (featdiff.tasks.organism)."""
STEPS = "/steps"
SET = "set"
"""Name of the whole set among its features."""


def step_shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of step-by-step answers by ``sample_id``, over sampled answers, or the greedy one where none were drawn.
    Answers without a manner (likelihood) are left out."""
    graded = [row for row in rows if row["manner"] and row["mode"] in (GREEDY, SAMPLED)]
    drawn = [row for row in graded if row["mode"] == SAMPLED] or graded
    answers: dict[str, list[bool]] = {}
    for row in drawn:
        answers.setdefault(row["sample_id"], []).append(row["manner"] == "steps")
    return {sample_id: float(np.mean(steps)) for sample_id, steps in answers.items()}


def in_a_manner(texts: Sequence[Text], most: int) -> list[Text]:
    """Texts of the organism (up to ``most`` per family) whose prompt holds an earlier question, answered in the manner that
    the text goes on in: here the manner can be known from the prompt. None where all are of one kind."""
    counts: Counter[str] = Counter()
    kept = []
    for text in texts:
        family, _, manner = text.source.partition("/")
        if "\n" in text.prompt and manner in MANNERS and counts[family] < most:
            counts[family] += 1
            kept.append(text)
    return kept if len({text.source.endswith(STEPS) for text in kept}) == 2 else []


def manner_of_answers(
    reading: Reading,
    answers: Answered,
    features: Sequence[int],
    graded: Mapping[str, list[dict[str, Any]]],
    params: DescribeParams,
    seed: int,
) -> dict[str, Judged]:
    """By part: do the values in that model at the last prompt token tell the manner of its own answers (``graded``, by part) to
    these questions?"""
    judged = {}
    for part in PARTS:
        values, shares = reading.split(part), step_shares(graded[part])
        known = [i for i, sample in enumerate(answers.samples) if sample.sample_id in shares]
        if known:
            values_PS = torch.stack([values[i][answers.starts[i] - reading.stream.skip - 1] for i in known])
            steps_P = np.array([shares[answers.samples[i].sample_id] for i in known])
            tasks = [answers.tasks[i] for i in known]
            judged[part] = tell_manner(values_PS.double().numpy(), features, steps_P, tasks, params, seed)
    return judged


def manner_of_texts(
    reader: FeatureReader, tokenizer: PreTrainedTokenizerFast, texts: Sequence[Text], params: DescribeParams, seed: int
) -> dict[str, Judged]:
    """By part: do the values in that model at the last prompt token tell the manner that the prompt shows
    (:func:`in_a_manner`)?"""
    chosen = in_a_manner(texts, params.samples)
    if not chosen:
        return {}
    prompts = tokenizer([text.prompt for text in chosen])["input_ids"]
    read, last = reader.read(TokenStream(prompts, skip=0)), torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1
    steps_P = np.array([float(text.source.endswith(STEPS)) for text in chosen])
    families = [text.source.partition("/")[0] for text in chosen]
    return {
        part: tell_manner(values_NS[last].double().numpy(), reader.features, steps_P, families, params, seed)
        for part, values_NS in read.values.items()
    }


def tell_manner(
    values_PS: Float[np.ndarray, "P S"],
    features: Sequence[int],
    steps_P: Float[np.ndarray, " P"],
    tasks: Sequence[str],
    params: DescribeParams,
    seed: int,
) -> Judged:
    """Precision, recall and AUROC (over all pairs of prompts, and over pairs of one task) of every feature, by its id,
    and of the ``set``, which fires where any of its features does and has their mean standardised value.

    None stands for what these prompts cannot tell: precision of a feature that never fires, AUROC of one manner."""
    spread_S = values_PS.std(0)
    standard_PS = (values_PS - values_PS.mean(0)) / np.where(spread_S > 0, spread_S, 1)
    counts_RP = np.stack(
        [np.bincount(rows, minlength=len(steps_P)) for rows in stats.resample(len(steps_P), params.bootstrap, seed)]
    ).astype(np.float64)
    columns = dict(zip(map(str, features), values_PS.T, strict=True)) | {SET: standard_PS.mean(1)}
    fires = dict(zip(map(str, features), values_PS.T > 0, strict=True)) | {SET: (values_PS > 0).any(1)}
    labels = np.array(tasks)
    return {
        name: _judged(value_P, fires[name], steps_P, labels, counts_RP, params.confidence) for name, value_P in columns.items()
    }


def _judged(
    value_P: Floats,
    fires_P: Bool[np.ndarray, " P"],
    steps_P: Floats,
    tasks_P: NDArray[np.str_],
    counts_RP: Floats,
    confidence: float,
) -> dict[str, Any]:
    drawn_RP = np.concatenate([np.ones((1, len(steps_P))), counts_RP])  # first the prompts as they are
    with_RP, without_RP = drawn_RP * steps_P, drawn_RP * (1 - steps_P)
    fires_RP = drawn_RP * fires_P

    def interval(over_R: Floats, under_R: Floats) -> Interval | None:
        ratio_R = np.divide(over_R, under_R, out=np.full_like(over_R, np.nan), where=under_R > 0)
        if np.isnan(ratio_R[0]):
            return None
        low, high = np.nanquantile(ratio_R[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(float(ratio_R[0]), float(low), float(high), len(steps_P))

    by_task = [_pairs(value_P[held], with_RP[:, held], without_RP[:, held]) for held in (tasks_P == t for t in set(tasks_P))]
    return {
        "prompts": len(steps_P),
        "fires": int(fires_P.sum()),
        "steps": interval(with_RP.sum(1), drawn_RP.sum(1)),
        "precision": interval(fires_RP @ steps_P, fires_RP.sum(1)),
        "recall": interval(fires_RP @ steps_P, with_RP.sum(1)),
        "auroc": interval(*_pairs(value_P, with_RP, without_RP)),
        "auroc_within_tasks": interval(*np.sum(by_task, axis=0)),
    }


def _pairs(value_P: Floats, with_RP: Floats, without_RP: Floats) -> tuple[Floats, Floats]:
    """Over pairs of an answer step by step and one that is not, weighted: those in which the first has the larger value
    (half of the ties), and all."""
    order = value_P.argsort(kind="stable")
    ties = np.flatnonzero(np.diff(value_P[order], prepend=-np.inf))
    with_RG, without_RG = (np.add.reduceat(weights[:, order], ties, axis=1) for weights in (with_RP, without_RP))
    smaller_RG = without_RG.cumsum(1) - without_RG / 2
    return (with_RG * smaller_RG).sum(1), with_RG.sum(1) * without_RG.sum(1)
