"""A team's set-up for real (``make servers``): the nano study of one person, tracked on a server and pushed to S3, and a second
person who clones, pulls, compares, and goes on while the server is away. Everything as at a terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from servers import BUCKETS, KEYS, PASSWORD, USER, free_port, listens, mlflow, object_store, postgres, postgres_programs, status

from featdiff.report.picture import BROWSERS
from featdiff.tracking.record import numbers

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = postgres_programs()
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
READ_IN = 15
"""Seconds from a clone to reading the report (said, not asserted: a machine may be busy)."""
pytestmark = [pytest.mark.team, pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL here (package postgresql)")]


class Person:
    """Somebody at a terminal in a clone of the repository."""

    def __init__(self, folder: Path, source: Path, environment: dict[str, str]) -> None:
        subprocess.run(["git", "clone", "--quiet", source, folder], check=True)
        self.folder, self.environment = folder, environment | {"PYTHONPATH": str(folder / "src")}

    def says(self, *words: str, fails: bool = False, **environment: str) -> str:
        """What ``words`` print; they must succeed, or must not."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode != 0) == fails, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def make(self, *words: str, **how: Any) -> str:
        """With this environment as it is: the clone's sources come first on the path."""
        return self.says("make", "-o", f"{sys.prefix}/.installed", f"VENV={sys.prefix}", *words, **how)


class Team(NamedTuple):
    first: Person
    second: Person
    tracking: str
    objects: str
    restart: Any
    """Takes the tracking server down, or brings it up again."""


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    place, ports = tmp_path_factory.mktemp("team"), [free_port()]
    with ExitStack() as stack:
        database = stack.enter_context(postgres(PROGRAMS, place / "postgres.log"))
        objects = stack.enter_context(object_store(place / "objects.log"))
        stores, up = (database("runs"), database("users")), ExitStack()
        stack.callback(up.close)

        def restart(running: bool) -> None:
            up.close()
            if running:
                up.enter_context(mlflow(*stores, objects, ports[0], place, place / "mlflow.log"))

        restart(True)
        tracking = f"http://127.0.0.1:{ports[0]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC", "GIT"))}
        environment |= KEYS | {"MLFLOW_TRACKING_URI": tracking, "DVC_NO_ANALYTICS": "1"}
        environment |= {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        for key in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{key}_NAME": "t", f"GIT_{key}_EMAIL": "t@example.org"}
        first = Person(place / "first", ROOT, environment)
        first.make("repro", "PROFILE=nano")
        said = first.make("remote", f"URL=s3://{BUCKETS[0]}/store", f"ENDPOINT={objects}")
        assert "can be written, read and cleaned" in said
        first.make("push")
        first.says("git", "commit", "--quiet", "--all", "--message", "nano")
        began = time.monotonic()
        second = Person(place / "second", first.folder, environment)
        second.make("pull", "STAGE=report")
        assert (second.folder / "report/index.html").read_bytes() == (first.folder / "report/index.html").read_bytes()
        print(f"clone to reading the report: {time.monotonic() - began:.1f} s (wanted: {READ_IN})")
        yield Team(first, second, tracking, objects, restart)
    assert not any(map(listens, ports)), "a server was left behind"


def headline(person: Person) -> dict[str, float]:
    """The numbers of a study as the tracking server names them."""
    return numbers(json.loads((person.folder / "metrics/headline.json").read_text(encoding="utf-8")))


def runs(team: Team, kind: str) -> list[Any]:
    """Runs on the server, the oldest first: of pipelines, or of stages."""
    program = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
[experiment] = [found for found in client.search_experiments() if found.name == "featdiff"]
found = client.search_runs([experiment.experiment_id], max_results=500, order_by=["attributes.start_time ASC"])
tags = {"experiment": experiment.experiment_id}
print(json.dumps([[run.info.run_id, run.data.tags | tags, run.data.params, run.data.metrics] for run in found]))
"""
    done = team.first.says(sys.executable, "-c", program)
    every = json.loads(done.strip().splitlines()[-1])
    return [run for run in every if ("mlflow.parentRunId" in run[1]) == (kind == "stages")]


def test_nobody_reads_the_server_without_a_password(team: Team) -> None:
    assert status(f"{team.tracking}/api/2.0/mlflow/experiments/search?max_results=5") == 401


def test_the_server_has_the_pipeline_with_its_headline_its_params_and_a_run_of_every_stage(team: Team) -> None:
    [(_, _, params, metrics)] = runs(team, "pipelines")
    ours = headline(team.first)
    assert {name: value for name, value in metrics.items() if name in ours} == pytest.approx(ours)
    assert params["report.min_effect"] == "0.05"
    stages = team.first.says(sys.executable, "-m", "dvc", "stage", "list", "--name-only").split()
    assert len(runs(team, "stages")) == len(set(stages) - {"check"})


def test_artifacts_go_through_the_server_to_its_store_and_come_back(team: Team) -> None:
    [report] = [run for run in runs(team, "stages") if run[1]["mlflow.runName"].startswith("report")]
    program = """
import sys
from mlflow.artifacts import download_artifacts
from mlflow import MlflowClient
names = [entry.path for entry in MlflowClient().list_artifacts(sys.argv[1])]
print(open(download_artifacts(run_id=sys.argv[1], artifact_path=[n for n in names if n.endswith(".html")][0])).read()[:15])
"""
    assert "<!doctype html>" in team.second.says(sys.executable, "-c", program, report[0], AWS_SECRET_ACCESS_KEY="wrong")


def test_a_clone_pulls_and_computes_nothing_again(team: Team) -> None:
    team.second.make("pull")
    said = team.second.says(sys.executable, "-m", "dvc", "repro")
    assert "Running stage" not in said.replace("Running stage 'check'", "")
    assert "up to date" in team.second.says(sys.executable, "-m", "dvc", "status")


def test_a_sweep_is_queued_run_and_compared(team: Team) -> None:
    dvc, wanted = (sys.executable, "-m", "dvc"), {"0.3", "0.9"}
    team.second.says(*dvc, "exp", "run", "--queue", "-S", f"localize.threshold={','.join(sorted(wanted))}")
    team.second.says(*dvc, "exp", "run", "--run-all")
    shown = json.loads(team.second.says(*dvc, "exp", "show", "--json").partition("[")[2].join(["[", ""]))
    every = [run["data"] for experiment in shown[1]["experiments"] for run in experiment["revs"]]
    found = {
        str(run["params"]["params.yaml"]["data"]["localize"]["threshold"]): run["metrics"]["metrics/headline.json"]
        for run in every
    }
    assert found.keys() == wanted
    team.second.says(sys.executable, "-m", "featdiff.tracking.mirror", "sync")
    swept = {run[2]["localize.threshold"]: run[3] for run in runs(team, "pipelines") if run[2]["localize.threshold"] in wanted}
    assert swept.keys() == wanted
    verdicts = [numbers(metrics["data"]) for metrics in found.values()]
    for value, metrics in zip(found, verdicts, strict=True):
        assert {name: swept[value][name] for name in metrics} == pytest.approx(metrics)
    assert verdicts[0] != verdicts[1], "nothing that was swept shows"


def test_another_experiment_shows_what_differs_and_is_kept_while_the_server_is_away(team: Team) -> None:
    params = team.second.folder / "params.yaml"
    text = params.read_text(encoding="utf-8")
    params.write_text(text.replace("min_effect: 0.05", "min_effect: 0.07"), encoding="utf-8")
    before = runs(team, "pipelines")
    team.restart(False)
    team.second.make("repro")  # ends well: tracking never stops a stage
    team.restart(True)
    team.second.says(sys.executable, "-m", "featdiff.tracking.mirror", "sync")
    after = runs(team, "pipelines")
    new = [run for run in after if run[0] not in {old[0] for old in before}]
    assert len(new) == 1, [run[1] for run in new]
    (_, _, here, found), (_, _, there, others) = new[0], before[0]
    assert {name for name in here.keys() | there.keys() if here.get(name) != there.get(name)} == {"report.min_effect"}
    known = headline(team.second).keys()
    assert known <= found.keys() & others.keys(), "values of stages that came from the cache are there as well"
    changed = team.second.says(sys.executable, "-m", "dvc", "params", "diff")
    assert "report.min_effect" in changed
    assert "0.07" in changed


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_the_compare_page_has_the_headline_on_both_sides(team: Team) -> None:
    """In a browser, as who follows a link sees it. ``PICTURES`` names a folder that keeps what is seen."""
    from playwright.sync_api import sync_playwright

    (first, tags, params, ours), *_, (second, _, others, theirs) = runs(team, "pipelines")
    assert params["report.min_effect"] != others["report.min_effect"]
    chosen = f'runs=["{first}","{second}"]&experiments=["{tags["experiment"]}"]'
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": 1280, "height": 1600}, http_credentials={"username": USER, "password": PASSWORD}
        )
        page.goto(f"{team.tracking}/#/compare-runs?{chosen}")
        page.get_by_text("report.min_effect").first.wait_for(timeout=60_000)
        differing = page.get_by_role("switch").first  # of params
        differing.click()
        if folder := os.environ.get("PICTURES"):
            page.screenshot(path=Path(folder) / "compare.png")
        said = page.locator("body").inner_text()
        for top in range(0, 3000, 100):  # its tables hold the rows in view alone
            page.evaluate(f"document.querySelectorAll('.ReactVirtualized__Grid').forEach(grid => {{ grid.scrollTop = {top} }})")
            page.wait_for_timeout(100)
            said += page.locator("body").inner_text()
        browser.close()
    known = headline(team.second)
    for name in known:
        assert name in said, name
    for values in (ours, theirs):
        assert sum(f"{values[name]:g}" in said for name in known) > len(known) / 2
