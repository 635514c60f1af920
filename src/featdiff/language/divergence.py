"""How far a model has moved from the base: the KL divergence per token along sampled answers.

With π0 the base, π a checkpoint, x a prompt, and y an answer of |y| tokens (its end is one) sampled at temperature 1:

    forward = E_x E_{y ~ π0} [ 1/|y| Σ_t KL( π0(·|x, y<t) ‖ π(·|x, y<t) ) ]
    reverse = E_x E_{y ~ π}  [ 1/|y| Σ_t KL( π(·|x, y<t) ‖ π0(·|x, y<t) ) ]

Shenfeld et al. (RL's Razor, arXiv 2509.04259) foretell forgetting from the forward one on prompts of the training task. The
estimate is ours: only the answers are sampled, the divergence at each of their tokens is exact over the whole vocabulary; a
long answer counts as much as a short one.

Shapes: B batch, T token of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from featdiff import stats
from featdiff.artifacts.artifact import ContractError
from featdiff.config.models import CheckpointsParams
from featdiff.language.decode import batches, generate
from featdiff.language.evaluation import Evaluator, Row
from featdiff.language.models import encode_prompts, end_tokens, left_pad, load_model
from featdiff.tasks.task import Sample, TaskInfo

MOST_LOGITS = 2**26
"""Numbers [B, T, V] that one pass holds of each model: a batch shrinks where the vocabulary is large."""
DIRECTIONS = ("forward", "reverse")

Answers = list[list[int]]


@torch.inference_mode()
def token_divergence(
    p: PreTrainedModel, q: PreTrainedModel, prompts: Answers, answers: Answers, *, pad: int, batch_size: int
) -> list[float]:
    """KL(p ‖ q) in nats per token along each answer: at every token exact over the vocabulary, averaged over its tokens.

    No answer is empty; both models are on one device. Raises ContractError for vocabularies of different size."""
    if p.config.vocab_size != q.config.vocab_size:
        sizes = p.config.vocab_size, q.config.vocab_size
        raise ContractError(q.config.name_or_path, "vocab_size", *sizes, "give both models as many embeddings")
    # The last token is never fed: nothing is asked about what follows it. With padding on the left, the predictions of an
    # answer's T tokens are the last T of its row.
    texts = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    size = MOST_LOGITS // (max(map(len, answers)) * p.config.vocab_size)
    found: dict[int, float] = {}
    for rows in batches([len(text) for text in texts], max(1, min(size, batch_size))):
        ids, mask, positions = left_pad([texts[row] for row in rows], pad, p.device)
        lengths_B = torch.tensor([len(answers[row]) for row in rows], device=p.device)
        keep = int(lengths_B.max())
        log_p, log_q = (
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep)
            .logits.float()
            .log_softmax(-1)
            for model in (p, q)
        )
        kl_BT = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        before_BT = torch.arange(keep, device=p.device) < keep - lengths_B.unsqueeze(1)
        means_B = kl_BT.masked_fill(before_BT, 0).sum(1) / lengths_B
        found |= zip(rows, means_B.tolist(), strict=True)
    return [found[row] for row in range(len(texts))]


class Divergence:
    """The base with the prompts on which every checkpoint is compared with it."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        samples: Sequence[Sample],
        tasks: Mapping[str, TaskInfo],
        params: CheckpointsParams,
        seed: int,
    ) -> None:
        self.base, self.tokenizer, self.tasks, self.params, self.seed = base, tokenizer, dict(tasks), params, seed
        self.prompts = [encode_prompts(tokenizer, [sample], chat=tasks[sample.task].chat)[0] for sample in samples]

    def answers(self, model: PreTrainedModel, number: int = 0) -> Answers:
        """One sampled answer of ``model`` to each prompt, with the end token that was drawn, if one was; ``number`` tells the
        random streams of several models apart. The base has 0, whatever it is compared with."""
        return generate(
            model,
            self.prompts,
            max_new_tokens=self.params.max_new_tokens,
            ends=end_tokens(model, self.tokenizer),
            pad=self.tokenizer.pad_token_id,
            batch_size=self.params.batch_size,
            temperature=1.0,
            generator=torch.Generator().manual_seed(stats.stream(self.seed, number)),
            keep_end=True,
        )

    def measure(self, model: PreTrainedModel, number: int, base_answers: Answers) -> dict[str, list[float]]:
        """Divergence in nats per token for each prompt, by direction; ``number`` of the checkpoint, from 1."""
        pad, size = self.tokenizer.pad_token_id, self.params.batch_size
        own = self.answers(model, number)
        return {
            "forward": token_divergence(self.base, model, self.prompts, base_answers, pad=pad, batch_size=size),
            "reverse": token_divergence(model, self.base, self.prompts, own, pad=pad, batch_size=size),
        }

    def checkpoint(
        self, path: Path, number: int, questions: list[Sample], base_answers: Answers, part: Callable[[str, Any], Any]
    ) -> tuple[list[Row], dict[str, list[float]]]:
        """Answers of the checkpoint in ``path`` to ``questions``, and :meth:`measure` of it, both where the base is. ``part``
        computes a value under a name, or has it from before (:meth:`featdiff.pipeline.checkpoint.Scratch.part`)."""
        model, params = load_model(path).to(self.base.device), self.params
        sizes = {"batch_size": params.batch_size, "max_new_tokens": params.max_new_tokens}
        asked = Evaluator(model, self.tokenizer, self.tasks, **sizes)
        answers = part(f"answers {number}", partial(asked.answer, questions))
        return answers, part(f"divergence {number}", partial(self.measure, model, number, base_answers))


def divergence_table(
    samples: Sequence[Sample],
    tasks: Mapping[str, TaskInfo],
    measured: Mapping[str, Sequence[float]],
    params: CheckpointsParams,
    seed: int,
) -> list[dict[str, Any]]:
    """Mean divergence with its bootstrap interval over prompts, per task and (``task`` None) over the tasks of each role, each
    of which counts the same. ``measured`` holds one number per sample and direction."""
    asked = [name for name in tasks if any(sample.task == name for sample in samples)]
    groups: list[tuple[str | None, str, list[str]]] = [(name, tasks[name].role, [name]) for name in asked]
    for role in dict.fromkeys(tasks[name].role for name in asked):
        groups.append((None, role, [name for name in asked if tasks[name].role == role]))
    table = []
    for task, role, names in groups:
        row: dict[str, Any] = {"task": task, "role": role, "n": sum(sample.task in names for sample in samples)}
        for direction in DIRECTIONS:
            pairs = list(zip(samples, measured[direction], strict=True))
            found = stats.mean_over_strata(
                {name: [value for sample, value in pairs if sample.task == name] for name in names},
                resamples=params.bootstrap,
                confidence=params.confidence,
                seed=seed,
            )
            assert found is not None  # a group has samples
            row |= {f"{direction}_kl": found.value, f"{direction}_low": found.low, f"{direction}_high": found.high}
        table.append(row)
    return table
