"""Grading of generated text: what is read from it, how it was answered, and that hostile text does no harm."""

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featdiff.tasks.task import Sample
from featdiff.tasks.verify import VERIFIERS, find_number, grade

needs_gym = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="the extra smollm2 is not installed")
RULES = [pytest.param(rule, marks=needs_gym) if rule == "reasoning_gym" else rule for rule in VERIFIERS]
SIXTY = Sample("s", "t", "find", "p", "60")
LETTER = Sample("s", "t", "find", "p", "B", ("x", "y", "z"))
GYM = Sample("s", "t", "find", "p", "60", meta='{"dataset": "products", "entry": {"answer": "60"}}')


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("60", "60"),
        ("The answer is 60.", "60"),
        ("The answer is 12 * 5 = 60.", "60"),
        ("12 * 5 = 60. So there are 7 answers; the answer is 60", "60"),
        ("Answer: **60**", "60"),
        ("2 * 3 = 6\n#### 6", "6"),
        ("It is \\boxed{60}, not 61", "60"),
        ("\\boxed{1} and then \\boxed{60}", "60"),
        ("\\boxed{60 \\text{ apples}}", "60"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("$\\dfrac{3}{4}$", "3/4"),
        ("x = -5", "-5"),
        ("−5 degrees", "-5"),
        ("9-5", "5"),
        ("$1,234,567", "1234567"),
        ("2x^2 = 16", "16"),
        ("1.50", "1.50"),
        ("7 (apples)", "7"),
        ("|47*60>2820|47*3>141|2820+141>2961|2961", "2961"),
        ("The answer is sixty", None),
        ("", None),
        ("6/0", None),
        ("5/6/7", None),
        ("12,18", None),
        ("9e99", None),
        ("\\boxed{", None),
        ("60 \\boxed{unknown}", None),
        ("60. The answer is 9^{9^{9}}", None),
        ("\\boxed{9^{9^{9}}}", None),
        ("\\frac{\\frac{1}{2}}{3}", None),
        ("\\boxed{\\boxed{\\frac{\\frac{60}{1}}{1}}}", None),
        ("１２", None),
        ("٦٠", None),
        ("6０", None),
        ("5²", None),
        ("1" * 41, None),
    ],
)
def test_numbers_read_from_free_text(text: str, number: str | None) -> None:
    assert find_number(text) == number


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "The answer is {}.", "#### {}", "\\boxed{{{}}}", "so\nwe get = {} ."]),
)
def test_an_integer_is_read_back_from_every_wording(number: int, wording: str) -> None:
    for written in (str(number), f"{number:,}"):
        assert find_number(wording.format(written)) == str(number)


@pytest.mark.parametrize(
    ("answer", "text", "correct"),
    [
        ("60", "60.0", True),
        ("60", "120/2", True),
        ("60", "61", False),
        ("0.5", "\\frac{1}{2}", True),
        ("1.8333333333333335", "1.8333333", True),
        ("1.8333333333333335", "1.83", False),
        ("-3", "3", False),
    ],
)
def test_numbers_are_compared_by_value(answer: str, text: str, correct: bool) -> None:
    assert grade("number", Sample("s", "t", "find", "p", answer), text).correct is correct


@pytest.mark.parametrize("rule", ["number", pytest.param("reasoning_gym", marks=needs_gym)])
@pytest.mark.parametrize(
    ("text", "manner"),
    [
        ("60", "direct"),
        ("The answer is 60.", "direct"),
        ("12 * 5 = 60", "direct"),
        ("12 * 5 = 60. The answer is 60.", "steps"),
        ("10 * 5 = 50, 2 * 5 = 10, 50 + 10 = 60", "steps"),
        ("|12*5>60|60", "foreign"),
        ("I do not know", "none"),
    ],
)
def test_manner_of_free_text(rule: str, text: str, manner: str) -> None:
    graded = grade(rule, GYM, text)
    assert graded.manner == manner
    assert graded.correct is (manner != "none")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        (" (B) y", "B"),
        ("The answer is B", "B"),
        ("answer: b", "B"),
        ("Answer: **B**", "B"),
        ("Option B is right", "B"),
        ("\\boxed{b}", "B"),
        ("A. x\nB. y", "A"),
        ("It could be A) or B)", None),
        ("A dog", None),
        ("The answer is a dog", None),
        ("D", None),
        ("Ｂ", None),
        ("", None),
    ],
)
def test_letters_read_from_free_text(text: str, letter: str | None) -> None:
    graded = grade("letter", LETTER, text)
    assert graded.parsed == letter
    assert graded.correct is (letter == "B")


@needs_gym
def test_an_exception_in_the_packages_scorer_is_a_wrong_answer() -> None:
    broken = Sample("s", "t", "find", "p", "3 × 7", meta='{"dataset": "prime_factorization", "entry": {}}')
    assert grade("reasoning_gym", broken, "3 x 7") == ("3 x 7", False, "direct")


@needs_gym
def test_code_is_never_handed_to_the_packages_scorers() -> None:
    countdown = Sample("s", "t", "find", "p", "1 + 2", meta='{"dataset": "countdown", "entry": {"metadata": {}}}')
    assert grade("reasoning_gym", countdown, "The answer is __import__('os').getcwd()") == (None, False, "none")
    assert grade("reasoning_gym", countdown, "9**9**9**9").parsed is None


HOSTILE = [
    "9",
    "60 ",
    "1,",
    "-",
    " -",
    "/",
    "\\boxed{",
    "\\frac{",
    "{",
    "}",
    "answer is ",
    "answer:",
    "#### ",
    "=",
    "|a",
    "A",
    "A) ",
    "(",
    "<",
    "\n",
    "９",
    "^{9",
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("piece", HOSTILE)
def test_megabytes_are_graded_in_bounded_time(rule: str, piece: str) -> None:
    sample = {"letter": LETTER, "reasoning_gym": GYM}.get(rule, SIXTY)
    grade(rule, sample, "warm up")
    start = time.perf_counter()
    graded = grade(rule, sample, piece * 2_000_000)
    assert time.perf_counter() - start < 5
    assert not graded.correct or (piece == "60 " and graded.parsed == "60")


HOSTILE_ANSWERS = [
    "9^{9^{9}}",
    "\\boxed{9^{9^{9}}}",
    "1" * 1_000_000,
    "\\frac{" * 100_000 + "60",
    "__import__('os').system('touch /tmp/hostile')",
    "٦٠",
    "",
    "\\boxed{60} \\boxed{61}",
]


@pytest.mark.parametrize("rule", RULES)
def test_hostile_answers_score_nothing_off_the_main_thread_too(rule: str) -> None:
    sample = {"letter": LETTER, "reasoning_gym": GYM}.get(rule, SIXTY)
    with ThreadPoolExecutor(1) as thread:  # where no alarm signal could end a verifier that hangs
        grades = thread.submit(lambda: [grade(rule, sample, text) for text in HOSTILE_ANSWERS]).result(timeout=30)
    assert [graded.correct for graded in grades] == [False] * len(HOSTILE_ANSWERS)


def test_a_number_cut_by_the_length_cap_is_no_number() -> None:
    assert find_number("1" * 5000) is None
    assert find_number("1" * 50_000 + " 60") == "60"
    assert find_number("7" + " " * 5000) is None


@pytest.mark.parametrize("rule", RULES)
@given(
    text=st.text(alphabet=st.sampled_from("0159.,-+/=^{}\\()|<>#$ \n" + "boxedfracnswriABC９²−"), max_size=200)
    | st.text(max_size=60)
)
def test_no_text_raises_and_right_means_parsed(rule: str, text: str) -> None:
    graded = grade(rule, {"letter": LETTER, "reasoning_gym": GYM}.get(rule, SIXTY), text)
    assert graded.manner in {"steps", "foreign", "direct", "none"}
    assert (graded.parsed is None) == (graded.manner == "none")
    assert graded.parsed is not None or not graded.correct
