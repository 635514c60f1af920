"""SIGKILL and SIGTERM at any moment: the stage goes on and ends in the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forge import CHECKPOINT, LONG, Study

KILLS = 25
"""Of each long stage."""
WORKING = re.compile(r"\| [1-9]\d*/[^\r\n]*(step|group|batch|part|shard|checkpoint)")
"""A stage's progress bar that has got somewhere; those of libraries count other things."""


def kill_at(place: str, count: int) -> None:
    """End this process for good when it comes to ``place`` for the ``count``-th time."""
    from featdiff.artifacts import artifact, provenance

    owner, name = {
        "written, not yet described": (artifact, "write_json"),
        "described, not yet renamed": (artifact.Path, "rename"),
        "old one removed, new one not yet in place": (artifact.shutil, "rmtree"),
        "in place, provenance not yet written": (provenance, "place"),
    }[place]
    original, calls = getattr(owner, name), 0

    def fatal(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += not place.startswith("old one") or given[0] == Path("models/base")  # not what begin() clears
        if calls == count:
            if place.startswith("old one"):
                original(*given, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(owner, name, fatal)


@pytest.mark.parametrize("out", LONG)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(study: Study, out: str) -> None:
    wanted, rng = study.files(out), random.Random(out)
    described = study.provenance(out).read_bytes()
    study.clear(out)
    kills = went_on = 0
    while kills < KILLS:
        progress = study.published(out)
        process = study.start(LONG[out])
        if rng.random() < 0.5:  # at any moment, or soon after it has got somewhere
            process.join(rng.uniform(0, study.took[out]))
        else:
            while process.is_alive() and study.published(out) <= progress:
                time.sleep(0.01)
            process.join(rng.uniform(0, study.took[out] / 5))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, study.said()[-3000:]
            assert study.files(out) == wanted
        if (study.path / out).exists():  # finished: from the start again
            assert study.files(out) == wanted
            went_on += "going on" in study.said()
            study.clear(out)
    assert study.finish(LONG[out]) == 0, study.said()[-3000:]
    assert study.files(out) == wanted
    went_on += "going on" in study.said()
    assert not study.scratch(out).exists(), "scratch is cleaned after success"
    assert study.provenance(out).read_bytes() == described
    assert went_on


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("place", ["written, not yet described", "described, not yet renamed"])
@pytest.mark.parametrize("out", ["models/sft", "crosscoders/joint_topk"])
def test_killed_inside_of_publishing_nothing_half_written_is_taken_up(study: Study, out: str, place: str, count: int) -> None:
    wanted = study.files(out)
    study.clear(out)
    assert study.finish(LONG[out], partial(kill_at, place, count)) == -signal.SIGKILL
    assert not (study.path / out).exists()
    assert study.finish(LONG[out]) == 0, study.said()[-3000:]
    assert study.files(out) == wanted


def written_in_place() -> None:
    """Take the guard of publishing away: outputs are written under their own name."""
    from featdiff.artifacts import artifact

    artifact.staging_path = lambda target: target
    kill_at("written, not yet described", 1)


def test_without_a_temporary_name_half_an_artifact_would_be_left(study: Study) -> None:
    out = "crosscoders/joint_topk"
    study.clear(out)
    assert study.finish(LONG[out], written_in_place) == -signal.SIGKILL
    assert (study.path / out).exists(), "the test above would not notice that the guard is gone"


def test_killed_between_removing_the_old_artifact_and_placing_the_new_one(study: Study) -> None:
    wanted = study.files("models/base")
    place = "old one removed, new one not yet in place"
    assert study.finish(LONG["models/base"], partial(kill_at, place, 1)) == -signal.SIGKILL
    assert not (study.path / "models/base").exists()
    assert study.finish(LONG["models/base"]) == 0
    assert study.files("models/base") == wanted


def test_killed_between_placing_an_artifact_and_its_provenance(study: Study) -> None:
    wanted, described = study.files("models/base"), study.provenance("models/base").read_bytes()
    study.clear("models/base")
    assert study.finish(LONG["models/base"], partial(kill_at, "in place, provenance not yet written", 1)) == -signal.SIGKILL
    assert study.files("models/base") == wanted
    assert not study.provenance("models/base").exists()
    assert study.finish(LONG["models/base"]) == 0
    assert study.files("models/base") == wanted
    assert study.provenance("models/base").read_bytes() == described


def unhurried() -> None:
    """Leave time for a signal between two pieces of work, of which the nano study makes hundreds a second."""
    from featdiff.pipeline.checkpoint import Scratch

    def slowed(original: Callable[..., Any]) -> Callable[..., Any]:
        def later(*given: Any) -> Any:
            time.sleep(0.3)
            return original(*given)

        return later

    for name in ("due", "part"):
        setattr(Scratch, name, slowed(getattr(Scratch, name)))


@pytest.mark.parametrize("out", LONG)
def test_a_request_to_stop_keeps_what_is_done_and_is_no_success(study: Study, out: str) -> None:
    wanted = study.files(out)
    study.clear(out)
    study.set({"resume.every_seconds": 3600.0})  # only the request leads to a checkpoint
    process = study.start(LONG[out], unhurried)
    while process.is_alive() and not WORKING.search(study.log.read_text(errors="replace") if study.log.exists() else ""):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    said = study.said()
    assert process.exitcode == 75, said[-2000:]
    assert not (study.path / out).exists()
    assert "nothing was published; start it again" in said
    assert study.finish(LONG[out]) == 0
    assert "going on from" in study.said()
    assert study.files(out) == wanted


def test_other_params_do_not_go_on_from_old_checkpoints(study: Study) -> None:
    out = "crosscoders/joint_topk"
    wanted = study.files(out)
    study.killed(out, CHECKPOINT)
    study.set({"crosscoder.training.lr": 0.002})
    assert study.finish(LONG[out]) == 0
    assert "going on" not in study.said()
    assert study.files(out) != wanted


def damage_newest(study: Study, out: str, how: Callable[[Path], None]) -> int:
    """Kill a stage when it has two checkpoints and damage the newest; returns its step."""
    study.killed(out, CHECKPOINT, 2)
    newest = max(study.scratch(out).glob(f"*/{CHECKPOINT}"))
    how(newest)
    study.said()
    return int(newest.name)


def cut(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(bytes(data))


def unseal(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("how", [cut, flip, unseal])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(study: Study, how: Callable[[object], None]) -> None:
    out = "crosscoders/joint_topk"
    wanted = study.files(out)
    step = damage_newest(study, out, how)
    assert study.finish(LONG[out]) == 0
    said = study.said()
    assert "not taken up: " in said
    assert f"{step:08d}" in said
    assert study.files(out) == wanted


def trust_anything() -> None:
    """Take the guard of resuming away: what lies in scratch is believed."""
    from featdiff.pipeline.checkpoint import Scratch

    Scratch._whole = lambda self, folder, read: read(folder)  # type: ignore[method-assign]


def test_without_the_guard_a_flipped_bit_gets_into_the_result(study: Study) -> None:
    out = "crosscoders/joint_topk"
    wanted = study.files(out)
    damage_newest(study, out, flip)
    status = study.finish(LONG[out], trust_anything)
    assert status != 0 or study.files(out) != wanted, "the test above would not notice that the guard is gone"


def test_restarted_scratch_is_kept_small(study: Study) -> None:
    out = "models/grpo"
    wanted = study.files(out)
    study.killed(out, "trainer/checkpoint-4/manifest.json")
    kept = list(study.scratch(out).glob("*/trainer/checkpoint-*"))
    assert len(kept) <= 3, kept
    assert study.finish(LONG[out]) == 0
    assert study.files(out) == wanted
