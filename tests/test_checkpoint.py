"""Checkpoints and parts: taken up whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from featdiff.pipeline.checkpoint import Scratch, require_finite, restore, snapshot
from featdiff.processes import signals
from featdiff.tracking.record import Record


def eager(root: Path, record: Record | None = None) -> Scratch:
    return Scratch(root, 0.0, record=record)


def test_without_a_root_nothing_is_kept_and_everything_is_computed() -> None:
    scratch = Scratch()
    assert [scratch.part("a", lambda: 1), scratch.part("a", lambda: 2)] == [1, 2]
    assert not scratch.due()
    assert scratch.load() is None
    with scratch.loop():
        pass


def test_a_part_is_computed_once_over_restarts_and_keeps_the_order_of_its_keys(tmp_path: Path) -> None:
    value = [{"z": 0.1 + 0.2, "a": None, "m": True}]
    assert eager(tmp_path).part("rows 1", lambda: value) == value
    again = eager(tmp_path).part("rows 1", lambda: pytest.fail("computed again"))
    assert json.dumps(again) == json.dumps(value)


def test_parts_are_written_together_after_the_interval(tmp_path: Path) -> None:
    patient = Scratch(tmp_path, 3600.0)
    assert patient.part("a", lambda: 1) == 1
    assert not (tmp_path / "parts").exists()
    patient.interval = 0.0
    patient.part("b", lambda: 2)
    assert len(list((tmp_path / "parts").iterdir())) == 1
    later = eager(tmp_path)
    assert [later.part(name, lambda: 0) for name in "ab"] == [1, 2]


@pytest.mark.parametrize(("cost", "interval"), [(0.5, 60.0), (3.0, 150.0)])
def test_the_interval_follows_what_saving_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, interval: float
) -> None:
    """Saving takes at most its share of the time; where that is no matter, the interval asked for holds."""
    now = 1000.0
    monkeypatch.setattr("featdiff.pipeline.checkpoint.time.monotonic", lambda: now)
    scratch = Scratch(tmp_path, 60.0, 0.02)
    assert not scratch.due()
    now += 60
    assert scratch.due()
    now += cost
    scratch.saved()
    now += interval - 1
    assert not scratch.due()
    now += 1
    assert scratch.due()


def test_an_interval_of_nothing_saves_at_every_opportunity_whatever_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("featdiff.pipeline.checkpoint.time.monotonic", lambda: now)
    scratch = Scratch(tmp_path, 0.0, 0.02)
    assert scratch.due()
    now += 100
    scratch.saved()
    assert scratch.due()


def test_a_name_asked_for_twice_is_an_error_not_the_first_ones_value(tmp_path: Path) -> None:
    scratch = eager(tmp_path)
    scratch.part("a", lambda: 1)
    with pytest.raises(ValueError, match="part a: asked for twice"):
        scratch.part("a", lambda: 2)


def test_a_damaged_part_is_said_removed_and_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eager(tmp_path).part("a", lambda: 1)
    (file,) = tmp_path.glob("parts/*/state.json")
    file.write_text('{"a": 2}', encoding="utf-8")
    scratch = eager(tmp_path)
    assert "not taken up: " in capsys.readouterr().err
    assert scratch.part("a", lambda: 3) == 3


def test_after_a_damaged_part_was_removed_later_ones_are_still_written(tmp_path: Path) -> None:
    scratch = eager(tmp_path)
    for name in "abc":
        scratch.part(name, lambda name=name: name)
    (tmp_path / "parts/000001/manifest.json").unlink()
    again = eager(tmp_path)
    assert [again.part(name, lambda name=name: name.upper()) for name in "abc"] == ["a", "B", "c"]
    assert eager(tmp_path).part("b", lambda: pytest.fail("was not written")) == "B"


def training(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer, LambdaLR]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def steps(parts: tuple[torch.nn.Module, torch.optim.Optimizer, LambdaLR], numbers: range) -> None:
    model, optimizer, schedule = parts
    for number in numbers:
        data = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        model(data).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_training_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    whole = training()
    steps(whole, range(9))
    half = training()
    steps(half, range(4))
    eager(tmp_path).save(4, snapshot(half[0], half[1]), rates=half[2].get_last_lr())
    rest = training(seed=1)
    found = eager(tmp_path).load()
    assert found is not None
    assert found.step == 4
    restore(*rest, found)
    steps(rest, range(4, 9))
    for (name, one), other in zip(whole[0].state_dict().items(), rest[0].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert whole[2].get_last_lr() == rest[2].get_last_lr()


def test_the_newest_whole_checkpoint_counts_and_old_ones_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = eager(tmp_path)
    for step in (1, 2, 3):
        scratch.save(step, {"w": torch.full((2,), float(step))})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000003"]
    (tmp_path / "checkpoints/00000003/manifest.json").unlink()
    found = eager(tmp_path).load()
    assert found is not None
    assert (found.step, found.tensors["w"].tolist()) == (2, [2.0, 2.0])
    assert "00000003" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints/00000003").exists()


def test_curves_follow_without_gap_or_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATDIFF_MIRROR", "off")
    first = Record("sft", "sft", "", {}, 0, main=True)
    first.log(1, {"loss": 2.0, "b": 1.0})
    eager(tmp_path / "s", first).save(1, {})
    first.log(2, {"loss": 1.5})  # lost with the kill
    second = Record("sft@again", "sft", "again", {}, 0, main=True)
    second.log(9, {"loss": 9.0})
    assert eager(tmp_path / "s", second).load() is not None
    second.log(2, {"loss": 1.5})
    (tmp_path / "out").mkdir()
    second.save(tmp_path / "out")
    assert (tmp_path / "out/curves.csv").read_text().split() == ["step,loss,b", "1,2.0,1.0", "2,1.5,"]
    assert len((second.folder / "times.txt").read_text().split()) == 2
    for record in (first, second):
        record.close("FINISHED")


def test_files_are_made_once_and_brought_without_their_manifest(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "x.bin").write_bytes(b"1")

    eager(tmp_path / "s").bring("shards/0", tmp_path / "a", write)
    eager(tmp_path / "s").bring("shards/0", tmp_path / "b", lambda _: pytest.fail("written again"))
    Scratch().bring("shards/0", tmp_path / "c", write)
    for name in "abc":
        assert [path.name for path in (tmp_path / name).iterdir()] == ["x.bin"]


def test_a_request_to_stop_waits_for_the_next_checkpoint_and_is_never_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signals.listen()
        scratch = Scratch(tmp_path, math.inf)
        with scratch.loop():
            assert not scratch.due()
            os.kill(os.getpid(), signal.SIGTERM)
            assert scratch.due()
            with pytest.raises(signals.Stopped, match="SIGTERM"):
                scratch.save(7, {})
            signals.listen()  # as if it had ended
        assert (tmp_path / "checkpoints/00000007").is_dir()
        signals.listen()
        with pytest.raises(signals.Stopped, match="SIGTERM"), scratch.loop():
            os.kill(os.getpid(), signal.SIGTERM)  # and nobody asked
        signals.listen()
        with pytest.raises(signals.Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signals.listen()  # what was asked here would stop every later test of this process
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_logged_and_stops(value: float) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    require_finite({"loss": 1.0}, 1, lambda *point: logged.append(point), "x")
    assert logged == []
    with pytest.raises(FloatingPointError, match=r"fit: loss is -?(nan|inf) at step 3; lower it"):
        require_finite({"grad_norm": 1.0, "loss": value}, 3, lambda *point: logged.append(point), "lower it", "fit")
    assert logged[0][0] == 3
