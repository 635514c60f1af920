"""Decoder norms compared between models: NRN, MAS, classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from featdiff.artifacts.tables import FEATURES
from featdiff.attribution.norms import attribute, class_counts, classify, mas, nrn, own
from featdiff.attribution.scaling import LatentScaling
from featdiff.config.dictionary import AttributionParams
from featdiff.crosscoder.model import Crosscoder
from tiny import params_of, random_crosscoder

NUMBERS = st.floats(-100, 100, width=32).map(lambda x: 0.0 if abs(x) < 1e-4 else x)


def decoders(models: st.SearchStrategy[int]) -> st.SearchStrategy[Tensor]:
    """W_dec [F, M, D], with exact zeros among the entries."""
    shapes = st.tuples(st.integers(1, 6), models, st.integers(1, 5))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=NUMBERS)).map(torch.from_numpy)


PAIRS, ANY = decoders(st.just(2)), decoders(st.integers(2, 4))


def statistics(n: int, dead: tuple[int, ...] = ()) -> dict[str, Tensor]:
    rate = torch.full((n,), 0.25)
    rate[list(dead)] = 0
    return {"firing_rate": rate, "mean_activation": rate * 2, "max_activation": rate * 8}


def params() -> AttributionParams:
    return params_of(AttributionParams, "attribution", shared_band=[0.3, 0.7], joint_dominance=0.6)


@settings(deadline=None)
@given(ANY)
def test_mas_are_shares_that_sum_to_one(w_dec: Tensor) -> None:
    shares = mas(w_dec)
    assert ((shares >= 0) & (shares <= 1)).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(len(w_dec)))


@settings(deadline=None)
@given(ANY)
def test_mas_is_the_l1_norm_over_the_sum_of_l1_norms(w_dec: Tensor) -> None:
    for k, shares in enumerate(mas(w_dec).tolist()):
        norms = [sum(abs(x) for x in row) for row in w_dec[k].tolist()]
        wanted = [norm / sum(norms) if sum(norms) else 1 / len(norms) for norm in norms]
        assert shares == pytest.approx(wanted, abs=1e-5)


@settings(deadline=None)
@given(PAIRS)
def test_swapping_the_models_mirrors_nrn(w_dec: Tensor) -> None:
    assert ((nrn(w_dec) >= 0) & (nrn(w_dec) <= 1)).all()
    torch.testing.assert_close(nrn(w_dec.flip(1)), 1 - nrn(w_dec))


@settings(deadline=None)
@given(ANY, st.randoms(use_true_random=False), st.floats(0.1, 10))
def test_shares_follow_permutations_and_ignore_the_scale_of_a_feature(
    w_dec: Tensor, random: np.random.Generator, scale: float
) -> None:
    order = list(range(len(w_dec)))
    random.shuffle(order)
    assert torch.equal(mas(w_dec[order]), mas(w_dec)[order])
    torch.testing.assert_close(mas(w_dec * scale), mas(w_dec))


def test_zero_rows() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    w_dec = torch.stack([torch.stack(pair) for pair in ((zero, one), (one, zero), (one, one), (zero, zero))])
    assert nrn(w_dec).tolist() == [1, 0, 0.5, 0.5]


def test_nrn_takes_the_l1_norm_not_the_l2_norm() -> None:
    w_dec = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    assert nrn(w_dec).item() == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("share", "named"),
    [(0.0, "base"), (0.299, "base"), (0.3, "shared"), (0.5, "shared"), (0.7, "shared"), (0.701, "sft"), (1.0, "sft")],
)
def test_classes_of_a_pair(share: float, named: str) -> None:
    assert classify([1 - share, share], ["base", "sft"], params()) == named


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        ([0.1, 0.2, 0.7], "grpo"),
        ([0.61, 0.39, 0.0], "base"),
        ([0.2, 0.6, 0.2], "shared"),  # dominance has to be exceeded
        ([1 / 3, 1 / 3, 1 / 3], "shared"),
        ([0.45, 0.45, 0.1], "mixed"),
        ([0.16, 0.42, 0.42], "new"),
        ([0.17, 0.415, 0.415], "shared"),
        ([0.1, 0.3, 0.6], "new"),
        ([0.16, 0.33, 0.51], "mixed"),  # against the original, NRN of the second is .67
        ([0.0, 0.4, 0.6], "new"),
        ([0.42, 0.42, 0.16], "mixed"),  # lost in one tuned model is not new
    ],
)
def test_classes_of_three_models(shares: list[float], named: str) -> None:
    assert classify(shares, ["base", "sft", "grpo"], params()) == named


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        ([0.25, 0.25, 0.25, 0.25], "shared"),
        ([0.02, 0.3, 0.33, 0.35], "new"),
        ([0.0, 0.2, 0.3, 0.5], "mixed"),  # NRN of the last against the second is .71
        ([0.0, 0.22, 0.28, 0.5], "new"),
        ([0.0, 0.5, 0.5, 0.0], "mixed"),
        ([0.1, 0.2, 0.3, 0.4], "mixed"),
        ([0.05, 0.05, 0.2, 0.7], "rft"),
        ([0.7, 0.1, 0.1, 0.1], "base"),
    ],
)
def test_classes_of_four_models(shares: list[float], named: str) -> None:
    assert classify(shares, ["base", "sft", "grpo", "rft"], params()) == named


def scaled(crosscoder: Crosscoder, owners: dict[int, str]) -> LatentScaling:
    """Scaling of shared features, but for those of one owner."""
    m, n_features = len(crosscoder.models), crosscoder.n_features
    beta = torch.ones(m, m, n_features)
    for k, owner in owners.items():
        t = crosscoder.slot(owner)
        beta[[o for o in range(m) if o != t], t, k] = 0.0
    return LatentScaling(crosscoder.models, beta, beta.clone())


def test_an_owner_holds_against_every_other_model() -> None:
    joint = random_crosscoder(("base", "sft", "grpo"), n_features=3)
    scaling = scaled(joint, {0: "grpo", 1: "grpo"})
    scaling.error_MMF[0, 2, 1] = 1.0  # feature 1 acts in base as well
    assert own(scaling, params()) == ["grpo", None, None]


def test_new_is_what_every_tuned_model_has_against_the_original_and_none_against_another() -> None:
    joint = random_crosscoder(("base", "sft", "grpo", "rft"), n_features=6)
    scaling = scaled(joint, {3: "sft", 4: "base"})
    for beta_MMF in scaling[1:]:
        beta_MMF[0, 1:, [0, 1, 2, 5]] = 0.0
    scaling.error_MMF[0, 2, 1] = 1.0  # the base has as much of feature 1 as grpo
    scaling.error_MMF[1, 3, 2] = scaling.reconstruction_MMF[1, 3, 2] = 0.0  # rft has feature 2 and sft does not
    scaling.reconstruction_MMF[0, 1, 5] = 1.0  # what other features say of feature 5 is in the base
    assert own(scaling, params()) == ["new", None, None, "sft", "base", None]


def test_one_row_per_feature_and_the_dead_have_no_class(tmp_path: Path) -> None:
    pair = random_crosscoder(("base", "sft"), n_features=5)
    pair.W_dec.data[:, 0] = 0
    rows = attribute("pair", pair, statistics(5, dead=(1, 4)), scaled(pair, {0: "sft", 2: "base", 4: "sft"}), params())
    assert [row["scaling_owner"] for row in rows] == ["sft", None, "base", None, None]
    assert [row["specific"] for row in rows] == [True, False, False, False, False]
    assert class_counts(rows) == {"pair": {"specific": 1, "sft": 3, "dead": 2}}
    assert [row["feature_class"] for row in rows] == ["sft", "dead", "sft", "sft", "dead"]
    assert [row["dead"] for row in rows] == [False, True, False, False, True]
    assert [(row["feature_id"], row["nrn"], row["mas"]) for row in rows] == [(k, 1.0, None) for k in range(5)]
    assert rows[0]["max_activation"] == 2.0
    FEATURES.write(tmp_path, rows)


def test_what_fires_on_no_row_is_untested_and_halves_tell_how_sure_a_call_is() -> None:
    pair = random_crosscoder(("base", "sft"), n_features=4)
    pair.W_dec.data[:, 0] = 0
    whole, first, second = (scaled(pair, owners) for owners in ({0: "sft", 1: "sft"}, {0: "sft", 1: "sft"}, {0: "sft"}))
    for scaling, silent in ((whole, 3), (first, 3), (second, 2)):
        for beta_MMF in scaling[1:]:
            beta_MMF[:, :, silent] = torch.nan
    rows = attribute("pair", pair, statistics(4), whole, params(), [first, second])
    assert [row["tested"] for row in rows] == [True, True, True, False]
    assert [row["halves_agree"] for row in rows] == [True, False, None, None]
    assert [row["halves_agree"] for row in attribute("pair", pair, statistics(4), whole, params())] == [None] * 4


def test_more_than_two_models_have_mas_in_their_order(tmp_path: Path) -> None:
    joint = random_crosscoder(("base", "sft", "grpo", "rft"), n_features=4)
    none = scaled(joint, {})
    rows = attribute("joint", joint, statistics(4), none, params())
    shares = mas(joint.W_dec.detach())
    for k, row in enumerate(rows):
        assert row["nrn"] is None
        assert row["mas"] == pytest.approx(shares[k].tolist())
    FEATURES.write(tmp_path, rows)
    counts = class_counts(rows + attribute("other", joint, statistics(4, dead=(0,)), none, params()))
    assert sum(counts["joint"].values()) == sum(counts["other"].values()) == 4
    assert counts["other"]["dead"] == 1
    assert "dead" not in counts["joint"]
