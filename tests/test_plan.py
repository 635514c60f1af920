"""What a study costs before it is run: operations counted by torch, sizes of real models, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from featdiff.config.params import load_study
from featdiff.planning import plan
from featdiff.planning.plan import lines, main, of_profile, seconds, size_of
from featdiff.planning.work import work
from project import ROOT

TINY = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
BIG = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def folder(path: Path, **changes: int) -> Path:
    config = LlamaConfig(**{**TINY.to_dict(), **changes})
    config.save_pretrained(path)
    return path


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    model = LlamaForCausalLM._from_config(TINY, attn_implementation="eager").eval()  # of which torch counts attention
    size = size_of(load_study(), folder(tmp_path))
    assert size.weights == sum(weight.numel() for weight in model.parameters())
    assert (size.layers, size.d_model, size.d_mlp, size.d_kv, size.vocabulary) == (4, 32, 64, 16, 100)
    ids = torch.randint(100, (3, 20))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids))
    # attention is counted in full, as it is computed, and not as far as it is causal
    assert size.forward(60, 20) == pytest.approx(counter.get_total_flops(), rel=0.1)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    assert 3 * size.forward(60, 20) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_organism_has_the_weights_that_it_will_have() -> None:
    assert size_of(load_study()).weights == pytest.approx(453_024, rel=0.03)


@pytest.mark.parametrize("profile", ["organism", "nano", "pair", "null_manners"])
def test_every_stage_of_a_profile_is_there(profile: str, tmp_path: Path) -> None:
    study = of_profile(profile)
    found = work(study, size_of(study, folder(tmp_path)))
    stages = [each.stage for each in found]
    assert len(set(stages)) == len(stages)
    parts = [f"evaluate {model}" for model in study.models] + [f"crosscoder {fit}" for fit in study.fits]
    assert {*parts, *(f"arm {arm}" for arm in study.arms), "prepare", "base", "stitch", "report"} <= set(stages)
    assert {"intervene remove", "intervene amplify"} <= set(stages)
    assert all(each.amount > 0 and each.memory > 0 for each in found)


def test_models_that_run_again_take_the_place_of_activations_on_disk(tmp_path: Path) -> None:
    study, size = load_study(), size_of(load_study(), folder(tmp_path, **BIG))
    streamed = study.model_copy(update={"activations": study.activations.model_copy(update={"source": "models"})})
    kept, again = ({each.stage: each for each in work(given, size)} for given in (study, streamed))
    assert kept.keys() == again.keys()
    assert again["activations base"].disk < kept["activations base"].disk / 100
    per_token = size.forward(1, study.activations.max_length / 2, size.layers // 2)
    more = again["crosscoder joint_topk"].amount - kept["crosscoder joint_topk"].amount
    assert more == pytest.approx(3 * 3 * study.activations.tokens * per_token, rel=1e-3)
    assert again["crosscoder joint_topk"].fixed > kept["crosscoder joint_topk"].fixed + 3 * 4 * size.weights
    assert again["intervene remove"].disk == kept["intervene remove"].disk


def test_what_does_not_fit_does_with_the_change_that_is_named(tmp_path: Path) -> None:
    study = of_profile("pair")
    found = work(study, size_of(study, folder(tmp_path, **BIG)))
    edited = next(each for each in found if each.kind == "intervene")
    memory = edited.fixed + 3.5 * edited.each
    rates = {"peak": 1e9, "start": 1.0, "kinds": {}}
    said = list(lines(found, seconds(found, rates, 1e9), memory, 10 * 2**30))
    big = [each for each in found if each.memory > memory]
    assert {each.fitting(memory) > 0 for each in big} == {True, False}, "some fit with a smaller batch, some with none"
    assert edited.fitting(memory) == 3
    assert len([line for line in said if line.startswith("does not fit: ") and "takes" in line]) == len(big)
    for each in big:
        batch = each.fitting(memory)
        assert batch < max(1, each.batch)
        if batch:
            assert each.fixed + batch * each.each <= memory < each.fixed + (batch + 1) * each.each
            assert any(f"{each.field}: {batch} in place of {each.batch}" in line for line in said)
    assert any("on a disk with" in line for line in said)


def test_time_follows_the_speed_of_the_machine(tmp_path: Path) -> None:
    study = load_study()
    found = work(study, size_of(study, folder(tmp_path)))
    kinds = {each.kind: 1e-9 for each in found if each.kind != "report"}
    rates = {"peak": 2e10, "start": 5.0, "kinds": kinds}
    slow, fast = (seconds(found, rates, speed) for speed in (1e10, 4e10))
    for each in found:
        if each.kind == "report":
            assert slow[each.stage] is fast[each.stage] is None, "no rate is known"
        else:
            assert slow[each.stage] - 5 == pytest.approx(4 * (fast[each.stage] - 5)) == pytest.approx(2e-9 * each.amount)


def test_rates_are_learnt_from_records_and_predict_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study()
    found, clock = work(study, size_of(study)), 0.0
    for number, each in enumerate(found):
        took = 1e-9 * each.amount * (1 + (each.kind == "crosscoder"))
        record = {
            "label": each.stage.replace(" ", "@"), "status": "FINISHED", "profile": study.profile, "pipeline": {"id": "one"},
            "started": clock, "ended": clock + took, "observed": {"wall_seconds": took},
        }  # fmt: skip
        clock += took + 3.5
        place = tmp_path / f"{number:03}"
        place.mkdir()
        (place / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr("featdiff.tracking.record.runs_folder", lambda: tmp_path)
    rates = plan.learn(study, 1e10)
    assert rates["start"] == pytest.approx(3.5)
    told = seconds(found, rates, 1e10)
    for each in found:
        assert told[each.stage] == pytest.approx(1e-9 * each.amount * (1 + (each.kind == "crosscoder")) + 3.5)


def test_from_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["organism"]) == 0
    said = capsys.readouterr().out
    assert "crosscoder joint_topk" in said
    assert "GFLOP/s here" in said
    for words, line in (
        (["nowhere"], "nowhere"),
        (["pair"], "/path/to/the/base: config.json: expected a model configuration, found nothing"),
        (["pair", "--config", str(tmp_path)], "config.json: expected a model configuration, found nothing"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert line in err
