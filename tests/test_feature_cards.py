"""Cards of the features: what is shown is what was measured, and text stays text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape

import pytest

from featdiff.report.build import render
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence
from featdiff.report.feature_cards import cards, figures, manner_tables, token_table, visible
from featdiff.report.sources import traced
from synthetic_study import SET, STUDY

Studied = Callable[..., Evidence]


def page_of(evidence: Evidence) -> str:
    claims = Claims(evidence, STUDY.report, STUDY.seed)
    verdicts = claims.verdicts()
    trace = traced(claims, verdicts, {}, lambda _: 1)
    return render(evidence, claims, verdicts, [], STUDY.report, "organism", trace, {}, None)["index.html"]


@pytest.fixture(scope="module")
def evidence(studied: Studied) -> Evidence:
    return studied(n=20)


def test_one_card_per_feature_with_its_class_and_verdict(evidence: Evidence) -> None:
    made = cards(evidence)
    assert [card.feature for card in made] == list(SET)
    assert [card.tags[-1] for card in made] == ["needs its context", "detects =", "not tested"]
    known = {row["feature_id"]: row["feature_class"] for row in evidence.features if row["fit"] == "joint_topk"}
    assert [card.tags[0] for card in made] == [known[k] for k in SET]
    assert "at a silent place (it fires in every text)" in made[1].facts[-1]
    assert "“=” 95\u202f% [90\u202f%, 100\u202f%], n = 400" in made[1].facts[-1]
    assert len(made[2].facts) == len(made[0].facts) - 1, "nothing is said of planting where nothing was planted"


def test_contexts_hold_every_token_shaded_by_its_value(evidence: Evidence) -> None:
    for card in cards(evidence):
        rows = [row for row in evidence.contexts if row["feature_id"] == card.feature]
        assert len(card.contexts) == 1 + len(evidence.tasks)
        assert len(card.contexts) + len(card.further) == len(rows)
        assert card.contexts[0].source == "corpus"
        values = [float(found.tuned) for found in card.contexts[1:]]
        assert values == sorted(values, reverse=True)
        for found in card.contexts + card.further:
            assert "".join(piece.text for piece in found.pieces) == "sort ab=</script><i>x"
            silent, peak, after, *_ = found.pieces
            assert (silent.text, silent.tuned, silent.original) == ("sort ab", 0, 0)
            assert (peak.text, after.text) == ("=", "</script>")
            assert peak.tuned > peak.original > 0
            assert peak.tuned > after.tuned >= 8, "what fires is seen"
            assert peak.note == f"GRPO {found.tuned}, base {found.original}"
            assert after.said == (not found.source.startswith("corpus"))


def test_small_changes_are_not_named_and_blanks_are_seen(evidence: Evidence) -> None:
    chips = {label: [(chip.token, chip.note) for chip in group] for label, group in cards(evidence)[0].chips}
    assert chips["made more likely"] == [("<b>", "0.20\u00a0→\u00a00.60")]
    assert chips["made less likely"] == [("&amp;", "0.30\u00a0→\u00a00.05")]
    assert chips["promoted directly"] == [("<b>", "+2.0"), ("␣the", "+1.0")]
    assert chips["suppressed directly"] == [("⏎", "−1.5")]
    assert (visible(""), visible("\t")) == ("∅", "⇥")


def test_tokens_of_texts_and_chips_are_escaped_on_the_page(evidence: Evidence) -> None:
    page = page_of(evidence)
    card = page[page.index('id="feature-118"') : page.index('id="feature-311"')]
    shown = re.sub(r'<script type="application/json".*?</script>', "", card, flags=re.S)
    assert "<i>" not in shown.replace('<i style="background', "")
    assert "</script>" not in shown
    texts = [unescape(re.sub(r"<[^>]+>", "", code)) for code in re.findall(r"<code>(.*?)</code>", shown, flags=re.S)]
    assert texts.count("sort ab=</script><i>x") == 2 * (1 + len(evidence.tasks))
    assert "&amp;" in texts


def test_figures_show_the_measured_values(evidence: Evidence) -> None:
    panel = figures(evidence)
    assert panel is not None
    drawn = {figure.key: figure for figure in panel.figures}
    assert len(drawn) == 4 * len(SET)
    before, after = drawn["feature-311-histogram"].data
    assert (list(before["y"]), list(after["y"])) == ([40, 9, 0], [50, 20, 4])
    assert after["x"] == [1.5, 4.5, 7.5]
    feature = evidence.described["features"][1]
    rows = {(row["model"], row["position"], row["task"]): row for row in feature["positions"]}
    original, tuned = drawn["feature-311-tasks"].data
    assert tuned["x"] == list(evidence.tasks)
    assert tuned["y"] == [rows["tuned", "prompt_last", task]["value"]["value"] for task in evidence.tasks]
    rate = drawn["feature-311-rate"].data[0]
    assert rate["y"][1] == rows["original", "prompt_last", None]["rate"]["value"]
    assert rate["y"][1] + rate["error_y"]["array"][1] == pytest.approx(rows["original", "prompt_last", None]["rate"]["high"])
    assert (original["name"], tuned["name"]) == ("base", "GRPO")
    assert all(figure in panel.figures for card in cards(evidence) for figure in card.panel.figures)


def test_features_that_are_alike_stand_under_the_first_of_them(evidence: Evidence) -> None:
    first, second, third = evidence.described["features"]
    ids = [feature["feature_id"] for feature in (first, second, third)]
    alike = [first | {"alike": [ids[2]]}, second, third | {"alike": [ids[0]]}]
    found = replace(evidence, described=evidence.described | {"features": alike})
    made = cards(found)
    assert [card.feature for card in made] == ids[:2]
    assert [[twin.feature for twin in card.twins] for card in made] == [[ids[2]], []]
    page = page_of(found)
    assert f"1 feature that tells the same: {ids[2]}" in page
    assert all(page.count(f'id="feature-{k}"') == 1 for k in ids)
    assert f'href="#feature-{ids[2]}"' in page


def test_a_context_of_a_quantile_says_so(evidence: Evidence) -> None:
    for card in cards(evidence):
        assert [found.source for found in card.further].count("corpus, 50\u202f% quantile") == 1
        assert not any("quantile" in found.source for found in card.contexts)


def test_tables_over_all_features(evidence: Evidence) -> None:
    tokens = token_table(evidence)
    assert tokens is not None
    assert [row[-1].text for row in tokens.rows] == ["needs its context", "detects the token"]
    assert [row[2].text for row in tokens.rows] == ["8.00", "8.00"]
    assert [row[4].text for row in tokens.rows] == ["10\u202f%", "95\u202f%"]
    (texts_label, texts), (_, own) = manner_tables(evidence)
    assert texts_label == "Texts that show the manner"
    assert [row[0].text for row in texts.rows][-2:] == ["set", "set"]
    assert len(texts.rows) == len(own.rows) == 2 * (len(SET) + 1)
    assert (texts.rows[0][5].text, own.rows[0][5].text) == ("0.95", "0.50")


def test_likelihood_tasks_have_no_manner_and_a_study_without_a_set_no_cards(studied: Studied) -> None:
    suites = studied(n=20, likelihood=True, train=("products",), find=("sciq",), heldout=(), control=())
    assert manner_tables(suites) == []
    assert "Does it tell the manner" not in page_of(suites)
    none = studied(n=20, status="empty_intersection")
    assert (cards(none), figures(none), token_table(none), manner_tables(none)) == ([], None, None, [])
    assert "What the features are" not in page_of(none)


def test_of_many_features_the_first_are_open(evidence: Evidence) -> None:
    feature = evidence.described["features"][0]
    many = evidence.described | {"features": [feature | {"feature_id": k} for k in range(11)]}
    page = page_of(replace(evidence, described=many))
    assert page.count('class="card feature"') == 11
    assert "3 further features" in page
    assert page.index('id="feature-7"') < page.index("3 further features") < page.index('id="feature-8"')
