"""Agreement of sets from several seeds: effect, subspace, ids."""

import math

import pytest
import torch
from torch import Tensor

from featdiff.config.sets import LocalizeParams
from featdiff.crosscoder.edits import Editor
from featdiff.crosscoder.model import Crosscoder
from featdiff.localization.flipped import FlippedStreams
from featdiff.localization.search import Search
from featdiff.localization.stability import effect_stability, leading_components, random_span_cosine, span_cosine
from tiny import ROLES, params_of, random_crosscoder

D, K = 12, 3


def dictionary(rows_KD: Tensor) -> Crosscoder:
    """A crosscoder whose first features read and write along the orthonormal ``rows_KD``, the same in both models; the others
    are silent."""
    made = Crosscoder(["base", "grpo"], D, 6, "l1")
    with torch.no_grad():
        made.W_dec[: len(rows_KD)] = rows_KD[:, None]
        made.W_enc[:, :, : len(rows_KD)] = rows_KD.T / 2
        made.W_dec[len(rows_KD) :, :, -1] = 1.0
        made.b_enc[: len(rows_KD)] = 10.0  # never cut off by the ReLU, so that the code is linear in the stream
        made.b_enc[len(rows_KD) :] = -100.0
    return made


def search(crosscoders: dict[str, Crosscoder], gained_SD: Tensor) -> Search:
    """Two tasks; the tuned model's stream is the base's plus ``gained_SD``."""
    base_SD = torch.randn(gained_SD.shape, generator=torch.Generator().manual_seed(0))
    reading = FlippedStreams({"base": base_SD, "grpo": base_SD + gained_SD}, torch.arange(len(base_SD)), len(base_SD))
    first = next(iter(crosscoders))
    numbers = {"thresholds": [0.2], "largest_set": 1.0, "shuffles": 2, "random_dictionary": None}
    params = params_of(LocalizeParams, "localize", fit=first, seeds=list(crosscoders)[1:], **numbers)
    return Search(crosscoders, {task: {"prompt_last": reading} for task in ("a", "b")}, params, ROLES)


def test_sets_that_are_rotated_in_one_subspace_differ_in_every_id_and_agree_in_effect_and_span() -> None:
    generator = torch.Generator().manual_seed(1)
    rows_KD = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[:K]
    hadamard = torch.tensor([[2.0, 2.0, 1.0], [-2.0, 1.0, 2.0], [1.0, -2.0, 2.0]]) / 3  # no row near an axis
    gained_SD = (torch.rand(40, K, generator=generator) + 1) @ rows_KD
    made = search({"one": dictionary(rows_KD), "two": dictionary(hadamard @ rows_KD)}, gained_SD)
    ids = list(range(K))
    facts, _ = made.robustness(ids, 0.2, 0)
    found = facts["seeds"]
    assert found["sets"]["one"] == ids
    assert found["mean_jaccard"] == 0
    spans = {fit: made.decoder_rows(ids, fit) for fit in ("one", "two")}
    changes = {fit: made.set_changes(ids, fit) for fit in ("one", "two")}
    whole = effect_stability(changes, spans, made.mean_difference(), 0)
    assert whole["mean_subspace"] == pytest.approx(1, abs=1e-5)
    assert whole["mean_effect"] == pytest.approx(1, abs=1e-5)
    assert whole["effect"]["one · two"]["per_question"] == pytest.approx(1, abs=1e-4)
    assert whole["mean_difference"] == pytest.approx({"one": 1, "two": 1}, abs=1e-5)
    assert whole["subspace"]["one · two"]["decoder_random"] < 0.6


def test_sets_in_orthogonal_subspaces_agree_in_nothing() -> None:
    rows_DD = torch.eye(D)
    gained_SD = torch.ones(30, D)
    made = search({"one": dictionary(rows_DD[:3]), "two": dictionary(rows_DD[3:6])}, gained_SD)
    found = made.robustness([0, 1, 2], 0.2, 0)[0]["seeds"]
    assert (found["mean_effect"], found["mean_subspace"]) == pytest.approx((0, 0), abs=1e-6)
    assert found["mean_difference"]["one"] == pytest.approx(math.sqrt(3 / D), abs=1e-5)


def test_a_set_that_is_empty_agrees_with_none_and_one_seed_says_nothing() -> None:
    changes = {"one": {"a": torch.ones(4, D)}, "two": {"a": torch.zeros(4, D)}}
    spans = {"one": torch.eye(D)[:2], "two": torch.zeros(0, D)}
    found = effect_stability(changes, spans, torch.ones(D), 0)
    assert (found["mean_effect"], found["mean_subspace"]) == (0, 0)
    assert set(found["subspace"]["one · two"].values()) == {0.0}
    alone = effect_stability({"one": changes["one"]}, spans, torch.ones(D), 0)
    assert (alone["mean_effect"], alone["mean_subspace"], alone["effect"]) == (None, None, {})


def test_the_change_of_the_set_is_the_transplant_edit() -> None:
    generator = torch.Generator().manual_seed(2)
    crosscoder = random_crosscoder(("base", "grpo"), d_model=D)
    made = search({"one": crosscoder}, torch.randn(8, D, generator=generator))
    streams = made.readings["a"]["prompt_last"].resid
    editor = Editor(crosscoder, "base", 0, torch.device("cpu"), torch.zeros(12), "grpo")
    with torch.no_grad():
        wanted = editor.edit("transplant", [1, 7], "all", 1.0).delta(streams["base"][None], streams["grpo"][None])[0]
    torch.testing.assert_close(made.set_changes([1, 7])["a"], wanted)


def test_leading_components_hold_the_share_and_the_mean() -> None:
    change_SD = torch.zeros(10, D)
    change_SD[:, 0] = 3.0
    change_SD[::2, 1] = 0.5
    assert leading_components(change_SD).abs().argmax(1).tolist() == [0]
    change_SD[::2, 1] = 4.0
    assert len(leading_components(change_SD)) == 2
    assert len(leading_components(torch.zeros(10, D))) == 0


def test_random_subspaces_are_what_is_expected_of_unrelated_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [span_cosine(torch.randn(4, D, generator=generator), torch.randn(2, D, generator=generator)) for _ in range(200)]
    assert random_span_cosine(4, 2, D, 0) == pytest.approx(sum(drawn) / 200, abs=0.03)
    assert random_span_cosine(4, 2, D, 0) == random_span_cosine(4, 2, D, 0)
    assert random_span_cosine(D, 2, D, 0) == pytest.approx(1)
    assert random_span_cosine(0, 2, D, 0) == 0
