"""README results come from metrics/summary.json and from nowhere else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from featdiff.artifacts.artifact import sha256_file
from featdiff.report.picture import BROWSERS, PAGE, PICTURE, SUMMARY, label, main
from featdiff.report.readme import with_results

ROOT = Path(__file__).resolve().parents[1]


def test_readme_shows_the_committed_summary() -> None:
    readme, path = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "metrics/summary.json"
    if not path.is_file():
        pytest.skip("no committed run")
    assert with_results(readme, json.loads(path.read_text(encoding="utf-8"))) == readme, "run python -m featdiff.report.readme"


def test_the_picture_is_of_the_committed_summary() -> None:
    if not (ROOT / SUMMARY).is_file():
        pytest.skip("no committed run")
    assert label(ROOT / PICTURE) == sha256_file(ROOT / SUMMARY), "run make picture"


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_a_picture_knows_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main() == 2
    assert "report/index.html: not found; make repro" in capsys.readouterr().err
    for name, text in {PAGE: "<h1>verdict</h1>", SUMMARY: "{}", PICTURE: ""}.items():
        name.parent.mkdir(exist_ok=True)
        name.write_text(text)
    assert main() == 0
    assert label(PICTURE) == sha256_file(SUMMARY)
    monkeypatch.setenv("BROWSER", "false")
    capsys.readouterr()
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert label(PICTURE) == sha256_file(SUMMARY), "the old one stays"


def test_a_changed_number_changes_the_text_and_only_between_the_markers() -> None:
    effect = {"n": 9, "effect": -0.5, "low": -0.6, "high": -0.4, "random_low": -0.1, "random_high": 0.1}
    keys = ("transfer", "forgetting", "features", "necessary", "sufficient", "dictionary")
    summary = {
        "verdicts": dict.fromkeys(keys, "supported"),
        "claims": {key: f"claim of {key}" for key in keys},
        "accuracy": {"base": {"find": 0.25}, "grpo": {"find": 0.75}},
        "effects": {"zero_tuned": {"sort": effect}, "amplify_original": {"sort": effect}},
    }
    page = "top\n<!-- results:begin -->\nold\n<!-- results:end -->\nbottom\n"
    filled = with_results(page, summary)
    assert filled.startswith("top\n<!-- results:begin -->\n")
    assert filled.endswith("<!-- results:end -->\nbottom\n")
    assert "old" not in filled
    assert "| claim of features | **supported** |" in filled
    assert "-0.50 [-0.60, -0.40]" in filled
    changed = copy.deepcopy(summary)
    changed["accuracy"]["grpo"]["find"] = 0.5
    assert with_results(page, changed) != filled
    assert with_results(filled, summary) == filled
    undrawn = copy.deepcopy(summary)
    undrawn["effects"]["zero_tuned"] = {"sort": effect | {"random_low": None, "random_high": None}}
    assert "| -0.50 [-0.60, -0.40] | – | -0.50 [-0.60, -0.40] | -0.10 … +0.10 |" in with_results(page, undrawn)
    with pytest.raises(ValueError, match="markers"):
        with_results("no markers", summary)
