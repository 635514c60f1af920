"""Probes on the page: what is drawn was measured, and the sentence follows its rule."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from featdiff.report.evidence import Evidence, Row
from featdiff.report.probe_figures import probes, sentences
from synthetic_study import STUDY, probe_rows

MARGIN = 0.05


@pytest.fixture
def evidence() -> Evidence:
    """Probes, and nothing else."""
    nothing = {field.name: [] for field in fields(Evidence)}
    return Evidence(**nothing | {"roles": STUDY.roles, "arms": STUDY.arms, "probes": probe_rows()})  # type: ignore[arg-type]


def changed(evidence: Evidence, **probes: dict[str, float]) -> str:
    """What is said of the answers of two models with other numbers of some probes."""

    def row(old: Row) -> Row:
        return old | probes.get(old["probe"], {}) if old["models"] == "original + tuned" else old

    return sentences(replace(evidence, probes=[row(old) for old in evidence.probes]), MARGIN)[2]


def test_every_auc_is_drawn_with_its_interval(evidence: Evidence) -> None:
    panel = probes(evidence)
    assert panel is not None
    assert [figure.title for figure in panel.figures] == [
        "Own answers of base and GRPO (n = 1200, 11 tasks)",
        "Texts that show the manner, read in base (n = 1200, 11 tasks)",
    ]
    (trace,) = panel.figures[0].data
    rows = [row for row in evidence.probes if row["models"] == "original + tuned"]
    assert trace["y"][::-1] == [
        "whole stream", "1 feature", "5 features", "1 feature of a random dictionary", "5 features of a random dictionary",
        "the set (3)", "tuned − original, one direction",
    ]  # fmt: skip
    assert trace["x"][::-1] == [row["auc"] for row in rows]
    ends = [value + more for value, more in zip(trace["x"], trace["error_x"]["array"], strict=True)]
    assert ends[::-1] == pytest.approx([row["auc_high"] for row in rows])


def test_each_group_of_models_has_its_sentence(evidence: Evidence) -> None:
    original, tuned, both, texts = sentences(evidence, MARGIN)
    assert original.startswith(
        "Own answers of base: too few of one label (4.0\u202f% of 1200 step by step; enough of both in 1 task)"
    )
    assert tuned.startswith("Own answers of GRPO: too few of one label")
    assert "not better than chance" in texts
    assert both.startswith("Own answers of base and GRPO: the whole residual stream reads it with AUC 0.98 [0.94,\u00a01.00]")
    assert "5 features: as well (difference −0.01 [−0.05,\u00a00.03])" in both
    assert "5 features of a random dictionary: not as well (difference −0.30" in both
    assert "The dictionary is not needed to read it." in both
    assert both.endswith("largely which model it is (step by step: base 4.0\u202f% and GRPO 97\u202f%).")


def test_the_dictionary_is_needed_only_where_all_else_reads_worse(evidence: Evidence) -> None:
    worse = {"minus_dense": -0.2, "minus_dense_low": -0.3, "minus_dense_high": -0.1}
    unsure = {"minus_dense": -0.2, "minus_dense_low": -0.5, "minus_dense_high": 0.1}
    assert "only the dictionary reads it off so few numbers" in changed(evidence, mean_difference=worse)
    assert "is undecided" in changed(evidence, mean_difference=unsure)
    assert "one direction: cannot be told (difference" in changed(evidence, mean_difference=unsure)
    assert "is undecided" in changed(evidence, mean_difference=worse, features_5=worse)


def test_where_no_manner_is_known_there_is_nothing_to_show(evidence: Evidence) -> None:
    empty = replace(evidence, probes=[])
    assert (probes(empty), sentences(empty, MARGIN)) == (None, [])
