"""Families as a source of samples and of pretraining texts."""

from collections import Counter

import numpy as np
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.tasks import organism
from featdiff.tasks.organism import FamilySource
from featdiff.tasks.task import Text
from featdiff.tasks.verify import grade

SIZES = {"find": 20, "tune": 10, "report": 30}


def test_splits_are_disjoint_and_of_the_size_asked_for() -> None:
    samples = FamilySource("reverse", "find", "own", grading="strict").eval_samples(SIZES, np.random.default_rng(0))
    assert Counter(sample.split for sample in samples) == SIZES
    assert len({sample.prompt for sample in samples}) == len(samples)
    assert len({sample.sample_id for sample in samples}) == len(samples)


@pytest.mark.parametrize(("teacher", "manner"), [("own", "steps"), ("foreign", "foreign")])
def test_train_samples_avoid_banned_prompts_and_follow_the_teacher(teacher: str, manner: str) -> None:
    source = FamilySource("add", "train", teacher, grading="strict")
    banned = {sample.prompt for sample in source.eval_samples({"find": 3000, "tune": 1, "report": 1}, np.random.default_rng(0))}
    samples = source.train_samples(500, banned, np.random.default_rng(1))
    assert not banned & {sample.prompt for sample in samples}
    assert all(grade("organism", sample, sample.solution) == (sample.answer, True, manner, True, True) for sample in samples)


def test_asking_for_more_questions_than_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(organism, "ATTEMPTS", 2)
    with pytest.raises(
        ContractError, match=r"prepare.tasks.add: expected 9000 further questions, found 3645 in all; ask for fewer"
    ):
        FamilySource("add", "train", "own", grading="strict").eval_samples(
            {"find": 9000, "tune": 0, "report": 0}, np.random.default_rng(0)
        )


def test_texts_have_the_shares_asked_for_and_no_banned_prompt() -> None:
    rng = np.random.default_rng(0)
    texts = organism.texts(4000, ["add", "reverse"], {"steps": 0.25, "direct": 0.15, "mistake": 0.6}, 0.0, {}, set(), rng)
    manners = Counter(text.source.split("/")[1] for text in texts)
    assert abs(manners["steps"] / 4000 - 0.25) < 0.03
    assert abs(manners["direct"] / 4000 - 0.15) < 0.03
    banned = {text.prompt for text in texts[:2000]}
    again = organism.texts(500, ["add", "reverse"], {"steps": 1.0}, 0.5, {"steps": 1.0}, banned, rng)
    assert not banned & {text.prompt for text in again}


def test_a_family_without_foreign_wording_is_answered_in_steps() -> None:
    texts = organism.texts(50, ["reverse"], {"foreign": 1.0}, 0.0, {}, set(), np.random.default_rng(0))
    assert {text.source for text in texts} == {"reverse/steps"}


def test_a_worked_example_is_marked_and_answered_in_the_manner_of_the_question() -> None:
    rng = np.random.default_rng(1)
    alone, examples = {"steps": 0.1, "direct": 0.3, "mistake": 0.6}, {"steps": 0.5, "direct": 0.2, "mistake": 0.3}
    texts = organism.texts(2000, ["add", "reverse", "sort"], alone, 0.5, examples, set(), rng)
    shown = [text for text in texts if "\n" in text.prompt]
    assert abs(len(shown) / len(texts) - 0.5) < 0.04
    for text in shown:
        first, _, _ = text.prompt.partition("\n")
        assert first.startswith(organism.EXAMPLE)
        assert ("<" in first) == text.source.endswith("/steps")
    assert not any(text.prompt.startswith(organism.EXAMPLE) for text in texts if text not in shown)

    def steps(group: list[Text]) -> float:
        return float(np.mean([text.source.endswith("/steps") for text in group]))

    assert abs(steps(shown) - 0.5) < 0.05
    assert abs(steps([text for text in texts if "\n" not in text.prompt]) - 0.1) < 0.03
