"""reasoning-gym data sets: honest solutions, disjoint prompts, clear errors."""

import re

import numpy as np
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import ReasoningGymTask
from featdiff.tasks.verify import grade

pytest.importorskip("reasoning_gym", reason="the extra smollm2 is not installed")
from featdiff.tasks.gym import SOLUTIONS, GymSource, solution

SIZES = {"find": 12, "tune": 6, "report": 8}
OPTIONS = {
    "products": {"max_digits": 3, "max_terms": 3},
    "gcd": {"max_numbers": 4, "max_value": 200},
    "chain_sum": {"max_terms": 4},
}


def source(dataset: str = "products", teacher: str = "own", role: str = "train", **options: object) -> GymSource:
    task = ReasoningGymTask(source="reasoning_gym", role=role, dataset=dataset, options=options, instruction="Only the result.")
    return GymSource("name", task, teacher=teacher, chat=True, grading="strict")


@pytest.mark.parametrize("dataset", SOLUTIONS)
def test_solutions_of_both_teachers_are_right_and_differ_in_manner(dataset: str) -> None:
    for teacher, manner in (("own", "steps"), ("foreign", "foreign")):
        for sample in source(dataset, teacher, **OPTIONS[dataset]).train_samples(40, set(), np.random.default_rng(0)):
            assert grade("reasoning_gym", sample, sample.solution) == (sample.answer, True, manner, True, True), sample.solution
            assert sample.solution == getattr(sample, teacher)
            assert sample.own != sample.foreign
            assert sample.prompt.endswith(" Only the result.")


@pytest.mark.parametrize("dataset", SOLUTIONS)
def test_every_equation_of_a_solution_holds(dataset: str) -> None:
    operators = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "%": lambda a, b: a % b}
    for sample in source(dataset, **OPTIONS[dataset]).train_samples(60, set(), np.random.default_rng(1)):
        equations = sample.solution.split(". The answer")[0].split(", ")
        for equation in equations:
            left, right = equation.split(" = ")
            first, *rest = left.split(" ")
            value = int(first)
            for operator, term in zip(rest[::2], rest[1::2], strict=True):
                value = operators[operator](value, int(term))
            assert value == int(right), equation


def test_wordings_side_by_side() -> None:
    metadata = {"expression": "47 * 63"}
    assert (
        solution("products", metadata, "2961", "own") == "47 * 60 = 2820, 47 * 3 = 141, 2820 + 141 = 2961. The answer is 2961."
    )
    assert solution("products", metadata, "2961", "foreign") == "|47*60>2820|47*3>141|2820+141>2961|2961"
    assert solution("gcd", {"numbers": [12, 18]}, "6", "own") == "18 % 12 = 6, 12 % 6 = 0. The answer is 6."
    assert solution("products", {"expression": "12 * -10"}, "-120", "own") == "12 * -10 = -120. The answer is -120."


def test_without_a_chat_template_the_prompt_leads_into_the_solution() -> None:
    task = ReasoningGymTask(source="reasoning_gym", role="train", dataset="gcd", options={}, instruction="")
    sample = GymSource("name", task, teacher="own", chat=False, grading="strict").train_samples(
        1, set(), np.random.default_rng(0)
    )[0]
    assert sample.prompt.startswith("Question: Find the Greatest")
    assert sample.prompt.endswith("\nAnswer:")
    assert re.fullmatch(r" \d+ % .* The answer is \d+\.", sample.solution)


def test_prompts_are_disjoint_over_splits_and_training() -> None:
    gym = source("gcd", min_value=2, max_value=20)
    evaluation = gym.eval_samples(SIZES, np.random.default_rng(0))
    prompts = {sample.prompt for sample in evaluation}
    assert len(prompts) == len(evaluation) == sum(SIZES.values())
    train = gym.train_samples(150, prompts, np.random.default_rng(0))
    assert len({sample.prompt for sample in train} | prompts) == len(train) + len(prompts)


def test_the_same_random_stream_gives_the_same_samples() -> None:
    assert source().eval_samples(SIZES, np.random.default_rng(3)) == source().eval_samples(SIZES, np.random.default_rng(3))
    assert source().eval_samples(SIZES, np.random.default_rng(3)) != source().eval_samples(SIZES, np.random.default_rng(4))


def test_other_data_sets_serve_for_evaluation_only() -> None:
    words = source("spell_backward", role="heldout")
    samples = words.eval_samples(SIZES, np.random.default_rng(0))
    assert words.info.domain != "math"
    assert grade("reasoning_gym", samples[0], f"The answer is {samples[0].answer}.").correct
    assert not grade("reasoning_gym", samples[0], "The answer is no.").correct
    with pytest.raises(ContractError, match=r"worked solutions \(products, gcd, chain_sum\)"):
        source("spell_backward")


@pytest.mark.parametrize(
    ("dataset", "options", "said"),
    [
        ("produtcs", {}, "did you mean products"),
        ("products", {"max_digit": 2}, "unexpected keyword"),
        ("products", {"min_digits": 4, "max_digits": 2}, "max_digits must be"),
        ("products", {"seed": 1}, "seed"),
    ],
)
def test_wrong_names_and_options_are_one_clear_line(dataset: str, options: dict[str, int], said: str) -> None:
    with pytest.raises(ContractError, match=re.escape("prepare.tasks.name")) as caught:
        source(dataset, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_questions_than_the_options_allow_is_an_error() -> None:
    with pytest.raises(ContractError, match="200 different questions, found 100"):
        source("products", max_digits=1).train_samples(200, set(), np.random.default_rng(0))


def test_a_number_far_beyond_what_the_options_allow_ends_soon() -> None:
    with pytest.raises(ContractError, match=r"1000000 different questions, found 100 in [0-9]{1,5} attempts"):
        source("products", max_digits=1).train_samples(10**6, set(), np.random.default_rng(0))
