"""Several crosscoders from one read of their rows: each as it is alone, to the byte, and no row read twice."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from featdiff.activations import mixing, store
from featdiff.activations.harvest import harvest
from featdiff.activations.store import ActivationStore, SharedSource, SharedStore, moments
from featdiff.activations.turns import Turns, alone, in_turns
from featdiff.config.dictionary import ActivationsParams, CrosscoderTraining, Fit
from featdiff.crosscoder.make import Made, make_in_turns
from featdiff.language.models import save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.signals import Stopped
from featdiff.tasks.task import Data, Sample, TaskInfo, Text
from project import Project
from tiny import params_of, rows_read, tiny_model

TEXTS = [Text(f"add {i} {i * 7}=" * (1 + i % 3), f"<{i}>{i * 8}.", "add") for i in range(90)]
MODELS = ("base", "sft", "grpo")
FITS = {
    "joint": Fit(models=["base", "sft", "grpo"], loss="batchtopk", seed=0),
    "joint_l1": Fit(models=["base", "sft", "grpo"], loss="l1", seed=0),
    "joint_1": Fit(models=["base", "sft", "grpo"], loss="batchtopk", seed=1),
    "pair": Fit(models=["base", "grpo"], loss="batchtopk", seed=2),
    "backwards": Fit(models=["grpo", "base"], loss="dedicated", seed=2),
    "null": Fit(models=["sft", "sft"], loss="batchtopk", seed=0),
}
TRAINING = params_of(
    CrosscoderTraining, "crosscoder", "training", n_features=32, batch_tokens=64, steps=60, k=4, aux_k=8, log_every=10,
    dead_after_tokens=500,
)  # fmt: skip
Folders = dict[str, Path]


@pytest.fixture(scope="module", params=["activations", "models"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Activations of three models, kept or run again."""
    place = tmp_path_factory.mktemp("study")
    params = params_of(
        ActivationsParams, "activations", layer=1, tokens=900, checkpoint_tokens=200, max_length=24, batch_size=4,
        shard_rows=50, source=request.param,
    )  # fmt: skip
    for seed, model in enumerate(MODELS):
        save_model(*tiny_model(seed), place / "models" / model)
        (place / "activations" / model).mkdir(parents=True)
        harvest(place / "models" / model, TEXTS, place / "activations" / model, params, Scratch())
    return {model: place / "activations" / model for model in MODELS}


@pytest.fixture(params=["a buffer that holds all rows", "one through which they pass"])
def buffer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(store, "READ_ROWS", 256)
    if "pass" in request.param:
        monkeypatch.setattr(mixing, "BLOCK_ROWS", 32)
        monkeypatch.setattr(mixing, "BUFFER_ROWS", 256)
    return str(request.param)


class Study:
    """Crosscoders of one study, and where each keeps what it can go on from."""

    def __init__(self, folders: Folders, place: Path | None = None) -> None:
        self.folders, self.curves = folders, {name: list[Any]() for name in FITS}
        self.scratches = {name: Scratch(place and place / name) for name in FITS}
        self.made: dict[str, Made] = {}
        self.failed: dict[str, Exception] = {}

    def work(self, name: str, source: ActivationStore | SharedSource) -> Turns[Made]:
        def log(*point: Any) -> None:
            self.curves[name].append(point)

        return make_in_turns(source, FITS[name], TRAINING, 5, log, name, self.scratches[name], tied=name != "null")

    def alone(self) -> Study:
        for name, fit in FITS.items():
            source = ActivationStore({slot: self.folders[model] for slot, model in fit.slots.items()})
            self.made[name] = alone(self.work(name, source))
        return self

    def together(self, stops: Callable[[], bool] = lambda: False) -> SharedStore:
        shared = SharedStore(self.folders)
        works = {name: self.work(name, SharedSource(shared, fit.slots)) for name, fit in FITS.items()}
        in_turns(works, self.made.__setitem__, self.failed.__setitem__, stops)
        return shared


def same(one: Study, other: Study) -> None:
    assert one.made.keys() == other.made.keys()
    for name, made in one.made.items():
        found = other.made[name]
        weights, others = made.crosscoder.state_dict(), found.crosscoder.state_dict()
        assert all(torch.equal(weights[key], others[key]) for key in weights), name
        assert all(torch.equal(made.features[key], found.features[key]) for key in made.features), name
        assert made.metrics == found.metrics, name


def test_each_is_what_it_is_alone_and_rows_are_read_once_for_all(
    folders: Folders, buffer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, together, read, in_order = Study(folders).alone(), Study(folders), rows_read(monkeypatch), []
    all_models = ActivationStore.read

    def read_and_count(source: ActivationStore, start: int, stop: int) -> torch.Tensor:
        in_order.append(stop - start)
        return all_models(source, start, stop)

    monkeypatch.setattr(ActivationStore, "read", read_and_count)
    rows = together.together().whole.rows
    same(whole, together)
    assert whole.curves == together.curves
    train_rows = TRAINING.train_rows(rows)
    assert sum(read) <= (train_rows if "holds" in buffer else TRAINING.steps * TRAINING.batch_tokens + mixing.BUFFER_ROWS)
    assert sum(in_order) <= 2 * rows + (rows - train_rows) + store.READ_ROWS


def test_where_they_are_stopped_each_keeps_what_it_has_and_goes_on_to_the_same(
    folders: Folders, buffer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Study(folders).alone()
    first, rounds = Study(folders, tmp_path), iter(range(10_000))

    def stops() -> bool:
        if (number := next(rounds)) == 37:  # every step is kept from here on: those before would take long and show no more
            for scratch in first.scratches.values():
                scratch.seconds = scratch.interval = 0.0
        return number == 40

    with pytest.raises(Stopped):
        first.together(stops)
    kept = [max((tmp_path / name / "checkpoints").iterdir()).name for name in FITS]
    assert len(set(kept)) == 1
    assert 0 < int(kept[0]) < TRAINING.steps
    # as a kill in the middle of saving leaves them: some are a step behind; and one has done nothing yet
    for behind in ("joint_1", "pair"):
        shutil.rmtree(tmp_path / behind / "checkpoints" / kept[0])
    shutil.rmtree(tmp_path / "null")
    read = rows_read(monkeypatch)
    again = Study(folders, tmp_path)
    again.together()
    same(whole, again)
    if "pass" in buffer:
        steps = TRAINING.steps * TRAINING.batch_tokens  # all of them for the one, and what others need on the way is among it
        assert sum(read) <= steps + 3 * mixing.BUFFER_ROWS


def test_one_that_fails_ends_alone(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, together = Study(folders).alone(), Study(folders)

    def broken(step: int, point: dict[str, float]) -> None:
        if step == 30:
            raise FloatingPointError("loss is nan at step 30")

    work = together.work
    monkeypatch.setattr(
        together, "work", lambda name, source: _with_log(together, source, broken) if name == "pair" else work(name, source)
    )
    together.together()
    assert [(name, str(error)) for name, error in together.failed.items()] == [("pair", "loss is nan at step 30")]
    del whole.made["pair"]
    same(whole, together)


def _with_log(study: Study, source: ActivationStore | SharedSource, log: Any) -> Turns[Made]:
    return make_in_turns(source, FITS["pair"], TRAINING, 5, log, "pair", Scratch(), tied=True)


def test_a_read_that_fails_leaves_nothing_that_is_taken_for_rows(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 32)
    source, load, calls = ActivationStore(folders), ActivationStore._load, iter(range(1000))

    def once(*given: Any) -> None:
        if next(calls) == 5:
            raise OSError("gone")
        load(*given)

    monkeypatch.setattr(ActivationStore, "_load", once)
    shared = source.shared()
    with pytest.raises(OSError, match="gone"):
        next(shared.mixed(64, torch.Generator().manual_seed(3), 0, 800))
    wanted = source.shuffled(64, torch.Generator().manual_seed(3), 0, 800)
    found = shared.mixed(64, torch.Generator().manual_seed(3), 0, 800)
    for one, other in islice(zip(wanted, found, strict=True), 30):
        assert torch.equal(one, other)


def test_moments_are_those_of_a_source_alone(folders: Folders) -> None:
    slots = {"grpo": "grpo", "base": "base", "again": "grpo"}
    shared = SharedSource(SharedStore(folders), slots)
    one = ActivationStore({slot: folders[model] for slot, model in slots.items()})
    assert (shared.models, shared.rows, shared.d_model, shared.layer) == (one.models, one.rows, one.d_model, one.layer)
    for found, wanted in zip(moments(shared, 801), moments(one, 801), strict=True):
        assert torch.equal(found, wanted)


NAMES = ("joint_l1", "joint_topk_1", "null_base", "pair_grpo")


@pytest.fixture
def streamed(project: Project) -> Project:
    """A project with three models that run where they are read, at the door of its crosscoders."""
    texts = [Text(f"add {i} {i * 7}=", f"<{i}>{i * 8}.", "add") for i in range(60)]
    task = TaskInfo("add", "train", "words", "generation", "organism", "strict", False, 0)
    asked = [Sample(f"add-{split}", "add", split, "add 1 2=", "3") for split in ("train", "find", "tune", "report")]
    with project.publishing("data") as folder:
        Data([task], asked[:1], asked[1:], texts).save(folder)
    training = {"n_features": 32, "batch_tokens": 64, "steps": 200, "k": 4, "aux_k": 8}
    project.set({f"crosscoder.training.{name}": value for name, value in training.items()})
    read = {"tokens": 600, "checkpoint_tokens": 100, "shard_rows": 200, "source": "models"}
    project.set({f"activations.{name}": value for name, value in read.items()} | {"resume.every_seconds": 0})
    for seed, name in enumerate(MODELS):
        with project.publishing(f"models/{name}") as folder:
            save_model(*tiny_model(seed), folder)
        with project.publishing(f"activations/{name}") as folder:
            params = params_of(ActivationsParams, "activations", **read)
            harvest(project.path / "models" / name, texts, folder, params, Scratch())
    return project


def done(project: Project, *arguments: str) -> str:
    """What a process says that ends well."""
    found = project.run(*arguments)
    assert found.returncode == 0, found.stderr
    return found.stderr


def made(project: Project, name: str) -> tuple[dict[str, bytes], str]:
    """Files of the crosscoder that its stage makes, and what it says meanwhile."""
    said = done(project, "stages/crosscoder.py", "--fit", name)
    return {path.name: path.read_bytes() for path in (project.path / "crosscoders" / name).iterdir()}, said


TOGETHER = ("-m", "featdiff.crosscoder.together", *NAMES)


@pytest.mark.graph
def test_stages_take_up_what_was_made_together_with_the_bytes_of_stages_that_ran_alone(streamed: Project) -> None:
    alone = {name: made(streamed, name)[0] for name in NAMES}
    shutil.rmtree(streamed.path / "crosscoders")
    kept = streamed.path / ".featdiff/scratch/crosscoders"

    def steps() -> list[int]:
        return [int(path.name) for path in kept.glob("*/*/checkpoints/0*") if (path / "manifest.json").exists()]

    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
        before, process = max(steps(), default=0), streamed.start(*TOGETHER)
        until = time.monotonic() + 100
        while max(steps(), default=0) < before + 20 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate(timeout=100)[1]
        assert process.returncode == status, said
        assert list(kept.glob("*/*/made")) == []
    assert 20 < min(max(int(path.name) for path in kept.glob(f"{name}/*/checkpoints/*")) for name in NAMES) < 200
    assert "going on from step" in done(streamed, *TOGETHER)
    assert not (streamed.path / "crosscoders").exists()
    assert len(list(kept.glob("*/*/made"))) == len(NAMES)
    assert "step" not in done(streamed, *TOGETHER), "there is nothing left to do"
    for name in NAMES:
        files, said = made(streamed, name)
        assert files == alone[name], name
        assert "going on from step 200" in said
    assert list(kept.iterdir()) == []
    record = max((streamed.path / ".featdiff/runs").glob("*pair_grpo*"))
    assert (record / "metrics.jsonl").read_bytes() == alone["pair_grpo"]["metrics.jsonl"]
    assert json.loads((record / "run.json").read_text())["summary"]["l0"] > 0


SCARCE = """
import sys
from featdiff.activations import stream
from featdiff.crosscoder import together
opened = together.SharedStore
def store(folders):
    print(stream._loaded.cache_info().currsize, "models held", file=sys.stderr)
    return opened(folders)
together.SharedStore, together.free = store, lambda: 4.8e5
sys.exit(together.main(sys.argv[1:]))
"""
"""Where little memory is free, and it is told how many models are held when a group begins."""


@pytest.mark.graph
def test_those_that_find_no_room_at_once_are_made_in_groups(streamed: Project) -> None:
    alone = {name: made(streamed, name)[0] for name in NAMES}
    shutil.rmtree(streamed.path / "crosscoders")
    said = done(streamed, "-c", SCARCE, *NAMES)
    reads = re.findall(r"read \d of (\d): (.+); more", said)
    assert re.findall(r"(\d) models held", said) == ["0"] * len(reads), "none of the group before takes room"
    parts = [names.split(", ") for _, names in reads]
    assert {int(of) for of, _ in reads} == {len(parts)}
    assert [*chain(*parts)] == list(NAMES)
    assert 1 < len(parts) < len(NAMES)
    assert {name: made(streamed, name)[0] for name in NAMES} == alone


@pytest.mark.graph
def test_one_of_them_reruns_alone_and_nothing_made_for_other_params_is_taken_up(streamed: Project) -> None:
    done(streamed, *TOGETHER)
    first, _ = made(streamed, "joint_l1")
    streamed.set({"crosscoder.fits.joint_l1.seed": 4})
    again, said = made(streamed, "joint_l1")
    assert "going on" not in said
    assert again["weights.safetensors"] != first["weights.safetensors"]
    streamed.set({"crosscoder.fits.joint_l1.seed": 0})
    assert made(streamed, "joint_l1")[0] == first
    damaged = next((streamed.path / ".featdiff/scratch/crosscoders/pair_grpo").glob("*/made/weights.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    files, said = made(streamed, "pair_grpo")
    assert "not taken up" in said
    shutil.rmtree(streamed.path / "crosscoders")
    assert made(streamed, "pair_grpo")[0] == files


@pytest.mark.graph
def test_unknown_names_and_a_stage_at_work_are_one_line(streamed: Project) -> None:
    said = streamed.run("-m", "featdiff.crosscoder.together", "joint_l1", "joint_l2")
    streamed.refused(said, "crosscoders/joint_l1", "'joint_l2': no crosscoder that is fitted here", "joint_l1")
    first = streamed.start(*TOGETHER)
    locks = streamed.path / ".featdiff/locks"
    until = time.monotonic() + 100
    while len(list(locks.glob("crosscoders_*"))) < len(NAMES) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    refused = streamed.run("stages/crosscoder.py", "--fit", "pair_grpo")
    assert f"process {first.pid}" in refused.stderr
    first.communicate(timeout=100)
    assert first.returncode == 0


@pytest.mark.graph
@pytest.mark.parametrize("hardware", ["cpu", "cpu_2ranks"])
def test_ranks_make_together_what_they_make_alone(streamed: Project, hardware: str) -> None:
    streamed.environment["ACCELERATE_CONFIG"] = f"conf/accelerate/{hardware}.yaml"
    streamed.set({"crosscoder.training.steps": 30})
    launched = ("-m", "featdiff.processes.launch")

    def weights() -> tuple[bytes, str]:
        said = done(streamed, *launched, "stages/crosscoder.py", "--fit", "pair_grpo")
        return (streamed.path / "crosscoders/pair_grpo/weights.safetensors").read_bytes(), said

    alone, _ = weights()
    shutil.rmtree(streamed.path / "crosscoders")
    done(streamed, *launched, "-m", "featdiff.crosscoder.together", "pair_grpo", "joint_l1")
    found, said = weights()
    assert "going on from step 30" in said
    assert found == alone
