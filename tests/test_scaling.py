"""Latent scaling: against least squares token by token, and on crosscoders that are right or wrong by construction."""

from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdiff.activations import store
from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.tables import SCALING
from featdiff.attribution.scaling import LatentScaling, latent_scaling, ratio, scaling_rows
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.model import Crosscoder
from featdiff.pipeline.checkpoint import Scratch
from tiny import params_of, random_crosscoder, store_of

MODELS = ("base", "sft", "grpo")
SEEDS = st.integers(0, 10_000)
LOSSES = st.sampled_from(["l1", "batchtopk"])
BOUNDS = (0.2, 0.5)


def activations(seed: int, models: int = 3, rows: int = 40) -> Tensor:
    return torch.randn(rows, models, 6, generator=torch.Generator().manual_seed(seed)) * 2


def least_squares(target_ND: Tensor, f_N: Tensor, direction_D: Tensor) -> float:
    """The β that minimises Σ ‖β f d − y‖², by a solver and not by its formula."""
    columns = torch.outer(f_N, direction_D).flatten()[:, None].double()
    return torch.linalg.lstsq(columns, target_ND.double().flatten()[:, None]).solution.item()


@settings(deadline=None, max_examples=15)
@given(SEEDS, LOSSES)
def test_beta_is_the_least_squares_scale_over_all_tokens(seed: int, loss: str) -> None:
    crosscoder, acts = random_crosscoder(MODELS, loss=loss, seed=seed), activations(seed + 1)
    found = latent_scaling(crosscoder, ActivationTensor(list(MODELS), acts), 3, 38)
    x = crosscoder.normalise(acts[3:38])
    f, w = crosscoder.encode(x).detach(), crosscoder.W_dec.detach()
    rebuilt = crosscoder.decode(f).detach()
    for m in range(3):
        for t in range(3):
            for k in (f > 0).any(0).nonzero().squeeze(1).tolist():
                others = torch.cat([f[:, :k], f[:, k + 1 :]], 1) @ torch.cat([w[:k, m], w[k + 1 :, m]])
                error = x[:, m] - crosscoder.b_dec[m].detach() - others
                wanted = least_squares(error, f[:, k], w[k, t])
                assert found.error_MMF[m, t, k].item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
                wanted = least_squares(rebuilt[:, m], f[:, k], w[k, t])
                assert found.reconstruction_MMF[m, t, k].item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.permutations(range(12)))
def test_permuting_features_permutes_results(seed: int, order: list[int]) -> None:
    crosscoder, rows = random_crosscoder(MODELS, seed=seed), ActivationTensor(list(MODELS), activations(seed + 1))
    before = latent_scaling(crosscoder, rows, 0, 40)
    with torch.no_grad():
        for weight, features in ((crosscoder.W_enc, 2), (crosscoder.b_enc, 0), (crosscoder.W_dec, 0)):
            weight.copy_(weight.index_select(features, torch.tensor(order)))
    after = latent_scaling(crosscoder, rows, 0, 40)
    for old, new in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(new, old[:, :, order], equal_nan=True, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.permutations(range(3)))
def test_permuting_models_permutes_pairs(seed: int, order: list[int]) -> None:
    crosscoder, acts = random_crosscoder(MODELS, seed=seed), activations(seed + 1)
    models = tuple(MODELS[m] for m in order)
    turned = Crosscoder(list(models), 6, 12, "batchtopk")
    weights = crosscoder.state_dict()
    for name, dim in (("W_enc", 0), ("W_dec", 1), ("b_dec", 0), ("scale", 0)):
        weights[name] = weights[name].index_select(dim, torch.tensor(order))
    turned.load_state_dict(weights)
    found = latent_scaling(turned, ActivationTensor(list(models), acts[:, order]), 0, 40)
    wanted = latent_scaling(crosscoder, ActivationTensor(list(MODELS), acts), 0, 40)
    for old, new in zip(wanted[1:], found[1:], strict=True):
        torch.testing.assert_close(new, old[order][:, order], equal_nan=True, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(0.1, 10))
def test_the_scale_of_a_feature_is_no_part_of_the_result(seed: int, factor: float) -> None:
    crosscoder, rows = random_crosscoder(MODELS, loss="l1", seed=seed), ActivationTensor(list(MODELS), activations(seed + 1))
    before = latent_scaling(crosscoder, rows, 0, 40)
    with torch.no_grad():
        crosscoder.W_enc[:, :, 4] *= factor
        crosscoder.b_enc[4] *= factor
        crosscoder.W_dec[4] /= factor
    after = latent_scaling(crosscoder, rows, 0, 40)
    for old, new in zip(before[1:], after[1:], strict=True):
        torch.testing.assert_close(new, old, equal_nan=True, rtol=1e-3, atol=1e-4)


def test_the_size_of_the_pieces_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoder, acts = random_crosscoder(MODELS), activations(1)
    whole = latent_scaling(crosscoder, ActivationTensor(list(MODELS), acts), 0, 40)
    monkeypatch.setattr(store, "READ_ROWS", 7)
    parts = latent_scaling(crosscoder, store_of(tmp_path, acts, MODELS), 0, 40)
    for a, b in zip(whole[1:], parts[1:], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)


def planted(absent_in_base: int = 0) -> tuple[Crosscoder, ActivationTensor]:
    """Four features along the axes that a crosscoder has found exactly, the first ``absent_in_base`` of them in GRPO alone."""
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(2000, 4, generator=generator) * (torch.rand(2000, 4, generator=generator) < 0.3)
    crosscoder = Crosscoder(["base", "grpo"], 4, 4, "l1")
    with torch.no_grad():
        crosscoder.W_dec.copy_(torch.eye(4).unsqueeze(1).expand(4, 2, 4))
        crosscoder.W_dec[:absent_in_base, 0] = 0
        crosscoder.W_enc[1].copy_(torch.eye(4))
    noise = torch.randn(2000, 2, 4, generator=generator) * 0.01
    return crosscoder, ActivationTensor(["base", "grpo"], crosscoder.decode(f).detach() + noise)


def test_a_feature_of_one_model_has_no_trace_in_the_other_and_a_shared_one_a_full_one() -> None:
    scaling = latent_scaling(*planted(absent_in_base=1), 0, 2000)
    for beta in (scaling.error_MMF, scaling.reconstruction_MMF):
        nu = ratio(beta)[0, 1]
        assert nu[0].abs() < 0.02
        assert nu[1:].tolist() == pytest.approx([1, 1, 1], abs=0.02)
    assert scaling.specific(*BOUNDS)[0, 1].tolist() == [True, False, False, False]
    assert not scaling.specific(*BOUNDS)[1, 0].any()


def test_complete_shrinkage_shows_in_the_error_alone() -> None:
    crosscoder, rows = planted()
    crosscoder.W_dec.data[2, 0] = 0  # base still has the feature; its decoder row says otherwise
    scaling = latent_scaling(crosscoder, rows, 0, 2000)
    assert ratio(scaling.error_MMF)[0, 1, 2].item() == pytest.approx(1, abs=0.02)
    assert ratio(scaling.reconstruction_MMF)[0, 1, 2].abs() < 0.02
    assert not scaling.specific(*BOUNDS).any()


def test_latent_decoupling_shows_in_the_reconstruction_alone() -> None:
    crosscoder, rows = planted()
    twice = Crosscoder(["base", "grpo"], 4, 5, "l1")  # feature 3 again as feature 4: one copy for each model
    with torch.no_grad():
        for new, old, dim in ((twice.W_enc, crosscoder.W_enc, 2), (twice.W_dec, crosscoder.W_dec, 0)):
            new.copy_(torch.cat([old, old.narrow(dim, 3, 1)], dim))
        twice.W_dec[3, 0] = 0
        twice.W_dec[4, 1] = 0
    scaling = latent_scaling(twice, rows, 0, 2000)
    assert ratio(scaling.error_MMF)[0, 1, 3].abs() < 0.02
    assert ratio(scaling.reconstruction_MMF)[0, 1, 3].item() == pytest.approx(1, abs=0.02)
    assert not scaling.specific(*BOUNDS).any()


def test_a_feature_of_the_opposite_sign_is_not_specific() -> None:
    crosscoder, rows = planted()
    crosscoder.W_dec.data[1, 0] *= -1
    rows.acts_NMD = crosscoder.decode(crosscoder.encode(rows.acts_NMD)).detach()
    scaling = latent_scaling(crosscoder, rows, 0, 2000)
    assert ratio(scaling.error_MMF)[0, 1, 1].item() == pytest.approx(-1, abs=0.02)
    assert not scaling.specific(*BOUNDS)[0, 1, 1]


def test_what_never_fires_or_has_no_direction_has_no_number() -> None:
    crosscoder, rows = planted()
    crosscoder.b_enc.data[0] = -1e6
    crosscoder.W_dec.data[1, 1] = 0
    scaling = latent_scaling(crosscoder, rows, 0, 2000)
    for beta in (scaling.error_MMF, scaling.reconstruction_MMF):
        assert ratio(beta)[:, 1, :2].isnan().all()
        assert ratio(beta)[:, 1, 2:].isfinite().all()
    assert not scaling.specific(1.0, 1.0)[:, 1, :2].any()
    assert [row["nu_error"] for row in scaling_rows("pair", scaling, *BOUNDS) if row["pair"] == "grpo-base"][:2] == [None, None]


@pytest.mark.parametrize("own", [0.0, 1e-9, -0.5])
def test_a_ratio_needs_a_clearly_positive_beta_in_its_own_model(own: float) -> None:
    beta = torch.tensor([[1.0, 0.0], [0.0, own]], dtype=torch.float64)[:, :, None]
    assert ratio(beta)[:, 1].isnan().all()
    assert not LatentScaling(["base", "grpo"], beta, beta).specific(1.0, 1.0)[0, 1].any()


def test_one_row_per_feature_and_ordered_pair(tmp_path: Path) -> None:
    scaling = latent_scaling(random_crosscoder(MODELS), ActivationTensor(list(MODELS), activations(1)), 0, 40)
    rows = scaling_rows("joint", scaling, *BOUNDS)
    SCALING.write(tmp_path, rows)
    assert [(row["owner"], row["other"], row["feature_id"]) for row in rows] == [
        (MODELS[t], MODELS[o], k) for o, t in permutations(range(3), 2) for k in range(12)
    ]
    specific = scaling.specific(*BOUNDS)
    for row in rows:
        o, t, k = MODELS.index(row["other"]), MODELS.index(row["owner"]), row["feature_id"]
        assert row["specific"] == specific[o, t, k].item()
        assert row["fit"] == "joint"
        if row["nu_error"] is not None:
            assert row["nu_error"] == pytest.approx(row["beta_error"] / row["beta_error_owner"])
        if row["nu_reconstruction"] is not None:
            assert row["nu_reconstruction"] == pytest.approx(row["beta_reconstruction"] / row["beta_reconstruction_owner"])


def test_activations_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="the crosscoder is of base, grpo, the activations of grpo, base"):
        latent_scaling(random_crosscoder(), ActivationTensor(["grpo", "base"], activations(1, models=2)), 0, 40)


def test_an_overfitted_dictionary_is_told_by_held_out_rows() -> None:
    """Almost as many features as rows to learn: they learn the noise of these rows, of which held-out rows have none."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(4000, 1, 24, generator=generator)
    source = ActivationTensor(["base", "grpo"], stream + 0.7 * torch.randn(4000, 2, 24, generator=generator))
    small = {"n_features": 96, "k": 6, "batch_tokens": 64, "steps": 1200, "lr": 0.005, "dead_after_tokens": 10**7}
    training = params_of(CrosscoderTraining, "crosscoder", "training", heldout_share=0.968, **small)
    fitted = fit(source, "batchtopk", training, 0, lambda *_: None, "noise", scratch=Scratch())
    assert fitted.train_rows == 128
    known, new = (latent_scaling(fitted.crosscoder, source, *rows) for rows in ((0, 128), (128, 4000)))
    own = [scaling.error_MMF.diagonal().nanmean(0) for scaling in (known, new)]
    assert own[0].tolist() == pytest.approx([1, 1], abs=0.02)
    assert own[1].max() < 0.8
    assert new.tested().all()
    assert not latent_scaling(fitted.crosscoder, source, 0, 1).tested().all(), "one row cannot test 96 features"
