"""Activations of models that run when rows are read: those of a store, to the bit, and nothing kept of them."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featdiff.activations import mixing, stream
from featdiff.activations.harvest import harvest
from featdiff.activations.store import ActivationStore, in_order, moments
from featdiff.artifacts.artifact import ContractError, read_json
from featdiff.config.dictionary import ActivationsParams, CrosscoderTraining
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import measure
from featdiff.language.models import save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Data, Sample, TaskInfo, Text
from project import Project
from tiny import params_of, rows_read, tiny_model

TEXTS = [Text(f"add {i} {i * 7}=" * (1 + i % 3), f"<{i}>{i * 8}.", "add") for i in range(90)]
ROWS = 900
Folders = dict[str, Path]


def params(source: str, **changes: Any) -> ActivationsParams:
    small = {"layer": 1, "tokens": ROWS, "checkpoint_tokens": 200, "max_length": 24, "batch_size": 4, "shard_rows": 150}
    return params_of(ActivationsParams, "activations", **small | {"source": source} | changes)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folders]:
    """Stores and streams of a base, and of an arm with two checkpoints."""
    place = tmp_path_factory.mktemp("study")
    save_model(*tiny_model(0), place / "models/base")
    save_model(*tiny_model(5), place / "models/grpo")
    for number in (1, 2):
        save_model(*tiny_model(number), place / "models/grpo/checkpoints" / str(number))
    folders: dict[str, Folders] = {}
    for source in ("activations", "models"):
        folders[source] = {model: place / source / "of" / model for model in ("base", "grpo")}
        for model, out in folders[source].items():
            out.mkdir(parents=True)
            harvest(place / "models" / model, TEXTS, out, params(source, dtype=request.param), Scratch())
    return folders


def test_a_model_that_several_stores_read_is_hashed_and_loaded_once(
    both: dict[str, Folders], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    for name in ("load_model", "sha256_file"):
        original = getattr(stream, name)
        monkeypatch.setattr(
            stream, name, lambda path, name=name, original=original: (done.append((name, path.name)), original(path))[1]
        )
    stream._hashed.cache_clear()
    stream.forget()
    folders = both["models"]
    rows = [ActivationStore({"a": folders["base"], "b": folders["grpo"]}).read(3, 40) for _ in range(3)]
    assert torch.equal(rows[0], rows[2])
    assert sorted(done) == [
        ("load_model", "base"), ("load_model", "grpo"),
        *([("sha256_file", "config.json")] * 2), *([("sha256_file", "model.safetensors")] * 2),
    ]  # fmt: skip


def test_nothing_is_kept_but_the_tokens(both: dict[str, Folders]) -> None:
    stored, streamed = (both[source]["grpo"] for source in ("activations", "models"))
    assert {path.name for path in streamed.iterdir()} == {"index.json", "tokens.safetensors", "texts.safetensors"}
    assert (streamed / "tokens.safetensors").read_bytes() == (stored / "tokens.safetensors").read_bytes()
    indexes = [read_json(folder / "index.json") for folder in (stored, streamed)]
    assert indexes[0].keys() - {"shards"} == indexes[1].keys() - {"streamed"}
    assert all(indexes[0][key] == indexes[1][key] for key in indexes[0].keys() - {"shards"})


@pytest.mark.parametrize("series", ["acts", "checkpoint1", "checkpoint2"])
def test_rows_have_the_bits_of_the_store_wherever_they_are_read(both: dict[str, Folders], series: str) -> None:
    stored, streamed = (ActivationStore({"grpo": both[source]["grpo"]}, series) for source in ("activations", "models"))
    rows = stored.read(0, stored.rows)
    assert (streamed.rows, streamed.d_model, streamed.layer) == (stored.rows, stored.d_model, stored.layer)
    assert torch.equal(streamed.read(0, streamed.rows), rows)
    for start in range(0, streamed.rows, 13):
        for stop in (start + 1, start + 29, start + 170):
            assert torch.equal(streamed.read(start, min(stop, streamed.rows)), rows[start : min(stop, len(rows))]), (
                start,
                stop,
            )


def test_shuffled_rows_and_moments_are_those_of_the_store(both: dict[str, Folders], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 32)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", 128)
    stored, streamed = (ActivationStore(both[source]) for source in ("activations", "models"))
    for skip in (0, 11):
        batches = (source.shuffled(50, torch.Generator().manual_seed(3), 0, ROWS, skip) for source in (stored, streamed))
        for number, (wanted, found) in enumerate(islice(zip(*batches, strict=True), 40)):
            assert torch.equal(found, wanted), (skip, number)
    for wanted, found in zip(moments(stored, ROWS), moments(streamed, ROWS), strict=True):
        assert torch.equal(found, wanted)


def test_a_pass_in_order_runs_every_batch_once_and_holds_no_more_than_a_shard(
    both: dict[str, Folders], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ran, held = ActivationStore(both["models"] | {"again": both["models"]["base"]}), [], []
    (base, slots), _ = source._parts
    assert isinstance(base, stream.Runs)
    assert slots == [0, 2]
    read = stream.read_batch

    def counted(*given: Any) -> Any:
        ran.append(len(given[2]))
        return read(*given)

    monkeypatch.setattr(stream, "read_batch", counted)
    for low in range(0, source.rows, 40):
        source.read(low, min(low + 40, source.rows))
        held.append(base.held)
    assert sum(ran) == 2 * len(load_file(both["models"]["base"] / stream.TEXTS)["lengths"])
    assert max(held) <= base.most_held < 150 + 24
    assert base.held == sum(len(rows) for found in base._at_hand.values() for rows in found)


def test_a_fit_on_models_is_the_fit_on_their_store(both: dict[str, Folders]) -> None:
    small = {"n_features": 32, "batch_tokens": 64, "steps": 30, "k": 4, "aux_k": 8, "dead_after_tokens": 500}
    training = params_of(CrosscoderTraining, "crosscoder", "training", **small)
    found = []
    for source in ("activations", "models"):
        rows = ActivationStore(both[source])
        fitted = fit(rows, "batchtopk", training, 0, lambda step, point: None, source, scratch=Scratch())
        metrics, features = measure(rows, *fitted)
        found.append((fitted.crosscoder.state_dict(), metrics, features))
    (weights, metrics, features), (others, same_metrics, same_features) = found
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(torch.equal(features[name], same_features[name]) for name in features)
    assert metrics == same_metrics


def test_a_fit_that_was_stopped_goes_on_to_the_same_bits_and_reads_no_row_twice(
    both: dict[str, Folders], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 32)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", 128)
    small = {"n_features": 32, "batch_tokens": 64, "steps": 60, "k": 4, "aux_k": 8, "log_every": 10}
    training = params_of(CrosscoderTraining, "crosscoder", "training", **small)
    read = rows_read(monkeypatch)

    def stopped(step: int, point: dict[str, float]) -> None:
        if step == 50:
            raise KeyboardInterrupt

    def fitted(source: str, log: Any, scratch: Scratch) -> dict[str, torch.Tensor]:
        read.clear()
        made = fit(ActivationStore(both[source]), "batchtopk", training, 0, log, source, scratch=scratch)
        return made.crosscoder.state_dict()

    for source in both:
        whole = fitted(source, lambda step, point: None, Scratch())
        assert sum(read) >= 60 * 64
        with pytest.raises(KeyboardInterrupt):
            fitted(source, stopped, Scratch(tmp_path / source, seconds=0.0))
        rest = fitted(source, lambda step, point: None, Scratch(tmp_path / source, seconds=0.0))
        assert sum(read) <= 11 * 64 + 2 * 128 + 64, "what is left of the steps, and what the buffer holds"
        assert all(torch.equal(whole[name], rest[name]) for name in whole), source


def test_other_weights_and_a_model_that_is_gone_are_one_line(both: dict[str, Folders], tmp_path: Path) -> None:
    shutil.copytree(Path(read_json(both["models"]["grpo"] / "index.json")["streamed"]["series"]["acts"][0]), tmp_path / "grpo")
    out = tmp_path / "out"
    out.mkdir()
    harvest(tmp_path / "grpo", TEXTS, out, params("models"), Scratch())
    ActivationStore({"grpo": out})
    weights = tmp_path / "grpo/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ContractError, match=r"grpo: weights: expected those of .*out/index.json, found others .*dvc repro"):
        ActivationStore({"grpo": out})
    ActivationStore({"grpo": out}, "checkpoint1")
    shutil.rmtree(tmp_path / "grpo")
    with pytest.raises(ContractError, match=r"grpo: weights: expected the model, .* found none; rerun: dvc repro"):
        ActivationStore({"grpo": out})


def test_a_stream_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    model, tokenizer = tiny_model()
    with torch.no_grad():
        model.base_model.layers[0].mlp.down_proj.weight.fill_(3e38)
    save_model(model, tokenizer, tmp_path / "base")
    (tmp_path / "out").mkdir()
    harvest(tmp_path / "base", TEXTS, tmp_path / "out", params("models"), Scratch())
    with pytest.raises(ContractError, match=r"base: residual stream: expected finite values, found NaN or infinity"):
        list(in_order(ActivationStore({"base": tmp_path / "out"}), 0, 100))


@pytest.mark.graph
def test_the_stages_make_the_same_crosscoder_of_either_source(project: Project) -> None:
    texts = [Text(f"add {i} {i * 7}=", f"<{i}>{i * 8}.", "add") for i in range(60)]
    task = TaskInfo("add", "train", "words", "generation", "organism", "strict", False, 0)
    asked = [Sample(f"add-{split}", "add", split, "add 1 2=", "3") for split in ("train", "find", "tune", "report")]
    with project.publishing("data") as folder:
        Data([task], asked[:1], asked[1:], texts).save(folder)
    for seed, name in enumerate(("base", "grpo")):
        with project.publishing(f"models/{name}") as folder:
            save_model(*tiny_model(seed), folder)
    training = {"n_features": 32, "batch_tokens": 64, "steps": 20, "k": 4, "aux_k": 8}
    project.set({f"crosscoder.training.{name}": value for name, value in training.items()})
    project.set({"activations.tokens": 600, "activations.checkpoint_tokens": 100, "activations.shard_rows": 200})
    made = []
    for source in ("activations", "models"):
        project.set({"activations.source": source})
        for stage in ("activations --model base", "activations --model grpo", "crosscoder --fit pair_grpo"):
            script, *named = stage.split()
            done = project.run(f"stages/{script}.py", *named)
            assert done.returncode == 0, done.stderr
        crosscoder = project.path / "crosscoders/pair_grpo"
        made.append({path.name: path.read_bytes() for path in crosscoder.iterdir()})
        shutil.rmtree(crosscoder)
    assert made[0] == made[1]
    assert list((project.path / "activations/grpo").glob("acts*")) == []
    shutil.rmtree(project.path / "models/grpo")
    refused = project.run("stages/crosscoder.py", "--fit", "pair_grpo")
    project.refused(refused, "crosscoders/pair_grpo", "models/grpo: weights: expected the model, which streamed")
