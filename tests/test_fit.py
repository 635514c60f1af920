"""Fitting crosscoders on activations whose directions are known."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from featdiff.activations import store
from featdiff.activations.store import ActivationStore
from featdiff.analysis.attribution import nrn
from featdiff.artifact import ContractError
from featdiff.config import CrosscoderTraining
from featdiff.crosscoder import fit as fitting
from featdiff.crosscoder.fit import _statistics, _Step, feature_statistics, fit, measure
from featdiff.crosscoder.losses import batch_top_k
from featdiff.crosscoder.model import Crosscoder
from featdiff.resume import Scratch
from tiny import params_of, random_crosscoder, store_of

D, SHARED, OWN, ROWS, ACTIVE = 16, 12, 3, 4000, 3
MODELS = ("base", "grpo")
Logged = list[tuple[int, dict[str, float]]]


def training(**changes: Any) -> CrosscoderTraining:
    small = {
        "n_features": 32,
        "batch_tokens": 256,
        "steps": 300,
        "lr": 0.01,
        "k": ACTIVE,
        "aux_k": 8,
        "dead_after_tokens": 5000,
        "log_every": 50,
        "l1_weight": 0.2,
        "heldout_share": 0.1,
    }
    return params_of(CrosscoderTraining, "crosscoder", "training", **small | changes)


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations [N, 2, D]: sparse sums of unit directions [15, D], the last three present in the tuned model
    alone; the models have different units and means."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[: SHARED + OWN]
    on = torch.zeros(ROWS, SHARED + OWN)
    on.scatter_(1, torch.rand(ROWS, SHARED + OWN, generator=generator).topk(ACTIVE).indices, 1.0)
    strength = on * (1 + torch.rand(ROWS, SHARED + OWN, generator=generator))
    both = strength.clone()
    both[:, SHARED:] = 0
    mean = torch.randn(2, D, generator=generator) * 0.1
    return torch.stack([2.0 * (both @ directions + mean[0]), 5.0 * (strength @ directions + mean[1])], dim=1), directions


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return store_of(tmp_path_factory.mktemp("stores"), planted()[0], MODELS, shard_rows=1500)


Fitted = tuple[Crosscoder, dict[str, Any], dict[str, Tensor], Logged]


def fitted(source: ActivationStore, loss: str, seed: int = 0, **changes: Any) -> Fitted:
    logged: Logged = []
    return *fit(
        source, loss, training(**changes), seed, lambda step, point: logged.append((step, point)), "test", scratch=Scratch()
    ), logged


@pytest.fixture(scope="module")
def topk(source: ActivationStore) -> Fitted:
    return fitted(source, "batchtopk")


def closest(crosscoder: Crosscoder, directions: Tensor) -> tuple[Tensor, Tensor]:
    """For each direction the cosine of the nearest decoder row of the tuned model, and which feature that is."""
    rows = torch.nn.functional.normalize(crosscoder.W_dec[:, 1], dim=1)
    return (directions @ rows.T).max(1)


@pytest.mark.parametrize("loss", ["batchtopk", "l1"])
def test_planted_directions_are_found_and_the_tuned_models_own_are_its_own(
    source: ActivationStore, topk: Fitted, loss: str
) -> None:
    crosscoder, metrics, statistics, _ = topk if loss == "batchtopk" else fitted(source, "l1")
    assert all(value > 0.9 for value in metrics["fve"].values()), metrics
    cosine, feature = closest(crosscoder, planted()[1])
    assert (cosine > 0.9).all()
    share = nrn(crosscoder.W_dec)[feature]
    assert (share[SHARED:] > 0.9).all()
    assert ((share[:SHARED] > 0.3) & (share[:SHARED] < 0.7)).all()
    rate = statistics["firing_rate"][feature]
    torch.testing.assert_close(rate, torch.full_like(rate, ACTIVE / (SHARED + OWN)), rtol=0.0, atol=0.08)


def test_the_threshold_brings_heldout_l0_close_to_k(topk: Fitted) -> None:
    crosscoder, metrics, _, logged = topk
    assert crosscoder.threshold > 0
    assert metrics["l0"] == pytest.approx(ACTIVE, rel=0.15)
    assert all(point["l0"] == pytest.approx(ACTIVE, abs=0.02) for _, point in logged)  # exact while training, but for ties
    assert metrics["heldout_rows"] == ROWS // 10
    assert logged[-1][0] == 300


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(source: ActivationStore) -> None:
    first, again, other = (fitted(source, "batchtopk", seed, steps=25) for seed in (3, 3, 4))
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(tensor, again[0].state_dict()[name]), name
    assert (first[1], first[3]) == (again[1], again[3])
    assert not torch.equal(first[0].W_dec, other[0].W_dec)


def test_statistics_of_the_rows_of_the_fit(source: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_ROWS", 700)
    rows = source.read(0, 3000).double()
    mean, variance = _statistics(source, 3000)
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(variance, (rows - rows.mean(0)).square().sum(2).mean(0), rtol=1e-6, atol=1e-7)


def test_inputs_have_unit_variance_and_their_means_are_zero_only_over_all_models(source: ActivationStore, topk: Fitted) -> None:
    x = topk[0].normalise(source.read(0, 3600))
    torch.testing.assert_close(x.var(0, correction=0).mean(1), torch.ones(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(D), rtol=0, atol=1e-4)
    assert x.mean(0)[0].norm() > 0.05  # what one model has more of everywhere stays


def test_measures_against_a_loop_over_rows(source: ActivationStore, topk: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_ROWS", 130)
    crosscoder = topk[0]
    mean = crosscoder.normalise(_statistics(source, 3600)[0][None].float())[0]
    found = measure(crosscoder, source, mean, 3600, 4000)
    x = crosscoder.normalise(source.read(3600, 4000))
    f = crosscoder.encode(x)
    for m, model in enumerate(MODELS):
        error = sum((x[i, m] - crosscoder.decode(f[i : i + 1])[0, m]).square().sum().item() for i in range(400))
        spread = sum((x[i, m] - mean[m]).square().sum().item() for i in range(400))
        assert found["fve"][model] == pytest.approx(1 - error / spread, abs=1e-4)
    assert found["l0"] == pytest.approx((f > 0).sum(1).double().mean().item())
    statistics = feature_statistics(crosscoder, source)
    every = crosscoder.encode(crosscoder.normalise(source.read(0, ROWS)))
    torch.testing.assert_close(statistics["firing_rate"], (every > 0).float().mean(0))
    torch.testing.assert_close(statistics["max_activation"], every.amax(0))
    fires = every.sum(0) / (every > 0).sum(0).clamp(min=1)
    torch.testing.assert_close(statistics["mean_activation"], fires)


def test_what_is_reported_belongs_to_what_is_returned(source: ActivationStore, topk: Fitted) -> None:
    crosscoder, metrics, statistics, logged = topk
    assert metrics["dead_share"] == (statistics["firing_rate"] == 0).float().mean().item()
    assert not any(weight.requires_grad for weight in crosscoder.parameters())
    assert logged[-1][1]["fve/grpo"] == pytest.approx(metrics["fve"]["grpo"], abs=0.05)
    assert set(logged[0][1]) == {"loss", "l0", "dead", "fve/base", "fve/grpo", "grad_norm", "learning_rate"}


def test_a_feature_dies_after_so_many_silent_tokens_and_fires_back_to_life() -> None:
    crosscoder, x = random_crosscoder(MODELS, n_features=12), torch.randn(10, 2, 6, generator=torch.Generator().manual_seed(1))
    crosscoder.b_enc.data[4] = -1e3
    take = _Step(crosscoder, training(batch_tokens=10, dead_after_tokens=30, k=12), 1.0, Accelerator())
    for _ in range(3):
        take(x)
    assert take.idle_F[4] == 30
    assert (take.idle_F[[k for k in range(12) if k != 4]] == 0).all()
    crosscoder.b_enc.data[4] = 1e3
    take(x)
    assert take.idle_F[4] == 0


def test_the_threshold_is_a_running_mean_of_the_cutoffs_from_the_first_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "THRESHOLD_MEMORY", 0.75)
    crosscoder = random_crosscoder(MODELS, n_features=12)
    take = _Step(crosscoder, training(batch_tokens=10, k=2), 1.0, Accelerator())
    wanted = None
    for seed in range(3):
        x = torch.randn(10, 2, 6, generator=torch.Generator().manual_seed(seed))
        cutoff = batch_top_k(crosscoder.preactivations(x) * crosscoder.decoder_norms().sum(1), 20).item()
        wanted = cutoff if wanted is None else 0.75 * wanted + 0.25 * cutoff
        assert (take(x).fired > 0).sum() == 20
    assert crosscoder.threshold.item() == pytest.approx(wanted)


def test_the_l1_weight_ramps_up_over_its_share_of_the_steps() -> None:
    crosscoder, x = random_crosscoder(MODELS, loss="l1"), torch.randn(10, 2, 6, generator=torch.Generator().manual_seed(1))
    take = _Step(crosscoder, training(batch_tokens=10, steps=40, l1_warmup_share=0.1, l1_weight=3.0), 1.0, Accelerator())
    totals = [take(x).total.item() for _ in range(6)]
    steps = torch.tensor(totals).diff()
    assert steps[:3].min() > 0
    assert steps[:3].tolist() == pytest.approx([steps[0].item()] * 3, rel=1e-3)
    assert totals[3] == totals[4] == totals[5]


def test_the_learning_rate_rises_stays_and_falls(source: ActivationStore) -> None:
    logged = fitted(source, "l1", 0, steps=50, warmup_share=0.2, decay_share=0.4, lr=0.5e-3, log_every=5)[3]
    rates = {step: point["learning_rate"] for step, point in logged}
    wanted = {1: 0.0, 5: 0.4, 10: 0.9, 15: 1.0, 30: 1.0, 35: 16 / 20, 40: 11 / 20, 50: 1 / 20}
    assert {step: rates[step] / 0.5e-3 for step in wanted} == pytest.approx(wanted)


def test_a_loss_that_is_not_finite_stops_with_the_step(source: ActivationStore) -> None:
    with pytest.raises(FloatingPointError, match=r"test: loss is .* at step [0-9]+; lower crosscoder.training.lr"):
        fitted(source, "l1", lr=1e38, steps=20)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_nothing_to_fit_or_to_measure_on_is_one_line(source: ActivationStore, share: float) -> None:
    with pytest.raises(ContractError, match=r"params.yaml: crosscoder.training.heldout_share: expected"):
        fitted(source, "batchtopk", heldout_share=share, steps=2)


def test_a_batch_larger_than_the_rows_of_the_fit_is_one_line(source: ActivationStore) -> None:
    with pytest.raises(ContractError, match=r"params.yaml: crosscoder.training.batch_tokens: expected at most 3600"):
        fitted(source, "batchtopk", batch_tokens=3601)
