"""Question suites: columns, answers in every form, splits, and what is wrong with a bad file."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import HARNESS_SCORING, SuiteTask
from featdiff.tasks import external
from featdiff.tasks.external import Row, from_dataset, located, read_rows
from featdiff.tasks.suites import ADAPTERS, HARNESS, SuiteSource, listed_prompt, read_question
from featdiff.tasks.verify import grade

HERE = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data"
FILES = {
    "openbookqa": "qa/openbookqa/test.jsonl",
    "arc_challenge": "qa/arc_challenge/test.jsonl",
    "commonsense_qa": "qa/commonsense_qa/validation.jsonl",
    "sciq": "qa/sciq/validation.jsonl",
    "head_qa": "qa/head_qa/test.jsonl",
    "logiqa": "qa/logiqa/test.jsonl",
    "piqa": "qa/piqa/validation.jsonl",
}
SIZES = {"find": 1, "tune": 1, "report": 1}
LETTERS = {"question": "stem", "options": "choices", "answer": "key"}


def source(
    path: Path | str, columns: dict[str, str] | None = None, *, adapter: str = "columns", role: str = "find",
    scoring: str = "option_text_norm", max_chars: int = 10_000, chat: bool = True, seed: int = 0, suites: str = "hub",
    prompt: str = "own",
) -> SuiteSource:  # fmt: skip
    task = SuiteTask(
        source="suite", role=role, adapter=adapter, path=str(path), scoring=scoring, prompt=prompt, columns=columns
    )
    return SuiteSource("name", task, chat=chat, grading="strict", max_chars=max_chars, seed=seed, suites=suites)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_ones_own_by_columns_alone() -> None:
    suite = source(HERE / "letters.jsonl", LETTERS)
    samples = suite.eval_samples(SIZES, np.random.default_rng(0))
    assert suite.left_out == {"duplicate": 1, "ambiguous": 1}
    assert {sample.prompt: sample.options[sample.right_option] for sample in samples} == {
        "Question: Which of these floats on water?\nAnswer:": "a cork",
        "Question: Which of these gives light?\nAnswer:": "a lamp",
        "Question: Which of these is cold?\nAnswer:": "ice",
    }
    assert {sample.split for sample in samples} == {"find", "tune", "report"}
    assert (suite.info.verifier, suite.info.options, suite.info.chat, suite.info.domain) == ("letter", 3, False, "questions")


@pytest.mark.parametrize(
    ("file", "columns", "right"),
    [
        ("shapes.jsonl", {"question": "ask", "options": "one, two", "answer": "right"}, ["plum", "lead"]),
        ("keyed.jsonl", {"question": "ask", "options": "options", "answer": "right"}, ["gull", "carp"]),
    ],
)
def test_options_in_several_columns_or_keyed_by_their_labels(file: str, columns: dict[str, str], right: list[str]) -> None:
    questions = [read_question(row, columns) for row in read_rows(str(HERE / file))]
    assert [question.options[int(question.answer)] for question in questions] == right


@pytest.mark.parametrize(("answer", "index"), [(0, 0), (2, 2), ("c", 2), ("B", 1), ("no", 1), ("A", 0), ("5", 2), (" no ", 1)])
def test_answers_as_index_letter_or_text(answer: str | int, index: int) -> None:
    row = Row({"q": "?", "o": ["yes", "no", 5], "a": answer}, "f:1")
    assert read_question(row, {"question": "q", "options": "o", "answer": "a"}).answer == index


@pytest.mark.parametrize("answer", [3, -1, "D", "maybe", "0", "", None, True, ["yes"]])
def test_answers_that_are_none_of_the_options(answer: object) -> None:
    row = Row({"q": "?", "o": ["yes", "no", "so"], "a": answer}, "file.jsonl:7")
    with pytest.raises(ContractError, match=r"file.jsonl:7: a: expected"):
        read_question(row, {"question": "q", "options": "o", "answer": "a"})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "f.jsonl:2: line: expected JSON"),
        ("[1]", "f.jsonl:2: line: expected a JSON object, found list"),
        ("[" * 100_000, "f.jsonl:2: line: expected JSON"),
        ({"stem": "?", "choices": ["a", "b"]}, "f.jsonl:2: key: expected a column 'key', found columns stem, choices"),
        ({"stem": " ", "choices": ["a", "b"], "key": 0}, "f.jsonl:2: stem: expected a text, found a blank one"),
        ({"stem": "?", "choices": ["a"], "key": 0}, "f.jsonl:2: choices: expected 2 to 26 options, found 1"),
        ({"stem": "?", "choices": "a", "key": 0}, "f.jsonl:2: choices: expected a list, found str"),
        ({"stem": "?", "choices": ["a", None], "key": 0}, "f.jsonl:2: choices: expected a text, found NoneType"),
    ],
)
def test_a_malformed_row_is_named_by_line_and_column(tmp_path: Path, line: Any, said: str) -> None:
    path = write(tmp_path / "f.jsonl", {"stem": "?", "choices": ["a", "b"], "key": 0}, line)
    with pytest.raises(ContractError) as caught:
        source(path, LETTERS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="expected at least one, found none"):
        source(write(tmp_path / "empty.jsonl"), LETTERS)
    with pytest.raises(ContractError, match="No such file"):
        source(tmp_path / "absent.jsonl", LETTERS)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ContractError, match=r"binary.jsonl:1: line: expected JSON"):
        source(tmp_path / "binary.jsonl", LETTERS)


def test_a_mark_of_byte_order_and_windows_line_ends_are_no_errors(tmp_path: Path) -> None:
    rows = (HERE / "letters.jsonl").read_text(encoding="utf-8")
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.replace("\n", "\r\n").encode())
    assert source(tmp_path / "f.jsonl", LETTERS).questions == source(HERE / "letters.jsonl", LETTERS).questions


def test_a_local_folder_is_not_taken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "allenai/sciq").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ContractError, match="expected a data set of the hub, found a local folder allenai/sciq"):
        source("hub:allenai/sciq@" + "0" * 40 + "#test", adapter="sciq")


def test_too_few_rows_says_how_many_there_are_and_why() -> None:
    with pytest.raises(
        ContractError, match=r"expected 4 different questions for name, found 3 \(left out: 1 duplicate, 1 ambig"
    ):
        source(HERE / "letters.jsonl", LETTERS).eval_samples({"find": 2, "tune": 1, "report": 1}, np.random.default_rng(0))
    assert source(HERE / "letters.jsonl", LETTERS, max_chars=20).left_out["long"] == 5


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "stem", "options": "choices"}, "a column for answer"),
        ({"question": "stem", "answer": "key"}, "options for scoring option_text_norm"),
        ({**LETTERS, "answr": "key"}, "found answr"),
    ],
)
def test_columns_that_cannot_work(columns: dict[str, str], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        source(HERE / "letters.jsonl", columns)


def test_listed_prompt_and_letter_generation() -> None:
    plain = source(HERE / "letters.jsonl", LETTERS).eval_samples(SIZES, np.random.default_rng(0))[0]
    a, b, c = plain.options
    question = plain.prompt.removesuffix("\nAnswer:")
    assert listed_prompt(plain.prompt, plain.options) == f"{question}\nA. {a}\nB. {b}\nC. {c}\nAnswer:"
    suite = source(HERE / "letters.jsonl", LETTERS, scoring="generation")
    asked = suite.eval_samples(SIZES, np.random.default_rng(0))[0]
    assert suite.info.chat
    assert asked.prompt == f"{question}\nA. {a}\nB. {b}\nC. {c}\nGive only the letter of the right option.\nAnswer:"
    assert listed_prompt(asked.prompt, asked.options) == asked.prompt
    assert grade("letter", asked, f"{asked.answer}.").correct


def test_option_order_depends_on_seed_and_question_only() -> None:
    def orders(seed: int, stream: int) -> dict[str, tuple[str, ...]]:
        samples = source(HERE / "letters.jsonl", LETTERS, seed=seed).eval_samples(SIZES, np.random.default_rng(stream))
        return {sample.prompt: sample.options for sample in samples}

    assert orders(0, 0) == orders(0, 1)
    assert len({json.dumps(orders(seed, 0), sort_keys=True) for seed in range(8)}) > 1


def test_word_problems_have_a_number_and_a_solution() -> None:
    columns = {"question": "question", "answer": "answer", "solution": "answer"}
    suite = source(HERE / "sums.jsonl", columns, role="train", scoring="generation")
    assert (suite.info.verifier, suite.info.options, suite.info.domain) == ("number", 0, "math")
    evaluation = suite.eval_samples({"find": 1, "tune": 0, "report": 0}, np.random.default_rng(0))
    train = suite.train_samples(2, {evaluation[0].prompt}, np.random.default_rng(1))
    assert {sample.answer for sample in [*evaluation, *train]} == {"6", "2.5", "4"}
    assert all(grade("number", sample, sample.solution) == (sample.answer, True, "steps", True, True) for sample in train)
    with pytest.raises(
        ContractError, match="expected 3 questions outside the evaluation splits with a right solution, found 2"
    ):
        suite.train_samples(3, {evaluation[0].prompt}, np.random.default_rng(1))


def test_only_right_solutions_are_taught(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", {"q": "1+1?", "a": 2, "s": "1+1 = 3"}, {"q": "1+2?", "a": 3, "s": "1+2 = 3"},
                 {"q": "1+3?", "a": 4, "s": "The answer is 3 or 4"})  # fmt: skip
    suite = source(path, {"question": "q", "answer": "a", "solution": "s"}, role="train", scoring="generation")
    assert [sample.answer for sample in suite.train_samples(1, set(), np.random.default_rng(0))] == ["3"]
    with pytest.raises(ContractError, match="found 1"):
        suite.train_samples(2, set(), np.random.default_rng(0))


@pytest.mark.parametrize("answer", ["two", "3:30 p.m.", "2 (red); 3 (blue)"])
def test_an_answer_that_is_not_one_number_is_named(tmp_path: Path, answer: str) -> None:
    path = write(tmp_path / "f.jsonl", {"q": "1+1?", "a": answer})
    with pytest.raises(ContractError, match=r"f.jsonl:1: a: expected a text with one number"):
        source(path, {"question": "q", "answer": "a"}, scoring="generation")


@pytest.mark.parametrize(
    "path",
    [
        "hub:allenai/sciq",
        "hub:allenai/sciq@" + "0" * 40,
        "hub:sciq@" + "0" * 40 + "#test",
        "hub:../..@" + "0" * 40 + "#test",
    ],
)
def test_hub_data_need_a_revision_and_a_split(path: str) -> None:
    with pytest.raises(ContractError, match="name revision and split"):
        source(path, adapter="sciq")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("list(read_rows('hub:allenai/sciq@' + '0' * 40 + '#test'))", "data set: expected one that loads"),
        ("located('suite:qa/sciq/test', 'hub')", "hub:allenai/sciq@main#test: revision: expected a branch or tag"),
        ("located('hub:allenai/sciq@v2#test', 'elsewhere')", "hub:allenai/sciq@v2#test: revision: expected a branch or tag"),
    ],
)
def test_an_unreachable_hub_is_one_line(call: str, said: str) -> None:
    program = (
        "from featdiff.tasks.external import located, read_rows\n"
        "from featdiff.artifacts.artifact import ContractError\n"
        f"try: {call}\n"
        "except ContractError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert said in done.stdout
    assert "SUITES=<folder>" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_suite_is_read_from_the_folder_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "qa/letters").mkdir(parents=True)
    shutil.copy(HERE / "letters.jsonl", tmp_path / "qa/letters/test.jsonl")
    named = source("suite:qa/letters/test", LETTERS, suites=str(tmp_path))
    assert named.questions == source(HERE / "letters.jsonl", LETTERS).questions
    pinned = "hub:allenai/sciq@" + "0" * 40 + "#test"
    assert located(pinned, str(tmp_path)) == pinned
    with pytest.raises(ContractError, match=r"suite:qa/\.\./test: path: expected suite:<kind>/<name>/<split>"):
        located("suite:qa/../test", str(tmp_path))
    with pytest.raises(ContractError, match=r"suite: expected one of aime24, .*found letters"):
        located("suite:qa/letters/test", "hub")


def test_rows_of_a_hub_data_set_read_like_lines_of_a_file() -> None:
    datasets = pytest.importorskip("datasets")
    lines = [row.values for row in read_rows(str(HERE / "letters.jsonl"))]
    rows = from_dataset(datasets.Dataset.from_list(lines), "hub:x")
    assert [read_question(row, LETTERS) for row in rows] == [
        read_question(row, LETTERS) for row in read_rows(str(HERE / "letters.jsonl"))
    ]


def test_every_adapter_of_the_params_exists() -> None:
    allowed = SuiteTask.model_fields["adapter"].annotation.__args__  # type: ignore[union-attr]
    assert set(allowed) == {*ADAPTERS, "columns"}


@pytest.mark.parametrize("adapter", FILES)
def test_real_suites(adapter: str) -> None:
    path = SHARED / FILES[adapter]
    if not path.is_file():
        pytest.skip("../shared/data is not here")
    suite = source(path, adapter=adapter)
    samples = suite.eval_samples({"find": 150, "tune": 100, "report": 240}, np.random.default_rng(0))
    assert len({sample.prompt for sample in samples}) == 490
    assert suite.info.options == {"commonsense_qa": 5, "piqa": 2}.get(adapter, 4)
    shares = Counter(sample.answer for sample in samples)
    # The right option must stand anywhere equally often: 490 draws, four standard errors.
    for letter in "ABCDE"[: suite.info.options]:
        p = 1 / suite.info.options
        assert abs(shares[letter] / 490 - p) < 4 * (p * (1 - p) / 490) ** 0.5
    assert all(sample.prompt.startswith("Question: ") and sample.prompt.endswith("\nAnswer:") for sample in samples)


@pytest.mark.parametrize(
    ("adapter", "question", "right"),
    [
        ("openbookqa", "There is most likely going to be fog around:", "a marsh"),
        ("arc_challenge", "An astronomer observes that a planet rotates faster", "Planetary days will become shorter."),
        ("commonsense_qa", "A revolving door is convenient", "bank"),
        ("sciq", "Who proposed the theory of evolution by natural selection?", "darwin"),
        ("head_qa", "Form extracellular fibers with high tensile strength:", "Collagen"),
        ("logiqa", "In the planning of a new district in a township", "Civic Park is north of the administrative service area"),
        ("piqa", "dresser", "finish, woodgrain with  bobby pin"),
    ],
)
def test_the_right_option_of_known_questions(adapter: str, question: str, right: str) -> None:
    path = SHARED / FILES[adapter]
    if not path.is_file():
        pytest.skip("../shared/data is not here")
    found = [item for item in source(path, adapter=adapter).questions if item.text.startswith(question)]
    assert found[0].options[int(found[0].answer)] == right


HARNESS_ROWS = {
    "openbookqa": {
        "question_stem": "Fog is found around", "choices": {"text": ["a marsh", "a desert"], "label": [*"AB"]}, "answerKey": "B"
    },
    "arc_challenge": {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
    "commonsense_qa": {"question": " Where? ", "choices": {"text": ["in", "out"], "label": ["A", "B"]}, "answerKey": "B"},
    "sciq": {
        "question": "Who?", "support": " Long ago.",
        "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d",
    },
    "head_qa": {"qtext": "Which?", "ra": 2, "answers": [{"aid": 1, "atext": "x"}, {"aid": 2, "atext": "y"}]},
    "logiqa": {"context": "All is well.", "query": "So?", "options": ["x", "y", "z"], "correct_option": 2},
    "piqa": {"goal": "Do it", "sol1": "so ", "sol2": "otherwise", "label": 0},
}  # fmt: skip
HARNESS_REQUESTS = {
    "openbookqa": ("Fog is found around", {" a marsh", " a desert"}, " a desert"),
    "arc_challenge": ("Question: Why?\nAnswer:", {" x", " y"}, " x"),
    "commonsense_qa": ("Question: Where?\nA. in\nB. out\nAnswer:", {" A", " B"}, " B"),
    "sciq": ("Long ago.\nQuestion: Who?\nAnswer:", {" a", " b", " c", " d"}, " d"),
    "head_qa": ("Question: Which?\nAnswer:", {" x", " y"}, " y"),
    "logiqa": ("Passage: All is well.\nQuestion: So?\nChoices:\nA. x\nB. y\nC. z\nAnswer:", {" x", " y", " z"}, " z"),
    "piqa": ("Question: Do it\nAnswer:", {" so ", " otherwise"}, " so "),
}
"""Context, continuations and the right one; tests/test_harness.py holds them against the harness where it is installed."""


@pytest.mark.parametrize("adapter", HARNESS)
def test_prompts_of_lm_evaluation_harness(adapter: str, tmp_path: Path) -> None:
    path, scoring = write(tmp_path / "f.jsonl", HARNESS_ROWS[adapter]), HARNESS_SCORING[adapter][0]
    orders = set()
    for seed in range(6):
        suite = source(path, adapter=adapter, scoring=scoring, prompt="harness", seed=seed)
        (sample,) = suite.eval_samples({"find": 1, "tune": 0, "report": 0}, np.random.default_rng(0))
        letters = scoring == "option_letter"
        context = listed_prompt(sample.prompt, sample.options) if letters else sample.prompt
        texts = [f" {text}" for text in ("ABCDE"[: len(sample.options)] if letters else sample.options)]
        assert (context, set(texts), texts[sample.right_option]) == HARNESS_REQUESTS[adapter]
        assert listed_prompt(context, sample.options) == context or adapter not in ("commonsense_qa", "logiqa")
        orders.add(sample.options)
    assert (len(orders) == 1) is (adapter in ("commonsense_qa", "logiqa"))  # options that are shown keep their order


@pytest.mark.parametrize(
    ("adapter", "scoring", "said"),
    [
        ("commonsense_qa", "option_text_norm", "scoring: option_letter with prompt harness and adapter commonsense_qa"),
        ("piqa", "option_letter", "scoring: option_text or option_text_norm with prompt harness and adapter piqa"),
        ("sciq", "generation", "scoring: option_text or option_text_norm"),
        ("math500", "generation", "prompt: harness is known for openbookqa, "),
    ],
)
def test_the_harness_scores_each_suite_in_its_own_way(adapter: str, scoring: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source("f.jsonl", adapter=adapter, scoring=scoring, prompt="harness")


def test_where_the_hub_has_one_split_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "_commit", lambda path, name, revision: "0" * 40)
    assert located("suite:math/aime24/test", "hub") == f"hub:HuggingFaceH4/aime_2024@{'0' * 40}#train"
    assert located("suite:math/aime25/test", "hub") == f"hub:math-ai/aime25@{'0' * 40}#test"
    assert located("suite:math/aime24/test", "here") == "here/math/aime24/test.jsonl"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"question": "q", "expression": "a", "answer": "a"}, "expression or answer, found both"),
        ({"question": "q", "expression": "a", "options": "o"}, "expression or options, found both"),
    ],
)
def test_an_expression_takes_the_place_of_the_answer(columns: dict[str, str], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        source(HERE / "sums.jsonl", columns, scoring="generation")
