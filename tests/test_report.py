"""The page: self-contained, complete, escaped, the same bytes each time, and whole in every degenerate study."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.report import battery, build, crosscoder_figures, tables, words
from featdiff.report.build import examples, render
from featdiff.report.calibration import error_rates
from featdiff.report.charts import CLASS_COLOURS, SET_COLOUR, mixed, tile_for
from featdiff.report.claims import Claims
from featdiff.report.evidence import Evidence, load
from featdiff.report.model_figures import report_rows
from featdiff.report.selectivity import choice
from featdiff.report.sources import traced
from featdiff.report.summary import WORTH, headline, plots, summarise
from featdiff.tracking.record import numbers
from synthetic_study import STUDY, Plan, write_study

ROOT = Path(__file__).parents[1]
PACKED = r'<script type="application/gzip" id="plotly">(.*?)</script>'
SUITES = {
    "likelihood": True,
    "train": ("products",),
    "find": ("openbookqa", "arc_challenge", "sciq"),
    "heldout": ("piqa",),
    "control": (),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "too_few_flipped": {"status": "too_few_flipped", "rl_transfers": False},
    "empty_intersection": {"status": "empty_intersection"},
    "one_task_pairs_only": {"find": ("reverse",), "heldout": (), "control": (), "joint": False, "works": ()},
    "suites": SUITES,
    "no_contrast": {"contrast": None},
    "no_repeats": {"arms": ("sft", "grpo", "rft")},
    "reported": {"reported": ("aime24",)},
}
PAGES = (*VARIANTS, "no_checkpoints")
WRONG = {"claim": "sufficient", "status": "supported", "failed": ""}
RATES = error_rates([WRONG | {"control": "shuffled"}, WRONG | {"control": "random", "status": "undecided"}], 0.95)


@dataclass
class Page:
    evidence: Evidence
    claims: Claims
    html: str
    alone: dict[str, str]
    summary: dict[str, Any]

    @property
    def own(self) -> str:
        """The page without the plotting library."""
        return re.sub(PACKED, "", self.html, flags=re.S)


def page_of(evidence: Evidence) -> Page:
    claims = Claims(evidence, STUDY.report, STUDY.seed)
    verdicts = claims.verdicts()
    rates = RATES if evidence.effects else []
    trace = traced(claims, verdicts, {}, lambda _: 1)
    written = render(evidence, claims, verdicts, rates, STUDY.report, "organism", trace, {"data": "0" * 64}, None)
    return Page(evidence, claims, written.pop("index.html"), written, summarise(evidence, claims, verdicts, rates))


@pytest.fixture(scope="module")
def pages(studied: Callable[..., Evidence]) -> dict[str, Page]:
    found = {name: page_of(studied(n=60, n_features=700, **changes)) for name, changes in VARIANTS.items()}
    whole = found["full"].evidence
    emptied: dict[str, list[dict[str, Any]]] = {name: [] for name in whole.checkpoints}
    found["no_checkpoints"] = page_of(replace(whole, checkpoints=emptied, overlap=[], trajectories=[]))
    return found


class Elements(HTMLParser):
    """Attributes of every element, and text by kind of element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.found[-1][0] if self.found else "", data))


def figures(html: str) -> dict[str, dict[str, Any]]:
    found = re.findall(r'<script type="application/json" data-for="([^"]+)">(.*?)</script>', html, flags=re.S)
    assert len(found) == len(dict(found)), "two figures under one key"
    return {key: json.loads(text) for key, text in found}


@pytest.mark.parametrize("variant", PAGES)
def test_the_page_needs_no_network_and_holds_the_plotting_library_once(pages: dict[str, Page], variant: str) -> None:
    html = pages[variant].html
    assert len(html.encode()) < 3_000_000
    packed = re.findall(PACKED, html, flags=re.S)
    assert len(packed) == 1
    assert b"* plotly.js v" in gzip.decompress(base64.b64decode(packed[0]))[:200]
    for tag, attributes in Elements(pages[variant].own).found:
        assert "src" not in attributes, tag
        assert not (attributes.get("href") or "").startswith(("http", "//", "file")), tag
    assert "@import" not in pages[variant].own
    assert "url(" not in pages[variant].own


@pytest.mark.parametrize("variant", PAGES)
def test_every_figure_also_stands_alone(pages: dict[str, Page], variant: str) -> None:
    page = pages[variant]
    together = figures(page.html)
    drawn = {name: text for name, text in page.alone.items() if name.startswith("figures/")}
    alone = {name: html for name, html in drawn.items() if name.endswith(".html")}
    apart = {key: content for html in alone.values() for key, content in figures(html).items()}
    assert apart == together
    assert drawn.keys() - alone.keys() == {"figures/plotly.js"}
    assert page.alone["figures/plotly.js"] == f'window.plotlyPacked = "{re.findall(PACKED, page.html, flags=re.S)[0]}";'
    assert all('<script src="plotly.js"></script>' in html and not re.search(PACKED, html) for html in alone.values())
    assert sum(len(text.encode()) for text in drawn.values()) < 4_000_000


@pytest.mark.parametrize("variant", PAGES)
def test_every_plot_has_its_figure_and_every_figure_is_valid(pages: dict[str, Page], variant: str) -> None:
    import plotly.graph_objects as go

    html = pages[variant].html
    drawn = figures(html)
    places = [attributes["data-plot"] for _, attributes in Elements(pages[variant].own).found if "data-plot" in attributes]
    assert sorted(places) == sorted(drawn)
    for key, content in drawn.items():
        plain = json.loads(re.sub(r"var\(--[a-z-]+\)", "#123456", json.dumps(content)))
        figure = go.Figure(plain)
        assert len(figure.data) > 0, key


@pytest.mark.parametrize("variant", PAGES)
def test_links_of_the_navigation_lead_somewhere(pages: dict[str, Page], variant: str) -> None:
    elements = Elements(pages[variant].own).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] or "" for tag, attributes in elements if tag == "a"}
    pages_named = {target.partition("#")[0] if target[0] != "#" else target for target in targets}
    assert "browse.html" in pages_named <= {f"#{name}" for name in ids} | pages[variant].alone.keys()


def test_model_text_is_shown_as_text(pages: dict[str, Page]) -> None:
    html = pages["full"].html
    assert "<script>alert(" not in html
    assert "&lt;script&gt;alert(" in html


def test_json_in_the_page_cannot_end_its_script(studied: Callable[..., Evidence]) -> None:
    html = page_of(studied(n=20, find=("</script><b>", "sort"), heldout=())).html
    assert "</script><b>" not in html
    assert any("</script><b>" in json.dumps(content) for content in figures(html).values())


def test_the_word_causal_appears_only_with_a_supported_intervention(pages: dict[str, Page]) -> None:
    assert "causal" in pages["full"].own
    for variant in ("too_few_flipped", "empty_intersection", "one_task_pairs_only"):
        assert "causal" not in pages[variant].own, variant


def test_a_study_without_a_set_says_so_and_leaves_out_what_was_not_measured(pages: dict[str, Page]) -> None:
    page = pages["too_few_flipped"]
    assert "No features could be sought" in page.own
    keys = figures(page.html)
    assert not any(key.startswith(("effect-", "lengths-", "tuning-", "score-", "steps-")) for key in keys)
    assert "nothing was zeroed or amplified" in page.own
    assert "accuracy-greedy" in keys
    assert page.summary["feature_set"] == {"status": "too_few_flipped", "size": 0, "share": 0.0, "expected_by_chance": 0.0021}
    assert page.summary["effects"] == {}


def test_pair_fits_alone_have_no_triangle(pages: dict[str, Page]) -> None:
    keys = figures(pages["one_task_pairs_only"].html)
    assert {"nrn-pair_sft", "nrn-pair_grpo"} <= set(keys)
    assert not any(key.startswith("mas-") for key in keys)


def test_a_missing_player_is_one_sentence_and_the_rest_is_shown(pages: dict[str, Page]) -> None:
    whole, whole_keys = pages["full"], set(figures(pages["full"].html))
    said = {
        "no_contrast": ("This study has no contrast model, so the set is zeroed in no other arm.", "effect-zero_contrast"),
        "no_repeats": ("GRPO was trained once, so it cannot be told", "replication"),
        "no_checkpoints": ("No checkpoint of an arm was read, so it cannot be told when features change.", "overlap-"),
    }
    for variant, (sentence, gone) in said.items():
        page, keys = pages[variant], set(figures(pages[variant].html))
        assert sentence in page.own
        assert sentence not in whole.own
        assert any(key.startswith(gone) for key in whole_keys)
        assert not any(key.startswith(gone) for key in keys)
        assert {"accuracy-greedy", "effect-zero_tuned-all", "effect-amplify_original-all"} <= keys


def test_every_arm_has_its_bars_and_the_other_runs_their_marks(pages: dict[str, Page]) -> None:
    evidence, drawn = pages["full"].evidence, figures(pages["full"].html)
    traces = {trace["name"]: trace for trace in drawn["accuracy-greedy"]["data"]}
    names = evidence.names
    assert set(traces) == {names.label(model) for model in evidence.models}
    for model in evidence.compared:
        bars, others = traces[names.label(model)], [traces[names.label(run)] for run in evidence.runs(model)[1:]]
        assert bars["type"] == "bar"
        assert all(ring["type"] == "scatter" and ring["x"] == bars["x"] for ring in others)
    headline = {bar.label: bar for bar in build.headline(evidence, pages["full"].claims)}
    assert [name for name, _ in headline["GRPO"].runs] == [names.label(run) for run in evidence.runs("grpo")[1:]]
    assert len(headline["GRPO, set zeroed"].runs) == len(headline["GRPO"].runs)
    assert {f"training-{arm}" for arm in evidence.repeats} <= set(drawn)


def test_replication_shows_every_run_over_its_own_random_sets(pages: dict[str, Page]) -> None:
    evidence, drawn = pages["full"].evidence, figures(pages["full"].html)["replication"]
    runs = {f"repeat_{run}" if run != evidence.roles.tuned else "zero_tuned": run for run in evidence.runs("grpo")}
    assert len(runs) > 1
    table = battery.replication(evidence)
    assert table is not None
    assert table.head[1:] == [evidence.names.label(run) for run in runs.values()]
    bands = {(shape["y0"], shape["y1"]) for shape in drawn["layout"]["shapes"] if shape["type"] == "rect"}
    for i, (purpose, trace) in enumerate(zip(runs, drawn["data"], strict=True)):
        rows = [row for row in evidence.effects if (row["purpose"], row["control"], row["subset"]) == (purpose, "set", "all")]
        assert trace["y"] == [row["effect"] for row in rows]
        assert {(row["random_low"], row["random_high"]) for row in rows} <= bands
        written = {cells[0].text: cells[1 + i].text for cells in table.rows if cells[0].text in evidence.tasks}
        assert written == {row["task"]: words.signed(row["effect"]) for row in rows}


def test_decoder_norms_are_a_triangle_for_three_models_and_a_strip_for_more(pages: dict[str, Page]) -> None:
    evidence = pages["full"].evidence
    joint = {name: fit for name, fit in evidence.fits.items() if len(fit.models) == 3}
    name, fit = next(iter(joint.items()))
    further = evidence.names.label("rft")
    wide = replace(fit, config=fit.config | {"models": [*fit.models, "rft"]})
    rows = [row | {"mas": [*(0.75 * share for share in row["mas"]), 0.25]} for row in evidence.features if row["fit"] == name]
    panel = crosscoder_figures.mas(replace(evidence, fits={name: wide}, features=rows))
    assert panel is not None
    (strip,) = panel.figures
    assert {trace["type"] for trace in strip.data} == {"bar"}
    live = [row for row in rows if not row["dead"]]
    assert sum(value or 0 for trace in strip.data for value in trace["y"]) == len(live)
    assert further in dict(panel.legend) or f"{further} only" in dict(panel.legend)
    triangles = crosscoder_figures.mas(evidence)
    assert triangles is not None
    drawn = {figure.key: figure for figure in triangles.figures}
    for key in joint:
        points = [
            (a, b, c) for trace in drawn[f"mas-{key}"].data for a, b, c in zip(*(trace[side] for side in "abc"), strict=True)
        ]
        expected = [row["mas"] for row in evidence.features if row["fit"] == key and not row["dead"]]
        assert sorted(points) == sorted(tuple(round(share, 4) for share in shares) for shares in expected)


def test_crosscoders_have_a_colour_each_and_none_that_means_something_else(pages: dict[str, Page]) -> None:
    evidence = pages["full"].evidence
    many = {f"fit_{i}": fit for i, fit in enumerate([*evidence.fits.values()] * 3)}
    panel = crosscoder_figures.curves(replace(evidence, fits=many))
    assert panel is not None
    colours = [colour for _, colour in panel.legend]
    assert len(set(colours)) == len(many)
    taken = {SET_COLOUR, *CLASS_COLOURS.values(), *(evidence.names.colour(model) for model in evidence.models)}
    assert not {mixed(colour, 1.0) for colour in taken} & set(colours)


def test_a_task_that_is_only_reported_stands_beside_the_others_and_behind_no_claim(pages: dict[str, Page]) -> None:
    page = pages["reported"]
    evidence = page.evidence
    assert "aime24" in {cells[0].text for cells in tables.accuracy(evidence, page.claims).rows}
    assert set(page.summary["accuracy"]["grpo"]) - set(pages["full"].summary["accuracy"]["grpo"]) == {"reported"}
    assert "aime24" not in {*evidence.far, *evidence.named("train", "find", "heldout", "control")}
    for rows in (evidence.effects, evidence.search, evidence.edited):
        assert "aime24" not in {row["task"] for row in rows}
    listed = json.dumps(traced(page.claims, page.claims.verdicts(), {}, lambda _: 1))
    assert "sort" in listed
    assert "aime24" not in listed


def test_figures_show_the_numbers_of_the_tables(pages: dict[str, Page]) -> None:
    page = pages["full"]
    drawn = figures(page.html)
    row = next(
        row
        for row in page.evidence.accuracy["grpo"]
        if (row["task"], row["split"], row["mode"]) == ("sort", "report", "greedy")
    )
    bars = drawn["accuracy-greedy"]["data"][2]
    place = [item[0] for item in bars["customdata"]].index("sort")
    assert bars["y"][place] == row["accuracy"]
    assert bars["y"][place] + bars["error_y"]["array"][place] == pytest.approx(row["high"])
    strip = drawn["effect-zero_tuned-all"]["data"]
    assert len(strip[0]["y"]) == 20 * len(page.evidence.tasks), "one ring for each random set and task"
    histogram = drawn["nrn-pair_sft"]["data"]
    alive = [row for row in page.evidence.features if row["fit"] == "pair_sft" and not row["dead"]]
    assert sum(value or 0 for trace in histogram for value in trace["y"]) == len(alive)
    assert set(drawn["score-sort"]["data"][0]["text"][:3]) == {"118", "311", "640"}


def test_curves_begin_at_no_change_and_mark_the_choice(pages: dict[str, Page]) -> None:
    evidence, drawn = pages["full"].evidence, figures(pages["full"].html)
    for purpose, sign in (("zero_tuned", -1), ("amplify_original", 1)):
        own = choice(evidence, purpose, "set")
        rows = [row for row in evidence.search if (row["purpose"], row["control"]) == (purpose, "set")]
        wanted = [row for row in rows if (row["edit"], row["positions"]) == (own["edit"], own["positions"])]
        levels = {row["norm"]: [each["accuracy"] for each in wanted if each["norm"] == row["norm"]] for row in wanted}
        curve = drawn[f"lengths-{purpose}"]["data"][-1]
        assert curve["x"] == sorted(levels)
        assert curve["y"] == pytest.approx([sign * (np.mean(levels[at]) - np.mean(levels[0.0])) for at in sorted(levels)])
        (dotted,) = drawn[f"lengths-{purpose}"]["layout"]["shapes"]
        assert dotted["x0"] == dotted["x1"] == next(row["norm"] for row in rows if row["chosen"])
        grid = drawn[f"tuning-{purpose}-{own['edit']}"]
        (frame,) = grid["layout"]["shapes"]
        place = [round(frame[axis + "0"] + 0.5) for axis in "xy"]
        heat = grid["data"][0]
        assert [float(heat["x"][place[0]]), heat["y"][place[1]]] == [own["dose"], own["positions"]]
        assert "0" not in heat["x"], "dose 0 is no setting that was tried"


def test_controls_say_what_was_chosen_for_them_and_errors_are_counted(pages: dict[str, Page]) -> None:
    page = pages["full"]
    table = battery.controls(page.evidence, "amplify_original")
    assert table is not None
    shown = {row[0].text: [cell.text for cell in row] for row in table.rows}
    own = choice(page.evidence, "amplify_original", "mean_difference")
    assert float(shown[battery.NAMES["mean_difference"]][1]) == own["dose"]
    assert shown[battery.NAMES["noop"]][1:4] == [words.MISSING] * 3
    assert set(battery.NAMES.values()) == set(shown)
    wrong = battery.errors(RATES)
    assert wrong is not None
    assert [(row[2].text, row[2].mark) for row in wrong.rows] == [("1", "bad"), ("0", "good")]
    assert "How often are the rules wrong?" in page.own
    assert "How often are the rules wrong?" not in pages["empty_intersection"].own


def test_other_choices_are_compared_with_draws_where_there_are_any(pages: dict[str, Page]) -> None:
    (_, table), *_ = battery.sensitivity(pages["full"].evidence)
    shown = {row[0].text: [cell.text for cell in row[3:]] for row in table.rows}
    assert shown["found with swap at prompt last"] == ["−0.80", "0.00", "+0.10", "yes"]
    assert shown["found with slot at all"][0] == "nothing found"
    assert shown["found in the crosscoder joint topk 1"] == ["−0.80", *[words.MISSING] * 3]
    assert shown["tested with add at all"][-1] == "no"


@pytest.mark.parametrize(("variant", "rule"), [("full", "strict"), ("full", "flexible"), ("suites", "strict")])
def test_the_table_shows_both_rules_of_grading_and_says_which_the_reward_used(
    pages: dict[str, Page], variant: str, rule: str
) -> None:
    page = pages[variant]
    tasks = {name: replace(task, grading=rule) for name, task in page.evidence.tasks.items()}
    table = tables.accuracy(replace(page.evidence, tasks=tasks), page.claims)
    assert f"in rewards too, by the {rule} rule" in table.caption
    models = page.evidence.compared
    column = table.head.index(f"flexible, {' / '.join(map(page.evidence.names.label, models))}")
    for (name, task), cells in zip(tasks.items(), table.rows, strict=True):
        assert len(cells) == len(table.head)
        generated = task.scoring == "generation"
        rows = [report_rows(page.evidence, model, "greedy").get(name) for model in models]
        assert cells[column].text == (" / ".join(words.number(row["flexible"]) for row in rows) if generated else words.MISSING)
        assert "/" in cells[column - 1].text or not generated
        assert "%" in cells[column + 1].text or not generated


def test_suites_show_chance_and_the_flip_floor(pages: dict[str, Page]) -> None:
    page = pages["suites"]
    floors = [shape["y0"] for shape in figures(page.html)["effect-amplify_original-flipped"]["layout"]["shapes"]]
    assert floors.count(pytest.approx(1 / 3)) == 4
    assert "a random flip gives +0.33" in page.own
    assert page.evidence.primary_mode("piqa") == "option_text_norm"


def test_examples_put_flipped_questions_first_and_take_tasks_in_turn(pages: dict[str, Page]) -> None:
    page = pages["full"]
    shown = examples(page.evidence, page.claims, 6)
    assert [example.task for example in shown] == page.evidence.far
    for example in shown:
        assert [answer.label for answer in example.answers] == [
            "base",
            "SFT",
            "GRPO",
            "GRPO, set zeroed",
            "base, set amplified",
        ]
        assert (example.answers[0].correct, example.answers[2].correct) == (False, True)
    assert len(examples(page.evidence, page.claims, 2)) == 2


def test_the_summary_is_small_and_says_n_and_interval(pages: dict[str, Page]) -> None:
    summary = pages["full"].summary
    assert len(json.dumps(summary)) < 12_000
    assert summary["verdicts"]["necessary"] == "supported"
    assert summary["crosscoders"]["joint_topk"]["fve"]["base"] == 0.985
    assert summary["accuracy"]["grpo"]["find"] > 0.85 > 0.2 > summary["accuracy"]["base"]["find"]
    effect = summary["effects"]["zero_tuned"]["sort"]
    assert effect["n"] == 60
    assert effect["low"] <= effect["effect"] <= effect["high"] < effect["random_low"]


def test_the_headline_fits_on_a_screen_and_does_not_depend_on_names(pages: dict[str, Page]) -> None:
    summary = pages["full"].summary
    found = headline(pages["full"].claims, summary)
    assert len(numbers(found)) == 24
    assert found["verdict"] == {key: WORTH[status] for key, status in summary["verdicts"].items()}
    assert found["accuracy"] == {
        role: summary["accuracy"][model]["away_from_math"]
        for role, model in {"original": "base", "contrast": "sft", "tuned": "grpo"}.items()
    }
    for name, claim, sign in (("necessity", "necessary", -1), ("sufficiency", "sufficient", 1)):
        group, measured = found[name], summary["estimates"][claim]
        assert group["found"] == measured["found_on"]["value"]
        assert group["heldout"] == measured["heldout"]["value"]
        assert group["low"] <= group["found"] <= group["high"]
        assert sign * (group["found"] - group["controls"]) > 0
    assert found["set"]["runs"] == len(pages["full"].evidence.runs("grpo")) == 2
    assert not {*pages["full"].evidence.models} & {part for key in numbers(found) for part in key.split("/")}


def test_what_was_not_measured_is_absent_from_the_headline(pages: dict[str, Page]) -> None:
    found = headline(pages["too_few_flipped"].claims, pages["too_few_flipped"].summary)
    assert found["set"]["size"] == 0
    assert found["necessity"] == found["sufficiency"] == {}
    assert None not in numbers(found).values()


def test_plots_have_their_columns_where_nothing_was_edited_as_well(pages: dict[str, Page]) -> None:
    full, nothing = (plots(pages[name].summary) for name in ("full", "too_few_flipped"))
    assert full.keys() == nothing.keys()
    heads = {name: text.splitlines()[0] for name, text in full.items()}
    assert heads == {name: text.splitlines()[0] for name, text in nothing.items()}
    assert set(nothing["plots/zero_tuned.csv"].splitlines()[1:]) == set()
    rows = [line.split(",") for line in full["plots/zero_tuned.csv"].splitlines()[1:]]
    effects = pages["full"].summary["effects"]["zero_tuned"]
    assert {task: float(effect) for task, effect, *_ in rows} == {task: row["effect"] for task, row in effects.items()}
    assert full["plots/verdicts.csv"].splitlines()[1:]


def test_a_lost_column_is_one_line_that_names_it(tmp_path: Path) -> None:
    plan = Plan(n=10)
    write_study(tmp_path, plan)
    path = tmp_path / "analysis/intervene/remove/effects.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["random_low"]), path)
    with pytest.raises(ContractError, match=r"effects\.parquet: random_low: expected float, null, found nothing"):
        load(lambda name, *_: tmp_path / name, plan.study)


def test_numbers_are_written_without_negative_zero_or_plus_zero() -> None:
    assert words.number(-0.001) == "0.00"
    assert words.signed(-0.001) == "0.00"
    assert words.signed(0.25) == "+0.25"
    assert words.number(-0.5) == "−0.50"
    assert words.number(float("nan")) == words.MISSING
    assert words.compact(451_234) == "451k"
    assert words.compact(7_620_000_000) == "7.62B"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.things(1, "task") == "1 task"


def test_four_tiles_stand_two_by_two() -> None:
    assert tile_for(4, 3) == tile_for(2, 3) > tile_for(3, 3) == tile_for(6, 4) > tile_for(8, 4)
    assert tile_for(1, 3) > tile_for(2, 3)


@pytest.mark.graph
def test_the_stage_writes_page_and_summary_the_same_each_time(tmp_path: Path) -> None:
    write_study(tmp_path, Plan(n=20, arms=tuple(STUDY.arms)))
    for name in ("stages", "params.yaml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, tmp_path / name)
    (tmp_path / "dvc.yaml").write_text("stages:\n  report:\n    deps: [stages/report.py]\n")
    environment = os.environ | {"FEATDIFF_MIRROR": "off"}
    written = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "stages/report.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        written.append(
            [
                (tmp_path / path).read_bytes()
                for path in ("report/index.html", "metrics/summary.json", "metrics/headline.json", "report/manifest.json")
            ]
        )
    assert written[0] == written[1]
    assert b"analysis/intervene" in written[0][0], "the page names the artifacts it was made from"
    numbers = {"estimates", "runs", "accuracy", "crosscoders", "feature_set", "effects", "selectivity", "errors", "replication"}
    assert set(json.loads(written[0][1])) == {"verdicts", "claims"} | numbers
