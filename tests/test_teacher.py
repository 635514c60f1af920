"""A teacher: another model's right answers in place of the solutions that came with the problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featdiff.artifacts.artifact import ContractError, sha256_file
from featdiff.artifacts.tables import SAMPLED_ANSWERS
from featdiff.config.models import TeacherParams
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, load_samples, load_tasks
from featdiff.tasks.verify import grade
from featdiff.training import sampled as sampled_module
from featdiff.training.teacher import solve
from project import Project
from taught import hashes, trained, write_data

ASKED = {"chat": False, "instruction": "", "samples": 3, "temperature": 1.0, "max_new_tokens": 4, "sampling_batch_size": 10}


def taught(world: Path, out: Path, data: str = "data", seed: int = 0, **changes: Any) -> tuple[Path, dict[str, Any]]:
    out.mkdir()
    params = TeacherParams(**{"source": str(world / "base"), "dtype": "float32", **ASKED, **changes})
    return out, solve("other", world / data, out, Scratch(), params, seed)


def test_what_it_solved_is_taught_to_every_arm(world: Path, tmp_path: Path) -> None:
    """It answers ``c.`` or ``d.``, and ``c`` is right: some problems get three wrong answers."""
    out, facts = taught(world, tmp_path / "teacher")
    before, kept = load_samples(world / "data", "train"), load_samples(out, "train")
    rows, task = SAMPLED_ANSWERS.read(out), load_tasks(out)["t"]
    right = {row["sample_id"] for row in rows if row["correct"] and row["whole"]}
    assert 12 < len(kept) < len(before) == 24
    assert [sample.sample_id for sample in kept] == [sample.sample_id for sample in before if sample.sample_id in right]
    assert {sample.solution for sample in kept} == {"c."}
    assert all(grade(task.verifier, sample, sample.solution, task.grading).correct for sample in kept)
    assert [(sample.prompt, sample.answer, sample.own) for sample in kept] == [
        (sample.prompt, sample.answer, sample.own) for sample in before if sample.sample_id in right
    ]
    assert facts["problems_left_out"] == 24 - len(kept)
    assert facts["answers"] == len(rows) == 72
    assert hashes(out) == hashes(taught(world, tmp_path / "again")[0])
    assert hashes(out) != hashes(taught(world, tmp_path / "other", seed=1)[0])
    for method in ("sft", "grpo"):
        _, audit = trained(method, tmp_path, tmp_path / method, data="teacher", base=world / "base")
        assert audit["problems"] == len(kept)


def test_in_a_chat_the_question_alone_is_asked(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is answered is learned after the prompt that arms read."""
    put: list[tuple[str, bool]] = []

    def encoded(tokenizer: Any, samples: list[Sample], *, chat: bool) -> list[list[int]]:
        put.extend((sample.prompt, chat) for sample in samples)
        return [tokenizer("a1=")["input_ids"] for _ in samples]

    monkeypatch.setattr(sampled_module, "encode_prompts", encoded)
    prompt = "Question: How many?\nAnswer:"
    tasks = list(load_tasks(world / "data").values())
    write_data(tmp_path / "data", tasks, [Sample("t-0", "t", "train", prompt, "c", solution=" see above: c.")])
    asked = {"source": str(world / "base"), "chat": True, "instruction": "Think first.", "samples": 8}
    out, _ = taught(tmp_path, tmp_path / "teacher", **asked)
    assert put == [("How many?\nThink first.", True)] * 8
    (kept,) = load_samples(out, "train")
    assert (kept.prompt, kept.solution) == (prompt, " c.")


def test_one_that_solves_nothing_is_one_line(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"answers: expected a right one to at least one problem, found 0 right of 24"):
        taught(world, tmp_path / "none", samples=1, max_new_tokens=1)
    assert list((tmp_path / "none").iterdir()) == []
    with pytest.raises(ContractError, match=r"teachers.other.source: expected hub:"):
        taught(world, tmp_path / "hub", source="hub:owner/name@main")


@pytest.mark.graph
def test_arms_learn_from_the_teacher_that_params_name(tmp_path: Path) -> None:
    project = Project(tmp_path).fill()
    assert project.run("-m", "featdiff.config.profiles", "use", "nano").returncode == 0
    project.set({"base.pretraining.steps": 60})
    for stage in ("prepare", "base"):
        assert project.run(f"stages/{stage}.py").returncode == 0
    teacher = ASKED | {"source": "models/base", "dtype": "float32", "samples": 8, "max_new_tokens": 16}
    project.set({"teachers": {"itself": teacher}, "problems": "teachers/itself"})
    result = project.run("stages/teacher.py", "--teacher", "it")
    project.refused(result, "teachers/it", "--teacher: 'it': unknown; known: itself")
    result = project.run("stages/teacher.py", "--teacher", "itself")
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "teachers/itself/metrics.json").read_text())
    kept = load_samples(tmp_path / "teachers/itself", "train")
    assert 0 < len(kept) == facts["problems"] - facts["problems_left_out"] < facts["problems"] == 96
    for arm in ("sft", "grpo"):
        result = project.run("stages/arm.py", "--arm", arm)
        assert result.returncode == 0, result.stderr
        audit = json.loads((tmp_path / f"models/{arm}/audit.json").read_text())
        assert audit["problems_sha256"] == sha256_file(tmp_path / "teachers/itself/train.parquet")
        assert audit["problems"] == len(kept)
