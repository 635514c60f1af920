"""What is said of a crosscoder, against loops over rows."""

import pytest
import torch
from torch import Tensor

from featdiff.activations import store
from featdiff.activations.tensor import ActivationTensor
from featdiff.crosscoder.losses.loss import Step
from featdiff.crosscoder.measure import batch_quality, measure
from tiny import random_crosscoder

MODELS = ("base", "grpo")
ROWS, TRAIN = 400, 300


def activations() -> Tensor:
    return torch.randn(ROWS, 2, 6, generator=torch.Generator().manual_seed(1)) + 0.5


def test_measures_against_a_loop_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_ROWS", 130)
    crosscoder, raw = random_crosscoder(MODELS, threshold=8.0).requires_grad_(False), activations()
    crosscoder.b_enc[3] = -1e3
    mean = crosscoder.normalise(raw[:TRAIN]).mean(0)
    metrics, features = measure(ActivationTensor(list(MODELS), raw), crosscoder, mean, TRAIN)
    x = crosscoder.normalise(raw[TRAIN:])
    f = crosscoder.encode(x)
    for m, model in enumerate(MODELS):
        error = sum((x[i, m] - crosscoder.decode(f[i : i + 1])[0, m]).square().sum().item() for i in range(len(x)))
        spread = sum((x[i, m] - mean[m]).square().sum().item() for i in range(len(x)))
        assert metrics["fve"][model] == pytest.approx(1 - error / spread, abs=1e-4)
    assert metrics["l0"] == pytest.approx((f > 0).sum(1).double().mean().item())
    assert metrics["heldout_rows"] == ROWS - TRAIN
    every = crosscoder.encode(crosscoder.normalise(raw))
    assert metrics["dead_share"] == pytest.approx((every == 0).all(0).float().mean().item())
    assert 0 < metrics["dead_share"] < 1
    torch.testing.assert_close(features["firing_rate"], (every > 0).float().mean(0))
    torch.testing.assert_close(features["max_activation"], every.amax(0))
    torch.testing.assert_close(features["mean_activation"], every.sum(0) / (every > 0).sum(0).clamp(min=1))


def test_the_curves_of_a_batch() -> None:
    x, mean = activations(), torch.full((2, 6), 0.5)
    error = x * torch.tensor([0.1, 0.2])[:, None]
    counts = torch.tensor([len(x), 0, len(x) // 2])
    found = batch_quality(list(MODELS), Step(torch.zeros(()), error, counts), x, mean, torch.tensor([False, True, False]))
    spread = (x - mean).square().sum((0, 2))
    wanted = {f"fve/{model}": 1 - (error[:, m].square().sum() / spread[m]).item() for m, model in enumerate(MODELS)}
    assert found == pytest.approx({"l0": 1.5, "dead": 1 / 3} | wanted)
