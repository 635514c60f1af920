"""Divergence from the base: against closed forms, against a computation token by token, and between swapped models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from featdiff.artifacts.artifact import ContractError
from featdiff.artifacts.tables import CHECKPOINT_DIVERGENCE
from featdiff.config.models import CheckpointsParams
from featdiff.language import divergence
from featdiff.language.divergence import Divergence, divergence_table, token_divergence
from featdiff.tasks.task import Sample, TaskInfo, first_of_each

PARAMS = CheckpointsParams(questions=4, prompts=3, batch_size=2, max_new_tokens=8, confidence=0.95, bootstrap=200)
TASKS = {
    name: TaskInfo(name, role, "math", "generation", "organism", "strict", False, 0)
    for name, role in (("add", "train"), ("sub", "train"), ("sort", "find"))
}
SAMPLES = [Sample(f"{task}-{i}", task, "report", f"{task} {'ab' * i}=", "a") for task in TASKS for i in range(1, 4)]
PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1]]
SOME = [[12, 3, 2], [4], [5, 6, 7, 8], [2]]


def constant(make_model: Callable[..., Any], probabilities: list[float]) -> Any:
    """A model that gives its first tokens these probabilities and all others none, whatever it has read."""
    model = make_model()
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e9)
        head.bias[: len(probabilities)] = torch.tensor(probabilities).log()
    model.lm_head = head
    return model


def along(p: Any, q: Any, batch_size: int = 3) -> list[float]:
    return token_divergence(p, q, PROMPTS, SOME, pad=0, batch_size=batch_size)


def test_constant_models_have_the_divergence_of_their_distributions(make_model: Callable[..., Any]) -> None:
    p, q = [0.5, 0.25, 0.25], [0.1, 0.6, 0.3]
    found = along(constant(make_model, p), constant(make_model, q))
    assert found == pytest.approx([scipy.stats.entropy(p, q)] * len(PROMPTS), rel=1e-5)


def test_two_tokens_have_the_divergence_of_two_coins(make_model: Callable[..., Any]) -> None:
    coin = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert along(constant(make_model, [0.9, 0.1]), constant(make_model, [0.5, 0.5])) == pytest.approx([coin] * 4, rel=1e-5)


def test_it_is_the_mean_over_an_answers_tokens_of_the_exact_divergence_at_each(make_model: Callable[..., Any]) -> None:
    """One prefix at a time, without padding, in float64, by scipy."""
    p, q = make_model(seed=1), make_model(seed=2)

    def next_token(model: Any, prefix: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1).numpy()

    wanted = [
        np.mean(
            [
                scipy.stats.entropy(next_token(p, prompt + answer[:t]), next_token(q, prompt + answer[:t]))
                for t in range(len(answer))
            ]
        )
        for prompt, answer in zip(PROMPTS, SOME, strict=True)
    ]
    assert min(wanted) > 0.1
    assert along(p, q) == pytest.approx(wanted, rel=1e-4)


def test_a_model_does_not_differ_from_itself_at_all(make_model: Callable[..., Any]) -> None:
    assert along(make_model(seed=1), make_model(seed=1)) == [0.0] * len(PROMPTS)


def test_batches_and_the_size_of_a_pass_change_nothing(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = make_model(seed=1), make_model(seed=2)
    wanted, sizes = along(p, q), []
    p.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.logits.numel()))
    assert along(p, q, batch_size=1) == pytest.approx(wanted, rel=1e-4)
    sizes.clear()
    most = 2 * max(map(len, SOME)) * p.config.vocab_size
    monkeypatch.setattr(divergence, "MOST_LOGITS", most)
    assert along(p, q, batch_size=100) == pytest.approx(wanted, rel=1e-4)
    assert len(sizes) == 2
    assert max(sizes) <= most


def test_reverse_is_forward_with_the_models_changed_around(make_model: Callable[..., Any], tokenizer: Any) -> None:
    base, model = make_model(seed=1), make_model(seed=2)
    here, there = (Divergence(one, tokenizer, SAMPLES, TASKS, PARAMS, 3) for one in (base, model))
    found = here.measure(model, 1, here.answers(base))
    assert found["forward"] != found["reverse"]
    assert found["reverse"] == there.measure(base, 1, here.answers(model, 1))["forward"]


def test_the_base_answers_the_same_for_every_arm_and_ends_its_answers(make_model: Callable[..., Any], tokenizer: Any) -> None:
    base, eos = make_model(seed=1), tokenizer.eos_token_id
    here = Divergence(base, tokenizer, SAMPLES, TASKS, PARAMS, 3)
    answers = here.answers(base)
    assert answers == Divergence(base, tokenizer, SAMPLES, TASKS, PARAMS, 3).answers(base)
    assert answers != here.answers(base, 1)
    assert answers != Divergence(base, tokenizer, SAMPLES, TASKS, PARAMS, 4).answers(base)
    assert all(len(answer) == 8 or answer[-1] == eos for answer in answers)
    assert not any(eos in answer[:-1] for answer in answers)
    stops = constant(make_model, [0.0, 0.0, 1.0])
    assert tokenizer.eos_token_id == 2
    assert here.answers(stops) == [[2]] * len(SAMPLES)
    goes_on = constant(make_model, [0.0, 0.0, 0.0, 1.0])
    assert here.answers(goes_on) == [[3] * 8] * len(SAMPLES)


def test_prompts_go_through_the_chat_template_where_answers_do(make_model: Callable[..., Any], tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    try:
        chat = TASKS | {"sort": replace(TASKS["sort"], chat=True)}
        found = Divergence(make_model(), tokenizer, SAMPLES, chat, PARAMS, 3).prompts
    finally:
        tokenizer.chat_template = None
    plain = Divergence(make_model(), tokenizer, SAMPLES, TASKS, PARAMS, 3).prompts
    assert [a == b for a, b in zip(found, plain, strict=True)] == [sample.task != "sort" for sample in SAMPLES]


def test_vocabularies_of_different_size_are_refused(make_model: Callable[..., Any]) -> None:
    other = make_model(seed=1)
    other.resize_token_embeddings(other.config.vocab_size + 3)
    with pytest.raises(ContractError, match=r"vocab_size: expected [0-9]+, found [0-9]+"):
        along(make_model(), other)


def test_the_table_has_every_task_and_the_mean_of_each_role(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    measured = {way: rng.exponential(size=len(SAMPLES)).tolist() for way in ("forward", "reverse")}
    table = divergence_table(SAMPLES, TASKS, measured, PARAMS, 0)
    assert [(row["task"], row["role"], row["n"]) for row in table] == [
        ("add", "train", 3), ("sub", "train", 3), ("sort", "find", 3), (None, "train", 6), (None, "find", 3)
    ]  # fmt: skip
    by = {(row["task"], row["role"]): row for row in table}
    for way in ("forward", "reverse"):
        assert by["sub", "train"][f"{way}_kl"] == pytest.approx(np.mean(measured[way][3:6]))
        tasks = [by[name, "train"][f"{way}_kl"] for name in ("add", "sub")]
        assert by[None, "train"][f"{way}_kl"] == pytest.approx(np.mean(tasks))
        assert all(row[f"{way}_low"] < row[f"{way}_kl"] < row[f"{way}_high"] for row in table)
    where = {"arm": "sft", "checkpoint": 1, "step": None, "share": 1.0}
    CHECKPOINT_DIVERGENCE.write(tmp_path, [where | row for row in table])


def test_the_first_of_each_task_are_kept_in_their_order() -> None:
    mixed = SAMPLES[::2] + SAMPLES[1::2]
    kept = first_of_each(mixed, 2)
    assert kept == [sample for sample in mixed if sample in kept]
    assert {name: [sample for sample in kept if sample.task == name] for name in TASKS} == {
        name: [sample for sample in mixed if sample.task == name][:2] for name in TASKS
    }
