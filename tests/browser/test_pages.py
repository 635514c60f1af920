"""The report and the page of answers in a real browser (``make browser``): no error, every figure drawn, links and filters that
work, on a phone and on a desk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featdiff.report.evidence import Evidence
from featdiff.report.picture import BROWSERS
from test_report import page_of

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS = {"phone": 390, "desk": 1280}
pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason=f"no browser here: {', '.join(BROWSERS)}")]


@pytest.fixture(scope="module")
def report(studied: Callable[..., Evidence], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the report of a synthetic study, as a stage writes it."""
    page, folder = page_of(studied(n=60, n_features=700)), tmp_path_factory.mktemp("report")
    for name, text in {"index.html": page.html, **page.alone}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=WIDTHS)
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page of one width; whatever it says as an error fails the test."""
    page, errors = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 900}), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: errors.append(asked.url) if asked.url.startswith("http") else None)
    yield page
    page.close()
    assert errors == []


def fits(tab: Any) -> bool:
    """Whether nothing makes the page itself wider than the window."""
    return bool(tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def test_every_figure_is_drawn_and_nothing_is_wider_than_the_window(tab: Any, report: Path) -> None:
    tab.goto((report / "index.html").as_uri())
    tab.wait_for_function("[...document.querySelectorAll('.plot')].every((p) => !p.offsetParent || p.dataset.drawn)")
    assert tab.locator(".plot:visible .main-svg").count() >= 2 * tab.locator(".plot:visible").count() > 0
    assert fits(tab)


def test_a_tab_draws_its_figure_when_it_is_opened(tab: Any, report: Path) -> None:
    tab.goto((report / "index.html").as_uri())
    hidden = tab.locator(".tab .plot:not([data-drawn])").first
    name = hidden.get_attribute("data-plot")
    which = tab.evaluate(
        """(name) => {
          const plot = document.querySelector(`[data-plot="${name}"]`), tab = plot.closest(".tab"), box = tab.parentElement;
          const number = [...box.querySelectorAll(":scope > .tab")].indexOf(tab);
          return box.querySelectorAll(":scope > input")[number].id;
        }""",
        name,
    )
    tab.locator(f"label[for='{which}']").click()
    tab.wait_for_selector(f"[data-plot='{name}'][data-drawn] .main-svg")


def test_the_criteria_of_a_verdict_are_a_table(tab: Any, report: Path) -> None:
    tab.goto((report / "index.html").as_uri())
    verdict = tab.locator(".verdict", has_text="necessary").first
    verdict.locator("summary", has_text="criteria hold").click()
    rows = verdict.locator(".criteria tbody tr")
    assert rows.count() >= 10
    assert all(rows.nth(i).locator("td").nth(2).inner_text().strip() in ("yes", "no", "open") for i in range(rows.count()))
    assert fits(tab)


def test_every_link_leads_somewhere(tab: Any, report: Path) -> None:
    tab.goto((report / "index.html").as_uri())
    links = [link.get_attribute("href") for link in tab.locator("a[href]").all()]
    assert links
    for link in set(links):
        file, _, name = link.partition("#")
        if file:
            assert (report / file).is_file(), link
        elif name:
            assert tab.locator(f"[id='{name}']").count() == 1, link


def test_a_feature_leads_to_the_questions_shaded_by_it(tab: Any, report: Path) -> None:
    tab.goto((report / "index.html").as_uri())
    card = tab.locator(".card.feature").first
    feature = re.sub(r"\D", "", card.get_attribute("id"))
    file, _, place = card.locator("a", has_text="on every question").get_attribute("href").partition("#")
    tab.goto(f"{(report / file).as_uri()}#{place}")
    tab.wait_for_selector(".shaded span")
    assert tab.locator("select[name=feature]").input_value() == feature
    assert tab.locator(".shaded").count() == 2, "two questions of the task have values"
    strongest = tab.locator(".shaded").first.locator("span").last
    assert strongest.evaluate("(span) => getComputedStyle(span).backgroundColor") != "rgba(0, 0, 0, 0)"
    tab.select_option("select[name=feature]", "")
    assert tab.locator(".shaded").count() == 0


def test_filters_hold_and_stand_in_the_address(tab: Any, report: Path) -> None:
    tab.goto((report / "browse.html").as_uri())
    tab.wait_for_selector("body[data-drawn]")
    tasks = json.loads(tab.locator("#index").text_content())["tasks"]
    number = next(number for number, task in enumerate(tasks) if task["role"] == "find")
    tab.select_option("select[name=task]", str(number))
    tab.wait_for_function(f"document.getElementById('count').textContent.includes('of {tasks[number]['n']} ')")
    everything = int(tab.locator("#count").inner_text().split()[0])
    assert everything == tasks[number]["n"]
    tab.select_option("select[name=which]", "flipped")
    flipped = int(tab.locator("#count").inner_text().split()[0])
    assert 0 < flipped < everything
    assert tab.locator("#answers tbody tr").count() == min(flipped, 50)
    address = tab.evaluate("location.href")
    assert "which=flipped" in address
    tab.goto("about:blank")
    tab.goto(address)
    tab.wait_for_selector("body[data-drawn]")
    assert int(tab.locator("#count").inner_text().split()[0]) == flipped
    tab.fill("input[name=text]", "no question holds this")
    tab.wait_for_function("document.getElementById('count').textContent.startsWith('0 of')")
    assert fits(tab)
