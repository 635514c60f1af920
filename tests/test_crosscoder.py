"""The crosscoder: code, reconstruction, initialisation, disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from featdiff.artifacts.artifact import ContractError, read_json
from featdiff.crosscoder.model import Crosscoder
from tiny import random_crosscoder

MODELS = ("base", "sft", "grpo")


def test_one_code_from_all_models_and_a_reconstruction_for_each() -> None:
    crosscoder = random_crosscoder(MODELS, loss="l1")
    x = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1))
    f = torch.zeros(5, 12)
    for m in range(3):
        f += x[:, m] @ crosscoder.W_enc[m]
    f = (f + crosscoder.b_enc).clamp(min=0)
    torch.testing.assert_close(crosscoder.encode(x), f)
    rebuilt = torch.stack([f @ crosscoder.W_dec[:, m] + crosscoder.b_dec[m] for m in range(3)], dim=1)
    torch.testing.assert_close(crosscoder.decode(f), rebuilt)


def test_the_threshold_is_on_the_norm_weighted_value() -> None:
    crosscoder = random_crosscoder(MODELS, threshold=3.0)
    x = torch.randn(50, 3, 6, generator=torch.Generator().manual_seed(1))
    f = crosscoder.preactivations(x)
    weighted = f * crosscoder.W_dec.square().sum(2).sqrt().sum(1)
    kept = weighted > 3.0
    assert 0 < kept.sum() < (f > 0).sum()
    assert not torch.equal(kept, f > 3.0)
    assert torch.equal(crosscoder.encode(x), torch.where(kept, f, 0))
    assert torch.equal(f > crosscoder.cutoffs(), kept)
    crosscoder.threshold.fill_(0.0)
    assert torch.equal(crosscoder.encode(x), f)


def test_a_new_crosscoder_rebuilds_the_mean_and_sees_every_model_at_one_scale() -> None:
    crosscoder = Crosscoder(list(MODELS), 6, 12, "l1")
    raw = torch.randn(500, 3, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 3, 9])[:, None] + 2.0
    crosscoder.calibrate(raw.mean(0), (raw - raw.mean(0)).square().sum(2).mean(0))
    x = crosscoder.normalise(raw)
    torch.testing.assert_close((x - x.mean(0)).square().mean((0, 2)), torch.ones(3))
    torch.testing.assert_close(crosscoder.decode(crosscoder.encode(x))[0], x.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(6), rtol=0, atol=1e-5)


def test_each_model_is_brought_to_one_origin_and_its_own_scale() -> None:
    crosscoder, raw = random_crosscoder(MODELS), torch.randn(4, 3, 6)
    for m in range(3):
        torch.testing.assert_close(crosscoder.normalise(raw)[:, m], raw[:, m] * crosscoder.scale[m] - crosscoder.mean)


def test_the_order_of_the_models_does_not_change_the_code() -> None:
    crosscoder, other = random_crosscoder(MODELS), random_crosscoder(MODELS)
    order = [2, 0, 1]
    other.W_enc.data, other.W_dec.data, other.b_dec.data = (
        crosscoder.W_enc.data[order],
        crosscoder.W_dec.data[:, order],
        crosscoder.b_dec.data[order],
    )
    x = torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other.encode(x[:, order]), crosscoder.encode(x))
    torch.testing.assert_close(other.decode(other.encode(x[:, order])), crosscoder.decode(crosscoder.encode(x))[:, order])


def test_initial_rows_point_the_same_way_for_all_models() -> None:
    crosscoder = Crosscoder(list(MODELS), 6, 12, "l1")
    crosscoder.initialise(0.08, torch.Generator().manual_seed(0))
    torch.testing.assert_close(crosscoder.decoder_norms(), torch.full((12, 3), 0.08))
    assert torch.equal(crosscoder.W_dec[:, 0], crosscoder.W_dec[:, 2])
    for m in range(3):
        assert torch.equal(crosscoder.W_enc[m], crosscoder.W_dec[:, m].T)
    assert (crosscoder.W_dec[0, 0] @ crosscoder.W_dec[1, 0]).item() < 0.99 * 0.08**2


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    crosscoder = random_crosscoder(MODELS)
    crosscoder.save(tmp_path, layer=2, seed=7)
    loaded = Crosscoder.load(tmp_path)
    assert (loaded.models, loaded.loss) == (list(MODELS), "batchtopk")
    for name, tensor in crosscoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    config = read_json(tmp_path / "config.json")
    assert (config["layer"], config["seed"]) == (2, 7)
    assert config["scale"]["sft"] == pytest.approx(crosscoder.scale[1].item())


@pytest.mark.parametrize("broken", ["missing", "shape"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, broken: str) -> None:
    random_crosscoder(MODELS).save(tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    weights.pop("W_dec") if broken == "missing" else weights.update(W_dec=weights["W_dec"][:, :2].contiguous())
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ContractError, match=r"weights.safetensors: W_dec: expected \(12, 3, 6\)"):
        Crosscoder.load(tmp_path)


def test_a_model_outside_the_fit_has_no_slot() -> None:
    assert random_crosscoder(MODELS).slot("grpo") == 2
    with pytest.raises(KeyError, match="sft is not one of this crosscoder's models"):
        random_crosscoder(("base", "grpo")).slot("sft")
