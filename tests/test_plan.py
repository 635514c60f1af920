"""What a study costs before it is run: operations counted by torch, sizes of real models, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from featdiff.config.dictionary import Fit
from featdiff.config.params import Study, load_study
from featdiff.pipeline.repro import ONE_READ
from featdiff.planning import plan
from featdiff.planning.gpus import Cluster, Gpu, alone
from featdiff.planning.gpus import lines as gpu_lines
from featdiff.planning.plan import lines, main, of_profile, seconds, size_of
from featdiff.planning.units import scaled
from featdiff.planning.work import GPU, Work, work
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


def streamed(study: Study) -> Study:
    """The same with models that run where their activations are read."""
    return study.model_copy(update={"activations": study.activations.model_copy(update={"source": "models"})})


def test_models_that_run_again_take_the_place_of_activations_on_disk_once_for_all_crosscoders(tmp_path: Path) -> None:
    study, size = load_study(), size_of(load_study(), folder(tmp_path, **BIG))
    kept, again = ({each.stage: each for each in work(given, size)} for given in (study, streamed(study)))
    assert again.keys() - kept.keys() == {ONE_READ}
    assert again["activations base"].disk < kept["activations base"].disk / 100
    one_model = 3 * study.activations.tokens * size.forward(1, study.activations.max_length / 2, size.layers // 2)
    together, alone = again[ONE_READ], {each.stage: each for each in again[ONE_READ].alone}
    assert together.amount == together.repeated == pytest.approx(len(study.models) * one_model, rel=1e-3)
    fits = {f"crosscoder {name}": fit for name, fit in study.fits.items()}
    assert alone.keys() == fits.keys()
    trained = 0.0
    for name, fit in fits.items():
        assert again[name].amount == kept[name].amount, "its own work"
        assert alone[name].amount - kept[name].amount == pytest.approx(len(set(fit.models)) * one_model, rel=1e-3)
        assert alone[name].fixed > kept[name].fixed + len(set(fit.models)) * 4 * size.weights
        trained += 2 * 16 * study.crosscoder.training.n_features * len(fit.slots) * size.d_model
    held = sum(len(study.models) * each for each in (4 * size.weights, 4 * study.activations.tokens * size.d_model))
    assert held + trained < together.memory < 1.1 * held + trained
    assert again["intervene remove"].disk == kept["intervene remove"].disk


def test_a_crosscoder_that_is_fitted_alone_reads_rows_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, size = streamed(load_study()), size_of(load_study(), folder(tmp_path))
    (name, fitted), *others = study.fits.items()
    brought = {other: Fit(models=fit.models, loss="imported", seed=0, source="there") for other, fit in others}
    monkeypatch.setattr(Study, "fits", {name: fitted} | brought)
    found = work(study, size)
    assert ONE_READ not in {each.stage for each in found}
    assert all(each.repeated > 0 for each in found if each.kind == "crosscoder")
    monkeypatch.setattr(Study, "fits", brought | {name: fitted, "another": fitted})
    together = next(each for each in work(study, size) if each.stage == ONE_READ)
    assert [each.stage for each in together.alone] == [f"crosscoder {name}", "crosscoder another"]


def test_crosscoders_that_find_no_room_at_once_are_made_in_groups() -> None:
    study = of_profile("llama3_1_8b")
    size, gpus = size_of(study), cluster(1, 8)
    whole = next(each for each in work(study, size, GPU) if each.stage == ONE_READ)
    assert whole.memory > gpus.memory
    found = whole.within(gpus.memory)
    assert 1 < found.reads < len(study.fits)
    roomy = whole.within(2 * whole.memory)
    assert (roomy.reads, roomy.amount, roomy.memory) == (1, whole.amount, whole.memory)
    per_read = whole.repeated / len(study.models)  # of a model
    assert found.repeated == found.amount
    assert found.reads * 2 * per_read <= found.repeated <= found.reads * len(study.models) * per_read
    p = study.crosscoder.training
    weights = [16 * 2 * p.n_features * len(fit.slots) * size.d_model for fit in study.fits.values()]
    assert min(weights) < found.memory - 2 * 4 * size.trunk(size.layers // 2) < gpus.memory
    said = list(gpu_lines([whole], size, gpus))
    assert not [line for line in said if line.startswith("does not fit")]
    alone = sum(each.repeated for each in whole.alone)
    assert any(f"each of {found.reads} groups" in line and scaled(alone, "FLOP") in line for line in said)


def test_of_a_study_whose_crosscoders_were_made_together_no_rate_of_theirs_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study()
    found = work(study, size_of(study))
    write_records(tmp_path, study, found, {each.stage: 1e-9 * each.amount for each in found})
    monkeypatch.setattr("featdiff.tracking.record.runs_folder", lambda: tmp_path)
    assert plan.learn(streamed(study), 1e10)["kinds"].keys() == plan.learn(study, 1e10)["kinds"].keys() - {"crosscoder"}


@pytest.mark.parametrize("source", ["activations", "models"])
def test_a_longer_stream_takes_more_memory_wherever_rows_come_from(source: str, tmp_path: Path) -> None:
    study, size = load_study(), size_of(load_study(), folder(tmp_path))
    found = []
    for tokens in (1_000_000, 3_000_000):
        read = study.activations.model_copy(update={"source": source, "tokens": tokens})
        stages = work(study.model_copy(update={"activations": read}), size)
        found.append(next(each.memory for each in stages if each.stage == "activations base"))
    assert found[1] - found[0] == 2_000_000


def test_what_does_not_fit_does_with_the_change_that_is_named(tmp_path: Path) -> None:
    study = of_profile("pair")
    found = work(study, size_of(study, folder(tmp_path, **BIG)))
    edited = next(each for each in found if each.kind == "intervene")
    memory = edited.fixed + 3.5 * edited.each
    said = list(lines(found, dict.fromkeys([each.stage for each in found]), memory, 10 * 2**30))
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
    rates = {"one": {"weights": 1e6, "peak": 2e10, "start": 5.0, "kinds": kinds}}
    slow, fast = (seconds(found, rates, speed, 10**5) for speed in (1e10, 4e10))
    for each in found:
        if each.kind == "report":
            assert slow[each.stage] is fast[each.stage] is None, "no rate is known"
        else:
            assert slow[each.stage] - 5 == pytest.approx(4 * (fast[each.stage] - 5)) == pytest.approx(2e-9 * each.amount)


def test_time_follows_the_size_of_the_models_between_those_of_studies_that_were_run() -> None:
    found = [each for each in work(load_study(), size_of(load_study())) if each.kind in ("evaluate", "stitch")]
    kinds = {"evaluate": 1e-9, "stitch": 3e-9}
    small = {"weights": 10**6, "peak": 1e10, "start": 1.0, "kinds": kinds}
    large = {"weights": 10**8, "peak": 2e10, "start": 5.0, "kinds": {"evaluate": 5e-11}}  # ten times less of its peak

    def units(weights: int) -> dict[str, float]:
        """Seconds at 1e10 operations a second for each unit of work."""
        start = 1.0 if weights < 10**7 else 3.0 if weights == 10**7 else 5.0
        told = seconds(found, {"large": large, "small": small}, 1e10, weights)
        return {each.kind: ((told[each.stage] or 0) - start) / each.amount for each in found}

    assert units(10**5) == units(10**6) == pytest.approx(kinds)
    assert units(10**9) == units(10**8) == pytest.approx({"evaluate": 1e-10, "stitch": 3e-9})
    assert units(10**7) == pytest.approx({"evaluate": 10**-9.5, "stitch": 3e-9}), "half way in logarithms"


def write_records(folder: Path, study: Study, works: list[Work], took: dict[str, float]) -> None:
    """Of one pipeline whose stages came one after the other, 3.5 seconds between two."""
    clock = 0.0
    for number, each in enumerate(works):
        seconds = took[each.stage]
        record = {
            "label": each.stage.replace(" ", "@"), "status": "FINISHED", "profile": study.profile, "pipeline": {"id": "one"},
            "started": clock, "ended": clock + seconds, "observed": {"wall_seconds": seconds},
        }  # fmt: skip
        clock += seconds + 3.5
        place = folder / f"{number:03}"
        place.mkdir()
        (place / "run.json").write_text(json.dumps(record))


def test_rates_are_learnt_from_records_and_predict_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study()
    found = work(study, size_of(study))
    write_records(
        tmp_path, study, found, {each.stage: 1e-9 * each.amount * (1 + (each.kind == "crosscoder")) for each in found}
    )
    monkeypatch.setattr("featdiff.tracking.record.runs_folder", lambda: tmp_path)
    rates = plan.learn(study, 1e10)
    assert rates["start"] == pytest.approx(3.5)
    assert rates["weights"] == size_of(study).weights
    told = seconds(found, {"this": rates}, 1e10, rates["weights"])
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


QWEN = Path("conf/models/Qwen3-4B-Base")


@pytest.mark.parametrize(
    ("model", "weights"),
    # total sizes of the safetensors files on the hub, in weights of two bytes
    [("Qwen3-4B-Base", 4_022_468_096), ("Qwen2.5-7B", 7_615_616_512), ("Llama-3.1-8B-Instruct", 8_030_261_248)],
)
def test_models_of_the_hub_have_their_size_without_a_network(model: str, weights: int) -> None:
    assert size_of(load_study(), Path("conf/models") / model).weights == weights


def cluster(nodes: int, per_node: int) -> Cluster:
    return Cluster(Gpu.called("h100"), nodes, per_node, alone())


def test_stages_use_the_gpus_that_the_graph_lets_them_use() -> None:
    found = work(load_study(), size_of(load_study(), QWEN), GPU)
    by_stage = {each.stage: cluster(2, 8).ranks(each) for each in found}
    assert by_stage["arm grpo"] == by_stage["activations base"] == by_stage["crosscoder joint_topk"] == 16
    assert by_stage["intervene remove"] == by_stage["intervene amplify"] == 16
    assert (by_stage["localize"], by_stage["stitch"]) == (4, 2 * (load_study().stitch.depths + 1))
    assert by_stage["describe"] == by_stage["prepare"] == 1


def test_memory_of_sharded_training() -> None:
    study = of_profile("smollm2")
    size = size_of(study, QWEN)
    sft = next(each for each in work(study, size, GPU) if each.stage == "arm sft")
    # fp32 weight, gradient and two moments are shared out; what is left does not depend on how many share
    assert sft.on(1) - sft.on(8) == pytest.approx(16 * size.weights * 7 / 8)
    assert sft.on(8) > 2 * size.weights / size.layers + 16 * size.weights / 8
    # each pass over a micro batch brings together 2 bytes a weight forth and back, and sends 4 bytes of its gradient
    steps = study.numbers("sft").epochs * study.prepare.train_problems / study.numbers("sft").micro_batch_size
    assert cluster(1, 8).traffic(sft, size) == pytest.approx(steps / 8 * 8 * size.weights * 7 / 8)
    assert cluster(1, 1).traffic(sft, size) == 0
    few = 1.5 * (sft.fixed + sft.each)
    fewest = sft.fewest(few)
    assert sft.fixed + sft.divided / fewest + sft.each <= few < sft.fixed + sft.divided / (fewest - 1) + sft.each
    assert sft.fewest(sft.fixed) == 0


def test_slow_links_and_slow_sampling_take_their_time() -> None:
    study = of_profile("smollm2")
    size = size_of(study, QWEN)
    grpo = next(each for each in work(study, size, GPU) if each.stage == "arm grpo")
    one = cluster(1, 8)
    pace = one.gpu.tflops * 1e12 * 8
    expected = grpo.sampled / one.gpu.share.sample / pace + (grpo.amount - grpo.sampled) / one.gpu.share.train / pace
    assert one.seconds(grpo, size) == pytest.approx(expected)
    slow = one._replace(nodes=2, gpu=one.gpu.model_copy(update={"far_gb": 0.001}))
    assert slow.seconds(grpo, size) == pytest.approx(slow.traffic(grpo, size) / 1e6)


def test_what_does_not_fit_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    study = of_profile("smollm2")
    size = size_of(study, QWEN)
    found = work(study, size, GPU)
    small = cluster(1, 2)._replace(gpu=Gpu.called("h100").model_copy(update={"memory_gib": 24.0}))
    said = list(gpu_lines(found, size, small))
    complaints = [line for line in said if line.startswith("does not fit: ")]
    big = [each for each in found if each.computes and each.on(small.ranks(each)) > small.memory]
    assert len(complaints) == len(big) > 0
    assert any("GPUs and sft.micro_batch_size: 1" in line for line in complaints)
    assert main(["smollm2", "--config", str(QWEN), "--gpus", "8", "--nodes", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("16 GPUs for ") for line in said)
    assert not any(line.startswith("does not fit") for line in said)
    assert main(["smollm2", "--config", str(QWEN), "--gpus", "8", "--gpu", "h10"]) == 2
    assert "did you mean h100" in capsys.readouterr().err


def test_what_every_rank_does_by_itself_is_not_shared_out() -> None:
    stored = of_profile("qwen3_4b")
    size, one = size_of(stored, QWEN), cluster(1, 1)
    kept, again = ({each.stage: each for each in work(study, size, GPU)} for study in (stored, streamed(stored)))
    fit, models = "crosscoder joint_l1", again[ONE_READ]
    by_itself = next(each for each in models.alone if each.stage == fit)
    for gpus in (1, 8):
        took = {each: cluster(1, gpus).seconds(each, size) or 0 for each in (kept[fit], again[fit], by_itself, models)}
        pace = one.gpu.share.forward * one.gpu.tflops_tf32 * 1e12
        assert took[models] == pytest.approx(models.repeated / pace)
        assert took[by_itself] - took[kept[fit]] == pytest.approx(by_itself.repeated / pace)
        assert took[again[fit]] == took[kept[fit]]
    assert by_itself.repeated > 3 * size.forward(stored.activations.tokens, 500, size.layers // 2)


def test_ranks_share_out_checkpoints_and_no_part_of_one() -> None:
    study = of_profile("qwen3_4b")
    size = size_of(study, QWEN)
    five = next(each for each in work(study, size, GPU) if each.stage == "checkpoints grpo")
    assert study.numbers("grpo").checkpoints == 5
    for gpus, ranks, rounds in ((1, 1, 5), (2, 2, 3), (4, 4, 2), (8, 5, 1)):
        assert cluster(1, gpus).ranks(five) == ranks
        assert cluster(1, gpus).seconds(five, size) == pytest.approx((cluster(1, 1).seconds(five, size) or 0) * rounds / 5)
    assert five.fixed > 2 * 4 * size.weights, "the base beside a checkpoint, both in float32"


@pytest.mark.parametrize("profile", ["qwen3_4b", "qwen2_5_7b", "llama3_1_8b"])
def test_the_papers_models_fit_on_a_node(profile: str) -> None:
    study = of_profile(profile)
    size = size_of(study)
    assert [line for line in gpu_lines(work(study, size, GPU), size, cluster(1, 8)) if line.startswith("does not fit")] == []
