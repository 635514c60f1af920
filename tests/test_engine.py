"""How the hardware at hand trains arms: the precision of weights and of what computes on them, shards of two real ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as library
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import PreTrainedModel, masking_utils
from trl import GRPOConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from featdiff.artifacts.artifact import MANIFEST, ContractError
from featdiff.language.models import checkpoint_folders, end_tokens, load_model, load_tokenizer, save_model
from featdiff.processes import ranks as ranks_module
from featdiff.processes.ranks import PACK, VLLM
from featdiff.training import engine as engine_module
from featdiff.training import grpo, imitation
from featdiff.training.engine import RECOMPUTE, Engine, Replica
from featdiff.training.noise import moved
from taught import PROBLEMS, hashes, numbers, trained
from tiny import ROOT, SIZES, random_model, tiny_model


@pytest.fixture
def bfloat16_compute(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What accelerate's launcher leaves in the environment where its configuration says so."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_bfloat16(world: Path, target: Path) -> Path:
    """A world whose base is saved in bfloat16."""
    (target / "data").parent.mkdir(parents=True)
    (target / "data").symlink_to(world / "data")
    save_model(load_model(world / "base").bfloat16(), load_tokenizer(world / "base"), target / "base")
    return target


RARE = {"lr": 1e-6, "epochs": 25.0, "batch_size": 24, "micro_batch_size": 24, "warmup_share": 0.0, "checkpoints": 1}
"""The paper's learning rate of reinforcement, for 25 updates."""


def share_moved(before: PreTrainedModel, after: PreTrainedModel) -> float:
    old_W, new_W = (parameters_to_vector(model.parameters()).float() for model in (before, after))
    return float((old_W != new_W).float().mean())


def test_small_changes_are_kept_in_float32_whatever_computes(
    world: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights that moved are counted, as they are read from disk again. In bfloat16 alone hardly any does."""
    world = in_bfloat16(world, tmp_path / "world")
    base = load_model(world / "base")
    assert base.dtype == torch.bfloat16
    full, audit = trained("sft", world, tmp_path / "full", **RARE)
    assert audit["precision"] == "float32 weights, float32 compute"
    request.getfixturevalue("bfloat16_compute")
    mixed, audit = trained("sft", world, tmp_path / "mixed", **RARE)
    assert audit["precision"] == "float32 weights, bfloat16 compute"
    assert hashes(full)["model.safetensors"] != hashes(mixed)["model.safetensors"], "bfloat16 did compute"
    models = [load_model(folder) for folder in (full, mixed)]
    assert [model.dtype for model in models] == [torch.float32] * 2
    shares = [share_moved(base, model) for model in models]
    assert shares[0] > 0.95
    assert shares[1] == pytest.approx(shares[0], abs=0.02)
    assert moved(base, models[1]) == pytest.approx(moved(base, models[0]), rel=0.01)
    real = imitation.load_trainable
    monkeypatch.setattr(imitation, "load_trainable", lambda *given: real(*given).bfloat16())
    alone = load_model(trained("sft", world, tmp_path / "alone", **RARE)[0])
    assert share_moved(base, alone) < 0.05
    assert share_moved(base, models[1].bfloat16()) < 0.2, "saved in bfloat16 it would be lost as well"


def test_rollouts_compute_as_training_does(world: Path, tmp_path: Path, bfloat16_compute: None) -> None:
    out, audit = trained("grpo", world, tmp_path / "grpo", blocks=1)
    assert audit["precision"] == "float32 weights, bfloat16 compute"
    assert [load_model(folder).dtype for folder in checkpoint_folders(out)] == [torch.float32] * 3
    assert hashes(out) == hashes(trained("grpo", world, tmp_path / "again", blocks=1)[0])


def test_activations_that_are_computed_again_give_the_same_weights(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    real = PreTrainedModel.gradient_checkpointing_enable
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", lambda *a, **k: [asked.append(1), real(*a, **k)][1])
    out, _ = trained("grpo", world, tmp_path / "kept", blocks=1)
    assert asked == []
    monkeypatch.setenv(RECOMPUTE, "true")
    again, _ = trained("grpo", world, tmp_path / "again", blocks=1)
    assert asked
    assert hashes(out) == hashes(again)


@pytest.mark.parametrize(("kind", "told"), [("cuda", "float32 (TF32) compute"), ("cpu", "float32 compute")])
def test_gpus_compute_products_of_float32_numbers_as_tf32(kind: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.PartialState", lambda **_: SimpleNamespace(num_processes=1, device=torch.device(kind)))
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        assert told in Engine.here().facts()["precision"]
        assert torch.backends.cuda.matmul.allow_tf32 is (kind == "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("kind", SIZES)
def test_in_a_packed_row_every_kind_of_model_reads_texts_apart(kind: str) -> None:
    model, texts = random_model(kind).eval(), ([3, 4, 5, 6, 7], [8, 9, 10])
    row = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{"input_ids": text} for text in texts])
    with torch.no_grad():
        joint = model(**{key: value for key, value in row.items() if key != "labels"}, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts])
    torch.testing.assert_close(joint, alone, atol=1e-6, rtol=1e-5)


PACKED = {"epochs": 4.0, "batch_size": 12, "micro_batch_size": 6, "checkpoints": 1}


def test_packed_texts_teach_the_same_and_see_nothing_of_one_another(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are one where texts are packed; the weights differ by rounding from padded ones. Were the mask of one text only, as
    it is where positions do not tell texts apart, they would differ by a tenth of what was learned."""
    shapes: list[tuple[int, ...]] = []
    real = DataCollatorForLanguageModeling.torch_call

    def collate(self: Any, examples: list[Any]) -> dict[str, Tensor]:
        batch = real(self, examples)
        shapes.append((len(examples), len(batch["input_ids"])))
        return batch

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", collate)
    padded, audit = trained("sft", world, tmp_path / "padded", **PACKED)
    assert set(shapes) == {(6, 6)}
    assert "packed" not in audit["engine"]
    assert ranks_module.hardware().keys() == {"ranks", "threads", "sharded", "precision"}
    monkeypatch.setenv(PACK, "true")
    shapes.clear()
    packed, told = trained("sft", world, tmp_path / "packed", **PACKED)
    assert set(shapes) == {(6, 1)}
    assert told["engine"] == "whole model, ranks: 1, imitated texts packed"
    assert {key: told[key] for key in ("updates", "tokens_seen", "samples_seen")} == {
        key: audit[key] for key in ("updates", "tokens_seen", "samples_seen")
    }
    assert ranks_module.hardware()["packed"] == "true", "a checkpoint of the one is none of the other"
    base, one, other = (load_model(folder) for folder in (world / "base", padded, packed))
    learned, apart = moved(base, one), moved(one, other)
    assert 0 < apart < 0.001 * learned
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    joined = load_model(trained("sft", world, tmp_path / "joined", **PACKED)[0])
    assert moved(one, joined) > 0.1 * learned


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: expected no or bf16, found fp16"),
        ({"FSDP_VERSION": "1"}, "fsdp_config: fsdp_version: expected 2, found 1"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: expected FULL_STATE_DICT, found SHARDED"),
        ({}, "num_processes: expected at least 2 that share a model, found 1"),
    ],
)
def test_an_engine_that_is_not_supported_is_one_line(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ContractError, match=said) as caught:
        Engine.here()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["vllm", "colocate ", "https://host:8000", "http://host", "http://host:8000/v1", "http://a b:1\n"]
)
def test_what_draws_completions_is_one_of_three(
    value: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VLLM, value)
    expected = r"^\$FEATDIFF_VLLM: value: expected colocate, or http://<host>:<port> of a server, found .*; correct it"
    with pytest.raises(ContractError, match=expected) as caught:
        trained("grpo", world, tmp_path / "grpo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["colocate", "http://10.0.0.2:8000"])
def test_vllm_that_cannot_draw_is_one_line(value: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM, value)
    with pytest.raises(ContractError, match=r"^\$FEATDIFF_VLLM: device: expected a GPU, found cpu; unset it"):
        trained("grpo", world, tmp_path / "grpo")
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    monkeypatch.setattr(engine_module, "process_state", lambda: gpu)
    monkeypatch.setattr(ranks_module, "process_state", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = f"$FEATDIFF_VLLM: {value}: expected the package vllm installed, found no such module; pip install -e .[vllm]"
    with pytest.raises(ContractError) as caught:
        trained("grpo", world, tmp_path / "grpo")
    assert str(caught.value).startswith(said)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert Engine.here() == Engine(torch.float32, False, False, 1, packed=True, vllm=value)
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj"]}
    with pytest.raises(
        ContractError, match=r"lora: expected null where vLLM draws \(\$FEATDIFF_VLLM\), found an adapter; unset"
    ):
        trained("grpo", world, tmp_path / "grpo", lora=lora)


class AskedError(Exception):
    """Stands for the trainer, which is told everything and does nothing."""


def asked(world: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **engine: Any) -> dict[str, Any]:
    """What the trainer of GRPO is made with under ``engine``."""
    told: dict[str, Any] = {}

    def trainer(**given: Any) -> None:
        told.update(given)
        raise AskedError

    monkeypatch.setattr(grpo, "GRPOTrainer", trainer)
    here = Engine(torch.float32, False, False, 1, **engine)
    monkeypatch.setattr(Engine, "here", classmethod(lambda cls: here))
    with pytest.raises(AskedError):
        trained("grpo", world, target)
    return told


def test_vllm_draws_in_place_of_our_decoder_and_from_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, params, tokenizer = "http://10.0.0.2:8000", numbers("grpo"), load_tokenizer(world / "base")
    ours = asked(world, tmp_path / "ours", monkeypatch)
    beside = asked(world, tmp_path / "beside", monkeypatch, vllm="colocate")
    server = asked(world, tmp_path / "server", monkeypatch, vllm=address)
    assert (ours["rollout_func"] is None, ours["args"].use_vllm, ours["args"].generation_kwargs) == (False, False, None)
    for told, mode, url in ((beside, "colocate", None), (server, "server", address)):
        arguments: GRPOConfig = told["args"]
        assert told["rollout_func"] is None
        assert (arguments.use_vllm, arguments.vllm_mode, arguments.vllm_server_base_url) == (True, mode, url)
        assert arguments.generation_kwargs == {"stop_token_ids": list(end_tokens(load_model(world / "base"), tokenizer))}
        assert arguments.vllm_importance_sampling_correction
        assert arguments.vllm_max_model_length == max(map(len, tokenizer(PROBLEMS)["input_ids"])) + params.max_new_tokens
        assert (arguments.temperature, arguments.max_completion_length) == (params.temperature, params.max_new_tokens)
        left_out = (arguments.top_p, arguments.top_k, arguments.min_p, arguments.repetition_penalty)
        assert left_out == (1.0, 0, None, 1.0), "every token may be drawn"
        assert told["model"].name_or_path == str(world / "base"), "from where vLLM loads it"


def test_vllm_stops_at_every_end_and_what_is_graded_is_without_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``d`` ends an answer and is no special token: texts of the trainer would show it."""
    model, tokenizer = load_model(world / "base"), load_tokenizer(world / "base")
    eos, (c, d, dot) = tokenizer.eos_token_id, tokenizer("cd.", add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [eos, d]
    save_model(model, tokenizer, tmp_path / "world/base")
    (tmp_path / "world/data").symlink_to(world / "data")
    told = asked(tmp_path / "world", tmp_path / "grpo", monkeypatch, vllm="colocate")
    assert told["args"].generation_kwargs == {"stop_token_ids": sorted([eos, d])}
    (reward,) = told["reward_funcs"]
    ids, texts = [[c, dot, d], [c, dot, eos], [c, dot], [c, d]], ["c.d", "c.", "c.", "cd"]
    assert reward(completions=texts, completion_ids=ids, sample_id=["t-0"] * 4) == [1.0, 1.0, 1.0, 0.0]
    assert [row["completion"] for row in reward.state["kept"]] == ["c.", "c.", "c.", "c"]


def test_the_correction_is_logged_under_the_names_that_the_library_has() -> None:
    source = Path(library.__file__).read_text()
    names = [name for name in grpo.SERIES if name.startswith("sampling/")]
    assert len(names) == 5
    assert all(f'"{name}"' in source for name in names)


def test_the_audit_and_the_checkpoints_name_what_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "version", lambda name: {"vllm": "0.24.0"}[name])
    engine = Engine(torch.float32, False, False, 1)
    assert engine.decoder() == {}
    assert engine._replace(vllm="colocate").decoder() == {"decoder": "vLLM 0.24.0, in the ranks that train"}
    assert engine._replace(vllm="http://a:1").decoder() == {"decoder": "vLLM 0.24.0 of the client; a server drew"}
    found = []
    for value in ("", "colocate", "http://a:1", "http://b:2"):
        monkeypatch.setenv(VLLM, value)
        found.append(ranks_module.hardware())
    monkeypatch.delenv(VLLM)
    assert found[0] == ranks_module.hardware()
    assert found[2] == found[3]
    assert found[0] != found[1] != found[2] != found[0]


def test_a_replica_follows_what_is_trained_and_leaves_the_model_alone() -> None:
    model = tiny_model(0)[0].requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    replica = Replica(model, torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    copy = dict(replica.like(model, torch.device("cpu")).named_parameters())
    for name, weight in model.named_parameters():
        assert copy[name].dtype == torch.bfloat16
        wanted: Tensor = weight if name.startswith("model.layers.0.") else weight - 1
        torch.testing.assert_close(copy[name].float(), wanted, rtol=1e-2, atol=1e-2)


RANK = """
import json, os, sys
from pathlib import Path
import psutil, torch
from taught import trained
from featdiff.artifacts.artifact import ContractError
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.launch import LAUNCHER
from featdiff.processes.ranks import process_state, rank, replicated
from featdiff.training import arm, dpo, grpo, imitation
from featdiff.training.engine import Engine

world, root, killed = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
other, place = replicated(), root / f"rank{rank()}.json"
first = {"others": [str(other.distributed_type), other.mixed_precision]}
first |= {"shares": [], "points": {}, "audits": {}, "resumed": {}}
said = json.loads(place.read_text()) if place.exists() else first
write, ending = torch.save, None

def end_within_a_checkpoint(value, file, **more):
    write(value, file, **more)
    if "checkpoint-5/" in str(file) and rank() == {"rank": 1, "all": 0}.get(ending):
        os.truncate(file, os.path.getsize(file) // 2)
        if ending == "all":
            launcher = psutil.Process(int(os.environ[LAUNCHER].partition(":")[0]))
            for each in {launcher, *launcher.children(recursive=True)} - {psutil.Process()}:
                each.kill()
        psutil.Process().kill()

class Recorder(arm.Recorder):
    def on_step_end(self, *given, model=None, **more):
        held = sum(getattr(weight, "_local_tensor", weight).numel() for weight in model.parameters())
        said["shares"].append(held / sum(weight.numel() for weight in model.parameters()))
        return super().on_step_end(*given, model=model, **more)

class Interrupted(Scratch):
    count = 0
    def saved(self):
        super().saved()
        self.count += 1
        if self.count == 4 and not ending:
            raise InterruptedError

torch.save = end_within_a_checkpoint
for module in (dpo, grpo, imitation):
    module.Recorder = Recorder
for method in ("sft", "grpo", "dpo"):
    if method in said["resumed"]:
        continue
    again, kept = root / f"{method}_killed", root / "scratch" / method
    if method not in said["audits"]:
        points = said["points"][method] = []
        _, audit = trained(method, world, root / method, log=lambda *point: points.append(point), blocks=1)
        said["audits"][method] = audit
        place.write_text(json.dumps(said))
        ending = killed.get(method)
        try:
            trained(method, world, again, scratch=Interrupted(kept, 0.0), blocks=1)
        except InterruptedError:
            process_state().wait_for_everyone()
    ending, steps = None, []
    _, told = trained(method, world, again, scratch=Scratch(kept, 0.0), log=lambda step, _: steps.append(step), blocks=1)
    said["resumed"][method] = [steps, json.loads(json.dumps(told)) == said["audits"][method]]
    said["engine"] = told["engine"]
    place.write_text(json.dumps(said))
Engine.ready = lambda self, arguments: arguments
try:
    trained("sft", world, root / "unasked")
except ContractError as error:
    said["unasked"] = str(error)
place.write_text(json.dumps(said))
process_state().wait_for_everyone()
"""
"""Trains by every method, is ended and goes on; then as if nobody had told accelerate that a CPU can have shards.

A method of the third argument is killed while its fifth checkpoint is being written, which leaves a file that is cut off:
"rank", the second of the two alone, as by a system that is out of memory, or "all" with their launchers, as where a machine
goes down. Started again, this goes on there. Other methods are interrupted after their fourth checkpoint."""

KILLED = {"cpu_2ranks": {}, "cpu_2ranks_fsdp": {"sft": "rank", "grpo": "all"}}
STATUS = {"rank": 1, "all": -signal.SIGKILL}


@pytest.fixture(scope="module")
def ranks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What two ranks leave that hold whole models, and two that share them."""
    folders = {}
    for hardware, killed in KILLED.items():
        folder = folders[hardware] = tmp_path_factory.mktemp(hardware)
        (folder / "rank.py").write_text(RANK, encoding="utf-8")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "DVC_"))}
        environment |= {
            "ACCELERATE_CONFIG": str(ROOT / f"conf/accelerate/{hardware}.yaml"),
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
        }
        for method in (*killed, None):
            done = subprocess.run(
                [sys.executable, "-m", "featdiff.processes.launch", "rank.py", str(world), str(folder), json.dumps(killed)],
                cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300,
            )  # fmt: skip
            assert done.returncode == (STATUS[killed[method]] if method else 0), done.stderr[-4000:]
            if method:
                sealed, torn = (folder / "scratch" / method / "trainer" / f"checkpoint-{step}" for step in (4, 5))
                assert (sealed / MANIFEST).exists()
                assert torn.exists()
                assert not (torn / MANIFEST).exists()
    return folders


def heard(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{i}.json").read_text(encoding="utf-8")) for i in (0, 1)]


@pytest.mark.graph
def test_two_ranks_share_the_weights_and_other_stages_hold_them_whole(ranks: dict[str, Path]) -> None:
    whole, shared = (heard(ranks[name]) for name in ("cpu_2ranks", "cpu_2ranks_fsdp"))
    assert {share for said in whole for share in said["shares"]} == {1.0}
    shares = [said["shares"] for said in shared]
    assert len(shares[0]) == len(shares[1]) == 3 * (6 + 2) + 4  # where a rank was killed it could not tell what it had
    assert all(first + second == pytest.approx(1) and 0.4 < first < 0.6 for first, second in zip(*shares, strict=True))
    assert [said["engine"] for said in (*whole, *shared)] == ["whole model, ranks: 2"] * 2 + ["sharded model, ranks: 2"] * 2
    assert [said["others"] for said in shared] == [["DistributedType.MULTI_CPU", "no"]] * 2


@pytest.mark.graph
@pytest.mark.parametrize("method", ["sft", "grpo", "dpo"])
def test_shards_train_the_same_model(method: str, ranks: dict[str, Path], world: Path) -> None:
    """Final and kept weights within a ten-thousandth of what was learned, for the same losses and norms of the gradient. Only
    the block that may learn has moved."""
    base = load_file(world / "base/model.safetensors")
    folders = [ranks[name] / f".{method}.partial" for name in ("cpu_2ranks", "cpu_2ranks_fsdp")]
    assert hashes(folders[0]).keys() == hashes(folders[1]).keys()
    for whole, shared in zip(*map(checkpoint_folders, folders), strict=True):
        one, two = (load_file(folder / "model.safetensors") for folder in (whole, shared))
        assert one.keys() == two.keys() == base.keys()
        learned = max(float((one[name] - base[name]).abs().max()) for name in base)
        assert max(float((one[name] - two[name]).abs().max()) for name in base) < 1e-4 * learned
        assert {name for name in base if not torch.equal(two[name], base[name])} == {
            name for name in base if name.startswith("model.layers.0.")
        }
        for file in ("config.json", "tokenizer.json"):
            assert (whole / file).read_bytes() == (shared / file).read_bytes()
    one, two = (dict(heard(ranks[name])[0]["points"][method]) for name in ("cpu_2ranks", "cpu_2ranks_fsdp"))
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    for step, point in one.items():
        for key in ("loss", "grad_norm"):
            assert two[step][key] == pytest.approx(point[key], rel=1e-3, abs=1e-5), (step, key)


@pytest.mark.graph
@pytest.mark.parametrize("method", ["sft", "grpo", "dpo"])
def test_ranks_that_were_killed_end_in_the_same_bytes(method: str, ranks: dict[str, Path]) -> None:
    for folder in ranks.values():
        assert [said["resumed"][method] for said in heard(folder)] == [[[5, 6], True], [[], True]]
        assert hashes(folder / f".{method}_killed.partial") == hashes(folder / f".{method}.partial")


@pytest.mark.graph
def test_shards_that_were_asked_for_and_are_not_there_are_one_line(ranks: dict[str, Path]) -> None:
    for said in heard(ranks["cpu_2ranks_fsdp"]):
        assert "in shards on 2 ranks, found whole; use a file of conf/accelerate/" in said["unasked"]
        assert "\n" not in said["unasked"]
    assert not any("unasked" in said for said in heard(ranks["cpu_2ranks"]))


@pytest.mark.graph
def test_two_ranks_learn_what_one_does(ranks: dict[str, Path], world: Path, tmp_path: Path) -> None:
    out, _ = trained("sft", world, tmp_path / "one", blocks=1)
    base, one, two = (
        load_file(folder / "model.safetensors") for folder in (world / "base", out, ranks["cpu_2ranks_fsdp"] / ".sft.partial")
    )
    learned = max(float((one[name] - base[name]).abs().max()) for name in base)
    assert max(float((one[name] - two[name]).abs().max()) for name in base) < 1e-3 * learned


@pytest.mark.parametrize("path", sorted((ROOT / "conf/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_gpus_compute_in_bfloat16_and_shards_are_of_the_kind_that_is_supported(path: Path) -> None:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found["mixed_precision"] == ("bf16" if "gpu" in path.stem or "bf16" in path.stem else "no")
    sharded = found["distributed_type"] == "FSDP"
    assert sharded is ("fsdp" in path.stem)
    if sharded:
        assert (found["fsdp_config"]["fsdp_version"], found["fsdp_config"]["fsdp_state_dict_type"]) == (2, "FULL_STATE_DICT")
