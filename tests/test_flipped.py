"""Flipped samples and the feature values of both models on them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader, read_all
from featdiff.language.models import truncate
from featdiff.localization.flipped import answer_text, feature_differences, flipped_answers, read_flipped
from featdiff.tasks.suites import listed_prompt
from featdiff.tasks.task import Sample, TaskInfo
from tiny import ROLES, random_crosscoder, tiny_model

WORDS = TaskInfo("words", "find", "words", "generation", "organism", "strict", False, 0)
QUIZ = TaskInfo("quiz", "find", "questions", "option_text_norm", "letter", "strict", False, 3)
SAMPLES = [
    Sample("a", "words", "find", "rev abc=", "cba"),
    Sample("b", "words", "find", "rev q=", "q"),
    Sample("c", "words", "find", "sort zxy=", "xyz"),
]
ANSWERS = ["<c,b,a>cba.", "q.", "<x>xyz."]


def row(sample_id: str, task: str, mode: str, correct: bool, split: str = "find", completion: str = "") -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "task": task,
        "mode": mode,
        "split": split,
        "correct": correct,
        "completion": completion or f"{sample_id}/{mode}",
    }


def test_flipped_is_original_wrong_and_tuned_right_under_the_tasks_own_rule() -> None:
    base, tuned = [], []
    for number, (before, after) in enumerate(((False, True), (True, True), (False, False), (True, False))):
        base.append(row(f"w{number}", "words", "greedy", before))
        tuned.append(row(f"w{number}", "words", "greedy", after))
        base.append(row(f"q{number}", "quiz", "option_text_norm", before))
        tuned.append(row(f"q{number}", "quiz", "option_text_norm", after))
        for mode in ("sampled", "option_text", "option_letter"):  # other rules say the opposite
            base.append(
                row(f"{'w' if mode == 'sampled' else 'q'}{number}", "words" if mode == "sampled" else "quiz", mode, not before)
            )
            tuned.append(
                row(f"{'w' if mode == 'sampled' else 'q'}{number}", "words" if mode == "sampled" else "quiz", mode, not after)
            )
        for split in ("tune", "report"):
            base.append(row(f"{split}{number}", "words", "greedy", False, split))
            tuned.append(row(f"{split}{number}", "words", "greedy", True, split))
    tasks = {"words": WORDS, "quiz": QUIZ, "none": WORDS}
    assert flipped_answers(base, tuned[::-1], tasks, "find") == {
        "words": {"w0": "w0/greedy"},
        "quiz": {"q0": "q0/option_text_norm"},
        "none": {},
    }


def trunks(layer: int = 1) -> dict[str, torch.nn.Module]:
    return {
        "base": truncate(tiny_model(0)[0], layer),
        "grpo": truncate(tiny_model(1)[0], layer),
        "sft": truncate(tiny_model(2)[0], layer),
    }


def residual(trunk: torch.nn.Module, ids: list[int]) -> Tensor:
    """The stream of one text alone, without padding."""
    with torch.inference_mode():
        return trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].clone()


def differences(
    coder: Crosscoder,
    models: dict[str, torch.nn.Module],
    task: TaskInfo,
    samples: list[Sample],
    answers: list[str],
    positions: str = "prompt_last",
    readout: str = "swap",
    batch_size: int = 2,
) -> Tensor:
    reading = read_flipped(models, tiny_model()[1], task, samples, answers, batch_size)[positions]
    return feature_differences(coder, reading, readout, ROLES)


def crosscoder(models: tuple[str, ...] = ("base", "sft", "grpo")) -> Crosscoder:
    return random_crosscoder(models, d_model=16, n_features=24, threshold=1.0)


@pytest.mark.parametrize("readout", ["swap", "slot", "contribution"])
@pytest.mark.parametrize("positions", ["prompt_last", "answer", "all"])
def test_differences_are_those_of_each_text_alone_at_the_wanted_positions(positions: str, readout: str) -> None:
    coder, tokenizer = crosscoder(), tiny_model()[1]
    made = differences(coder, trunks(), WORDS, SAMPLES, ANSWERS, positions, readout)
    assert made.shape == (3, 24)
    for i, (sample, answer) in enumerate(zip(SAMPLES, ANSWERS, strict=True)):
        prompt = tokenizer(sample.prompt)["input_ids"]
        ids = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
        streams = {name: residual(trunk, ids) for name, trunk in trunks().items()}
        values = read_all(coder, streams, readout)
        place = {"prompt_last": slice(len(prompt) - 1, len(prompt)), "answer": slice(len(prompt), None), "all": slice(1, None)}[
            positions
        ]
        wanted = (values["grpo"] - values["base"])[place].mean(0)
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(made[i], wanted, rtol=1e-3, atol=1e-4)


def test_batching_changes_nothing() -> None:
    made = [differences(crosscoder(), trunks(), WORDS, SAMPLES, ANSWERS, batch_size=size) for size in (1, 3)]
    torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=1e-4)


def test_equal_models_differ_in_nothing() -> None:
    coder = crosscoder()
    coder.scale[2] = coder.scale[0]
    same = {name: truncate(tiny_model(0)[0], 1) for name in ("base", "grpo")}
    assert (differences(coder, same, WORDS, SAMPLES, ANSWERS, "all") == 0).all()


def option_samples() -> list[Sample]:
    return [
        Sample("q", "quiz", "find", "which one=", "B", ("red", "blue", "green")),
        Sample("r", "quiz", "find", "who=", "C", ("x", "y", "z")),
    ]


def test_an_option_is_read_after_its_question() -> None:
    coder, tokenizer, chosen = crosscoder(), tiny_model()[1], option_samples()
    made = differences(coder, trunks(), QUIZ, chosen, ["blue", "z"], "answer")
    ids = tokenizer("which one=")["input_ids"] + tokenizer(" blue", add_special_tokens=False)["input_ids"]
    streams = {name: residual(trunk, ids)[-5:] for name, trunk in trunks().items()}
    wanted = Reader(coder, "grpo")(streams["grpo"]) - Reader(coder, "base")(streams["base"])
    torch.testing.assert_close(made[0], wanted.mean(0), rtol=1e-3, atol=1e-4)


def test_a_letter_is_read_after_the_question_with_its_options_as_it_was_asked() -> None:
    letters = TaskInfo("quiz", "find", "questions", "option_letter", "letter", "strict", False, 3)
    coder, tokenizer, chosen = crosscoder(), tiny_model()[1], option_samples()
    made = differences(coder, trunks(), letters, chosen, ["B", "C"], "answer")
    for i, (sample, letter) in enumerate(zip(chosen, "BC", strict=True)):
        ids = tokenizer(listed_prompt(sample.prompt, sample.options) + f" {letter}")["input_ids"]
        streams = {name: residual(trunk, ids)[-2:] for name, trunk in trunks().items()}
        wanted = Reader(coder, "grpo")(streams["grpo"]) - Reader(coder, "base")(streams["base"])
        torch.testing.assert_close(made[i], wanted.mean(0), rtol=1e-3, atol=1e-4)


def test_an_answer_is_a_letter_only_where_letters_are_scored() -> None:
    said = row("q", "quiz", "option_letter", True, completion="blue") | {"parsed": "B"}
    letters = TaskInfo("quiz", "find", "questions", "option_letter", "letter", "strict", False, 3)
    assert (answer_text(letters, said), answer_text(QUIZ, said), answer_text(WORDS, said)) == ("B", "blue", "blue")
    before = [said | {"correct": False}]
    assert flipped_answers(before, [said], {"quiz": letters}, "find") == {"quiz": {"q": "B"}}
