"""How well a crosscoder reconstructs, and how often its features fire.

FVE of model m = 1 − Σ ‖x^m − x̂^m‖² / Σ ‖x^m − mean^m‖², over token rows; the mean is that of the training rows.
L0 = mean number of active features per token. A feature is dead where it fires on no row.
N token rows, B batch, M models, D residual width, F features. All inputs are in normalised units.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featdiff.activations.store import ActivationSource, pieces
from featdiff.activations.turns import FEATURES, HELDOUT, Turns, alone
from featdiff.crosscoder.losses.loss import Step
from featdiff.crosscoder.model import Crosscoder


def _fve(models: list[str], error_M: Tensor, spread_M: Tensor) -> dict[str, float]:
    return {model: 1 - (error_M[m] / spread_M[m]).item() for m, model in enumerate(models)}


def batch_quality(
    models: list[str],
    result: Step,
    x_BMD: Float[Tensor, "B M D"],
    mean_MD: Float[Tensor, "M D"],
    dead_F: Bool[Tensor, " F"],
) -> dict[str, float]:
    """L0, share of dead features and FVE per model of one training batch, for the curves."""
    fve = _fve(models, result.error.square().sum((0, 2)), (x_BMD - mean_MD).square().sum((0, 2)))
    l0 = result.count_F.sum().item() / len(x_BMD)
    return {"l0": l0, "dead": dead_F.float().mean().item()} | {f"fve/{model}": value for model, value in fve.items()}


def measure(
    source: ActivationSource, crosscoder: Crosscoder, mean_MD: Float[Tensor, "M D"], train_rows: int
) -> tuple[dict[str, Any], dict[str, Float[Tensor, " F"]]]:
    """What a fit made: metrics, and statistics of every feature (:func:`feature_statistics`).

    The metrics are ``fve`` per model, ``l0`` and ``heldout_rows``, all on the rows from ``train_rows`` on, and ``dead_share``
    over all rows. The arguments after ``source`` are the fields of :class:`featdiff.crosscoder.fit.Fitted`."""
    return alone(measure_in_turns(source, crosscoder, mean_MD, train_rows))


def measure_in_turns(
    source: ActivationSource, crosscoder: Crosscoder, mean_MD: Float[Tensor, "M D"], train_rows: int
) -> Turns[tuple[dict[str, Any], dict[str, Float[Tensor, " F"]]]]:
    """:func:`measure`, piece by piece."""
    features = yield from _feature_statistics(crosscoder, source)
    dead_share = float((features["firing_rate"] == 0).float().mean())
    quality = yield from _heldout_quality(crosscoder, source, mean_MD, train_rows, source.rows)
    return quality | {"dead_share": dead_share}, features


def _heldout_quality(
    crosscoder: Crosscoder, source: ActivationSource, mean_MD: Float[Tensor, "M D"], start: int, stop: int
) -> Turns[dict[str, Any]]:
    """FVE per model and L0 of the code at inference on rows ``start`` to ``stop``."""
    device = crosscoder.b_enc.device
    error_M, spread_M, active = torch.zeros(len(source.models)), torch.zeros(len(source.models)), 0.0

    @torch.inference_mode()
    def add(rows: Float[Tensor, "N M D"]) -> float:
        x = crosscoder.normalise(rows.to(device))
        f = crosscoder.encode(x)
        error_M.add_((x - crosscoder.decode(f)).square().sum((0, 2)).cpu())
        spread_M.add_((x - mean_MD.to(device)).square().sum((0, 2)).cpu())
        return (f > 0).sum().item()

    for low, high in pieces(start, stop):
        yield HELDOUT, low
        active += add(source.read(low, high))
    rows_held = stop - start
    return {"fve": _fve(source.models, error_M, spread_M), "l0": active / rows_held, "heldout_rows": rows_held}


def feature_statistics(crosscoder: Crosscoder, source: ActivationSource) -> dict[str, Float[Tensor, " F"]]:
    """Over all rows of ``source``, for each feature: ``firing_rate``, ``mean_activation`` (where it fires) and
    ``max_activation``."""
    return alone(_feature_statistics(crosscoder, source))


def _feature_statistics(crosscoder: Crosscoder, source: ActivationSource) -> Turns[dict[str, Float[Tensor, " F"]]]:
    device = crosscoder.b_enc.device
    count, total, largest = (torch.zeros(crosscoder.n_features, device=device) for _ in range(3))

    @torch.inference_mode()
    def add(rows: Float[Tensor, "N M D"]) -> None:
        f = crosscoder.encode(crosscoder.normalise(rows.to(device)))
        count.add_((f > 0).sum(0))
        total.add_(f.sum(0))
        torch.maximum(largest, f.amax(0), out=largest)

    for low, high in pieces(0, source.rows):
        yield FEATURES, low
        add(source.read(low, high))
    statistics = {"firing_rate": count / source.rows, "mean_activation": total / count.clamp(min=1), "max_activation": largest}
    return {name: tensor.cpu() for name, tensor in statistics.items()}
