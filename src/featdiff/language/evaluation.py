"""A model's answers to questions: by generation, graded from the text, or by the likelihood of options.

The same functions serve plain evaluation and every edit of the interventions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from featdiff import stats
from featdiff.config.models import CheckpointsParams, EvaluateParams
from featdiff.language.decode import TOGETHER, generate_under, questions_at_once, score_options, score_tokens
from featdiff.language.models import encode_prompts, end_tokens
from featdiff.language.session import Edit, Guesses, PromptCache
from featdiff.language.vllm import TRIED, Vllm, in_place
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import shared_out
from featdiff.tasks.suites import listed_prompt
from featdiff.tasks.task import ANSWER, GENERATION, LETTERS, SPLITS, Sample, TaskInfo
from featdiff.tasks.verify import Grade, grade

Row = dict[str, Any]
GREEDY, SAMPLED = "greedy", "sampled"
GROUP_BATCHES = 4
"""Batches of questions in one group. A larger group is sorted by length as a whole, so that less of its batches is padding,
and is lost as a whole by a kill."""
LIKELIHOOD = ("option_text", "option_text_norm", "option_letter")


class Evaluator:
    """A model with its tokenizer and the tasks it is asked about."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        tasks: dict[str, TaskInfo],
        *,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.tasks = model, tokenizer, tasks
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.ends = end_tokens(model, tokenizer)
        self.vllm: Vllm | None = None
        """What answers in place of our decoder where nothing is edited."""

    def answer(
        self, samples: list[Sample], *, edit: Edit | None = None, shared: PromptCache | None = None, progress: str = ""
    ) -> list[Row]:
        """One row per sample, in order, under each task's own scoring rule."""
        (rows,) = self.answer_under([edit], samples, shared=shared, progress=progress)
        return rows

    def answer_under(
        self, edits: Sequence[Edit | None], samples: list[Sample], *, shared: PromptCache | None = None, progress: str = ""
    ) -> list[list[Row]]:
        """:meth:`answer` under each of ``edits``. Those that can share a batch do; ``shared`` prompts are passed over by edits
        that change them."""
        found: list[list[Row]] = [[] for _ in edits]
        order = {sample.sample_id: i for i, sample in enumerate(samples)}
        rules: dict[str, list[Sample]] = {}
        for sample in samples:
            rules.setdefault(self.tasks[sample.task].scoring, []).append(sample)
        by_generation = rules.pop(GENERATION, [])
        alike: dict[tuple[bool, int], list[int]] = {}
        for number, edit in enumerate(edits):
            alike.setdefault((edit is not None and edit.whole_prompt, id(edit and edit.donor)), []).append(number)
        for (whole, _), numbers in alike.items():
            kept, group = shared and shared.for_whole_prompts() if whole else shared, [edits[number] for number in numbers]
            answered = self.generate_under(group, by_generation, shared=kept, progress=progress)
            for number, edit, rows in zip(numbers, group, answered, strict=True):
                for rule, asked in rules.items():
                    rows += self.choose(asked, rules=(rule,), edit=edit, shared=kept, progress=progress)
                found[number] = sorted(rows, key=lambda row: order[row["sample_id"]])
        return found

    def guesses(self, samples: list[Sample], models: Sequence[PreTrainedModel]) -> Guesses:
        """The greedy answers of ``models`` to the prompts of ``samples``: what this model under an edit may well answer."""
        prompts = self.prompts(self.generated(samples))
        answers = zip(*(self._decode([None], prompts, model)[0] for model in models), strict=True)
        return {tuple(prompt): list(found) for prompt, found in zip(prompts, answers, strict=True)}

    def generated(self, samples: list[Sample]) -> list[Sample]:
        """Those that are answered by generation."""
        return [sample for sample in samples if self.tasks[sample.task].scoring == GENERATION]

    def prompts(self, samples: list[Sample]) -> list[list[int]]:
        """Token ids of each sample's prompt as its task's scoring rule reads it."""
        ids: list[list[int]] = []
        for sample in samples:
            task = self.tasks[sample.task]
            if task.scoring == "option_letter":
                ids.append(self.tokenizer(listed_prompt(sample.prompt, sample.options))["input_ids"])
            else:
                ids += encode_prompts(self.tokenizer, [sample], chat=task.chat and task.scoring == GENERATION)
        return ids

    def with_vllm(self, samples: list[Sample], scratch: Scratch, source: str, revision: str | None = None) -> dict[str, float]:
        """Have vLLM answer where it is asked for and agrees with our decoder on the first of ``samples`` that are answered by
        generation; how far it does. It loads the model from ``source``, a folder or a name on the hub at ``revision``."""
        if not (asked := self.generated(samples)):
            return {}

        def ask(vllm: Vllm | None) -> list[tuple[str, bool]]:
            self.vllm = vllm
            return [(row["completion"], row["correct"]) for row in self.generate(asked[:TRIED])]

        def make() -> Vllm:
            longest = max(map(len, self.prompts(asked))) + self.max_new_tokens
            return Vllm(source, revision, self.model.dtype, self.ends, longest)

        self.vllm, agreement = in_place(make, ask, scratch.part)
        return agreement

    def generate(self, samples: list[Sample], *, edit: Edit | None = None, **how: Any) -> list[Row]:
        """:meth:`generate_under` of one edit, or of none."""
        (rows,) = self.generate_under([edit], samples, **how)
        return rows

    def generate_under(
        self,
        edits: Sequence[Edit | None],
        samples: list[Sample],
        *,
        draw: int = 0,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        shared: PromptCache | None = None,
        progress: str = "",
    ) -> list[list[Row]]:
        """Generated answers with their grade and manner, for each of ``edits``; ``mode`` is greedy at temperature 0."""
        found: list[list[Row]] = [[] for _ in edits]
        mode = SAMPLED if temperature > 0 else GREEDY
        for chat in (False, True):
            group = [sample for sample in samples if self.tasks[sample.task].chat is chat]
            if not group:
                continue
            prompts = encode_prompts(self.tokenizer, group, chat=chat)
            answers = self._decode(
                edits, prompts, temperature=temperature, generator=generator, shared=shared, progress=progress
            )
            for rows, ids in zip(found, answers, strict=True):
                texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                for sample, text in zip(group, texts, strict=True):
                    task = self.tasks[sample.task]
                    rows.append(_row(sample, mode, draw, text, grade(task.verifier, sample, text, task.grading)))
        return found

    def _decode(
        self, edits: Sequence[Edit | None], prompts: list[list[int]], model: PreTrainedModel | None = None, **how: Any
    ) -> list[list[list[int]]]:
        if self.vllm and model is None and not any(edits):
            drawn = {name: how[name] for name in ("temperature", "generator") if name in how}
            return [self.vllm.generate(prompts, max_new_tokens=self.max_new_tokens, **drawn) for _ in edits]
        return generate_under(
            edits,
            model or self.model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            ends=self.ends,
            pad=self.tokenizer.pad_token_id,
            batch_size=self.batch_size,
            **how,
        )

    def likelihood(
        self, samples: list[Sample], *, edit: Edit | None = None, shared: PromptCache | None = None
    ) -> dict[str, tuple[float, float]]:
        """Of samples that are answered by generation: nats of the first token of the right answer (worked where one is
        known), and nats per token of the rest given that start. The first says which manner, the second whether the
        model can go through with it; by ``sample_id``."""
        found = {}
        for chat in (False, True):
            group = [sample for sample in self.generated(samples) if self.tasks[sample.task].chat is chat]
            if not group:
                continue
            right = [sample.solution or " " * sample.prompt.endswith(ANSWER) + sample.answer for sample in group]
            ids = self.tokenizer(right, add_special_tokens=False)["input_ids"]
            scores = score_tokens(
                self.model,
                encode_prompts(self.tokenizer, group, chat=chat),
                [[text] for text in ids],
                pad=self.tokenizer.pad_token_id,
                batch_size=questions_at_once(self.batch_size, TOGETHER),  # batches that were read for answers under edits
                edit=edit,
                shared=shared,
            )
            for sample, ((first, *rest),) in zip(group, scores, strict=True):
                found[sample.sample_id] = -first, -sum(rest) / max(1, len(rest))
        return found

    def choose(
        self,
        samples: list[Sample],
        *,
        rules: Iterable[str] = LIKELIHOOD,
        edit: Edit | None = None,
        shared: PromptCache | None = None,
        progress: str = "",
    ) -> list[Row]:
        """Answers by likelihood under each of ``rules``: option text (summed, and divided by its characters)
        after the question, and the option's letter after the question with its options listed."""
        if not samples:
            return []
        rows: list[Row] = []
        wanted = set(rules)

        def scored(prompts: list[str], texts: list[list[str]]) -> Iterator[tuple[Sample, np.ndarray]]:
            contexts = self.tokenizer(prompts)["input_ids"]
            options = [[self._continuation(text) for text in group] for group in texts]
            results = score_options(
                self.model,
                contexts,
                options,
                pad=self.tokenizer.pad_token_id,
                batch_size=self.batch_size,
                edit=edit,
                shared=shared,
                progress=progress,
            )
            return zip(samples, (np.array(result) for result in results), strict=True)

        if wanted & {"option_text", "option_text_norm"}:
            for sample, summed in scored([sample.prompt for sample in samples], [list(sample.options) for sample in samples]):
                rows.append(_chosen(sample, "option_text", summed))
                rows.append(_chosen(sample, "option_text_norm", summed / [max(1, len(option)) for option in sample.options]))
        if "option_letter" in wanted:
            listed = [listed_prompt(sample.prompt, sample.options) for sample in samples]
            letters = [list(LETTERS[: len(sample.options)]) for sample in samples]
            rows += [_chosen(sample, "option_letter", summed) for sample, summed in scored(listed, letters)]
        return [row for row in rows if row["mode"] in wanted]

    def _continuation(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return ids


def _row(sample: Sample, mode: str, draw: int, completion: str, graded: Grade) -> Row:
    return {
        "sample_id": sample.sample_id,
        "task": sample.task,
        "split": sample.split,
        "mode": mode,
        "draw": draw,
        "completion": completion,
        **graded._asdict(),
    }


def _chosen(sample: Sample, rule: str, scores: np.ndarray) -> Row:
    choice = int(scores.argmax())
    right = choice == sample.right_option
    return _row(sample, rule, 0, sample.options[choice], Grade(LETTERS[choice], right, "", strict=right, flexible=right))


def evaluate(evaluator: Evaluator, samples: list[Sample], params: EvaluateParams, seed: int, scratch: Scratch) -> list[Row]:
    """Every answer of one model: greedy and sampled generations, likelihood under every rule where options exist.

    Questions are asked in groups of a few batches, each with a generator of its own, so that what was answered before a
    kill need not be asked again. Ranks share the groups; each has all the rows in the end, the same as one alone would."""
    by_generation = evaluator.generated(samples)
    by_options = [sample for sample in samples if sample.options]
    size = GROUP_BATCHES * params.batch_size

    def groups(asked: list[Sample]) -> list[list[Sample]]:
        return [asked[low : low + size] for low in range(0, len(asked), size)]

    def part(
        name: str, number: int, answer: Callable[..., list[Row]], group: list[Sample], **how: Any
    ) -> Callable[[], list[Row]]:
        return partial(scratch.part, f"{name} {number}", partial(answer, group, **how))

    answered = shared_out(
        [part("greedy", i, evaluator.generate, group) for i, group in enumerate(groups(by_generation))], "greedy"
    )
    for draw in range(params.draws):
        name, drawn = f"sampled {draw + 1} of {params.draws}", []
        for i, group in enumerate(groups(by_generation)):
            generator = torch.Generator().manual_seed(stats.stream(seed, draw, i))
            how = {"draw": draw, "temperature": params.temperature, "generator": generator}
            drawn.append(part(name, i, evaluator.generate, group, **how))
        answered += shared_out(drawn, name)
    chosen = [part("likelihood", i, evaluator.choose, group) for i, group in enumerate(groups(by_options))]
    return [row for rows in answered + shared_out(chosen, "likelihood") for row in rows]


def accuracy_table(
    rows: list[Row], tasks: dict[str, TaskInfo], params: EvaluateParams | CheckpointsParams, seed: int
) -> list[Row]:
    """Accuracy with its interval, accuracy by either rule of grading, parse failures and manners, per task, split
    and mode. The bootstrap resamples questions, so that several draws of one question are not taken for several questions."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["split"], row["mode"]].append(row)
    table = []
    for name, task in tasks.items():
        for split in SPLITS:
            for mode in (GREEDY, SAMPLED, *LIKELIHOOD):
                if group := groups.get((name, split, mode)):
                    questions: dict[str, list[bool]] = defaultdict(list)
                    for row in group:
                        questions[row["sample_id"]].append(row["correct"])
                    means = np.array([np.mean(right) for right in questions.values()])
                    interval = stats.bootstrap_mean(
                        means, resamples=params.bootstrap, confidence=params.confidence, seed=seed, within=stats.SHARES
                    )
                    shares = {
                        manner: float(np.mean([row["manner"] == manner for row in group]))
                        for manner in ("steps", "foreign", "direct")
                    }
                    table.append(
                        {
                            "task": name,
                            "role": task.role,
                            "domain": task.domain,
                            "split": split,
                            "mode": mode,
                            "primary": mode == task.primary_mode,
                            "n": interval.n,
                            "accuracy": interval.value,
                            "low": interval.low,
                            "high": interval.high,
                            **{rule: float(np.mean([row[rule] for row in group])) for rule in ("strict", "flexible")},
                            "parse_failures": float(np.mean([row["parsed"] is None for row in group])),
                            **shares,
                        }
                    )
    return table
