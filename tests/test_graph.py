"""The pipeline file against the code, and the whole graph under DVC: run, repeat, change, push, clone, pull."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from featdiff.config.models import METHODS
from featdiff.config.params import Study
from featdiff.config.reading import PROFILES, flatten

ROOT = Path(__file__).resolve().parents[1]
PLUMBING = {"artifacts", "config", "pipeline", "processes", "tracking"}
"""Packages that know nothing of the science: a change of them cannot change a result."""


def stages() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name: entry.get("do", entry) for name, entry in found.items()}


def imported(path: Path, method: str = "") -> set[Path]:
    """Science modules of the package that ``path`` imports, directly or through others, wherever the import stands, and the
    module of ``method``, which a stage imports by name."""
    found: set[Path] = set()
    queue = [path]
    if method:
        found.add(ROOT / f"src/featdiff/training/{method}.py")
        queue += found
    while queue:
        tree = ast.parse(queue.pop().read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        for name in names:
            module = ROOT / "src" / Path(*name.split(".")).with_suffix(".py")
            if name.startswith("featdiff.") and name.split(".")[1] not in PLUMBING and module.is_file() and module not in found:
                found.add(module)
                queue.append(module)
    return found


def script(name: str) -> Path:
    """The program that a stage runs."""
    return ROOT / next(word for word in stages()[name]["cmd"].split() if word.endswith(".py"))


@pytest.mark.parametrize("name", stages())
def test_code_dependencies_are_the_imports(name: str) -> None:
    methods = METHODS if name == "arm" else [""]
    needed_by_any: set[Path] = set()
    for method in methods:
        declared = [ROOT / dep.replace("${item.method}", method) for dep in stages()[name]["deps"] if dep.startswith("src/")]
        needed = imported(script(name), method)
        covered = {module for module in needed for dep in declared if module == dep or dep in module.parents}
        assert needed - covered == set(), "imported and not declared: a change would leave the stage stale"
        needed_by_any |= needed
    idle = [dep for dep in declared if not any(module == dep or dep in module.parents for module in needed_by_any)]
    assert idle == [], "declared and not imported: a change would rerun the stage for nothing"


COMPUTING = sorted(stages().keys() - {"check"})
"""Stages that make an artifact; ``check`` only looks at params.yaml."""


@pytest.mark.parametrize("name", COMPUTING)
def test_params_are_the_sections_that_are_read(name: str) -> None:
    entry = stages()[name]
    source = script(name).read_text(encoding="utf-8")
    sections = {param.split(".")[0] for param in entry["params"] if param != "${item.method}"}
    assert sections <= set(Study.model_fields)
    assert {script(name).stem, f"{script(name).stem}s"} & sections
    assert ("seed" in sections) == ("run.seed" in source)
    assert ("profile" in sections) == (".profile" in source)


def pattern(argument: ast.expr) -> str:
    """The path that an argument stands for, with ``*`` for what is not written out."""
    if isinstance(argument, ast.JoinedStr):
        return "".join(map(pattern, argument.values))
    return str(argument.value) if isinstance(argument, ast.Constant) else "*"


@pytest.mark.parametrize("name", COMPUTING)
def test_artifacts_read_and_written_are_declared(name: str) -> None:
    entry = stages()[name]

    def plain(text: str) -> str:
        return re.sub(r"\$?\{[^}]*\}", "*", text)

    source = script(name).read_text(encoding="utf-8")
    deps = [plain(dep) for dep in entry["deps"]]
    outs = [plain(out if isinstance(out, str) else next(iter(out))) for out in entry["outs"]]
    calls = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.read"
    ]
    for folder, *files in ([pattern(argument) for argument in call.args] for call in calls):
        for read in [f"{folder}/{file}" for file in files] or [folder]:
            assert any(fnmatch(dep, read) or fnmatch(read, dep) or read.startswith(f"{dep}/") for dep in deps), read
    written = re.findall(r'"([^"]+)"', re.findall(r"out=(.*)", source)[0])
    assert any(fnmatch(out, plain(pattern)) for pattern in written for out in outs)


@pytest.mark.parametrize("name", COMPUTING)
def test_every_artifact_has_a_provenance_on_which_nothing_depends(name: str) -> None:
    outs = [out for out in stages()[name]["outs"] if isinstance(out, str)]
    made = [out for out in outs if not out.startswith("provenance/")]
    assert sorted(outs) == sorted([*made, *(f"provenance/{out}.json" for out in made)])
    assert [dep for dep in stages()[name]["deps"] if dep.startswith("provenance")] == []


def test_no_arm_is_named_outside_of_methods_and_params() -> None:
    """Who is compared stands in params.yaml; the science and the report know roles."""
    named = re.compile(rf"""["'](?:{"|".join(METHODS)})(?:_\w+)?["']""")
    files = [*(ROOT / "src/featdiff").rglob("*.py"), *(ROOT / "stages").glob("*.py"), ROOT / "dvc.yaml"]
    science = [file for file in files if file.parent.name not in ("config", "training")]
    assert [file.name for file in science if named.search(file.read_text(encoding="utf-8"))] == []


LAYERS = [
    {"planning"},
    {"report"},
    {"intervention", "description"},
    {"attribution", "localization"},
    {"crosscoder"},
    {"training", "activations"},
    {"language"},
    {"tasks"},
    {"pipeline"},
    {"stats"},
    {"tracking"},
    {"processes"},
    {"artifacts"},
    {"config"},
]
"""Packages from the top down; those of one set do not know each other."""


def test_no_import_leads_up() -> None:
    place = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
    package = ROOT / "src/featdiff"
    assert place.keys() == {
        path.stem for path in package.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    wrong = []
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "featdiff":
                names = [node.module] if "." in node.module else [f"featdiff.{alias.name}" for alias in node.names]
                others = {name.split(".")[1] for name in names} - {own}
                wrong += [
                    (path.relative_to(package).as_posix(), other) for other in others if place[other] <= place.get(own, -1)
                ]
    assert wrong == []


def test_no_command_holds_anything_from_params() -> None:
    """DVC fills in ``${…}`` as it is and hands the command to a shell."""
    assert [entry["cmd"] for entry in stages().values() if "$" in entry["cmd"]] == []


def test_everything_waits_for_the_check_of_params() -> None:
    """DVC deletes the outputs that a name leads to before it runs a stage; so the first stage refuses bad names."""
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    made = {
        re.sub(r"\$\{[^}]*\}", "*", out if isinstance(out, str) else next(iter(out))): name
        for name, entry in found.items()
        for out in entry.get("do", entry)["outs"]
    }

    def above(name: str) -> set[str]:
        deps = [re.sub(r"\$\{[^}]*\}", "*", dep) for dep in found[name].get("do", found[name])["deps"]]
        makers = {maker for out, maker in made.items() for dep in deps if fnmatch(dep, out) or dep.startswith(f"{out}/")}
        makers |= {maker for out, maker in made.items() for dep in deps if out.startswith(f"{dep}/")}
        return makers.union(*map(above, makers - {name}))

    assert [name for name in found if name != "check" and "check" not in above(name)] == []


def test_the_lock_file_holds_no_stage_that_is_no_more() -> None:
    """DVC never removes one, and ``make verify`` would miss its output in every clone."""
    kinds = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    found = {(name.partition("@")[0], "@" in name) for name in locked}
    assert found <= {(kind, "foreach" in entry) for kind, entry in kinds.items()}
    assert len(found) > 10


def test_every_stage_says_what_it_does() -> None:
    assert all(entry.get("desc") for entry in stages().values())
    assert {script(name) for name in stages()} == set((ROOT / "stages").glob("*.py"))


def test_stages_fit_on_a_screen() -> None:
    too_long = {path.name: n for path in (ROOT / "stages").glob("*.py") if (n := len(path.read_text().splitlines())) > 40}
    assert too_long == {}


class Repository:
    """A clone of this project under DVC, with the profile nano."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path = path
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "ACCELERATE_", "GIT_"))}
        bin_folder = str(Path(sys.executable).parent)
        self.environment = clean | {
            "PATH": f"{bin_folder}{os.pathsep}{clean['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(home),
            "DVC_NO_ANALYTICS": "1",
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@example.org",
            "PYTHONPATH": str(path / "src"),
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.path, env=self.environment, text=True, capture_output=True, check=False, timeout=900
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done.stdout + done.stderr

    def outputs(self) -> dict[str, dict[str, str]]:
        """What dvc.lock has: the md5 of every output by stage and path."""
        found = yaml.safe_load((self.path / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        return {name: {out["path"]: out["md5"] for out in entry["outs"]} for name, entry in found.items()}

    def executed(self, output: str) -> list[str]:
        """Stages that DVC ran, by its own words."""
        return re.findall(r"Running stage '([^']+)'", output)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The nano study, computed once from nothing and committed."""
    folder = tmp_path_factory.mktemp("graph")
    repository = Repository(folder / "one", folder)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout
    for name in listed.splitlines():
        if name not in ("dvc.lock", "metrics/summary.json", "metrics/headline.json") and (ROOT / name).is_file():
            (repository.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, repository.path / name)
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.run(sys.executable, "-m", "featdiff.config.profiles", "use", "nano")
    output = repository.run(sys.executable, "-m", "featdiff.pipeline.repro", "--jobs", "2")
    listed = repository.run("dvc", "stage", "list", "--name-only").split()
    assert sorted(re.findall(r"^(\S+) \| begins$", output, re.MULTILINE)) == sorted(listed)
    repository.run(sys.executable, "-m", "featdiff.tracking.mirror", "sync", "--wait", "60")
    repository.run("dvc", "remote", "add", "--default", "store", str(folder / "remote"))
    repository.run("git", "add", "--all")
    repository.run("git", "commit", "--quiet", "--message", "nano")
    return repository


@pytest.mark.graph
def test_the_study_ends_in_a_report_and_a_summary(nano: Repository) -> None:
    page = (nano.path / "report/index.html").read_text(encoding="utf-8")
    summary = json.loads((nano.path / "metrics/summary.json").read_text(encoding="utf-8"))
    assert "<html" in page
    assert "http://" not in re.sub(r'"http://www.w3.org[^"]*"', "", page.split("<script", 1)[0])
    assert set(summary) >= {"verdicts"}
    assert (nano.path / "analysis/intervene/remove/effects.parquet").is_file(), (
        "the nano study should get as far as interventions"
    )


@pytest.mark.graph
def test_arms_start_from_one_base_on_the_same_problems(nano: Repository) -> None:
    sft, grpo = (json.loads((nano.path / f"models/{arm}/audit.json").read_text()) for arm in ("sft", "grpo"))
    assert sft["base_manifest"] == grpo["base_manifest"]
    assert sft["problems_sha256"] == grpo["problems_sha256"]
    assert sft["problems"] == grpo["problems"] == 96
    assert grpo["updates"] == 6
    assert sft["tokens_seen"] > 0


@pytest.mark.graph
def test_no_op_arm_gives_the_bytes_of_the_unedited_model(nano: Repository) -> None:
    from featdiff.artifacts.tables import EDITED_SAMPLES
    from featdiff.intervention.purposes import SIDES

    rows = [row for side in SIDES for row in EDITED_SAMPLES.read(nano.path / "analysis/intervene" / side)]
    kept = ("purpose", "sample_id", "completion", "parsed", "correct", "manner")
    arms = {arm: [[row[key] for key in kept] for row in rows if row["control"] == arm] for arm in ("none", "noop")}
    assert arms["none"]
    assert arms["none"] == arms["noop"]


@pytest.mark.graph
def test_tracking_holds_one_parent_with_every_stage(nano: Repository) -> None:
    with sqlite3.connect(nano.path / "mlflow.db") as store:
        children = store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall()
        names = [row[0] for row in store.execute("select name from runs where status = 'FINISHED'")]
        curves = {row[0] for row in store.execute("select distinct key from metrics where step > 0")}
    assert len({parent for _, parent in children}) == 1
    assert len(children) == len(nano.executed(" ")) or len(children) >= 18
    assert {"arm@sft", "arm@grpo", "crosscoder@joint_topk", "report"} <= set(names)
    assert {"curve/reward", "curve/loss"} <= curves


@pytest.mark.graph
def test_repeating_does_nothing(nano: Repository) -> None:
    assert nano.executed(nano.run("dvc", "repro")) == []


@pytest.mark.graph
def test_a_clone_pulls_and_recomputes_nothing_and_an_experiment_reruns_only_what_depends(nano: Repository) -> None:
    nano.run("dvc", "push")
    nano.run("git", "clone", "--quiet", ".", "../two")
    two = Repository(nano.path.parent / "two", nano.path.parent)
    two.run("dvc", "pull")
    assert two.executed(two.run("dvc", "repro")) == []
    assert two.run("dvc", "status").strip().endswith("up to date.")
    executed = two.executed(two.run("dvc", "exp", "run", "--name", "higher", "--set-param", "localize.threshold=0.9"))
    assert executed[:2] == ["check", "localize"]
    assert set(executed) <= {"check", "localize", "describe", "intervene@remove", "intervene@amplify", "report"}
    shown = two.run("dvc", "exp", "show", "--csv")
    assert "higher" in shown
    assert {"0.2", "0.9"} <= set(re.findall(r"0\.\d+", shown))


def checked_out(nano: Repository, name: str) -> Repository:
    """A clone beside ``nano`` with its results, from its cache."""
    nano.run("git", "clone", "--quiet", ".", f"../{name}")
    clone = Repository(nano.path.parent / name, nano.path.parent)
    clone.environment["FEATDIFF_MIRROR"] = "off"
    clone.run("dvc", "cache", "dir", "--local", str(nano.path / ".dvc/cache"))
    clone.run("dvc", "checkout")
    return clone


@pytest.mark.graph
def test_a_changed_comment_reruns_the_stages_with_that_code_and_nothing_after_them(nano: Repository) -> None:
    three = checked_out(nano, "three")
    code = three.path / "src/featdiff/crosscoder/fit.py"
    code.write_text(code.read_text(encoding="utf-8") + "# a comment\n", encoding="utf-8")

    def stale() -> set[str]:
        return set(json.loads(three.run("dvc", "status", "--json")))

    fits = {name for name in three.outputs() if name.startswith(("crosscoder@", "pair@", "dynamics@"))}
    assert stale() == fits
    rerun = ["crosscoder@joint_topk", "pair@sft"]  # of all that are stale two, to see that nothing after them is
    assert three.executed(three.run("dvc", "repro", "--single-item", *rerun)) == rerun
    assert stale() == fits - {*rerun}
    for name in rerun:
        before, after = nano.outputs()[name], three.outputs()[name]
        changed = {path for path in before if after[path] != before[path]}
        assert changed == {path for path in before if path.startswith("provenance/")}
    said = [json.loads((one.path / "provenance/crosscoders/joint_topk.json").read_text()) for one in (nano, three)]
    assert {field for field in said[0] if said[0][field] != said[1][field]} == {"code", "self"}
    three.run(sys.executable, "-m", "featdiff.artifacts.integrity")


@pytest.mark.graph
def test_a_file_of_others_that_changed_is_read_again(nano: Repository) -> None:
    """DVC does not track it. A blank line in it changes no question, so that nothing else has to run."""
    clone = checked_out(nano, "quiz")
    quiz = clone.path / "conf/profiles/nano_quiz.jsonl"
    quiz.write_text(quiz.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    output = clone.run(sys.executable, "-m", "featdiff.pipeline.repro")
    assert "changed since it was read: prepare.tasks.quiz.path" in output
    assert re.findall(r"^(\S+) \| begins$", output, re.MULTILINE)[:2] == ["check", "prepare"]
    assert clone.outputs()["base"] == nano.outputs()["base"]
    again = clone.run(sys.executable, "-m", "featdiff.pipeline.repro")
    assert "every stage is up to date" in again
    assert "begins" not in again


@pytest.mark.graph
def test_crosscoders_from_elsewhere_take_the_place_of_fitted_ones(nano: Repository) -> None:
    """The study's own crosscoder comes back in another library's format, and leads to the same set; an SAE of one model does
    for a crosscoder."""
    four = checked_out(nano, "four")
    params = yaml.safe_load((four.path / "params.yaml").read_text(encoding="utf-8"))
    fits, exchange = params["crosscoder"]["fits"], (sys.executable, "-m", "featdiff.crosscoder.exchange")
    for fit, words in (("joint_topk", ["dictionary_learning"]), ("joint_l1", ["saelens", "--model", "base"])):
        four.run(*exchange, *words, "crosscoders/joint_topk", f"../{fit}")
        fits[fit] = {"models": fits[fit]["models"], "loss": "imported", "seed": 0, "source": f"../{fit}"}
    (four.path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    rerun = ["crosscoder@joint_topk", "crosscoder@joint_l1", "localize"]
    assert four.executed(four.run("dvc", "repro", "--single-item", "check", *rerun))[1:] == rerun
    ours, theirs = (json.loads((one.path / "analysis/localize/features.json").read_text()) for one in (nano, four))
    assert theirs["features"] == ours["features"] != []
    said = {fit: json.loads((four.path / f"crosscoders/{fit}/config.json").read_text()) for fit in ("joint_topk", "joint_l1")}
    assert [said[fit]["loss"] for fit in said] == ["threshold", "jumprelu"]
    fve = [json.loads((one.path / "crosscoders/joint_topk/metrics.json").read_text())["fve"] for one in (nano, four)]
    assert fve[1] == pytest.approx(fve[0], abs=1e-4)


@pytest.mark.graph
def test_a_change_of_one_method_leaves_the_arms_of_others_alone(nano: Repository) -> None:
    code, params = nano.path / "src/featdiff/training/grpo.py", nano.path / "params.yaml"
    before = code.read_text(encoding="utf-8"), params.read_text(encoding="utf-8")

    def stale() -> set[str]:
        return set(json.loads(nano.run("dvc", "status", "--json"))) - {"check"}

    try:
        code.write_text(before[0] + "# a comment\n", encoding="utf-8")
        assert stale() == {"arm@grpo", "arm@grpo_1"}
        code.write_text(before[0], encoding="utf-8")
        params.write_text(before[1].replace("epochs: 1.0", "epochs: 2.0"), encoding="utf-8")
        assert stale() == {"arm@sft", "arm@sft_1"}
    finally:
        code.write_text(before[0], encoding="utf-8")
        params.write_text(before[1], encoding="utf-8")


def test_profiles_change_known_numbers_only() -> None:
    from featdiff.config.reading import read_yaml

    default = flatten(read_yaml(PROFILES / "organism.yaml"))
    nano_changes = flatten(read_yaml(PROFILES / "nano.yaml"))
    assert {key for key in nano_changes if "!" not in key} <= set(default)
