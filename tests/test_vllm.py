"""vLLM in place of our decoder. There is none without a GPU: here a module with the names and forms of its own answers with the
model that it is told to load, or with other texts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from featdiff.artifacts.artifact import write_json
from featdiff.artifacts.tables import TRAIN
from featdiff.config.models import EvaluateParams, TeacherParams
from featdiff.language import vllm as vllm_module
from featdiff.language.decode import generate
from featdiff.language.evaluation import Evaluator, Row, evaluate
from featdiff.language.models import end_tokens, load_model, load_tokenizer, save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, TaskInfo
from featdiff.training.teacher import solve

PARAMS = EvaluateParams(batch_size=4, max_new_tokens=8, draws=1, temperature=1.0, confidence=0.95, bootstrap=50)
TASKS = {"gen": TaskInfo("gen", "find", "words", "generation", "organism", "flexible", False, 0)}


class Llm:
    """What vLLM's ``LLM`` is asked for here, with our own model and decoder inside."""

    made: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[Any]] = []
    spoilt = 0
    """Of so many questions the answer is another."""

    def __init__(self, **how: Any) -> None:
        Llm.made.append(how)
        self.model, self.tokenizer = load_model(Path(how["model"])), load_tokenizer(Path(how["model"]))

    def generate(self, prompts: list[dict[str, list[int]]], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        Llm.asked += params
        found = []
        for i, (prompt, how) in enumerate(zip(prompts, params, strict=True)):
            (ids,) = generate(
                self.model, [prompt["prompt_token_ids"]], max_new_tokens=how.max_tokens, ends=how.stop_token_ids, pad=0,
                batch_size=1, temperature=how.temperature, keep_end=True,
                generator=None if how.seed is None else torch.Generator().manual_seed(how.seed),
            )  # fmt: skip
            ids = ids[1:] if i < Llm.spoilt else ids
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]))
        assert not use_tqdm
        return found


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[Llm]:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = Llm, lambda **how: SimpleNamespace(**how)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_module, "vllm_asked", lambda: "colocate")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "here", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))  # they are set where a launcher did not, and are as before after the test
    monkeypatch.setattr(Llm, "made", [])
    monkeypatch.setattr(Llm, "asked", [])
    monkeypatch.setattr(Llm, "spoilt", 0)
    return Llm


@pytest.fixture
def folder(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """A model that ends some of its answers by a character that is no special token: texts would show it."""
    model = make_model(seed=91)
    free = Evaluator(model, tokenizer, TASKS, batch_size=4, max_new_tokens=8).generate(questions(["abc"] * 12))
    ((last, _),) = Counter("".join(row["completion"][1:] for row in free)).most_common(1)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer(last, add_special_tokens=False)["input_ids"]]
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def questions(answers: list[str]) -> list[Sample]:
    return [
        Sample(f"gen-{i}", "gen", "find", f"{'abcdef'[i % 6]}a{'b' * (i // 6)}=", answer) for i, answer in enumerate(answers)
    ]


def evaluator(folder: Path) -> Evaluator:
    return Evaluator(load_model(folder), load_tokenizer(folder), TASKS, batch_size=4, max_new_tokens=8)


def answered(asked: Evaluator, samples: list[Sample]) -> list[Row]:
    return [row for row in evaluate(asked, samples, PARAMS, 0, Scratch()) if row["mode"] == "greedy"]


def test_it_answers_as_our_decoder_does_up_to_an_end(folder: Path, library: type[Llm]) -> None:
    samples, ours, theirs = questions(["abc"] * 12), evaluator(folder), evaluator(folder)
    assert theirs.with_vllm(samples, Scratch(), str(folder)) == {"vllm_same_text": 1.0, "vllm_same_grade": 1.0}
    assert theirs.vllm is not None
    before = len(library.asked)
    assert answered(theirs, samples) == answered(ours, samples)
    assert any(len(row["completion"]) < 8 for row in answered(ours, samples)), "no answer is ended"
    longest = max(map(len, ours.prompts(samples))) + 8
    (how,) = library.made
    assert (how["model"], how["revision"], how["dtype"], how["max_model_len"]) == (str(folder), None, "float32", longest)
    greedy, sampled = library.asked[before : before + 12], library.asked[before + 12 : before + 24]
    assert {(each.temperature, each.seed, each.max_tokens) for each in greedy} == {(0.0, None, 8)}
    assert {each.temperature for each in sampled} == {1.0}
    assert len({each.seed for each in sampled}) == 12, "each of its own"
    ends = end_tokens(ours.model, ours.tokenizer)
    assert len(ends) == 2
    assert greedy[0].stop_token_ids == sorted(ends)


def test_what_it_draws_follows_from_the_seed(folder: Path, library: type[Llm]) -> None:
    samples, asked = questions(["abc"] * 6), evaluator(folder)
    asked.with_vllm(samples, Scratch(), str(folder))
    first, again = (evaluate(asked, samples, PARAMS, 0, Scratch()) for _ in range(2))
    assert first == again
    assert first != evaluate(asked, samples, PARAMS, 1, Scratch())


def test_where_both_are_not_graded_alike_ours_answers(
    folder: Path, library: type[Llm], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, asked = evaluator(folder), evaluator(folder)
    samples = questions(["abc"] * 36)
    right = [
        replace(each, answer=row["parsed"]) for each, row in zip(samples, plain.generate(samples), strict=True) if row["parsed"]
    ]
    assert sum(row["correct"] for row in plain.generate(right)) >= 4, "of too few answers the grade can change"
    monkeypatch.setattr(library, "spoilt", len(right))
    found = asked.with_vllm(right, Scratch(), str(folder))
    assert found["vllm_same_grade"] < 0.9
    assert asked.vllm is None
    assert "vLLM and our decoder are graded alike on" in capsys.readouterr().err
    assert answered(asked, right) == answered(plain, right)


def test_nothing_is_loaded_where_it_is_not_asked_for(folder: Path, library: type[Llm], monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "http://10.0.0.2:8000"):
        monkeypatch.setattr(vllm_module, "vllm_asked", lambda value=value: value)
        asked = evaluator(folder)
        assert asked.with_vllm(questions(["abc"]), Scratch(), str(folder)) == {}
        assert asked.vllm is None
    assert library.made == []


def test_a_model_under_an_edit_answers_by_our_decoder(folder: Path, library: type[Llm]) -> None:
    class Push:
        layer, donor, whole_prompt, after_prompt = 1, None, False, True

        def __call__(self, resid_BTD: torch.Tensor, donor_BTD: torch.Tensor | None, *, prompt: bool) -> torch.Tensor:
            return resid_BTD + 5.0

    samples, ours, theirs = questions(["abc"] * 6), evaluator(folder), evaluator(folder)
    theirs.with_vllm(samples, Scratch(), str(folder))
    before = len(library.asked)
    assert theirs.answer(samples, edit=Push()) == ours.answer(samples, edit=Push())
    assert len(library.asked) == before


def test_it_draws_the_solutions_of_a_teacher(folder: Path, library: type[Llm], tmp_path: Path) -> None:
    plain = evaluator(folder)
    samples = questions(["abc"] * 36)
    rows = plain.generate(samples)
    known = [
        replace(each, split="train", answer=row["parsed"]) for each, row in zip(samples, rows, strict=True) if row["parsed"]
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    TRAIN.write(tmp_path / "data", [asdict(each) for each in known])
    write_json(tmp_path / "data/tasks.json", [asdict(replace(TASKS["gen"], role="train"))])
    params = TeacherParams(
        source=str(folder), dtype="float32", chat=False, instruction="", samples=3, temperature=0.05, max_new_tokens=8,
        sampling_batch_size=4,
    )  # fmt: skip
    facts = solve("other", tmp_path / "data", tmp_path / "out", Scratch(), params, 0)
    assert facts["vllm_same_grade"] == 1.0
    assert facts["answers"] == 3 * len(known)
    assert len([each for each in library.asked if each.temperature == 0.05]) == 3 * len(known)
