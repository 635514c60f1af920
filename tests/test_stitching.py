"""Two models stitched together: the stream of one under the blocks of the other, and how the report shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from featdiff.config.report import ReportParams
from featdiff.language.models import stitched, truncate
from featdiff.localization.stitching import depths, seams
from featdiff.report import depth
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence
from synthetic_study import STUDY
from tiny import tiny_model

IDS = torch.tensor([[0, 3, 4, 5, 6, 7]])


def test_seams_lie_at_even_distances_and_at_the_hooked_layer() -> None:
    assert depths(4, 2, 5) == [1, 2, 3]
    assert depths(30, 15, 3) == [8, 15, 22]
    assert depths(30, 11, 2) == [10, 11, 20]
    assert depths(1, 1, 5) == []


@torch.inference_mode()
def test_the_upper_blocks_read_the_stream_of_the_lower_model() -> None:
    lower, upper = (tiny_model(seed, layers=3)[0] for seed in (0, 1))
    for number in (1, 2):
        model = stitched(lower, upper, number)
        stream = truncate(lower, number)(input_ids=IDS).last_hidden_state
        assert torch.equal(truncate(model, number)(input_ids=IDS).last_hidden_state, stream)
        seen: list[torch.Tensor] = []
        hooks = [upper.model.layers[number - 1].register_forward_hook(lambda *_, stream=stream: stream)]
        keep = partial(lambda seen, _, given: seen.append(given[0]), seen)
        hooks += [model.model.layers[number].register_forward_pre_hook(keep)]
        expected, found = upper(input_ids=IDS).logits, model(input_ids=IDS).logits
        for hook in hooks:
            hook.remove()
        assert torch.equal(seen[0], stream)
        assert torch.equal(found, expected), "not the others and the head of the upper one"
        assert not torch.allclose(found, lower(input_ids=IDS).logits)
        assert not torch.allclose(found, upper(input_ids=IDS).logits)


@torch.inference_mode()
def test_both_models_stay_as_they_are_and_lend_their_weights() -> None:
    lower, upper = (tiny_model(seed, layers=3)[0] for seed in (0, 1))
    before = [model(input_ids=IDS).logits for model in (lower, upper)]
    model = stitched(lower, upper, 1)
    places = {weight.data_ptr() for each in (lower, upper) for weight in each.parameters()}
    assert {weight.data_ptr() for weight in model.parameters()} <= places
    for logits, each in zip(before, (lower, upper), strict=True):
        assert torch.equal(each(input_ids=IDS).logits, logits)


def test_models_that_do_not_fit_have_no_seam() -> None:
    one, two = tiny_model(0, layers=3)[0], tiny_model(0, layers=2)[0]
    assert list(seams({"original": one, "tuned": two}, 1, 3)) == []
    found = [(lower, number) for lower, number, _ in seams({"original": one, "tuned": one}, 1, 3)]
    assert found == [("original", 1), ("original", 2), ("tuned", 1), ("tuned", 2)]


def claims(evidence: Evidence, **changes: float) -> Claims:
    params: ReportParams = STUDY.report
    return Claims(evidence, params.model_copy(update=changes), STUDY.seed)


def test_the_curves_begin_and_end_with_the_models_themselves(studied: Callable[..., Evidence]) -> None:
    full = studied(n=60, n_features=700)
    panel = depth.figure(claims(full))
    assert panel is not None
    below, above = panel.figures[0].data
    assert below["x"] == above["x"] == [0, 1, 2, 3, 4]
    assert (below["y"][0], below["y"][-1]) == (above["y"][-1], above["y"][0])
    rows = [row for row in full.stitched if (row["lower"], row["depth"]) == ("tuned", 2)]
    shares = [[row["correct"] for row in rows if row["task"] == task] for task in full.far]
    assert above["y"][2] == pytest.approx(sum(sum(right) / len(right) for right in shares) / len(shares))
    assert above["customdata"][2][1] == sum(map(len, shares))


def test_without_seams_there_is_no_figure_and_no_sentence(studied: Callable[..., Evidence]) -> None:
    full = studied(n=60, n_features=700)
    assert depth.figure(claims(replace(full, stitched=[]))) is None
    said = "With the whole stream of base"
    for evidence, there in ((full, True), (replace(full, stitched=[]), False)):
        necessary = next(each for each in claims(evidence, min_effect=0.99).verdicts() if each.key == "necessary")
        assert necessary.status != "supported"
        assert (said in necessary.evidence) is there
    assert said not in next(each for each in claims(full).verdicts() if each.key == "necessary").evidence
