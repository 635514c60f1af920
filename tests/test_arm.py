"""What all arms that are trained here share: batches per process, checkpoints, logging, facts of the audit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from featdiff.artifacts.artifact import ContractError, begin
from featdiff.language.models import checkpoint_folders, load_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.training.arm import Recorder, finish, per_process
from tiny import tiny_model

Points = list[tuple[int, dict[str, float]]]


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_the_processes_together_make_the_global_batch(share: int, micro: int, world: int) -> None:
    size, accumulation = per_process(share * world, micro, world, "sft.batch_size")
    assert size * accumulation * world == share * world
    assert 1 <= size <= micro


def test_a_micro_batch_that_fits_is_used_as_it_is() -> None:
    assert per_process(64, 64, 1, "b") == (64, 1)
    assert per_process(64, 16, 2, "b") == (16, 2)
    assert per_process(128, 999, 2, "b") == (64, 1)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(2, 8), st.data())
def test_a_batch_that_cannot_be_shared_out_is_refused(share: int, world: int, data: st.DataObject) -> None:
    total = share * world + data.draw(st.integers(1, world - 1))
    with pytest.raises(ContractError, match=rf"sft.batch_size: expected a multiple of {world} processes, found {total}"):
        per_process(total, 8, world, "sft.batch_size")


def recorder(out: Path, points: Points, checkpoints: int = 5) -> Recorder:
    return Recorder(
        out,
        lambda step, point: points.append((step, point)),
        checkpoints,
        {"loss": "loss", "grad_norm": "norm", "train_reward": "reward"},
        "loss",
        Scratch(),
    )


@pytest.mark.parametrize(
    ("steps", "checkpoints", "wanted"),
    [(250, 5, [50, 100, 150, 200]), (7, 5, [2, 3, 5, 6]), (5, 5, [1, 2, 3, 4]), (10, 1, []), (94, 2, [47])],
)
def test_checkpoints_come_at_even_shares_of_the_updates(
    tmp_path: Path, steps: int, checkpoints: int, wanted: list[int]
) -> None:
    assert list(recorder(tmp_path / ".sft.partial", [], checkpoints).kept_steps(steps)) == wanted


def test_series_are_logged_under_our_names_and_other_lines_are_not(tmp_path: Path) -> None:
    points: Points = []
    made, arguments = recorder(tmp_path / ".sft.partial", points), TrainingArguments(output_dir=str(tmp_path), report_to="none")
    made.on_log(arguments, TrainerState(global_step=3), TrainerControl(), logs={"loss": 0.5, "grad_norm": 2, "epoch": 1.0})
    made.on_log(arguments, TrainerState(global_step=4), TrainerControl(), logs={"train_reward": 1.0})
    made.on_log(arguments, TrainerState(global_step=5), TrainerControl(), logs={"train_runtime": 9.0})
    made.on_log(arguments, TrainerState(global_step=6, is_world_process_zero=False), TrainerControl(), logs={"loss": 0.1})
    assert points == [(3, {"loss": 0.5, "norm": 2.0}), (4, {"reward": 1.0})]


@pytest.mark.parametrize(
    "logs", [{"loss": float("nan")}, {"loss": 0.5, "grad_norm": float("inf")}, {"train_reward": float("nan")}]
)
def test_a_value_that_is_not_finite_stops_training_on_every_rank(tmp_path: Path, logs: dict[str, float]) -> None:
    made, arguments = recorder(tmp_path / ".sft.partial", []), TrainingArguments(output_dir=str(tmp_path), report_to="none")
    for main in (True, False):
        with pytest.raises(FloatingPointError, match="at step 8; lower the learning rate"):
            made.on_log(arguments, TrainerState(global_step=8, is_world_process_zero=main), TrainerControl(), logs=logs)


def test_a_run_leaves_its_checkpoints_its_model_and_the_facts_of_its_audit(tmp_path: Path) -> None:
    model, tokenizer = tiny_model()
    rows: list[dict[str, Any]] = [{"input_ids": tokenizer(f"add {i} 1=")["input_ids"][:7]} for i in range(10, 22)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    out, points = begin(tmp_path / "sft"), Points()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "scratch"),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    made = recorder(out, points, checkpoints=3)
    made.train(trainer)
    assert finish(trainer, made, out, {"problems": 12}) == {
        "updates": 6,
        "checkpoints": [2, 4, 6],
        "problems": 12,
        "precision": "float32 weights, float32 compute",
        "engine": "whole model, ranks: 1",
    }
    assert [path.name for path in checkpoint_folders(out)] == ["1", "2", out.name]
    weights = [load_model(path).model.layers[0].mlp.up_proj.weight for path in checkpoint_folders(out)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], model.model.layers[0].mlp.up_proj.weight)
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
