"""The page of answers: what it holds is what the tables hold, and a browser filters it."""

import json
import re
import shutil
import subprocess

import pytest

from featdiff.report import browse
from featdiff.report.build import _environment
from featdiff.report.picture import BROWSERS

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def made(studied):
    """Evidence of a synthetic study, its columns, and the pages by name."""
    evidence = studied(n=60, n_features=700)
    return evidence, browse.sources(evidence), browse.pages(evidence, _environment())


def part(pages, number):
    text = pages[f"browse/{number}.js"]
    assert text.startswith(f"featdiffPart({number}, ")
    return json.loads(text.removeprefix(f"featdiffPart({number}, ").removesuffix(");\n"))


def test_every_question_of_every_task_has_the_answers_of_every_model_and_edit(made):
    evidence, columns, pages = made
    assert pages.keys() == {"browse.html"} | {f"browse/{number}.js" for number in range(len(evidence.tasks))}
    seen = 0
    for number, task in enumerate(evidence.tasks):
        found = part(pages, number)
        ids = [question[0] for question in found["questions"]]
        assert ids == [key for key, sample in evidence.questions.items() if sample.task == task]
        for column, answers in zip(columns, found["answers"], strict=True):
            if column["key"] == ["grpo"]:
                rows = {row["sample_id"]: row for row in evidence.answers["grpo"] if row["mode"] == evidence.primary_mode(task)}
            elif column["key"] == ["zero_tuned", "set"]:
                rows = {
                    row["sample_id"]: row
                    for row in evidence.edited
                    if (row["purpose"], row["control"]) == ("zero_tuned", "set")
                }
            else:
                continue
            for key, answer in zip(ids, answers, strict=True):
                row = rows[key]
                assert answer == [row["completion"] or row["parsed"] or "", row["correct"], row["manner"] == "none"]
                seen += 1
    assert seen == 2 * len(evidence.questions)


def test_an_edit_is_held_against_its_own_model_and_the_one_it_is_to_become_like(made):
    _, columns, _ = made
    [zeroed] = [column for column in columns if column["key"] == ["zero_tuned", "set"]]
    [amplified] = [column for column in columns if column["key"] == ["amplify_original", "set"]]
    assert [columns[zeroed[name]]["key"] for name in ("before", "toward")] == [["grpo"], ["base"]]
    assert [columns[amplified[name]]["key"] for name in ("before", "toward")] == [["base"], ["grpo"]]
    assert not any(column["key"][-1] in browse.UNEDITED for column in columns)


def test_without_a_set_there_are_models_alone(studied):
    evidence = studied(n=60, n_features=700, status="too_few_flipped", rl_transfers=False)
    assert [column["key"] for column in browse.sources(evidence)] == [[model] for model in evidence.models]
    assert "browse.html" in browse.pages(evidence, _environment())


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("which", ["all", "flipped", "changed", "broken", "returned"])
def test_a_browser_shows_the_questions_that_the_filter_keeps(made, tmp_path, which):
    evidence, columns, pages = made
    (tmp_path / "browse").mkdir()
    for name, text in pages.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    task = list(evidence.tasks).index("sort")
    page = f"file://{tmp_path}/browse.html#task={task}&which={which}"
    options = ["--headless", "--no-sandbox", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run([BROWSER, *options, page], capture_output=True, text=True, check=True).stdout
    assert 'data-drawn="yes"' in dom
    found, shown = part(pages, task), [columns.index(column) for column in columns if column["shown"]]
    original, tuned, zeroed = (found["answers"][number] for number in shown)
    keep = {
        "all": lambda *_: True,
        "flipped": lambda a, b, _: not a[1] and b[1],
        "changed": lambda _, b, c: b[1] != c[1],
        "broken": lambda _a, _b, c: c[2],
        "returned": lambda a, _, c: a[0] == c[0],
    }[which]
    expected = [
        question[0] for question, *answers in zip(found["questions"], original, tuned, zeroed, strict=True) if keep(*answers)
    ]
    assert re.findall(r'<td id="([^"]+)"', dom) == expected[:50]
    assert f"{len(expected)} of {len(found['questions'])} questions" in dom
    heads = re.findall(r"<th [^>]*>([^<]*)</th>", dom)
    assert heads[1:] == [columns[number]["label"] for number in shown]
