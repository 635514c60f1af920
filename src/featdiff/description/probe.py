"""Is the dictionary needed to read the manner off the residual stream? Probes on the stream at the last prompt token.

A probe is a logistic regression that foretells whether the answer is given step by step. It reads the whole stream, a few
features of the crosscoder, as few of a dictionary that was never trained, the features of the set, or one direction. Sparse
probes that take the features of largest mean difference are those of Gurnee et al. 2023 (arXiv 2305.01610); the comparison
and its controls are ours.

A probe is asked about a task that it was not fitted on, so that it cannot foretell the manner by telling the task. What is
chosen (features, direction, coefficients) is chosen on the other tasks.
P prompts, N rows (prompts of one model or of several), D residual width, F features, K columns that a probe reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from featdiff import stats
from featdiff.activations.residual import TokenStream, read_residual
from featdiff.config.sets import DescribeParams
from featdiff.crosscoder.readout import Reader
from featdiff.description.describe import Sources
from featdiff.description.manner import STEPS, in_a_manner, step_shares
from featdiff.description.reading import ORIGINAL, TUNED, answered
from featdiff.language.models import truncate

CONTRAST = "contrast"
DENSE = "dense"
"""The probe that reads the whole residual stream; the others are held against it."""
FEWEST_TASKS = 3
"""A probe is fitted on two of them and asked about the third."""
TOO_FEW = "too few of one label"
MEASURES = {"auc": stats.SHARES, "accuracy": stats.SHARES, "minus_dense": stats.CHANGES}
"""What is measured of a probe, and between which numbers it lies."""

Floats = NDArray[np.float64]
Row = dict[str, Any]


class Read(NamedTuple):
    """One model at the last token of P prompts."""

    resid_PD: Float[np.ndarray, "P D"]
    values_PF: Float[np.ndarray, "P F"]
    """All features of the crosscoder, under the swap readout."""
    steps_P: Float[np.ndarray, " P"]
    """Share of step-by-step answers."""


class Scores(NamedTuple):
    """A probe on a task that it was not fitted on."""

    auc: float
    accuracy: float
    """Balanced: the mean of the shares of both manners that are told right, at probability one half."""


def manner_probes(sources: Sources, params: DescribeParams, seed: int) -> list[Row]:
    """Every probe (see :func:`probes`) of ``answers``, the models' own answers to questions of the find split, within each
    model and over several, and of ``texts``, whose prompt shows the manner that they go on in, within each model. No row where
    no manner is known."""
    roles, tokenizer = sources.roles, sources.tokenizer
    played = {ORIGINAL: roles.original, TUNED: roles.tuned, CONTRAST: roles.contrast}
    models = {part: model for part, model in played.items() if model is not None and model in sources.models}
    alone = [[part] for part in models]
    found: list[Row] = []

    def add(of: str, prompts: list[list[int]], tasks: list[str], steps: list[list[float]], groups: list[list[str]]) -> None:
        if prompts:
            read = {
                part: read_prompts(sources, model, prompts, np.array(shares), params)
                for (part, model), shares in zip(models.items(), steps, strict=True)
            }
            rows = probes(read, groups, tasks, list(sources.edits), params, seed)
            found.extend({"of": of} | row for row in rows)

    shares = [step_shares(sources.answers[model]) for model in models.values()]
    asked = answered(tokenizer, sources.tasks, sources.samples, sources.answers[roles.tuned], params.samples)
    known = [
        (prompt, sample)
        for prompt, sample in zip(asked.prompts, asked.samples, strict=True)
        if all(sample.sample_id in share for share in shares)
    ]
    steps = [[share[sample.sample_id] for _, sample in known] for share in shares]
    several = [list(models)[:number] for number in range(2, len(models) + 1)]
    add("answers", [prompt for prompt, _ in known], [sample.task for _, sample in known], steps, alone + several)

    texts = in_a_manner(sources.texts, params.samples)
    prompts = tokenizer([text.prompt for text in texts])["input_ids"] if texts else []
    shown = [float(text.source.endswith(STEPS)) for text in texts]
    add("texts", prompts, [text.source.partition("/")[0] for text in texts], [shown] * len(models), alone)
    return found


@torch.inference_mode()
def read_prompts(
    sources: Sources, model: str, prompts: list[list[int]], steps_P: Float[np.ndarray, " P"], params: DescribeParams
) -> Read:
    """``model`` at the last token of ``prompts`` (token ids), whose answers are step by step in the shares ``steps_P``."""
    trunk, pad = truncate(sources.models[model], sources.layer), sources.tokenizer.pad_token_id
    device = sources.models[model].device
    resid_TD = read_residual(trunk, TokenStream(prompts, skip=0), params.batch_size, pad, torch.float32)
    resid_PD = resid_TD[torch.tensor([len(ids) for ids in prompts]).cumsum(0) - 1]
    values_PF = Reader(sources.crosscoder, model).to(device)(resid_PD.to(device)).cpu()
    return Read(resid_PD.double().numpy(), values_PF.double().numpy(), steps_P)


def probes(
    read: Mapping[str, Read],
    groups: Sequence[Sequence[str]],
    tasks: Sequence[str],
    chosen: Sequence[int],
    params: DescribeParams,
    seed: int,
) -> list[Row]:
    """How well every probe tells step-by-step answers to the questions of a task that it was not fitted on.

    ``read`` holds the models by their part, all at the same prompts; ``tasks`` [P] says what each prompt is of, and ``chosen``
    holds the features of the set. A probe is fitted and asked within each of ``groups`` of models, over all of whose prompts.
    AUC and balanced accuracy are means over tasks that have ``params.probe_least`` questions of either manner, with Student's t
    interval over these tasks; ``minus_dense`` is the paired difference of AUC. A group with fewer than three such tasks has one
    row, without a probe, that gives the reason."""
    tasks_P = np.array(tasks)
    untrained = dict(zip(read, random_dictionary(list(read.values()), seed), strict=True))
    rows: list[Row] = []
    for group in groups:
        joined = Read(*(np.concatenate(arrays) for arrays in zip(*(read[part] for part in group), strict=True)))
        tasks_N, steps_N = np.tile(tasks_P, len(group)), joined.steps_P
        facts: Row = {"models": " + ".join(group), "n": len(steps_N), "steps": float(steps_N.mean())}
        counted = [
            task
            for task in dict.fromkeys(tasks)
            if min((steps_N[tasks_N == task] > 0).sum(), (steps_N[tasks_N == task] < 1).sum()) >= params.probe_least
        ]
        facts["tasks"] = len(counted)
        if len(counted) < FEWEST_TASKS:
            measured = [f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")]
            rows.append(facts | dict.fromkeys(["probe", "columns", *measured]) | {"reason": TOO_FEW})
            continue
        untrained_NF = np.concatenate([untrained[part] for part in group])
        scores: dict[str, list[Scores]] = {}
        width: dict[str, int] = {}
        for task in counted:
            fitted_N = tasks_N != task
            columns = _columns(joined, untrained_NF, fitted_N, chosen, params)
            if ORIGINAL in read and TUNED in read:
                columns["mean_difference"] = joined.resid_PD @ _direction(read, tasks_P, task)[:, None]
            for probe, columns_NK in columns.items():
                width[probe] = columns_NK.shape[1]
                scores.setdefault(probe, []).append(fit_and_score(columns_NK, steps_N, fitted_N, params.probe_penalty))
        for probe, found in scores.items():
            auc, dense = ([score.auc for score in held] for held in (found, scores[DENSE]))
            by_task: dict[str, Iterable[float]] = {
                "auc": auc,
                "accuracy": [score.accuracy for score in found],
                "minus_dense": stats.paired(auc, dense),
            }
            row = facts | {"probe": probe, "columns": width[probe]}
            for name, values in by_task.items():
                row |= _over_tasks(name, list(values), params.confidence)
            rows.append(row | {"reason": ""})
    return rows


def _columns(
    joined: Read, untrained_NF: Floats, fitted_N: Bool[np.ndarray, " N"], chosen: Sequence[int], params: DescribeParams
) -> dict[str, Floats]:
    """What each probe reads [N, K]."""
    found = {DENSE: joined.resid_PD}
    for name, values_NF in (("features", joined.values_PF), ("random", untrained_NF)):
        order = strongest(values_NF[fitted_N], joined.steps_P[fitted_N])
        found |= {f"{name}_{k}": values_NF[:, order[:k]] for k in params.probe_features}
    return found | ({"set": joined.values_PF[:, list(chosen)]} if chosen else {})


def _direction(read: Mapping[str, Read], tasks_P: NDArray[np.str_], without: str) -> Float[np.ndarray, " D"]:
    """Mean of tuned − original at the same prompts, for which every task but ``without`` counts the same."""
    change_PD = read[TUNED].resid_PD - read[ORIGINAL].resid_PD
    return np.mean([change_PD[tasks_P == task].mean(0) for task in dict.fromkeys(tasks_P) if task != without], axis=0)


def strongest(values_NF: Float[np.ndarray, "N F"], steps_N: Float[np.ndarray, " N"]) -> NDArray[np.int64]:
    """Features by the difference of their means over both manners, in standard deviations, the largest first."""
    difference_F = steps_N @ values_NF / steps_N.sum() - (1 - steps_N) @ values_NF / (1 - steps_N).sum()
    spread_F = values_NF.std(0)
    return np.argsort(-np.abs(difference_F) / np.where(spread_F > 0, spread_F, np.inf), kind="stable")


def random_dictionary(read: Sequence[Read], seed: int) -> list[Float[np.ndarray, "P F"]]:
    """Values [P, F] in every model of a dictionary whose encoder is random: ReLU(h·w_k − b_k), with w_k drawn once from a
    normal distribution and b_k as high that feature k fires on as many rows, over all models, as feature k of the crosscoder.
    It knows nothing but how often to be silent."""
    resid_ND = np.concatenate([one.resid_PD for one in read])
    fires_F = np.concatenate([one.values_PF for one in read]).astype(bool).sum(0)
    rows, features = len(resid_ND), len(fires_F)
    W_DF = np.random.default_rng(stats.stream(seed, features)).standard_normal((resid_ND.shape[1], features))
    values_NF = resid_ND @ W_DF
    descending_NF = -np.sort(-values_NF, axis=0)
    bias_F = descending_NF[np.minimum(fires_F, rows - 1), np.arange(features)]
    return np.split(np.maximum(values_NF - bias_F, 0), len(read))


def fit_and_score(
    columns_NK: Float[np.ndarray, "N K"],
    steps_N: Float[np.ndarray, " N"],
    fitted_N: Bool[np.ndarray, " N"],
    penalty: float,
) -> Scores:
    """A logistic regression on the rows of ``fitted_N``, asked about the others. A row counts as a step-by-step one by its
    share of such answers and as another by the rest; in the fit both manners weigh the same. Columns are standardised on the
    rows of the fit."""
    spread_K = columns_NK[fitted_N].std(0)
    standard_NK = (columns_NK - columns_NK[fitted_N].mean(0)) / np.where(spread_K > 0, spread_K, 1)

    def both(rows_N: Bool[np.ndarray, " N"]) -> tuple[Floats, NDArray[np.int64], Floats]:
        """Rows twice, once for either manner, with their weights; those without weight are left out."""
        steps = steps_N[rows_N]
        weights, labels = np.concatenate([steps, 1 - steps]), np.repeat([1, 0], len(steps))
        some = weights > 0
        return np.concatenate([standard_NK[rows_N]] * 2)[some], labels[some], weights[some]

    x, y, weights = both(fitted_N)
    share = weights[y == 1].sum() / weights.sum()
    probe = LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=2000)
    probe.fit(x, y, sample_weight=weights / np.where(y == 1, 2 * share, 2 * (1 - share)))
    x, y, weights = both(~fitted_N)
    return Scores(
        float(roc_auc_score(y, probe.decision_function(x), sample_weight=weights)),
        float(balanced_accuracy_score(y, probe.predict(x), sample_weight=weights)),
    )


def _over_tasks(name: str, values: Sequence[float], confidence: float) -> Row:
    found, (least, most) = stats.over_runs(values, confidence=confidence), MEASURES[name]
    return {name: found.value, f"{name}_low": max(found.low, least), f"{name}_high": min(found.high, most)}
