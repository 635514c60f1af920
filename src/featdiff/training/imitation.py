"""The loss of supervised fine-tuning, whoever wrote the solutions: cross-entropy on them alone, with TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from featdiff.config.models import RFTParams, SFTParams
from featdiff.language.models import load_tokenizer, trl_row
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, TaskInfo
from featdiff.training.arm import Log, Recorder, adapter, common_arguments, finish, load_trainable, token_counts
from featdiff.training.engine import Engine

SERIES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
}


def imitate(
    samples: list[Sample],
    tasks: dict[str, TaskInfo],
    base: Path,
    out: Path,
    scratch: Scratch,
    params: SFTParams | RFTParams,
    seed: int,
    log: Log,
    field: str,
    **length: float,
) -> dict[str, Any]:
    """Train ``base`` on the solutions of ``samples`` and save it to ``out``; returns what :func:`finish` does.

    ``field`` of params.yaml is the batch, and ``length`` the argument of the trainer that says how long to train."""
    engine, model, tokenizer = Engine.here(), load_trainable(base, params.blocks), load_tokenizer(base)
    recorder = Recorder(out, log, params.checkpoints, SERIES, "loss", scratch)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([trl_row(sample, chat=tasks[sample.task].chat, solution=True) for sample in samples]),
        args=engine.ready(
            SFTConfig(
                **common_arguments(params, seed, engine, recorder.folder, params.batch_size, field),
                **length,
                lr_scheduler_type=params.schedule,
                max_length=None,
                padding_free=engine.packed,  # a batch stays the same problems, which packs of a fixed length would not leave so
                completion_only_loss=True,
                logging_steps=1,
            )
        ),
        peft_config=adapter(params, model, seed),
    )
    recorder.train(trainer)
    seen = trainer.state.epoch
    facts = {
        "samples_seen": round(len(samples) * seen),
        "tokens_seen": round(sum(token_counts(tokenizer, samples)) * seen),
    }
    return finish(trainer, recorder, out, facts)
