"""The losses against loops that follow their formulas sample by sample."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.config.values import LossName
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.losses import batchtopk, loss
from featdiff.crosscoder.losses.batchtopk import BatchTopK, Kept, batch_top_k, batchtopk_loss
from featdiff.crosscoder.losses.dedicated import Dedicated, foreign
from featdiff.crosscoder.losses.delta import Delta
from featdiff.crosscoder.losses.l1 import L1, l1_loss
from featdiff.crosscoder.losses.loss import Loss, Step
from featdiff.crosscoder.losses.table import LOSSES
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.pipeline.checkpoint import Scratch
from tiny import ROOT, params_of, random_crosscoder

MODELS = ("base", "sft", "grpo")
Gradients = dict[str, Tensor]
NO_DEAD = torch.zeros(12, dtype=torch.bool)


@pytest.fixture(params=["dense", "sparse"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fact holds however the reconstruction is summed up."""
    monkeypatch.setattr(loss, "SPARSE_BELOW", 0.0 if request.param == "dense" else 2.0)


def loss_at(crosscoder: Crosscoder, x: Tensor, cutoff: Tensor, *how: Any) -> Step:
    return batchtopk_loss(crosscoder, x, Kept.at(crosscoder, x, cutoff), *how)


def cutoff_of(crosscoder: Crosscoder, x: Tensor, count: int) -> Tensor:
    return batch_top_k(crosscoder.linear(x), crosscoder.decoder_norms().sum(1).detach(), count)[0]


def code_at(crosscoder: Crosscoder, x: Tensor, cutoff: Tensor) -> Tensor:
    """Feature values that are kept [B, F]."""
    f = crosscoder.preactivations(x)
    return f * (f * crosscoder.decoder_norms().sum(1) >= cutoff)


def inputs(rows: int = 9, seed: int = 1) -> Tensor:
    return torch.randn(rows, len(MODELS), 6, generator=torch.Generator().manual_seed(seed))


def values(crosscoder: Crosscoder, x: Tensor) -> Tensor:
    """f_k Σ_m‖d_k^m‖ by loops [B, F]."""
    out = torch.zeros(len(x), crosscoder.n_features)
    for b, sample in enumerate(x):
        for k in range(crosscoder.n_features):
            f = crosscoder.b_enc[k] + sum(sample[m] @ crosscoder.W_enc[m, :, k] for m in range(len(MODELS)))
            out[b, k] = max(f.item(), 0) * sum(row.pow(2).sum().sqrt().item() for row in crosscoder.W_dec[k])
    return out


def squared_error(crosscoder: Crosscoder, sample: Tensor, f: Tensor) -> float:
    """Σ_m ‖x^m − x̂^m‖² of one sample with feature values f [F]."""
    total = 0.0
    for m in range(len(MODELS)):
        rebuilt = crosscoder.b_dec[m] + sum(f[k] * crosscoder.W_dec[k, m] for k in range(crosscoder.n_features))
        total += (sample[m] - rebuilt).square().sum().item()
    return total


@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_l1_is_the_formula_sample_by_sample(weight: float) -> None:
    crosscoder, x = random_crosscoder(MODELS, loss="l1"), inputs()
    value = values(crosscoder, x)
    f = value / crosscoder.decoder_norms().sum(1)
    by_sample = [squared_error(crosscoder, x[b], f[b]) + weight * value[b].sum().item() for b in range(len(x))]
    found = l1_loss(crosscoder, x, weight)
    assert found.total.item() == pytest.approx(np.mean(by_sample), rel=1e-4)
    assert found.count_F.tolist() == (f > 0).sum(0).tolist()
    torch.testing.assert_close(x - found.error, crosscoder.decode(f).detach())


def test_batch_size_does_not_change_the_scale_of_l1() -> None:
    crosscoder, x = random_crosscoder(MODELS, loss="l1"), inputs()
    torch.testing.assert_close(l1_loss(crosscoder, x, 2.0).total, l1_loss(crosscoder, x.repeat(3, 1, 1), 2.0).total)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 8)), elements=st.floats(0, 50, width=32)),
    st.integers(1, 60),
    st.one_of(st.none(), st.floats(-1, 60, width=32)),
    arrays(np.float32, 8, elements=st.one_of(st.just(0.0), st.just(1.0), st.floats(2**-100, 9, width=32))),
)
def test_the_cutoff_is_the_count_th_largest_value_whatever_the_guess(
    value: np.ndarray, count: int, guess: float | None, weight: np.ndarray
) -> None:
    norms = torch.from_numpy(weight[: value.shape[1]])
    unweighted, value = (
        torch.from_numpy(value - 5),
        (value - 5) * weight[: value.shape[1]],
    )  # some are negative, as before a ReLU
    found, places = batch_top_k(unweighted, norms, count, None if guess is None else torch.tensor(guess))
    cutoff = found.item()
    assert places.tolist() == np.flatnonzero(value >= cutoff).tolist()
    ordered = sorted(value.flatten().tolist(), reverse=True)
    kept = (value >= cutoff).sum()
    assert cutoff > 0
    assert not (value[value >= cutoff] == 0).any()
    positive = sum(v >= torch.finfo(torch.float32).tiny for v in ordered)
    if count <= positive:
        assert cutoff == ordered[count - 1]
        assert kept >= count
    else:
        assert kept == positive


@pytest.mark.parametrize("k", [1, 2, 4])
def test_batchtopk_keeps_exactly_the_k_times_b_largest(k: int) -> None:
    crosscoder, x = random_crosscoder(MODELS), inputs()
    crosscoder.W_dec.data *= torch.linspace(0.1, 3, 12)[:, None, None]  # norms decide the order, not f alone
    value = values(crosscoder, x)
    count = k * len(x)
    largest = value.flatten().topk(count)
    cutoff = cutoff_of(crosscoder, x, count)
    found = loss_at(crosscoder, x, cutoff, NO_DEAD, 4, 1.0, 1.0)
    kept = torch.zeros_like(value, dtype=torch.bool).flatten()
    kept[Kept.at(crosscoder, x, cutoff).places_E] = True
    assert kept.sum() == count
    assert torch.equal(found.count_F, kept.view_as(value).sum(0))
    assert set(kept.nonzero().squeeze(1).tolist()) == set(largest.indices.tolist())
    assert cutoff.item() <= value.flatten()[kept].min().item() * (1 + 1e-5)
    assert cutoff.item() == pytest.approx(largest.values.min().item(), rel=1e-5)
    f = torch.where(value >= largest.values.min() * 0.99999, value, 0) / crosscoder.decoder_norms().sum(1)
    wanted = np.mean([squared_error(crosscoder, x[b], f[b]) for b in range(len(x))])
    assert loss_at(crosscoder, x, cutoff, NO_DEAD, 4, 1.0, 2.5).total.item() == pytest.approx(wanted / 2.5, rel=1e-4)


def test_gradients_reach_only_the_kept_features() -> None:
    crosscoder, x = random_crosscoder(MODELS), inputs(rows=4)
    cutoff = cutoff_of(crosscoder, x, 4)
    found = loss_at(crosscoder, x, cutoff, NO_DEAD, 4, 1.0, 1.0)
    found.total.backward()
    kept = found.count_F > 0
    assert 0 < kept.sum() < 12
    for gradient in (
        crosscoder.W_enc.grad.abs().sum((0, 1)),
        crosscoder.b_enc.grad.abs(),
        crosscoder.W_dec.grad.abs().sum((1, 2)),
    ):
        assert torch.equal(gradient > 0, kept)


def dead_setup() -> tuple[Crosscoder, Tensor, Tensor, Tensor]:
    crosscoder, x = random_crosscoder(MODELS), inputs(rows=6)
    value = (crosscoder.preactivations(x) * crosscoder.decoder_norms().sum(1)).detach()
    dead = torch.zeros(12, dtype=torch.bool)
    dead[value.amax(0).argsort()[:4]] = True
    value[:, dead] = 0
    return crosscoder, x, batch_top_k(value, torch.ones(12), 12)[0], dead


def test_the_auxiliary_loss_rebuilds_the_error_from_the_most_active_dead_features() -> None:
    crosscoder, x, cutoff, dead = dead_setup()
    main = loss_at(crosscoder, x, cutoff, NO_DEAD, 2, 5.0, 3.0)
    found = loss_at(crosscoder, x, cutoff, dead, 2, 5.0, 3.0)
    f, ids = crosscoder.preactivations(x).detach(), dead.nonzero().squeeze(1).tolist()
    numerator = 0.0
    for b in range(len(x)):
        chosen = sorted(ids, key=lambda k: -f[b, k].item())[:2]
        rebuilt = sum((f[b, k] * crosscoder.W_dec[k] for k in chosen), torch.zeros(3, 6))
        numerator += (main.error[b] - rebuilt).square().sum().item()
    aux = numerator / main.error.square().sum().item()
    assert found.total.item() == pytest.approx(main.total.item() + 5.0 * aux, rel=1e-4)
    assert main.total.item() == pytest.approx(loss_at(crosscoder, x, cutoff, NO_DEAD, 2, 99.0, 3.0).total.item())
    more = loss_at(crosscoder, x, cutoff, dead, 99, 5.0, 3.0)
    assert torch.isfinite(more.total)


def test_the_auxiliary_gradient_reaches_only_dead_features() -> None:
    gradients = []
    for aux_weight in (0.0, 1.0):
        crosscoder, x, cutoff, dead = dead_setup()
        loss_at(crosscoder, x, cutoff, dead, 2, aux_weight, 1.0).total.backward()
        gradients.append(
            [
                crosscoder.W_enc.grad.flatten(0, 1).T,
                crosscoder.b_enc.grad[:, None],
                crosscoder.W_dec.grad.flatten(1),
                crosscoder.b_dec.grad,
            ]
        )
    for without, with_aux in zip(*gradients, strict=True):
        if len(without) == 12:
            changed = (without - with_aux).abs().sum(1) > 1e-7
            assert not changed[~dead].any()
            assert changed[dead].any()
        else:
            assert torch.equal(without, with_aux)


def test_permuting_features_changes_neither_loss() -> None:
    crosscoder, x = random_crosscoder(MODELS), inputs()
    cutoff = cutoff_of(crosscoder, x, 18)
    dead = torch.arange(12) < 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    other = random_crosscoder(MODELS)
    other.W_enc.data, other.b_enc.data, other.W_dec.data = (
        crosscoder.W_enc.data[:, :, order],
        crosscoder.b_enc.data[order],
        crosscoder.W_dec.data[order],
    )
    torch.testing.assert_close(l1_loss(other, x, 2.0).total, l1_loss(crosscoder, x, 2.0).total)
    first = loss_at(crosscoder, x, cutoff * 0.9999, dead, 2, 1.0, 1.0)
    second = loss_at(other, x, cutoff * 0.9999, dead[order], 2, 1.0, 1.0)
    torch.testing.assert_close(second.total, first.total)
    assert torch.equal(second.count_F, first.count_F[order])


def gradients(objective: Callable[[Crosscoder], Tensor]) -> tuple[float, Gradients]:
    crosscoder = random_crosscoder(MODELS, n_features=20)
    crosscoder.b_enc.data[[4, 19]] = -100.0  # features without any entry, inside and at the end
    total = objective(crosscoder)
    total.backward()
    return total.item(), {name: weight.grad for name, weight in crosscoder.named_parameters()}


@pytest.mark.parametrize("cutoff", [0.5, 6.0, 1e6])
@pytest.mark.parametrize("dead", [(), (1, 4, 7)])
def test_sparse_sums_give_the_gradients_of_dense_products(
    monkeypatch: pytest.MonkeyPatch, cutoff: float, dead: tuple[int, ...]
) -> None:
    x, dead_F = inputs(rows=5), torch.zeros(20, dtype=torch.bool)
    dead_F[list(dead)] = True
    objectives: list[Callable[[Crosscoder], Tensor]] = [
        lambda crosscoder: loss_at(crosscoder, x, torch.tensor(cutoff), dead_F, 2, 0.5, 3.0).total,
        lambda crosscoder: l1_loss(crosscoder, x, 1.5).total,
    ]
    for objective in objectives:
        found = []
        for share in (0.0, 2.0):
            monkeypatch.setattr(loss, "SPARSE_BELOW", share)
            found.append(gradients(objective))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(
                found[1][1][name], gradient, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def running(kind: type[Loss], crosscoder: Crosscoder, **changes: object) -> Loss:
    return kind(crosscoder, params_of(CrosscoderTraining, "crosscoder", "training", **changes), 1.0, Accelerator())


def test_the_threshold_is_a_running_mean_of_the_cutoffs_from_the_first_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchtopk, "THRESHOLD_MEMORY", 0.75)
    crosscoder = random_crosscoder(MODELS)
    take = running(BatchTopK, crosscoder, batch_tokens=10, k=2)
    wanted = None
    for step in (1, 2, 3):
        x = inputs(rows=10, seed=step)
        cutoff = cutoff_of(crosscoder, x, 20).item()
        wanted = cutoff if wanted is None else 0.75 * wanted + 0.25 * cutoff
        assert take(x, step, NO_DEAD).count_F.sum() == 20
    assert crosscoder.threshold.item() == pytest.approx(wanted)


def test_batchtopk_trains_the_dead_with_the_numbers_of_params() -> None:
    crosscoder, x, dead = random_crosscoder(MODELS), inputs(rows=10), torch.arange(12) < 4
    take = running(BatchTopK, crosscoder, batch_tokens=10, k=2, aux_k=3, aux_weight=0.5)
    cutoff = cutoff_of(crosscoder, x, 20)
    wanted = loss_at(crosscoder, x, cutoff, dead, 3, 0.5, 1.0).total
    torch.testing.assert_close(take(x, 1, dead).total, wanted)


def test_the_l1_weight_ramps_up_over_its_share_of_the_steps_and_sets_no_threshold() -> None:
    crosscoder, x = random_crosscoder(MODELS, loss="l1"), inputs(rows=10)
    take = running(L1, crosscoder, batch_tokens=10, steps=40, l1_warmup_share=0.1, l1_weight=3.0)
    totals = [take(x, step, NO_DEAD).total.item() for step in range(1, 7)]
    steps = torch.tensor(totals).diff()
    assert steps[:3].min() > 0
    assert steps[:3].tolist() == pytest.approx([steps[0].item()] * 3, rel=1e-3)
    assert totals[3] == totals[4] == totals[5]
    torch.testing.assert_close(torch.tensor(totals[3]), l1_loss(crosscoder, x, 3.0).total.detach())
    assert crosscoder.threshold == 0


def trained(
    kind: str, scratch: Scratch | None = None, log: Callable[[int, dict[str, float]], None] = lambda *_: None, **changes: object
) -> Crosscoder:
    """A short fit of three models, in which features die and are trained by the auxiliary loss."""
    small = {"n_features": 20, "batch_tokens": 32, "steps": 40, "lr": 0.01, "k": 2, "aux_k": 4, "dead_after_tokens": 96}
    small |= {"log_every": 1, "heldout_share": 0.1, "dedicated_share": 0.15}
    params = params_of(CrosscoderTraining, "crosscoder", "training", **small | changes)
    source = ActivationTensor(list(MODELS), inputs(rows=400))
    return fit(source, kind, params, 0, log, kind, scratch=scratch or Scratch()).crosscoder


def test_each_model_has_its_own_part_of_the_dictionary_and_the_rest_is_shared() -> None:
    found = foreign(3, 20, 0.15)
    assert found[:9].tolist() == [[m != owner for m in range(3)] for owner in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert not found[9:].any()


@pytest.mark.parametrize("share", [0.0, 0.04, 0.35])
def test_a_share_that_leaves_no_part_to_a_model_or_to_all_is_refused(share: float) -> None:
    with pytest.raises(ContractError, match="dedicated_share"):
        foreign(3, 20, share)


def test_foreign_rows_stay_exactly_zero_and_all_others_learn() -> None:
    dead: list[float] = []
    before, after = (trained("dedicated", log=lambda _, point: dead.append(point["dead"]), steps=steps) for steps in (1, 40))
    assert max(dead) > 0  # the auxiliary loss was at work, too
    mask = foreign(3, 20, 0.15)
    for weight, earlier in ((after.W_dec, before.W_dec), (after.W_enc.permute(2, 0, 1), before.W_enc.permute(2, 0, 1))):
        assert (weight[mask] == 0).all()
        assert ((weight - earlier)[~mask].abs().amax(1) > 0).all()


def test_an_exclusive_feature_reads_every_stream_with_the_encoder_of_its_own_model() -> None:
    crosscoder = trained("dedicated", steps=3)
    for model in MODELS:
        reader = Reader(crosscoder, model)
        assert torch.equal(reader.W_DF[:, 3:6], crosscoder.W_enc[1, :, 3:6])
        assert (reader.directions_FD[3:6] != 0).any() == (model == MODELS[1])


def test_dedicated_selects_and_weighs_as_batchtopk_does() -> None:
    crosscoder, x, dead = random_crosscoder(MODELS), inputs(rows=10), torch.arange(12) < 4
    dedicated = running(Dedicated, crosscoder, batch_tokens=10, k=6, dedicated_share=0.2)(x, 1, dead)
    masked = random_crosscoder(MODELS)
    mask = foreign(3, 12, 0.2)
    masked.W_dec.data[mask] = 0
    masked.W_enc.data.permute(2, 0, 1)[mask] = 0
    plain = running(BatchTopK, masked, batch_tokens=10, k=6)(x, 1, dead)
    assert torch.equal(dedicated.total, plain.total)
    assert torch.equal(dedicated.count_F, plain.count_F)
    assert dedicated.count_F[:6].any()


def test_the_delta_term_is_its_formula_sample_by_sample() -> None:
    crosscoder, x, dead = random_crosscoder(MODELS), inputs(rows=10), torch.arange(12) < 4
    changes = {"batch_tokens": 10, "k": 2, "delta_share": 0.5, "delta_weight": 0.7}
    plain = running(BatchTopK, crosscoder, **changes)(x, 1, dead)
    found = running(Delta, crosscoder, **changes)(x, 1, dead)
    assert torch.equal(found.count_F, plain.count_F)
    code = code_at(crosscoder, x, cutoff_of(crosscoder, x, 20))
    total = 0.0
    for b in range(10):
        for m in (1, 2):
            rebuilt = crosscoder.b_dec[m] - crosscoder.b_dec[0]
            for k in range(6):  # of the delta features those that the batch kept
                rebuilt = rebuilt + code[b, k] * (crosscoder.W_dec[k, m] - crosscoder.W_dec[k, 0])
            total += (x[b, m] - x[b, 0] - rebuilt).square().sum().item()
    assert 0 < found.count_F[:6].sum() < 20
    assert found.total.item() == pytest.approx(plain.total.item() + 0.7 * total / 10, rel=1e-5)


def dense_total(kind: str, crosscoder: Crosscoder, x: Tensor, dead: Tensor, take: Loss) -> Tensor:
    """The formulas by dense products, whose gradient is autograd's: the reference of every loss. Losses are at their first
    step, after a warm-up of λ."""
    params, norms = take.params, crosscoder.decoder_norms().sum(1)
    f = crosscoder.preactivations(x)
    if kind == "l1":
        return (x - crosscoder.decode(f)).square().sum((1, 2)).mean() + params.l1_weight * (f * norms).sum() / len(x)
    value = (f * norms).detach()
    code = torch.where((value >= value.flatten().topk(params.k * len(x)).values[-1]) & (value > 0), f, 0.0)
    error = x - crosscoder.decode(code)
    total = error.square().sum((1, 2)).mean() / take.variance
    if dead.any():
        error = error.detach()
        top = f[:, dead].topk(min(params.aux_k, int(dead.sum())), dim=1)
        sparse = torch.zeros_like(f[:, dead]).scatter(1, top.indices, top.values)
        left = error - (sparse @ crosscoder.W_dec[dead].flatten(1)).view_as(x)
        total = total + params.aux_weight * left.square().sum() / error.square().sum()
    if kind == "delta":
        own = torch.where(torch.arange(crosscoder.n_features) < take.features, code, 0.0)
        left = x - crosscoder.decode(own)
        left = left[:, 1:] - left[:, :1]
        total = total + params.delta_weight * left.square().sum((1, 2)).mean() / take.variance
    return total


@pytest.mark.parametrize("kind", LOSSES)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 5), st.integers(1, 12), st.sets(st.integers(0, 19)))
def test_every_loss_and_its_gradient_are_those_of_dense_products_in_double_precision(
    kind: str, seed: int, rows: int, k: int, aux_k: int, dead: set[int]
) -> None:
    changes = {"n_features": 20, "batch_tokens": rows, "k": k, "aux_k": aux_k, "aux_weight": 0.7, "l1_warmup_share": 0.0}
    changes |= {"dedicated_share": 0.15, "delta_share": 0.3, "delta_weight": 0.8}
    x, dead_F = inputs(rows, seed).double(), torch.zeros(20, dtype=torch.bool)
    dead_F[list(dead)] = True
    totals, found = [], []
    for dense in (False, True):
        crosscoder = random_crosscoder(MODELS, n_features=20).double()
        crosscoder.b_enc.data[[4, 19]] = -100.0  # features without any entry, inside and at the end
        crosscoder.W_dec.data[7] = 0.0
        take = running(LOSSES[kind], crosscoder, **changes)
        total = dense_total(kind, crosscoder, x, dead_F, take) if dense else take(x, 1, dead_F).total
        total.backward()
        totals.append(total.detach())
        found.append({name: weight.grad for name, weight in crosscoder.named_parameters()})
    torch.testing.assert_close(*totals)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_delta_gradient_reaches_the_encoder_of_delta_features_alone() -> None:
    gradients = []
    for delta_weight in (1e-12, 1.0):
        crosscoder = random_crosscoder(MODELS)
        take = running(Delta, crosscoder, batch_tokens=10, k=2, delta_share=0.5, delta_weight=delta_weight)
        take(inputs(rows=10), 1, NO_DEAD).total.backward()
        gradients.append(crosscoder.W_enc.grad)
    changed = (gradients[1] - gradients[0]).abs().sum((0, 1)) > 1e-5
    assert changed[:6].any()
    assert not changed[6:].any()


def test_without_delta_features_the_loss_is_refused() -> None:
    with pytest.raises(ContractError, match="delta_share"):
        running(Delta, random_crosscoder(MODELS), delta_share=0.05)


def test_a_frozen_decoder_stays_bit_for_bit_and_its_encoder_learns() -> None:
    dead: list[float] = []
    changes = {"k": 1, "dead_after_tokens": 32}
    before, after = (
        trained("frozen", log=lambda _, point: dead.append(point["dead"]), steps=steps, **changes) for steps in (1, 40)
    )
    assert max(dead) > 0, "the auxiliary loss was at work, too"
    assert torch.equal(after.W_dec, before.W_dec)
    assert torch.equal(after.W_dec, after.W_dec[:, :1].expand_as(after.W_dec)), "the same direction in every model"
    assert ((after.W_enc - before.W_enc).abs().amax((0, 1)) > 0).all()
    assert (after.b_dec != before.b_dec).any()


@pytest.mark.parametrize("kind", ["dedicated", "delta", "frozen"])
def test_a_killed_fit_goes_on_and_ends_in_the_same_bytes(kind: str, tmp_path: Path) -> None:
    whole, steps = trained(kind), []

    def log(step: int, _: dict[str, float]) -> None:
        steps.append(step)
        if step == 25 and steps.count(25) == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trained(kind, Scratch(tmp_path, 0.0), log)
    resumed = trained(kind, Scratch(tmp_path, 0.0), log)
    assert steps == [*range(1, 26), *range(25, 41)]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_params_know_the_losses_of_the_table() -> None:
    assert set(get_args(LossName)) == set(LOSSES)


VERDICTS = Path("report/feature_claim.py")
"""Says whose feature counts decide a verdict, which is a rule of the study about one loss."""


def test_only_the_table_and_params_name_a_loss() -> None:
    """Whoever asks which loss it is must change when a loss is added."""
    package = ROOT / "src/featdiff"
    sources = {path.relative_to(package): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    likely = {path: text for path, text in sources.items() if any(name in text for name in LOSSES)}
    naming = {
        path
        for path, text in likely.items()
        if any(isinstance(node, ast.Constant) and node.value in LOSSES for node in ast.walk(ast.parse(text)))
    }
    assert naming == {Path("crosscoder/losses/table.py"), Path("config/values.py"), Path("config/params.py"), VERDICTS}
