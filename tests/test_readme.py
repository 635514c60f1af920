"""README results come from metrics/summary.json and from nowhere else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from featdiff.report.readme import with_results

ROOT = Path(__file__).resolve().parents[1]


def test_readme_shows_the_committed_summary() -> None:
    readme, path = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "metrics/summary.json"
    if not path.is_file():
        pytest.skip("no committed run")
    assert with_results(readme, json.loads(path.read_text(encoding="utf-8"))) == readme, "run python -m featdiff.report.readme"


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
