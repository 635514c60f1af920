"""Reinforcement learning on the same problems, with TRL's GRPOTrainer; the reward is the final answer alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from featdiff import stats
from featdiff.artifacts.artifact import ContractError
from featdiff.artifacts.tables import COMPLETIONS
from featdiff.config.models import GRPOParams
from featdiff.language.decode import generate
from featdiff.language.models import encode_prompts, end_tokens, load_tokenizer, trl_row
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import COLOCATE, VLLM, process_state
from featdiff.tasks.task import Sample, TaskInfo, load_samples, load_tasks
from featdiff.tasks.verify import grade
from featdiff.training.arm import Log, Recorder, adapter, common_arguments, finish, load_trainable
from featdiff.training.engine import Engine, Replica

SERIES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "completions/mean_length": "completion_tokens",
    "frac_reward_zero_std": "groups_without_signal",
    "kl": "kl",
    # Only where vLLM draws: how far its probabilities are from those of the model that is trained, and what corrects for it.
    "sampling/sampling_logp_difference/mean": "vllm_logp_gap",
    "sampling/sampling_logp_difference/max": "vllm_logp_gap_max",
    "sampling/importance_sampling_ratio/min": "importance_ratio_min",
    "sampling/importance_sampling_ratio/mean": "importance_ratio",
    "sampling/importance_sampling_ratio/max": "importance_ratio_max",
}
KEPT_CALLS = 25


class Reward:
    """1 for a right final answer by the task's ``grading``, else 0, whatever comes before it; keeps some completions."""

    __name__ = "right_answer"

    def __init__(
        self,
        tasks: dict[str, TaskInfo],
        samples: list[Sample],
        steps: int,
        read: Callable[[list[Any]], list[str]],
    ) -> None:
        """``read`` gives the texts of token ids (:func:`said`)."""
        self.tasks, self.read = tasks, read
        self.samples = {sample.sample_id: sample for sample in samples}
        self.every = max(1, steps // KEPT_CALLS)
        self.state: dict[str, Any] = {"calls": 0, "kept": []}
        """What a resumed run goes on with."""

    def __call__(self, completion_ids: list[Any], sample_id: list[str], **_: Any) -> list[float]:
        """One for each of ``completion_ids``, whatever drew them. The trainer's own texts would show an end that is no special
        token."""
        rewards = []
        for i, (text, name) in enumerate(zip(self.read(completion_ids), sample_id, strict=True)):
            sample = self.samples[name]
            task = self.tasks[sample.task]
            graded = grade(task.verifier, sample, text, task.grading)
            rewards.append(float(graded.correct))
            if self.state["calls"] % self.every == 0 and i < 16:
                row = {"call": self.state["calls"], "task": sample.task, "prompt": sample.prompt, "answer": sample.answer}
                self.state["kept"].append(row | {"completion": text, "manner": graded.manner, "reward": rewards[-1]})
        self.state["calls"] += 1
        return rewards


def said(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int], completions: list[list[int]]) -> list[str]:
    """The texts of token ids, without the one of ``ends`` that was drawn last."""
    return tokenizer.batch_decode([ids[: len(ids) - (ids[-1] in ends)] for ids in completions], skip_special_tokens=True)


class Rollouts:
    """Completions by our own decoder in place of ``generate``: finished rows leave the batch, and what is drawn at an update
    depends on nothing but ``seed``, the update and the rank. They are the model's as it is trained: in the dtype that computes
    then, and by ``replica`` where it is sharded."""

    def __init__(self, params: GRPOParams, seed: int, replica: Replica | None = None) -> None:
        self.params, self.seed, self.replica = params, seed, replica

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """Token ids of each of ``prompts`` and of a completion, with the end token that was drawn, from which it learns to
        end."""
        tokenizer, accelerator = trainer.processing_class, trainer.accelerator
        model = accelerator.unwrap_model(trainer.model)
        if self.replica:
            model = self.replica.like(model, accelerator.device)
        if isinstance(prompts[0], str):
            ids = tokenizer(prompts)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
        drawn = stats.stream(self.seed, trainer.state.global_step, accelerator.process_index)
        model.eval()
        with accelerator.autocast() if self.replica is None else nullcontext():
            completions = generate(
                model,
                ids,
                max_new_tokens=self.params.max_new_tokens,
                ends=end_tokens(model, tokenizer),
                pad=tokenizer.pad_token_id,
                batch_size=len(ids),
                temperature=self.params.temperature,
                generator=torch.Generator().manual_seed(drawn),
                keep_end=True,
            )
        model.train()
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def vllm_arguments(where: str, ends: Sequence[int], longest: int) -> dict[str, Any]:
    """Trainer arguments with which vLLM draws completions (``where``: ``Engine.vllm``), each up to one of ``ends``; ``longest``
    tokens with their prompts at most. They are drawn from what our decoder draws from: the model's probabilities at
    ``temperature``, none left out."""
    place = {"vllm_mode": COLOCATE} if where == COLOCATE else {"vllm_mode": "server", "vllm_server_base_url": where}
    return {
        "use_vllm": True,
        **place,
        "vllm_max_model_length": longest,  # else it sets memory aside for the longest text that the model can read
        # It computes in other kernels and another precision than training does: a completion weighs as much more as it is more
        # probable there, and nothing where that is beyond the trainer's bound.
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "sequence_mask",
        # No seed beside them: each completion would start from it, and those to one prompt would all be equal.
        "generation_kwargs": {"stop_token_ids": list(ends)},
    }


def train(base: Path, data: Path, out: Path, scratch: Scratch, params: GRPOParams, seed: int, log: Log) -> dict[str, Any]:
    """Train ``base`` by GRPO on the train problems of ``data``; writes the completions it kept. Returns the audit."""
    state = process_state()
    tasks, samples = load_tasks(data), load_samples(data, "train")
    engine, model, tokenizer = Engine.here(), load_trainable(base, params.blocks), load_tokenizer(base)
    total, ends = params.prompts_per_step * params.rollouts, end_tokens(model, tokenizer)
    reward = Reward(tasks, samples, params.steps, partial(said, tokenizer, ends))
    drawing: dict[str, Any] = {}
    if engine.vllm:
        if params.lora is not None:
            # The trainer adds the adapter to the weights and takes it away again for every update, which leaves them rounded.
            raise ContractError("params.yaml", "lora", f"null where vLLM draws (${VLLM})", "an adapter", f"unset {VLLM}")
        prompts = [encode_prompts(tokenizer, [sample], chat=tasks[sample.task].chat)[0] for sample in samples]
        drawing = vllm_arguments(engine.vllm, ends, max(map(len, prompts)) + params.max_new_tokens)
        rollouts = None
    else:
        rollouts = Rollouts(params, seed, Replica(model, engine.compute) if engine.sharded else None)
    rows = [
        trl_row(sample, chat=tasks[sample.task].chat, solution=False) | {"sample_id": sample.sample_id} for sample in samples
    ]
    recorder = Recorder(out, log, params.checkpoints, SERIES, "reward", scratch, reward.state)
    warnings.filterwarnings("ignore", "You are using 'rollout_func'")  # may change without notice; the version is pinned
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[reward],
        rollout_func=rollouts,
        train_dataset=Dataset.from_list(rows),
        args=engine.ready(
            GRPOConfig(
                **common_arguments(params, seed, engine, recorder.folder, total, "grpo.prompts_per_step x grpo.rollouts"),
                lr_scheduler_type="constant_with_warmup",
                max_steps=params.steps,
                num_generations=params.rollouts,
                num_iterations=1,
                max_completion_length=params.max_new_tokens,
                temperature=params.temperature,
                beta=params.beta,
                epsilon=params.epsilon,
                loss_type=params.loss_type,
                scale_rewards=params.scale_rewards,
                mask_truncated_completions=False,
                logging_steps=1,
                **drawing,
            )
        ),
        peft_config=adapter(params, model, seed),
    )
    boundary, generation = trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation
    if generation * trainer.args.num_iterations != boundary:  # else a checkpoint could fall between rollouts and their use
        expected = f"one update per generation ({boundary} micro batches)"
        raise ContractError("GRPOConfig", "steps_per_generation", expected, generation, "do not set it")
    recorder.train(trainer)
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards = [entry["reward"] for entry in steps]
    tenth = max(1, len(rewards) // 10)
    facts = {
        "problems": len(samples),
        "samples_seen": params.steps * total,
        "tokens_seen": sum(round(total * entry["completions/mean_length"]) for entry in steps),
        "reward_first": sum(rewards[:tenth]) / tenth,
        "reward_last": sum(rewards[-tenth:]) / tenth,
        **engine.decoder(),
    }
    if state.is_main_process:
        COMPLETIONS.write(out, reward.state["kept"])
    return finish(trainer, recorder, out, facts)
