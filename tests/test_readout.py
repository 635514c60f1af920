"""Feature values of one model: readouts against the joint code, raw units against normalised ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdiff.crosscoder.readout import Reader, read_all
from tiny import random_crosscoder

MODELS = ("base", "sft", "grpo")
SEEDS = st.integers(0, 10_000)
LOSSES = st.sampled_from(["l1", "batchtopk"])


def raw(seed: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) * 3


@settings(deadline=None, max_examples=40)
@given(SEEDS, LOSSES)
def test_folding_the_normaliser_changes_nothing(seed: int, loss: str) -> None:
    crosscoder = random_crosscoder(("base",), loss=loss, seed=seed)
    resid = raw(seed + 1)
    normalised = crosscoder.normalise(resid[:, None])
    reader = Reader(crosscoder, "base")
    torch.testing.assert_close(reader(resid), crosscoder.encode(normalised), rtol=1e-4, atol=1e-4)
    rebuilt = (crosscoder.decode(crosscoder.encode(normalised))[:, 0] + crosscoder.mean) / crosscoder.scale[0]
    torch.testing.assert_close(reader.reconstruct(resid), rebuilt, rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(SEEDS, LOSSES, st.sampled_from(MODELS))
def test_swap_is_the_code_with_the_models_stream_in_every_slot(seed: int, loss: str, model: str) -> None:
    crosscoder, resid = random_crosscoder(MODELS, loss=loss, seed=seed), raw(seed + 1)
    normalised = resid * crosscoder.scale[MODELS.index(model)] - crosscoder.mean
    wanted = crosscoder.encode(torch.stack([normalised] * 3, dim=1))
    torch.testing.assert_close(Reader(crosscoder, model, "swap")(resid), wanted, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(SEEDS, LOSSES, st.sampled_from(MODELS))
def test_slot_is_the_code_with_nothing_in_the_other_slots(seed: int, loss: str, model: str) -> None:
    crosscoder, resid = random_crosscoder(MODELS, loss=loss, seed=seed), raw(seed + 1)
    alone = torch.zeros(len(resid), 3, 6)
    alone[:, MODELS.index(model)] = resid * crosscoder.scale[MODELS.index(model)] - crosscoder.mean
    torch.testing.assert_close(Reader(crosscoder, model, "slot")(resid), crosscoder.encode(alone), rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(SEEDS, st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True), st.sampled_from(["swap", "slot"]))
def test_a_reader_of_some_features_gives_their_columns_in_that_order(seed: int, features: list[int], readout: str) -> None:
    crosscoder, resid = random_crosscoder(MODELS, seed=seed), raw(seed + 1)
    whole, part = Reader(crosscoder, "sft", readout), Reader(crosscoder, "sft", readout, features)
    torch.testing.assert_close(part(resid), whole(resid)[:, features], rtol=1e-5, atol=1e-5)
    assert torch.equal(part.directions_FD, whole.directions_FD[features])


def test_directions_are_what_one_unit_adds_to_the_raw_stream_of_that_model() -> None:
    crosscoder = random_crosscoder(MODELS)
    for m, model in enumerate(MODELS):
        reader = Reader(crosscoder, model)
        unit = torch.zeros(2, 12)
        unit[1, 4] = 1
        step = (crosscoder.decode(unit)[1] - crosscoder.decode(unit)[0])[m] / crosscoder.scale[m]
        torch.testing.assert_close(reader.directions_FD[4], step, rtol=1e-4, atol=1e-5)


def test_the_threshold_decides_what_is_active() -> None:
    resid = raw(1, rows=40)
    low, high = (Reader(random_crosscoder(MODELS, threshold=value), "base")(resid) for value in (0.0, 20.0))
    assert 0 < (high > 0).sum() < (low > 0).sum()
    assert torch.equal(high[high > 0], low[high > 0])
    norms = random_crosscoder(MODELS).decoder_norms().sum(1)
    assert torch.equal(high > 0, low * norms > 20.0)


def test_a_feature_with_no_decoder_stays_silent_as_in_the_joint_code() -> None:
    crosscoder = random_crosscoder(("base",))
    crosscoder.W_dec.data[3] = 0
    resid = raw(1, rows=40)
    assert (crosscoder.preactivations(crosscoder.normalise(resid[:, None]))[:, 3] > 0).any()
    assert (Reader(crosscoder, "base")(resid)[:, 3] == 0).all()
    assert (crosscoder.encode(crosscoder.normalise(resid[:, None]))[:, 3] == 0).all()


def test_leading_shapes_and_half_precision() -> None:
    reader, resid = Reader(random_crosscoder(MODELS), "base"), raw(1, rows=12)
    torch.testing.assert_close(reader(resid.view(3, 4, 6)).view(12, 12), reader(resid))
    assert reader(resid.bfloat16()).dtype == torch.float32


def test_contribution_is_the_joint_code_times_each_models_norm() -> None:
    crosscoder = random_crosscoder(MODELS)
    streams = {model: raw(m) for m, model in enumerate(reversed(MODELS))}
    joint = crosscoder.encode(crosscoder.normalise(torch.stack([streams[model] for model in MODELS], dim=1)))
    read = read_all(crosscoder, streams, "contribution")
    for m, model in enumerate(MODELS):
        torch.testing.assert_close(read[model], joint * crosscoder.W_dec[:, m].norm(dim=1))
    with pytest.raises(KeyError, match="needs the residual streams of sft"):
        read_all(crosscoder, {"base": raw(0), "grpo": raw(1)}, "contribution")


@pytest.mark.parametrize("readout", ["swap", "slot"])
def test_read_all_reads_each_model_as_its_own(readout: str) -> None:
    crosscoder = random_crosscoder(MODELS)
    same = raw(2)
    read = read_all(crosscoder, {"base": same, "grpo": same}, readout)
    assert torch.equal(read["grpo"], Reader(crosscoder, "grpo", readout)(same))
    assert not torch.allclose(read["base"], read["grpo"])  # scales differ
