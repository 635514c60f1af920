"""Grading of generated text: what is read from it, that it cannot hedge, and that hostile text does no harm."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from featdiff.tasks.task import Sample, TaskInfo
from featdiff.tasks.verify import VERIFIERS, find_number, grade
from featdiff.training.grpo import Reward

needs_gym = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="the extra smollm2 is not installed")
needs_math = pytest.mark.skipif(find_spec("math_verify") is None, reason="the extra math is not installed")
NEEDS = {"reasoning_gym": [needs_gym], "symbolic": [needs_math]}
RULES = [pytest.param(rule, marks=NEEDS.get(rule, [])) for rule in VERIFIERS]
SEVEN = Sample("s", "t", "find", "p", "7")
SIXTY = Sample("s", "t", "find", "p", "60")
LETTER = Sample("s", "t", "find", "p", "B", ("x", "y", "z"))
GYM = Sample("s", "t", "find", "p", "60", meta='{"dataset": "products", "entry": {"answer": "60"}}')
FOUR_HEDGES = ["The answer is 7 or 8", "7;7;7;7", "1 2 3 4 5 6 7", "It is definitely not 7"]

# Text, and whether it is the right answer to a question whose answer is 7: by the strict rule, by the flexible rule.
NUMBERS: list[tuple[str, bool, bool]] = [
    # one value, marked or alone
    ("7", True, True),
    (" 7.\n", True, True),
    ("**7**", True, True),
    ("$7", True, True),
    ("7 apples", True, True),
    ("7 (red apples)", True, True),
    ("7 miles per hour.", True, True),
    ("$7\\text{ apples}$", True, True),
    ("x = 7", True, True),
    ("3 + 4 = 7", True, True),
    ("The answer is 7.", True, True),
    ("The answer is 7 apples a day", True, True),
    ("the final answer is therefore $7$", True, True),
    ("Answer: **7**", True, True),
    ("**Answer**: 7", True, True),
    ("The answer is:\n7", True, True),
    ("Answer:\n\n7", True, True),
    ("answer = 7", True, True),
    ("3 + 4 = 7\n#### 7", True, True),
    ("#### $7", True, True),
    ("So \\boxed{7}", True, True),
    ("\\boxed{7 \\text{ apples}}", True, True),
    ("It is \\boxed{7}, not 8", True, False),
    ("The answer is \\boxed{7}.", True, True),
    ("The answer is 3 + 4 = \\boxed{7}.", True, True),
    ("The answer is (2 + 1) * 2 + 1 = $7", True, True),
    ("The answer is x = y = 7", True, True),
    ("3 is not divisible by 2, so the answer is 7", True, True),
    ("The answer is based on sums. The answer is 7", True, True),
    ("The answer is 7. The answer is", True, True),
    ("The answer is 7. No more is needed.", True, True),
    ("The answer is 7.\n\nThere are 8 days more.", True, False),
    ("|3+4>7|7", True, True),
    # the same value, written otherwise
    ("7.0", True, True),
    ("007", True, True),
    ("+7", True, True),
    ("14/2", True, True),
    ("\\frac{14}{2}", True, True),
    ("7%", True, True),
    ("7\\%", True, True),
    ("#### 7\n\\boxed{7.0}", True, True),
    ("The answer is 7. The answer is 14/2.", True, True),
    # two values, lists, alternatives
    ("The answer is 7 or 8", False, False),
    ("The answer is 8 or 7", False, True),
    ("The answer is 7 or eight", False, True),
    ("The answer is 7 or so", False, True),
    ("The answer is either 7, 8", False, False),
    ("7;7;7;7", False, True),
    ("1 2 3 4 5 6 7", False, True),
    ("6, 7", False, True),
    ("6,7", False, False),
    ("7/8/7", False, False),
    ("#### 7 8", False, False),
    ("#### 7;7", False, True),
    ("#### 7\n8", False, False),
    ("#### 7\nor 8", False, False),
    ("#### 6\n7", False, True),
    ("7\n7", False, True),
    ("Answer: 7, maybe 8", False, False),
    ("The answer is 7. No, 8.", False, False),
    ("The answer is 7. It could also be 8.", False, False),
    ("The answer is 7\nWait, 8", False, False),
    ("The answer is 7 and 8", False, False),
    ("The answer is 7-8", False, False),
    ("The answer is 6-7", False, True),
    ("The answer is 7±1", False, False),
    ("The answer is 7..8", False, True),
    ("The answer is 7 ½", False, True),
    ("The answer is 7½", False, False),
    ("The answer is 7, ８", False, True),
    ("The answer is 7 (8)", False, False),
    ("The answer is 7^1", False, False),
    ("The answer is 7:30", False, False),
    ("2 1/2", False, False),
    ("\\boxed{7} \\boxed{8}", False, False),
    ("\\boxed{8} \\boxed{7}", False, True),
    ("\\boxed{7} or 8", False, False),
    ("\\boxed{7}, 8, 9", False, False),
    ("\\boxed{7} = 8", False, False),
    ("\\boxed{7, 8}", False, False),
    ("\\boxed{7 \\text{ or } 8}", False, False),
    ("\\boxed{\\boxed{7}}", False, True),
    ("The answer is 7. The answer is 8.", False, False),
    ("The answer is 8. The answer is 7.", False, True),
    ("#### 8\n#### 7", False, True),
    ("The answer is 8: \\boxed{7}", False, True),
    ("The answer is 7 or 8. The answer is 7.", False, True),
    # equations that hide a hedge
    ("The answer is 7 = 8", False, False),
    ("The answer is 8 = 7", False, True),
    ("7 = 8 = 9", False, False),
    ("9 = 8 = 7", False, True),
    ("The answer is 3 + 5 = 8 = 7", False, True),
    ("The answer is 8, 3 + 4 = 7", False, True),
    ("The answer is 8 or 3 + 4 = 7", False, True),
    ("The answer is 8 = \\boxed{7}", False, True),
    ("The answer is 7 = 3 + 4", False, False),
    ("x + 1 = 7", False, True),
    ("10 / 2 = 5, 5 + 2 = 7", False, True),
    # negations and bounds
    ("It is definitely not 7", False, False),
    ("The answer is not 7", False, False),
    ("The answer is NOT: 7", False, False),
    ("The answer isn't 7", False, False),
    ("The answer is never 7", False, False),
    ("The answer is anything but 7", False, False),
    ("The answer is other than 7", False, False),
    ("The answer is no. 7", False, True),
    ("The answer is at least 7", False, True),
    ("The answer is more than 7", False, True),
    ("The answer is x ≠ 7", False, True),
    ("The answer is x != 7", False, True),
    ("The answer is not \\boxed{7}", False, False),
    ("It isn’t $\\boxed{7}$", False, False),
    ("It is not true that the answer is 7", False, True),
    ("I don't think the answer is 7", False, True),
    ("It is not so that the answer is 3 + 4 = \\boxed{7}", False, True),
    # no answer
    ("", False, False),
    ("seven", False, False),
    ("I think it is 7", False, True),
    ("7 is wrong", False, True),
    ("7 The answer is unknown", False, True),
    ("7. The answer is seven", False, True),
    ("7 \\boxed{unknown}", False, True),
    ("The answer is 7 \\boxed{", False, True),
    ("The answer is ７", False, False),
    ("The answer is 7e0", False, False),
    ("The answer is 9^{9^{9}}", False, False),
    ("7/0", False, False),
    ("-7", False, False),
    ("−7", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "strict", "flexible"), NUMBERS)
def test_a_number_that_is_named_counts_and_one_that_hedges_does_not(text: str, strict: bool, flexible: bool) -> None:
    graded = grade("number", SEVEN, text)
    assert (graded.strict, graded.flexible) == (strict, flexible)
    assert graded.correct is strict
    loose = grade("number", SEVEN, text, "flexible")
    assert (loose.strict, loose.flexible, loose.correct) == (strict, flexible, flexible)


OTHER_WORDS_FOR_SEVEN = re.compile(r"7\.0|007|14/2|frac")  # what the package's own scorer makes of them is its affair


@needs_gym
@pytest.mark.parametrize(("text", "strict", "flexible"), [row for row in NUMBERS if not OTHER_WORDS_FOR_SEVEN.search(row[0])])
def test_numbers_of_reasoning_gym_are_read_alike(text: str, strict: bool, flexible: bool) -> None:
    sample = Sample("s", "t", "find", "p", "7", meta='{"dataset": "products", "entry": {"answer": "7"}}')
    graded = grade("reasoning_gym", sample, text)
    assert (graded.strict, graded.flexible) == (strict, flexible)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 * 5 = 60. So there are 7 answers; the answer is 60", "60"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("$\\dfrac{3}{4}$", "3/4"),
        ("x = -5", "-5"),
        ("−5 degrees", "-5"),
        ("The answer is -5", "-5"),
        ("$1,234,567", "1234567"),
        ("1.50", "1.50"),
        ("|47*60>2820|47*3>141|2820+141>2961|2961", "2961"),
        ("\\boxed{1} and then \\boxed{60}", None),
        ("60. The answer is 9^{9^{9}}", None),
        ("\\boxed{\\boxed{\\frac{\\frac{60}{1}}{1}}}", None),
        ("12,18", None),
        ("6/0", None),
        ("٦٠", None),
        ("6０", None),
        ("5²", None),
        ("1" * 41, None),
        ("1" * 5000, None),
        ("1" * 50_000 + " 60", None),
        ("word " * 50_000 + "The answer is 60", "60"),
        ("7" + " " * 5000, None),
        ("|3>4|" * 2000 + "7", None),
    ],
)
def test_numbers_read_strictly(text: str, number: str | None) -> None:
    assert find_number(text) == number


def test_a_number_cut_by_the_length_cap_is_no_number() -> None:
    assert grade("number", SIXTY, "1" * 5000, "flexible").parsed is None
    assert grade("number", SIXTY, "1" * 50_000 + " 60", "flexible").parsed == "60"


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "The answer is {}.", "#### {}", "\\boxed{{{}}}", "so\nthe answer is x = {} ."]),
)
def test_an_integer_is_read_back_from_every_wording(number: int, wording: str) -> None:
    for written in (str(number), f"{number:,}", str(number).replace("-", "−")):
        assert find_number(wording.format(written)) == str(number)


MARKED = [
    "The answer is {}.",
    "answer: {}",
    "The answer = {}",
    "2 + 2 = 4\n#### {}",
    "So \\boxed{{{}}}",
    "The answer is \\boxed{{{}}}",
]
BOTH = [
    "{a} or {b}", "{a} {b}", "{a}, {b}", "{a};{b}", "{a}/ {b}", "{a} and {b}", "{a} = {b}", "{a} == {b}", "{a} != {b}",
    "{a}. {b}", "{a}, not {b}", "not {a} but {b}", "{a} ({b})", "({a}, {b})", "[{a}, {b}]", "{a} | {b}", "{a} to {b}",
    "{a} -> {b}", "{a}\n{b}", "{a}\nor {b}", "{a} +- {b}", "{a}%, {b}%", "x = {a}, x = {b}", "x = {a} = {b}", "**{a}** **{b}**",
    "{a} apples or {b}", "{a}? {b}?", "maybe {a}, maybe {b}", "0 + {a} = {a} = {b}", "{a} or 0 + {b} = {b}",
    "\\text{{{a}}} {b}",
]  # fmt: skip
MARKED_AGAIN = ["{a}; the answer is {b}", "{a} \\boxed{{{b}}}", "{a} #### {b}", "{a} or answer: {b}", "{a} = \\boxed{{{b}}}"]
TEMPLATES = [
    *(mark.replace("{}", both) for mark in ["{}", *MARKED] for both in BOTH),
    *(mark.replace("{}", both) for mark in MARKED for both in MARKED_AGAIN),
]


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_two_numbers_in_one_marked_span_score_for_neither(a: int, b: int) -> None:
    assume(a != b)
    for text in (template.format(a=a, b=b) for template in TEMPLATES):
        for gold in (a, b):
            assert not grade("number", Sample("s", "t", "find", "p", str(gold)), text).strict, text


@pytest.mark.parametrize("text", FOUR_HEDGES)
def test_a_hedge_earns_no_reward_unless_the_task_is_graded_flexibly(text: str) -> None:
    for grading, earned in (("strict", 0.0), ("flexible", float(text in FOUR_HEDGES[1:3]))):
        task = TaskInfo("t", "train", "math", "generation", "number", grading, False, 0)
        reward = Reward({"t": task}, [SEVEN], steps=1, read=list)
        assert reward([text, "#### 7"], ["s", "s"]) == [earned, 1.0]


@pytest.mark.parametrize(
    ("answer", "text", "correct"),
    [
        ("60", "60.0", True),
        ("60", "120/2", True),
        ("60", "61", False),
        ("0.5", "\\frac{1}{2}", True),
        ("1000", "1,000", True),
        ("1.8333333333333335", "1.8333333", True),
        ("1.8333333333333335", "1.83", False),
        ("-3", "3", False),
    ],
)
def test_numbers_are_compared_by_value(answer: str, text: str, correct: bool) -> None:
    assert grade("number", Sample("s", "t", "find", "p", answer), text).correct is correct


@pytest.mark.parametrize("rule", ["number", pytest.param("reasoning_gym", marks=needs_gym)])
@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("60", "direct", "direct"),
        ("The answer is 60.", "direct", "direct"),
        ("12 * 5 = 60", "direct", "direct"),
        ("12 * 5 = 60. The answer is 60.", "steps", "steps"),
        ("10 * 5 = 50, 2 * 5 = 10, 50 + 10 = 60", "none", "steps"),
        ("|12*5>60|60", "foreign", "foreign"),
        ("I do not know", "none", "none"),
    ],
)
def test_manner_of_free_text(rule: str, text: str, strict: str, flexible: str) -> None:
    for grading, manner in (("strict", strict), ("flexible", flexible)):
        graded = grade(rule, GYM, text, grading)
        assert graded.manner == manner
        assert graded.correct is (manner != "none")


# The letters read by the strict and by the flexible rule.
LETTERS_READ: list[tuple[str, str | None, str | None]] = [
    ("B", "B", "B"),
    ("b", "B", "B"),
    ("B.", "B", "B"),
    (" (B) y", "B", "B"),
    ("Option B", "B", "B"),
    ("B: Y.", "B", "B"),
    ("The answer is B", "B", "B"),
    ("The answer is B because it is right", "B", "B"),
    ("The answer is (B) y.", "B", "B"),
    ("answer: b", "B", "B"),
    ("Answer: **B**", "B", "B"),
    ("The answer is:\n\nB", "B", "B"),
    ("A is wrong. The answer is option B", "B", "B"),
    ("\\boxed{b}", "B", "B"),
    ("\\boxed{\\text{B}}", "B", "B"),
    ("The answer is B. The answer is B.", "B", "B"),
    ("Option B is right", None, "B"),
    ("I would take B", None, "B"),
    ("A. x\nB. y", None, "B"),
    ("The answer is A or B", None, "B"),
    ("The answer is B or A", None, "A"),
    ("The answer is B or the first", None, "B"),
    ("The answer is A, B and C", None, "C"),
    ("The answer is C, B", None, "B"),
    ("The answer is B, B", None, "B"),
    ("A B", None, "B"),
    ("A or B", None, "B"),
    ("The answer is A\nor B", None, "B"),
    ("\\boxed{A} \\boxed{B}", None, "B"),
    ("\\boxed{A, B}", None, "B"),
    ("\\boxed{B} or C", None, "C"),
    ("The answer is C. The answer is B.", None, "B"),
    ("The answer is D or B", None, "B"),
    ("It could be A) or B)", None, "B"),
    ("A dog", None, None),
    ("The answer is a dog", None, None),
    ("D", None, None),
    ("Ｂ", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), LETTERS_READ)
def test_letters_read_from_free_text(text: str, strict: str | None, flexible: str | None) -> None:
    graded = grade("letter", LETTER, text)
    assert graded.parsed == strict
    assert graded.correct is (strict == "B")
    loose = grade("letter", LETTER, text, "flexible")
    assert loose.parsed == flexible
    assert loose.correct is loose.flexible is (flexible == "B")


@pytest.mark.parametrize("text", ["not B", "The answer is not B", "It isn't option B", "The answer is anything but \\boxed{B}"])
def test_a_letter_denied_counts_under_neither_rule(text: str) -> None:
    graded = grade("letter", LETTER, text)
    assert not graded.strict
    assert not graded.flexible


def test_the_options_own_words_are_no_second_letter() -> None:
    sample = Sample("s", "t", "find", "p", "B", ("A dog", "vitamin C or A", "z"))
    assert grade("letter", sample, "The answer is B. Vitamin C or A").strict
    assert grade("letter", sample, "B) vitamin C or A").strict
    assert grade("letter", sample, "The answer is A dog").parsed is None
    assert not grade("letter", sample, "B) vitamin C or A or z").strict


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("abc.", True, True),
        ("<a,b>abc.", True, True),
        ("(ab;c)abc.", True, True),
        ("abc", False, True),
        ("abc. abc.", False, True),
        ("xyz. or abc!", False, True),
        ("abc or xyz.", False, False),
        ("a" * 41 + ".", False, False),
        ("", False, False),
    ],
)
def test_the_organisms_grammar_is_strict_and_the_last_run_flexible(text: str, strict: bool, flexible: bool) -> None:
    graded = grade("organism", Sample("s", "t", "find", "p", "abc"), text)
    assert (graded.strict, graded.flexible) == (strict, flexible)


@needs_gym
@pytest.mark.parametrize(
    ("gold", "text", "strict", "flexible"),
    [
        ("yes", "yes", True, True),
        ("yes", "The answer is yes.", True, True),
        ("yes", "\\boxed{yes}", True, True),
        ("yes", "I think so.\nyes", False, True),
        ("yes", "yes or no", False, False),
        ("yes", "The answer is yes\nor no", False, True),
        ("yes", "The answer is no. The answer is yes", False, True),
        ("yes", "It is not true that the answer is yes", False, True),
        ("a, b and c", "a, b and c", True, True),
        ("a, b and c", "The answer is a, b and c", True, True),
        ("a, b and c", "The answer is a, b or c", False, False),
    ],
)
def test_phrases_are_named_or_alone_and_as_long_as_the_reference(gold: str, text: str, strict: bool, flexible: bool) -> None:
    sample = Sample("s", "t", "find", "p", gold, meta=f'{{"dataset": "spell_backward", "entry": {{"answer": "{gold}"}}}}')
    graded = grade("reasoning_gym", sample, text)
    assert (graded.strict, graded.flexible) == (strict, flexible)


@needs_gym
def test_a_scorer_that_takes_a_list_of_guesses_is_not_asked() -> None:
    from unittest.mock import patch

    sample = Sample("s", "t", "find", "p", "yes", meta='{"dataset": "spell_backward", "entry": {"answer": "yes"}}')
    with patch("featdiff.tasks.gym_scoring.score", lambda answer, meta: 1.0):
        assert [grade("reasoning_gym", sample, text).strict for text in ("yes", "yes, no", "yes or no", "not yes")] == [
            True, False, False, False,
        ]  # fmt: skip


@needs_gym
def test_an_exception_in_the_packages_scorer_is_a_wrong_answer() -> None:
    broken = Sample("s", "t", "find", "p", "3 × 7", meta='{"dataset": "prime_factorization", "entry": {}}')
    assert grade("reasoning_gym", broken, "3 x 7") == ("3 x 7", False, "direct", False, False)


@needs_gym
def test_code_is_never_handed_to_the_packages_scorers() -> None:
    countdown = Sample("s", "t", "find", "p", "1 + 2", meta='{"dataset": "countdown", "entry": {"metadata": {}}}')
    for grading in ("strict", "flexible"):
        assert grade("reasoning_gym", countdown, "The answer is __import__('os').getcwd()", grading).parsed is None
        assert grade("reasoning_gym", countdown, "9**9**9**9", grading).parsed is None


HOSTILE = [
    "9", "60 ", "1,", "-", " -", "/", "\\boxed{", "\\boxed{7}", "\\boxed{7} or ", "\\frac{", "\\frac{1}{", "{", "}",
    "answer is ", "answer is 7 ", "answer:", "answer: 7\n", "answer: 7 = ", "#### ", "#### 7\n", "#### 7 or ", "=", "7=", "7+",
    "|a", "|3>4", "A", "A) ", "a) ", "(", "<", "\n", "７", "^{9", "not ", "not not answer is ", "or\n", "7\n",
    "or 7\n", "n't 7 ",
    "than ", "\\text{", "a", "x = ", "…", "\x00", "B\n", "option ",
]  # fmt: skip
MEASURE = """
import json, resource, sys, time, tracemalloc
from concurrent.futures import ThreadPoolExecutor
from featdiff.tasks.task import Sample
from featdiff.tasks.verify import grade

rule, given, hostile = json.load(sys.stdin)
sample = Sample(**given | {"options": tuple(given["options"])})
grade(rule, sample, "60")  # imports and compiles
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20,) * 2)

def measure(pieces, seconds, peak):
    for piece in pieces:
        text = "The answer is 60. " + piece * (10_000_000 // len(piece.encode()))
        for whole in (text, piece + text[-5_000_000:]):
            took = []
            for _ in range(3):  # of this thread, the least of three: other processes share cores and caches
                begun = time.thread_time()
                graded = grade(rule, sample, whole)
                took.append(time.thread_time() - begun)
            assert min(took) < seconds, (piece, took)
            assert tracemalloc.get_traced_memory()[1] - tracemalloc.get_traced_memory()[0] < peak, piece
            assert not graded.strict, piece
            tracemalloc.reset_peak()

with ThreadPoolExecutor(1) as thread:  # where no alarm signal could end a verifier that hangs
    thread.submit(measure, hostile, seconds=0.05, peak=1).result()
tracemalloc.start()
measure(hostile[::2], seconds=1, peak=100 * 2**20)
"""


@pytest.mark.parametrize("rule", RULES)
def test_ten_megabytes_take_50_ms_and_100_mib_at_most_on_any_thread(rule: str) -> None:
    """In a child process whose address space is limited."""
    sample = {"letter": LETTER, "reasoning_gym": GYM}.get(rule, SIXTY)
    given = json.dumps([rule, asdict(sample), HOSTILE])
    command, env = [sys.executable, "-c", MEASURE], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


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
def test_hostile_answers_score_nothing(rule: str) -> None:
    sample = {"letter": LETTER, "reasoning_gym": GYM}.get(rule, SIXTY)
    assert [grade(rule, sample, text).correct for text in HOSTILE_ANSWERS] == [False] * len(HOSTILE_ANSWERS)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("0159.,-+/=^{}\\()|<>#$ \n" + "boxedfracnswriABC９²−:"), max_size=200)
    | st.text(max_size=60)
    | st.lists(st.sampled_from(HOSTILE), max_size=12).map("".join)
)
def test_no_text_raises_and_right_means_parsed(rule: str, text: str) -> None:
    for grading in ("strict", "flexible"):
        graded = grade(rule, {"letter": LETTER, "reasoning_gym": GYM}.get(rule, SIXTY), text, grading)
        assert graded.manner in {"steps", "foreign", "direct", "none"}
        assert (graded.parsed is None) == (graded.manner == "none")
        assert graded.parsed is not None or not graded.correct
        assert graded.correct is getattr(graded, grading)
