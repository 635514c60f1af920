"""Supervised fine-tuning on the teacher's worked solutions, with TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from featdiff.artifacts.artifact import ContractError
from featdiff.config.params import SFTParams
from featdiff.language.models import load_model, load_tokenizer, trl_row
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import load_samples, load_tasks
from featdiff.training.arm import Log, Recorder, common_arguments, finish

SERIES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
}


def train(base: Path, data: Path, out: Path, scratch: Scratch, params: SFTParams, seed: int, log: Log) -> dict[str, Any]:
    """Fine-tune ``base`` on the train problems of ``data``; loss on the solution only. Returns the audit."""
    process_state()
    tasks, samples = load_tasks(data), load_samples(data, "train")
    model, tokenizer = load_model(base), load_tokenizer(base)
    lengths = [len(tokenizer(sample.prompt + sample.solution)["input_ids"]) + 1 for sample in samples]
    for sample, length in zip(samples, lengths, strict=True):
        if length > params.max_length:
            raise ContractError(
                data / "train.parquet",
                sample.sample_id,
                f"at most sft.max_length = {params.max_length} tokens",
                length,
                "raise it",
            )
    rows = [trl_row(sample, chat=tasks[sample.task].chat, solution=True) for sample in samples]
    recorder = Recorder(out, log, params.checkpoints, SERIES, "loss", scratch)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            **common_arguments(params, seed, model, recorder.folder, params.batch_size, "sft.batch_size"),
            lr_scheduler_type=params.schedule,
            num_train_epochs=params.epochs,
            max_length=None,
            completion_only_loss=True,
            logging_steps=1,
        ),
    )
    recorder.train(trainer)
    facts = {
        "problems": len(samples),
        "samples_seen": trainer.state.global_step * params.batch_size,
        "tokens_seen": round(sum(lengths) * params.epochs),
    }
    return finish(trainer, recorder, out, base, data, facts)
