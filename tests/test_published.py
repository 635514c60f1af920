"""Published figures beside ours: data that is checked, rows that say what is missing, and no verdict that reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from featdiff import stats
from featdiff.config.profiles import render_profile
from featdiff.config.published import PUBLISHED, Published, published
from featdiff.config.reading import ConfigError, parse_yaml
from featdiff.report.build import render
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence
from featdiff.report.published import NO_MODEL, NO_SET, NOT_ASKED, Beside, beside
from featdiff.report.sources import traced
from featdiff.report.summary import headline, summarise
from featdiff.report.tables import Cell
from featdiff.report.words import MISSING
from project import ROOT
from synthetic_study import STUDY

MODEL = "Qwen3-4B"
SUITES: dict[str, Any] = {
    "likelihood": True,
    "train": ("math500",),
    "find": ("openbookqa", "commonsense_qa", "head_qa", "sciq", "arc_challenge"),
    "heldout": ("logiqa", "piqa"),
    "control": (),
    "n": 60,
    "n_features": 700,
}
REPORT = STUDY.report.model_copy(update={"paper_model": MODEL})


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def shown(evidence: Evidence) -> Beside:
    found = beside(Claims(evidence, REPORT, 0), published(MODEL))
    assert found is not None
    return found


def cells(table: Any) -> dict[str, list[Cell]]:
    return {row[0].note: row for row in table.rows}


def amount(text: str) -> float:
    return float(text.replace("−", "-").replace("+", ""))


def page_of(evidence: Evidence, params: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    claims = Claims(evidence, params, 0)
    verdicts = claims.verdicts()
    trace, paper = traced(claims, verdicts, {}, lambda _: 1), published(params.paper_model)
    html = render(evidence, claims, verdicts, [], params, "qwen3_4b", trace, {}, paper)["index.html"]
    summary = summarise(evidence, claims, verdicts, [])
    return html, summary, headline(claims, summary)


def test_the_figures_of_a_task_whose_size_is_known_are_counts_of_its_questions() -> None:
    found = published(MODEL)
    assert found is not None
    known = [
        (figure, task.questions)
        for model in found.models.values()
        for _, figures in model.accuracy
        for name, figure in figures.items()
        if (task := found.tasks[name]).questions
    ]
    assert len(known) == 18
    for figure, questions in known:
        assert abs(round(figure / 100 * questions) * 100 / questions - figure) < 0.05 + 1e-9


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "conf/profiles").glob("*.yaml")))
def test_profiles_name_models_and_tasks_that_the_file_has(profile: str) -> None:
    params = parse_yaml(render_profile(profile), profile)
    found = published(params["report"]["paper_model"])
    assert (found is not None) == (profile in ("qwen3_4b", "qwen2_5_7b"))
    if found:
        figures = found.models[params["report"]["paper_model"]]
        assert params["prepare"]["tasks"].keys() - {"math"} == {*found.tasks}
        for _, accuracy in figures.accuracy:
            assert accuracy.keys() | figures.zeroed.keys() == found.tasks.keys()


def test_accuracy_stands_beside_the_published_one_with_its_difference(studied: Callable[..., Evidence]) -> None:
    evidence = studied(**SUITES)
    paper, claims, found = published(MODEL), Claims(evidence, REPORT, 0), shown(evidence)
    assert paper is not None
    figures = dict(paper.models[MODEL].accuracy)
    assert [label for label, _ in found.accuracy] == ["base", "SFT", "GRPO"]
    for role, (_, table) in zip(figures, found.accuracy, strict=True):
        rows, model = cells(table), getattr(evidence.roles, role)
        assert rows.keys() == figures[role].keys()
        for task in evidence.tasks.keys() & rows.keys():
            ours = claims.estimate([task], claims.outcomes.model(model))
            assert ours is not None
            _, printed, here, apart = rows[task]
            assert amount(printed.text) == figures[role][task]
            assert amount(here.text) == pytest.approx(100 * ours.value, abs=0.051)
            assert here.note.endswith("n = 60")
            assert amount(apart.text) == pytest.approx(100 * ours.value - figures[role][task], abs=0.051)


def test_both_samples_count_where_the_published_number_of_questions_is_known(studied: Callable[..., Evidence]) -> None:
    evidence = studied(**SUITES)
    claims, rows = Claims(evidence, REPORT, 0), cells(dict(shown(evidence).accuracy)["GRPO"])
    ends = {task: [amount(end) for end in re.findall(r"[−\d.]+", rows[task][3].note)] for task in ("math500", "sciq")}
    ours = {task: claims.estimate([task], claims.outcomes.model("grpo")) for task in ends}
    theirs = stats.binomial(385, 500, REPORT.confidence)
    difference = stats.minus(ours["math500"], theirs)
    assert rows["math500"][1].note == "n = 500"
    assert ends["math500"] == pytest.approx([100 * difference.low, 100 * difference.high], abs=0.051)
    assert rows["sciq"][1].note == "n not stated"
    assert ends["sciq"] == pytest.approx([100 * ours["sciq"].low - 89.5, 100 * ours["sciq"].high - 89.5], abs=0.051)


def test_changes_are_those_of_the_set_on_flipped_samples(studied: Callable[..., Evidence]) -> None:
    evidence, figures = studied(**SUITES), yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))["models"][MODEL]
    found = shown(evidence)
    purposes = {"GRPO, set zeroed": ("zero_tuned", "zeroed"), "base, set amplified": ("amplify_original", "amplified")}
    assert [label for label, _ in found.changes] == list(purposes)
    for label, table in found.changes:
        purpose, key = purposes[label]
        rows = cells(table)
        assert rows.keys() == figures[key].keys()
        assert "Published: 50 features" in table.caption
        effects = {
            row["task"]: row
            for row in evidence.effects
            if (row["purpose"], row["control"], row["subset"]) == (purpose, "set", "flipped")
        }
        for task, effect in effects.items():
            if task in rows:
                assert amount(rows[task][1].text) == figures[key][task]
                assert amount(rows[task][2].text) == pytest.approx(100 * effect["effect"], abs=0.051)
                assert rows[task][2].note.endswith(f"n = {effect['n']}")


def test_what_has_no_counterpart_says_why(studied: Callable[..., Evidence]) -> None:
    whole = shown(studied(**SUITES))
    assert [cell.text for cell in cells(whole.accuracy[0][1])["aime24"][2:]] == [MISSING, MISSING]
    assert cells(whole.accuracy[0][1])["aime24"][2].note == NOT_ASKED
    assert (whole.printed, whole.measured) == (35, 29)
    assert shown(studied(**SUITES | {"reported": ("aime24", "aime25")})).measured == 35

    fewer = SUITES | {"find": ("openbookqa", "sciq", "arc_challenge"), "heldout": ("piqa",), "contrast": None}
    found = shown(studied(**fewer))
    assert cells(found.accuracy[2][1])["commonsense_qa"][2].note == NOT_ASKED
    assert [label for label, _ in found.accuracy] == ["base", "contrast", "GRPO"]
    assert {row[2].note for row in found.accuracy[1][1].rows} == {NO_MODEL}
    nothing = shown(studied(**SUITES | {"status": "empty_intersection"}))
    assert {row[2].note for _, table in nothing.changes for row in table.rows} == {NO_SET}
    assert nothing.measured == 15


def test_the_section_appears_where_a_paper_is_named_and_changes_no_verdict(studied: Callable[..., Evidence]) -> None:
    evidence = studied(**SUITES)
    alone, paired = page_of(evidence, STUDY.report), page_of(evidence, REPORT)
    assert alone[1:] == paired[1:], "verdicts and numbers are the study's own"
    assert "Beside the paper" not in alone[0]
    assert 'href="#published"' in paired[0]
    section = re.findall(r'<section id="published">.*?</section>', paired[0], re.DOTALL)
    assert len(section) == 1
    assert f"printed of {MODEL}" in section[0]
    assert "Of 35 published figures, 29 have one of this study beside them" in section[0]
    whole = paired[0].replace('<a href="#published">Beside the paper</a>', "").replace(section[0], "")
    assert whole.split() == alone[0].split(), "nothing else on the page changes"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": None}, ["source", "valid string"]),
        ({"models/Qwen3-4B/features": 0}, ["models.Qwen3-4B.features", "greater than 0"]),
        ({"models/Qwen3-4B/accuracy/tuned": {"math500": 770.0}}, ["accuracy.tuned.math500", "less than or equal to 100"]),
        ({"models/Qwen3-4B/accuracy/rl": {}}, ["accuracy.rl", "unknown key"]),
        ({"models/Qwen3-4B/zeroed": {"sqiq": -14.0}}, ["Qwen3-4B.zeroed: sqiq is not in tasks; did you mean sciq?"]),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: list[str]
) -> None:
    data = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    for path, value in change.items():
        *sections, key = path.split("/")
        place = data
        for section in sections:
            place = place[section]
        place[key] = value
    (tmp_path / "conf").mkdir()
    (tmp_path / PUBLISHED).write_text(yaml.safe_dump(data), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        published(MODEL)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("conf/published.yaml: ")
    for word in words:
        assert word in said


def test_a_model_that_is_not_in_the_file_is_one_line_before_anything_runs(project: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"report\.paper_model: qwen3-4b: not in conf/published\.yaml; did you mean Qwen3-4B\?"
    ):
        published("qwen3-4b")
    project.set({"report.paper_model": "Qwen3-4b"})
    for command in (["stages/check.py"], ["-m", "featdiff.config.profiles", "check"]):
        project.refused(project.run(*command), ".outside", "report.paper_model", "did you mean Qwen3-4B?")


def test_the_file_is_whole() -> None:
    assert isinstance(published("Qwen2.5-7B"), Published)
    assert published(None) is None
