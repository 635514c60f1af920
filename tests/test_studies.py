"""Studies beside the default one: which are meant, what is prepared for them, and the table of verdicts against the truth."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from featdiff.artifacts.documents import fill
from featdiff.config.params import load_study
from featdiff.config.reading import ConfigError
from featdiff.pipeline import studies
from featdiff.pipeline.studies import Plans, main, prepare, tables

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = {"transfer": "supported", "necessary": "undecided", "dictionary": "not supported"}


@pytest.fixture
def plans() -> Plans:
    seen = {"profile": "organism", "seeds": [1, 2], "holds": ["transfer"]}
    null = {"profile": "null_noise", "seeds": [0], "fails": ["transfer", "necessary"]}
    return Plans.model_validate({"plans": {"seen": seen, "null": null}})


@pytest.fixture
def say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes the result of a study."""
    monkeypatch.setattr(studies, "RESULTS", tmp_path)

    def write(name: str, **verdicts: str) -> None:
        facts = {"commit": "0123456789", "profile": "p", "seed": 0, "summary": {"verdicts": VERDICTS | verdicts}}
        (tmp_path / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")

    return write


def test_studies_are_meant_by_name_or_with_their_seed(plans: Plans) -> None:
    assert list(plans.chosen([])) == ["seen-1", "seen-2", "null-0"]
    assert list(plans.chosen(["null"])) == ["null-0"]
    assert list(plans.chosen(["seen-2", "seen"])) == ["seen-2", "seen-1"]
    assert plans.chosen(["seen-2"])["seen-2"][1] == 2
    with pytest.raises(ConfigError, match="'sen-1': no study"):
        plans.chosen(["sen-1"])


def test_the_table_counts_what_came_out_against_the_truth(plans: Plans, say_so: Callable[..., None]) -> None:
    assert tables(plans) == "No study has a result yet."
    say_so("seen-1")
    say_so("seen-2", transfer="undecided")
    say_so("null-0", necessary="supported")
    text = tables(plans)
    assert "| study | commit | dictionary | necessary | transfer |" in text
    assert "| seen-1 | 0123456 | not supported | undecided | supported (true) |" in text
    assert "| null-0 | 0123456 | not supported | supported (false) | supported (false) |" in text
    assert "| seen | transfer | true | 2 | 1 | 0.50 [0.01, 0.99] |" in text
    assert "| null | necessary | false | 1 | 1 | 1.00 [0.03, 1.00] |" in text
    assert "| dictionary |" not in text.partition("How often")[2], "construction does not say"


def test_the_page_has_what_the_committed_results_say() -> None:
    page = (ROOT / "docs/calibration.md").read_text(encoding="utf-8")
    assert fill(page, "studies", tables(Plans.load())) == page, "run make studies"


def test_claims_of_the_plans_are_claims_of_the_report() -> None:
    known = set(json.loads((ROOT / "metrics/summary.json").read_text(encoding="utf-8"))["verdicts"])
    for plan in Plans.load().plans.values():
        assert {*plan.holds, *plan.fails} <= known
        assert not set(plan.holds) & set(plan.fails)


def test_an_unknown_study_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonesuch"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_study_is_a_clone_with_its_profile_its_seed_and_this_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()
    for name in listed:
        if name.startswith((".dvc", "conf", "src", "dvc.yaml", "params.yaml")):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes((ROOT / name).read_bytes())
    for key in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{key}_NAME", "t")
        monkeypatch.setenv(f"GIT_{key}_EMAIL", "t@example.org")
    monkeypatch.chdir(home)
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "one"]):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, text=True, capture_output=True).stdout.strip()
    elsewhere = tmp_path / "elsewhere"
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "cache.dir", str(elsewhere)], check=True)
    folder = Path("studies/noise-7")
    for seed in (3, 7):  # a second time over what a first one left
        prepare(folder, commit, "null_noise", seed)
    monkeypatch.chdir(home / folder)
    study = load_study()
    assert (study.profile, study.seed, study.roles.tuned) == ("null_noise", 7, "noise")
    cache = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], check=True, text=True, capture_output=True).stdout
    assert Path(cache.strip()) == elsewhere, "wherever it is"


def test_side_by_side_each_has_its_share_of_the_cores_and_its_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two studies whose repro waits for the other: one after the other would never end."""
    together = threading.Barrier(2, timeout=30)
    seen: dict[str, list[str]] = {}

    def started(command: list[str], *, cwd: Path, stdout: IO[str], **_: object) -> SimpleNamespace:
        seen[cwd.name] = command
        print(f"speaking of {cwd.name}", file=stdout, flush=True)
        (cwd / "metrics").mkdir(parents=True)
        (cwd / "metrics/summary.json").write_text(json.dumps({"verdicts": VERDICTS}), encoding="utf-8")
        together.wait()
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(studies, "prepare", lambda folder, *_: folder.mkdir(parents=True))
    plan = studies.Plan(profile="organism", seeds=[1, 2])
    asked = SimpleNamespace(stdout="0123456789")
    real = subprocess.run
    monkeypatch.setattr(studies.subprocess, "run", lambda c, **k: asked if c[0] == "git" else started(c, **k))
    studies.run_all({"a-1": (plan, 1), "b-2": (plan, 2)}, jobs=2)
    monkeypatch.setattr(studies.subprocess, "run", real)
    for name, seed in (("a-1", 1), ("b-2", 2)):
        assert list(seen[name][-2:]) == ["--jobs", "3"], "stages of it at a time"
        assert (studies.CLONES / f"{name}.log").read_text(encoding="utf-8") == f"speaking of {name}\n"
        result = json.loads((studies.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert (result["seed"], result["commit"]) == (seed, "0123456789")


def test_after_a_study_that_failed_no_other_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def fails(name: str, *_: object) -> None:
        begun.append(name)
        raise studies.ContractError(Path(name), "repro", "status 0", 1, "say it again")

    monkeypatch.setattr(studies, "run", fails)
    plan = studies.Plan(profile="organism", seeds=[1])
    with pytest.raises(studies.ContractError):
        studies.run_all({f"a-{seed}": (plan, seed) for seed in range(50)}, jobs=1)
    assert begun == ["a-0"]


def test_stopped_by_hand_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "run", interrupted)
    assert main(["noise-106"]) == 75
    assert capsys.readouterr().err.count("\n") == 1
