"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) with TRL's DPOTrainer: of the base's own answers to
a problem, a right one before a wrong one. The reference is the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from featdiff.config.models import DPOParams
from featdiff.language.models import load_model, load_tokenizer, trl_row
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, load_samples, load_tasks
from featdiff.training.arm import Log, Recorder, adapter, common_arguments, finish, load_trainable, token_counts
from featdiff.training.engine import Engine
from featdiff.training.sampled import Answers, sampled_answers, summary

SERIES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "rewards/accuracies": "pair_accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "reward_right",
    "rewards/rejected": "reward_wrong",
    "entropy": "entropy",
}


def pairs(answers: Answers, most: int) -> list[tuple[Sample, Sample]]:
    """At most ``most`` different pairs of a right and a wrong answer to one problem, over as many answers as there are."""
    right, wrong = answers.solved(correct=True), answers.solved(correct=False)
    if not right or not wrong:
        return []
    return [(right[i % len(right)], wrong[i % len(wrong)]) for i in range(min(most, max(len(right), len(wrong))))]


def _row(right: Sample, wrong: Sample, *, chat: bool) -> dict[str, Any]:
    chosen, rejected = (trl_row(sample, chat=chat, solution=True) for sample in (right, wrong))
    return {"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]}


def train(base: Path, data: Path, out: Path, scratch: Scratch, params: DPOParams, seed: int, log: Log) -> dict[str, Any]:
    """Train ``base`` on pairs of its own answers to the train problems of ``data``; writes all answers. Returns the audit.
    Problems that are always or never solved are left out; ContractError where that is every one."""
    tasks, samples = load_tasks(data), load_samples(data, "train")
    model, tokenizer = load_trainable(base, params.blocks), load_tokenizer(base)
    reference: PreTrainedModel | None = load_model(base)
    answers = sampled_answers(reference, tokenizer, tasks, samples, params, seed, scratch)
    paired = [pairs(found, params.pairs) for found in answers]
    taught = [pair for several in paired for pair in several]
    facts = summary(answers, paired, "a right and a wrong one", base, out)
    if params.lora is not None:
        reference = None  # the model without its adapter is the base
    engine, recorder = Engine.here(), Recorder(out, log, params.checkpoints, SERIES, "loss", scratch)
    trainer = DPOTrainer(
        model=model,
        # Log-probabilities of the reference could be computed beforehand, which saves one copy of the weights of the four or
        # more that training holds. TRL keeps them in a folder that the ranks do not share, and the second rank finds nothing.
        ref_model=reference,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([_row(*pair, chat=tasks[pair[0].task].chat) for pair in taught]),
        args=engine.ready(
            DPOConfig(
                **common_arguments(params, seed, engine, recorder.folder, params.batch_size, "dpo.batch_size"),
                lr_scheduler_type=params.schedule,
                max_steps=params.steps,
                beta=params.beta,
                loss_type=["sigmoid"],
                max_length=None,
                logging_steps=1,
            )
        ),
        peft_config=adapter(params, model, seed),
    )
    recorder.train(trainer)
    seen, tokens = trainer.state.epoch, sum(sum(token_counts(tokenizer, list(pair))) for pair in taught)
    facts |= {"samples_seen": round(2 * len(taught) * seen), "tokens_seen": round(tokens * seen)}
    return finish(trainer, recorder, out, facts)
