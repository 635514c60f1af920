"""Fitting crosscoders on activations whose directions are known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import ContractError
from featdiff.attribution.norms import nrn
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.losses.l1 import L1
from featdiff.crosscoder.losses.loss import Loss, Step
from featdiff.crosscoder.losses.table import LOSSES
from featdiff.crosscoder.measure import measure
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.pipeline.checkpoint import Scratch
from tiny import params_of, store_of

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
    found = fit(
        source, loss, training(**changes), seed, lambda step, point: logged.append((step, point)), "test", scratch=Scratch()
    )
    return found.crosscoder, *measure(source, *found), logged


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


def test_inputs_have_unit_variance_and_their_means_are_zero_only_over_all_models(source: ActivationStore, topk: Fitted) -> None:
    x = topk[0].normalise(source.read(0, 3600))
    torch.testing.assert_close(x.var(0, correction=0).mean(1), torch.ones(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(D), rtol=0, atol=1e-4)
    assert x.mean(0)[0].norm() > 0.05  # what one model has more of everywhere stays


def test_what_is_reported_belongs_to_what_is_returned(source: ActivationStore, topk: Fitted) -> None:
    crosscoder, metrics, statistics, logged = topk
    assert metrics["dead_share"] == (statistics["firing_rate"] == 0).float().mean().item()
    assert not any(weight.requires_grad for weight in crosscoder.parameters())
    assert logged[-1][1]["fve/grpo"] == pytest.approx(metrics["fve"]["grpo"], abs=0.05)
    assert set(logged[0][1]) == {"loss", "l0", "dead", "fve/base", "fve/grpo", "grad_norm", "learning_rate"}


class Scripted(Loss):
    """Says that feature 4 fires in step 4 alone and all others always, and keeps what it is told."""

    told: list[list[int]]

    def __call__(self, x_BMD: Tensor, step: int, dead_F: Tensor) -> Step:
        self.told.append(dead_F.nonzero().flatten().tolist())
        fired = torch.full((self.crosscoder.n_features,), len(x_BMD))
        fired[4] = len(x_BMD) if step == 4 else 0
        error = x_BMD - self.crosscoder.decode(self.crosscoder.preactivations(x_BMD))
        return Step(error.square().mean(), error.detach(), fired)


def test_a_feature_is_dead_after_so_many_silent_tokens_and_firing_brings_it_back(
    source: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "scripted", Scripted)
    Scripted.told = []
    logged = fitted(source, "scripted", steps=8, batch_tokens=256, dead_after_tokens=3 * 256, log_every=1)[3]
    assert Scripted.told == [[], [], [], [4], [], [], [], [4]]
    assert [point["dead"] for _, point in logged] == [0, 0, 1 / 32, 0, 0, 0, 1 / 32, 1 / 32]


class Thresholded(L1):
    """A loss that nothing but the table knows: L1 in training, and at inference only what is above 0.3."""

    def __call__(self, x_BMD: Tensor, step: int, dead_F: Tensor) -> Step:
        self.crosscoder.threshold.fill_(0.3)
        return super().__call__(x_BMD, step, dead_F)


def test_a_line_in_the_table_is_all_that_a_new_loss_needs(source: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "thresholded", Thresholded)
    crosscoder, metrics, _, _ = fitted(source, "thresholded", steps=100)
    plain, plain_metrics, _, _ = fitted(source, "l1", steps=100)
    assert torch.equal(crosscoder.W_dec, plain.W_dec)
    assert plain.threshold == 0
    assert metrics["l0"] < plain_metrics["l0"]
    raw = source.read(0, 500)[:, 0]
    read, read_plain = Reader(crosscoder, "base")(raw), Reader(plain, "base")(raw)
    kept = read_plain * crosscoder.decoder_norms().sum(1) > 0.3
    assert 0 < kept.sum() < (read_plain > 0).sum()
    assert torch.equal(read, read_plain * kept)


def test_going_on_from_a_crosscoder_starts_at_its_weights_in_its_units(source: ActivationStore, topk: Fitted) -> None:
    gentle = training(steps=1, lr=1e-9)
    found = fit(source, "batchtopk", gentle, 1, lambda *_: None, "test", scratch=Scratch(), warm=topk[0])
    assert (found.crosscoder.W_dec - topk[0].W_dec).abs().max() < 1e-6
    assert torch.equal(found.crosscoder.scale, topk[0].scale)
    torch.testing.assert_close(found.mean_MD, topk[0].normalise(source.read(0, 3600)).mean(0), rtol=0, atol=1e-4)
    assert found.train_rows == 3600


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
