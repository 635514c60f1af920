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


def dumped(page):
    """The page as a browser has it when its scripts have run."""
    options = ["--headless", "--no-sandbox", "--virtual-time-budget=5000", "--dump-dom"]
    return subprocess.run([BROWSER, *options, page], capture_output=True, text=True, check=True).stdout


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


def test_the_tokens_of_a_question_are_there_with_the_values_of_every_feature(made):
    evidence, _, pages = made
    index = json.loads(re.search(r'id="index">(.*?)</script>', pages["browse.html"], re.DOTALL)[1])
    assert [k for k, _ in index["features"]] == evidence.localize["features"]
    seen = 0
    for number in range(len(evidence.tasks)):
        found = part(pages, number)
        for s, (k, largest) in enumerate(index["features"]):
            rows = {row["sample_id"]: row for row in evidence.token_values if row["feature_id"] == k}
            for question, tokens, shades in zip(found["questions"], found["tokens"], found["shades"][s], strict=True):
                row = rows.get(question[0])
                if row is None:
                    assert shades == 0
                    continue
                assert tokens == [row["answer_from"], row["tokens"]]
                for name, shade in zip(("tuned", "original"), shades, strict=True):
                    assert [value * largest / 100 for value in shade] == pytest.approx(row[name], abs=largest / 200)
                seen += 1
    assert seen == len(evidence.token_values) > 0


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
    dom = dumped(page)
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
    assert "shaded" not in re.findall(r'<pre class="([^"]*)"', dom)
    assert heads[1:] == [columns[number]["label"] for number in shown]


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_a_browser_shades_the_tokens_where_a_feature_fires(made, tmp_path):
    evidence, _, pages = made
    (tmp_path / "browse").mkdir()
    for name, text in pages.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    task, k = list(evidence.tasks).index("sort"), evidence.localize["features"][0]
    dom = dumped(f"file://{tmp_path}/browse.html#task={task}&feature={k}")
    rows = [row for row in evidence.token_values if row["feature_id"] == k and row["sample_id"].startswith("sort")]
    shown = re.findall(r'<pre class="shaded">(.*?)</pre>', dom, re.DOTALL)
    assert len(shown) == len(rows) > 0
    spans = re.findall(r'<span title="tuned (\S+), original (\S+)" class="(\w*)" style="--value: (\S+)%;">', shown[0])
    assert [float(tuned) for tuned, *_ in spans] == pytest.approx(rows[0]["tuned"], abs=0.1)
    assert [name for *_, name, _ in spans] == ["", "", "", "answer"]
    assert "<i>" not in shown[0], "text of a model is no markup"
