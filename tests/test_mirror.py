"""MLflow as a view of the records, against real stores: SQLite files and an ``mlflow server`` on this machine."""

import contextlib
import fcntl
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.config.params import load_study
from featdiff.tracking import backfill, mirror
from featdiff.tracking.backfill import restore
from featdiff.tracking.mlflow_view import EXPERIMENT, View, mask
from featdiff.tracking.record import in_force, runs_folder

REPOSITORY = Path(__file__).resolve().parents[1]

PREPARE = """
from featdiff.pipeline.stage import stage
with stage("prepare", out="data") as run:
    (run.out / "train.csv").write_text("a")
    run.metrics({"train": 2000, "eval": {"find": 10}})
"""
SFT = """
import sys, time
from featdiff.pipeline.stage import stage
steps, pause = int(sys.argv[1]), float(sys.argv[2])
with stage("sft", out="models/sft") as run:
    if len(sys.argv) > 3:
        run.read("data")
    for step in range(0, 2 * steps, 2):
        run.log(step, {"loss": 1 / (1 + step), "reward/mean": float("nan") if step == 4 else step})
        time.sleep(pause)
    run.observe(tokens_per_second=12.5, device="cpu")
    (run.out / "completions.csv").write_text("step,text\\n")
    run.attach("completions.csv")
    run.metrics({"accuracy": {"add": 0.9}, "loss": 0.25})
"""
EVALUATE = """
from featdiff.pipeline.stage import stage
with stage("evaluate", key="sft", out="evals/sft") as run:
    run.read("models/sft")
    run.metrics({"sort": 0.5})
"""
REPORT = """
from featdiff.pipeline.stage import stage
with stage("report", out="report") as run:
    run.read("models/sft")
    for name, text in {"index.html": "<h1>verdict</h1>", "summary.md": "it **holds**"}.items():
        (run.out / name).write_text(text)
        run.attach(name)
    run.metrics({"verdict": {"zero": 1}, "gain": 0.5})
"""
GRAPH = """
stages:
  prepare: {cmd: python stages/prepare.py, deps: [stages/prepare.py], params: [seed, prepare], outs: [data]}
  sft: {cmd: python stages/sft.py 20 0.05 data, deps: [stages/sft.py, data], params: [seed, sft], outs: [models/sft]}
  evaluate:
    foreach: [sft]
    do: {cmd: python stages/evaluate.py, deps: [stages/evaluate.py, models/sft], params: [evaluate], outs: [evals/sft]}
  report: {cmd: python stages/report.py, deps: [stages/report.py, models/sft], params: [report], outs: [report]}
"""


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A SQLite store with tables and nothing in them: making one takes seconds, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path, monkeypatch, empty_store):
    """A small repository with real stages, the working folder of the test."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "stages").mkdir()
    for name, text in {"prepare": PREPARE, "sft": SFT, "evaluate": EVALUATE, "report": REPORT}.items():
        (tmp_path / f"stages/{name}.py").write_text(text)
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    shutil.copytree(REPOSITORY / "conf/profiles", tmp_path / "conf/profiles")
    shutil.copy(REPOSITORY / "conf/profiles/organism.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATDIFF_MIRROR", "off")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return tmp_path


def run_stage(name, *arguments, **environment):
    return subprocess.run([sys.executable, f"stages/{name}.py", *map(str, arguments)], env=os.environ | environment, check=True)


def start_stage(name, *arguments, **environment):
    return subprocess.Popen([sys.executable, f"stages/{name}.py", *map(str, arguments)], env=os.environ | environment)


def command(*arguments, **environment):
    """``python -m featdiff.tracking.mirror …`` to its end."""
    words = [sys.executable, "-m", "featdiff.tracking.mirror", *arguments]
    return subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=False)


def only_record():
    (folder,) = runs_folder().iterdir()
    return folder


def advance(beat=lambda: None):
    one = mirror.Mirror(View(mirror.tracking_uri(), beat))
    one.advance()
    return one


def shown(uri=None):
    """Everything that the store shows, by stage or pipeline; ids that differ from store to store left out."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri or mirror.tracking_uri())
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    names = {run.info.run_id: run.data.tags.get("dvc.stage") or run.data.tags["featdiff.pipeline"] for run in runs}
    assert len(set(names.values())) == len(runs)
    everything = {}
    for run in runs:
        tags = {key: value for key, value in run.data.tags.items() if key not in ("mlflow.parentRunId", "mlflow.note.content")}
        everything[names[run.info.run_id]] = {
            "name": run.info.run_name,
            "parent": names.get(run.data.tags.get("mlflow.parentRunId")),
            "info": (run.info.status, run.info.start_time, run.info.end_time),
            "tags": tags,
            "note": re.sub("[0-9a-f]{32}", "<run>", run.data.tags.get("mlflow.note.content", "")),
            "params": run.data.params,
            "inputs": sorted((each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs),
            "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
            "points": {
                key: [
                    (point.step, repr(point.value), point.timestamp)
                    for point in client.get_metric_history(run.info.run_id, key)
                ]
                for key in run.data.metrics
            },
        }
    return everything


def experiment():
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=mirror.tracking_uri()).get_experiment_by_name(EXPERIMENT)


def models():
    """Every logged model of the store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=mirror.tracking_uri()).search_logged_models([View(mirror.tracking_uri()).experiment_id])


def run_of(label):
    """The only run of this stage."""
    view = View(mirror.tracking_uri())
    return view.client.get_run(view.find("dvc.stage", label).info.run_id)


def eventually(condition, seconds):
    """What ``condition`` becomes, which takes at most ``seconds`` on an idle machine."""
    deadline = time.monotonic() + 4 * seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)
    return value


def mirror_at_work():
    with contextlib.suppress(FileNotFoundError), Path(".featdiff/mirror.lock").open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_record_becomes_a_run_once(project):
    run_stage("sft", 5, 0)
    info = json.loads((only_record() / "run.json").read_text())
    times = [int(line) for line in (only_record() / "times.txt").read_text().split()]
    moment = int(info["started"] * 1000) + 20_000
    (only_record() / "system.jsonl").write_text(f'{{"time": {moment}, "cpu_utilization_percentage": 42.5}}\n{{"time": {moment}')
    assert advance().copied == 1
    view = shown()
    child = view["sft"]
    assert child["points"]["system/cpu_utilization_percentage"] == [(20, "42.5", moment)]
    assert child["info"] == ("FINISHED", int(info["started"] * 1000), int(info["ended"] * 1000))
    assert [(step, moment) for step, _, moment in child["points"]["curve/loss"]] == list(
        zip(range(0, 10, 2), times, strict=True)
    )
    assert [value for _, value, _ in child["points"]["curve/reward/mean"]] == ["0.0", "2.0", "nan", "6.0", "8.0"]
    assert [value for _, value, _ in child["points"]["result/accuracy/add"]] == ["0.9"]
    assert child["points"].keys() >= {"result/loss", "run/wall_seconds", "run/peak_memory_mib", "run/tokens_per_second"}
    assert child["tags"]["run.device"] == "cpu"
    assert child["tags"]["featdiff.record"] == info["id"]
    assert child["params"]["lr"] == str(load_study().sft.lr)
    assert child["files"] == ["completions.csv"]
    parent = view[child["parent"]]
    assert parent["tags"]["featdiff.pipeline"] == info["pipeline"]["id"]
    assert parent["info"] == child["info"]
    assert parent["points"].keys() == {"minutes"}

    assert advance().copied == 0
    (only_record() / "mirror.json").unlink()
    advance()
    assert shown() == view


def test_a_copy_broken_off_at_any_request_ends_the_same(project, monkeypatch, empty_store):
    run_stage("sft", 1200, 0)  # more points than one request takes
    run_stage("report")
    advance()
    expected = shown()
    assert len(expected["sft"]["points"]["curve/loss"]) == 1200

    for folder in runs_folder().iterdir():
        (folder / "mirror.json").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, project / 'again.db')}")
    broken, allowed = 0, 1
    while True:
        left = allowed

        def beat():
            nonlocal left
            left -= 1
            if left < 0:
                raise ConnectionError("gone")

        try:
            advance(beat)
        except ConnectionError:
            broken += 1
            allowed += 3
        else:
            break
    assert broken > 5
    assert shown() == expected


def test_a_request_carried_out_late_leaves_no_double(project):
    run_stage("sft", 5, 0)
    advance()
    expected = shown()
    view = View(mirror.tracking_uri())
    info = json.loads((only_record() / "run.json").read_text())
    for tag, value in {"featdiff.record": info["id"], "featdiff.pipeline": info["pipeline"]["id"]}.items():
        view.client.create_run(view.experiment_id, tags={tag: value}, run_name="late")
    (only_record() / "mirror.json").unlink()
    advance()
    assert shown() == expected


def test_points_arrive_while_the_stage_runs_and_a_killed_one_says_so(project):
    running = start_stage("sft", 1000, 0.01)
    try:
        curves = eventually(lambda: next(runs_folder().glob("*/metrics.jsonl"), None) if runs_folder().exists() else None, 20)
        eventually(lambda: curves.read_text().count("\n") > 20, 20)
        one = advance()
        early = shown()
        assert early["sft"]["info"][0] == "RUNNING"
        assert 20 <= len(early["sft"]["points"]["curve/loss"]) < 1000
        assert early[early["sft"]["parent"]]["info"][0] == "RUNNING"
    finally:
        running.kill()
        running.wait()
    assert one.advance() == 0
    late = shown()
    assert late["sft"]["info"][0] == "KILLED"
    assert late["sft"]["info"][2] >= late["sft"]["points"]["curve/loss"][-1][2] - 1000
    assert len(late["sft"]["points"]["curve/loss"]) == curves.read_bytes().count(b"\n")
    assert late[late["sft"]["parent"]]["info"][0] == "KILLED"


def test_a_run_that_a_person_deleted_stays_deleted(project):
    run_stage("sft", 5, 0)
    advance()
    view = View(mirror.tracking_uri())
    run = view.find("featdiff.record", only_record().name)
    view.client.delete_run(run.info.run_id)
    (only_record() / "mirror.json").unlink()
    assert advance().refused == []
    assert "sft" not in shown()


def test_a_deleted_store_is_filled_again(project, empty_store):
    run_stage("sft", 5, 0)
    advance()
    expected = shown()
    mirror_key = View(mirror.tracking_uri()).key
    shutil.copy(empty_store, project / "mlflow.db")
    assert View(mirror.tracking_uri()).key != mirror_key
    assert advance().copied == 1
    assert shown() == expected


def test_a_moved_repository_opens_its_artifacts(project, monkeypatch):
    from mlflow import MlflowClient

    run_stage("sft", 5, 0)
    advance()
    expected = shown()
    moved = project.rename(project.with_name("moved"))
    monkeypatch.chdir(moved)
    client = MlflowClient(tracking_uri=mirror.tracking_uri())
    run = View(mirror.tracking_uri()).find("featdiff.record", only_record().name)
    assert run.info.artifact_uri.startswith((moved / "mlartifacts").as_uri())
    assert Path(client.download_artifacts(run.info.run_id, "completions.csv")).read_text() == "step,text\n"
    assert advance().copied == 0, "what was settled is settled"
    assert shown() == expected
    run_stage("prepare")
    assert advance().copied == 1
    assert not project.exists()


def test_a_damaged_record_does_not_keep_the_others_out(project, capsys):
    run_stage("sft", 5, 0)
    damaged = only_record().rename(runs_folder() / "0-damaged")
    (damaged / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n\0\0\0\n')
    info = json.loads((damaged / "run.json").read_text()) | {"id": "0-damaged", "label": "damaged"}
    (damaged / "run.json").write_text(json.dumps(info))
    (runs_folder() / "1-empty").mkdir()
    run_stage("prepare")
    one = advance()
    assert [line.split(":")[0] for line in one.refused] == ["0-damaged"]
    assert "1-empty" in capsys.readouterr().out
    assert shown()["prepare"]["info"][0] == "FINISHED"


def test_mask_hides_what_a_uri_should_not_show():
    assert mask("to https://me:s3cr@et@host:5000/api?token=abc failed") == "to https://***@host:5000/api?*** failed"
    assert mask("postgresql://u:p@db/x?password=y") == "postgresql://***@db/x?***"
    assert mask("sqlite:////home/a@b/mlflow.db: no") == "sqlite:////home/a@b/mlflow.db: no"


def test_a_second_mirror_leaves_before_it_imports_mlflow(project):
    with mirror.lock() as mine:
        assert mine
        found = command("follow", PYTHONPROFILEIMPORTTIME="1")
        assert found.returncode == 0
        assert "featdiff.tracking.record" in found.stderr
        assert "mlflow.entities" not in found.stderr
        assert "another mirror" in command("sync").stdout
    assert not mirror_at_work()


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.graph
def test_a_server_that_refuses_or_fails_is_given_up_and_caught_up_later(project):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://me:secret@127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        run_stage("sft", 5, 0, MLFLOW_TRACKING_URI=nowhere, FEATDIFF_MIRROR="on")
        assert time.monotonic() - started < 5
        follower = int(eventually(lambda: mirror_at_work() and Path(".featdiff/mirror.lock").read_text(), 20))
        os.kill(follower, signal.SIGKILL)
        eventually(lambda: not mirror_at_work(), 5)
        found = command("sync", MLFLOW_TRACKING_URI=nowhere)
        assert found.returncode == 1
        assert "***@127.0.0.1" in found.stdout
        assert "secret" not in found.stdout + found.stderr + Path(".featdiff/mirror.log").read_text()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "import featdiff.tracking.mirror as m; m.GIVE_UP_SECONDS = 1.0; m.POLL_SECONDS = 0.5; m.main(['follow'])"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.server_port}"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    server.shutdown()
    assert "gave up" in found.stdout
    assert advance().copied == 1
    assert shown()["sft"]["info"][0] == "FINISHED"


@contextlib.contextmanager
def mlflow_server(folder, port):
    words = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "server-files")]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words, "--port", str(port), "--workers", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers():
        assert server.poll() is None
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200

    try:
        eventually(answers, 120)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGCONT)
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.graph
def test_a_server_that_stops_and_hangs_ends_with_every_point_once(project, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    follow = "import featdiff.tracking.mirror as m; m.POLL_SECONDS = 0.2; m.REQUEST_SECONDS = 4; m.main(['follow'])"

    with contextlib.ExitStack() as ending:
        with mlflow_server(project, port):
            running = start_stage("sft", 50_000, 0.05)
            ending.callback(running.kill)
            eventually(lambda: runs_folder().exists() and any(runs_folder().glob("*/run.json")), 20)
            follower = subprocess.Popen([sys.executable, "-c", follow])
            ending.callback(follower.kill)
            eventually(lambda: len(shown_points(uri)) > 20, 60)
        server = ending.enter_context(mlflow_server(project, port))
        before = len(shown_points(uri))
        eventually(lambda: len(shown_points(uri)) > before, 60)
        os.killpg(server.pid, signal.SIGSTOP)
        time.sleep(5)  # longer than the client waits for an answer
        os.killpg(server.pid, signal.SIGCONT)
        running.terminate()
        running.wait()
        assert follower.wait(240) == 0
        view = shown()
        rows = [json.loads(line) for line in (only_record() / "metrics.jsonl").read_text().splitlines()]
        points = [(step, value) for step, value, _ in view["sft"]["points"]["curve/loss"]]
        assert points == [(row["step"], repr(row["loss"])) for row in rows]
        assert view["sft"]["info"][0] == "KILLED"
        assert command("sync").returncode == 0
        assert shown() == view


def shown_points(uri):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id], "attributes.run_name = 'sft'") if experiment else []
    return client.get_metric_history(runs[0].info.run_id, "curve/loss") if runs else []


@pytest.mark.graph
def test_a_pipeline_is_one_parent_with_a_child_per_stage(project, monkeypatch, empty_store):
    import yaml

    for words in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(words, check=True)
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("teacher: foreign", "teacher: own"))
    Path("mlflow.db").unlink()
    for path in ("mlflow.db", "mlartifacts", ".featdiff"):
        with Path(".gitignore").open("a") as ignore:
            ignore.write(f"/{path}\n")
    subprocess.run(["dvc", "repro", "-q"], check=True, env=os.environ | {"FEATDIFF_MIRROR": "on"})
    eventually(lambda: not mirror_at_work(), 60)
    assert Path(".featdiff/mirror.log").read_text() == ""
    view = shown()
    (parent,) = (name for name, run in view.items() if run["parent"] is None)
    assert view[parent]["name"].startswith("organism ")
    assert {name: run["parent"] for name, run in view.items()} == {
        parent: None,
        "prepare": parent,
        "sft": parent,
        "evaluate@sft": parent,
        "report": parent,
    }
    assert {run["info"][0] for run in view.values()} == {"FINISHED"}
    assert view[parent]["info"][1:] == (view["prepare"]["info"][1], view["report"]["info"][2])
    values = {name: str(value) for name, value in in_force(project).items() if not isinstance(value, list)}
    assert values["prepare.teacher"] == "own"
    assert len(values) > 100
    assert values.items() <= view[parent]["params"].items()
    assert view[parent]["points"].keys() == {"verdict/zero", "gain", "minutes"}
    assert view[parent]["note"].startswith("it **holds**\n\n[report](#/experiments/")
    locked = {
        out["path"]: out["md5"]
        for stage in yaml.safe_load(Path("dvc.lock").read_text())["stages"].values()
        for out in stage["outs"]
    }
    assert view["sft"]["inputs"] == [("data", locked["data"])]
    assert view["report"]["inputs"] == [("models/sft", locked["models/sft"])]
    assert view[parent]["inputs"] == [("data", locked["data"])]
    shared = json.loads(experiment().tags["mlflow.sharedViewState.featdiff"])["selectedColumns"]
    assert shared == ["params.`profile`", "params.`seed`", "metrics.`verdict/zero`", "metrics.`gain`", "metrics.`minutes`"]
    assert view["report"]["files"] == ["index.html", "summary.md"]
    assert len(view["sft"]["points"]["curve/loss"]) == 20
    [model] = models()
    assert (model.name, model.tags["dvc.path"], model.tags["dvc.md5"]) == ("sft", "models/sft", locked["models/sft"])
    assert [(metric.key, metric.value) for metric in model.metrics] == [("result/sort", 0.5)]
    assert model.status == "READY"
    assert model.source_run_id == run_of("sft").info.run_id
    assert [read.model_id for read in run_of("evaluate@sft").inputs.model_inputs] == [model.model_id]
    assert (project / "mlflow.db").exists()
    assert any((project / "mlartifacts").rglob("index.html"))

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, project / 'restored.db')}")
    shutil.rmtree(".featdiff")
    assert command("rebuild").returncode == 0
    restored = shown()
    stages = {"prepare", "sft", "evaluate@sft", "report"}
    assert {name for name, run in restored.items() if run["parent"]} == stages
    assert [model.name for model in models()] == ["sft"]
    for name in stages:
        assert restored[name]["tags"]["featdiff.restored"] == "true"
        assert restored[name]["inputs"] == view[name]["inputs"]
        assert restored[name]["params"] == view[name]["params"]
        for key, points in view[name]["points"].items():
            if not key.startswith("run/"):
                assert [point[:2] for point in restored[name]["points"][key]] == [point[:2] for point in points]
    assert restore(project) == ["dvc.lock: 0 record(s) restored, 4 known already"]
    assert advance().copied == 0
    assert shown() == restored


class Pulled:
    """A repository with a cache and a dvc.lock that somebody else wrote; nothing was run in it."""

    def __init__(self, root):
        self.root, self.stages, self.cache = root, {}, root / ".dvc/cache/files/md5"

    def place(self, md5):
        return self.cache / md5[:2] / md5[2:]

    def store(self, data, suffix=""):
        md5 = hashlib.md5(data).hexdigest() + suffix
        self.place(md5).parent.mkdir(parents=True, exist_ok=True)
        self.place(md5).write_bytes(data)
        return md5

    def output(self, stage, listing):
        """``stage`` with one output, whose listing is a value or bytes; returns the listing's md5."""
        data = listing if isinstance(listing, bytes) else json.dumps(listing).encode()
        md5 = self.store(data, ".dir")
        self.stages[stage] = {"cmd": "x", "outs": [{"path": f"out/{stage}", "hash": "md5", "md5": md5}]}
        return md5

    def lock(self, text=None):
        import yaml

        text = yaml.safe_dump({"schema": "2.0", "stages": self.stages}) if text is None else text
        (self.root / "dvc.lock").write_text(text)

    def files(self, *names):
        return [{"md5": self.store(name.encode()), "relpath": name} for name in names]

    def restored(self):
        """What restoring says, line by line, and which files it made in and around the repository."""

        def everything():
            return {*self.root.parent.iterdir(), *self.root.rglob("*")}

        before = everything()
        lines = restore(self.root)
        assert all(line.isprintable() for line in lines)
        return lines, {os.path.relpath(path, self.root) for path in everything() - before if path.is_file()}


@pytest.fixture
def pulled(project, monkeypatch):
    made = Pulled(project)
    monkeypatch.setattr(backfill, "cache_folder", lambda _: made.cache)  # asking DVC takes a second
    return made


def record(stage, md5, *names):
    return {
        f".featdiff/runs/restored-{stage}-{md5.removesuffix('.dir')}/{name}" for name in ("run.json", "metrics.jsonl", *names)
    }


OUTSIDE = ("../../x.html", "../" * 9 + "tmp/x.html", "a/../../../../x.html", "/tmp/x.html", "//tmp/x.html", "..", ".", "")
STRANGE = (
    "a\\..\\x.html",
    "a\nb.html",
    "a\0b.html",
    "\ud800.html",
    "a//b.html",
    "./x.html",
    "x" * 300 + ".html",
    "a/" * 600 + "x.html",
)


def hostile(pulled):
    """Listings by the name of a stage, each with a cached page that it would have written somewhere."""
    page = pulled.store(b"<h1>")
    listings = [
        *([{"md5": page, "relpath": name}] for name in (*OUTSIDE, *STRANGE)),
        *(
            [{"md5": md5, "relpath": "x.html"}]
            for md5 in ("", "../" + page, f"/{page}", page.upper(), page + ".dir", page[:-1], 1, None)
        ),
        *([{"md5": page, "relpath": name}] for name in (None, 1, [], {})),
        [{"md5": page, "relpath": "x.html"}, {"md5": page, "relpath": "x.html/y.html"}],
        [{"md5": page, "relpath": "x.html"}, {"md5": page, "relpath": "x.html"}],
        *(
            {},
            None,
            1,
            "x",
            [1],
            [None],
            [[]],
            [{}],
            [{"md5": page}],
            [{"relpath": "x.html"}],
            {"md5": page, "relpath": "x.html"},
        ),
        *(b"", b"{", b"\xff", b"[" * 100_000, b'[{"a":' * 100_000, b"[" + b"1" * 5000 + b"]"),
    ]
    return {f"hostile{i:02d}": listing for i, listing in enumerate(listings)}


def test_a_hostile_listing_is_left_out_and_writes_nothing(pulled):
    stages = hostile(pulled)
    for stage, listing in stages.items():
        pulled.output(stage, listing)
    md5 = pulled.output("sound", pulled.files("index.html", "figures/größe.svg", "weights.bin"))
    pulled.lock()
    lines, made = pulled.restored()
    assert made == record("sound", md5, "files/index.html", "files/figures/größe.svg")
    assert lines[0] == "dvc.lock: 1 record(s) restored, 0 known already"
    assert [line.partition(": left out: ")[0] for line in lines[1:]] == [f"out/{stage}" for stage in stages]
    assert pulled.restored() == (["dvc.lock: 0 record(s) restored, 1 known already", *lines[1:]], set())


def test_without_a_look_at_the_names_a_file_would_be_written_outside(pulled, monkeypatch):
    pulled.output("hostile", [{"md5": pulled.store(b"<h1>"), "relpath": "../../../x.html"}])
    pulled.lock()
    monkeypatch.setattr("featdiff.artifacts.dvc.inside", lambda _: True)
    assert "x.html" in pulled.restored()[1], "the test above would not notice that the guard is gone"


def link(path):
    shutil.copy(path, path.parents[4] / "elsewhere")
    path.unlink()
    path.symlink_to(path.parents[4] / "elsewhere")


def link_above(path):
    path.parent.rename(path.parents[4] / "elsewhere")
    path.parent.symlink_to(path.parents[4] / "elsewhere")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def changed(path):
    path.write_bytes(path.read_bytes()[:-1] + b"~")


@pytest.mark.parametrize("damage", [changed, link, link_above, pipe, folder])
@pytest.mark.parametrize("object", ["listing", "index.html", "metrics.jsonl", "metrics.json"])
def test_an_object_that_is_not_what_its_name_says_is_left_out(pulled, damage, object):
    kept = {"index.html": b"<h1>", "metrics.jsonl": b'{"step": 1}\n', "metrics.json": b'{"gain": 0.5}', "weights.bin": b"w"}
    names = {name: pulled.store(data) for name, data in kept.items()}
    names["listing"] = pulled.output("report", [{"md5": md5, "relpath": name} for name, md5 in names.items()])
    pulled.lock()
    damage(pulled.place(names[object]))
    lines, made = pulled.restored()
    assert made == set()
    assert lines[0] == "dvc.lock: 0 record(s) restored, 0 known already"
    assert len(lines) == 2
    assert lines[1].startswith(f"out/report: left out: {pulled.place(names[object])}: ")
    assert lines[1].endswith("delete it, then run dvc pull, or dvc repro -f its stage")


@pytest.mark.parametrize("metrics", [b"[]", b"{", b'{"a":' * 100_000, b'{"a": 1' + b"0" * 400 + b"}"])
def test_final_metrics_that_are_none_are_left_out(pulled, metrics):
    pulled.output("report", [{"md5": pulled.store(metrics), "relpath": "metrics.json"}])
    pulled.lock()
    lines, made = pulled.restored()
    assert (len(lines), made) == (2, set())
    assert "out/report: left out: " in lines[1]


def test_what_is_not_pulled_is_told_from_what_is_damaged(pulled):
    files = pulled.files("index.html", "weights.bin")
    pulled.output("report", files)
    pulled.lock()
    pulled.place(files[1]["md5"]).unlink()
    assert pulled.restored()[0][1:] == ["not in DVC's cache: out/report; run dvc pull first"]


SUM = "0" * 32
LOCKS = {
    "no YAML": "stages: [",
    "not text": "\0",
    "a list": "[1]",
    "deep": "[" * 50_000,
    "no such tag": "stages: !!python/object/apply:os.system [echo]",
    "a value that its tag has not": "stages: !!bool maybe",
    "stages": "stages: [1]",
    "a stage": "stages: {x: 1}",
    "its name": f"stages: {{../../x: {{outs: [{{path: x, md5: {SUM}.dir}}]}}}}",
    "a name in a folder": f"stages: {{a/x: {{outs: [{{path: x, md5: {SUM}.dir}}]}}}}",
    "a number as name": f"stages: {{1: {{outs: [{{path: x, md5: {SUM}.dir}}]}}}}",
    "a long name": f"stages: {{{'x' * 200}: {{outs: [{{path: x, md5: {SUM}.dir}}]}}}}",
    "outs": "stages: {x: {outs: {path: x}}}",
    "no outs": "stages: {x: {outs: null}}",
    "an output": "stages: {x: {outs: [x]}}",
    "no path": f"stages: {{x: {{outs: [{{md5: {SUM}.dir}}]}}}}",
    "a path outside": f"stages: {{x: {{outs: [{{path: ../x, md5: {SUM}.dir}}]}}}}",
    "a path from the root": f"stages: {{x: {{outs: [{{path: /x, md5: {SUM}.dir}}]}}}}",
    "no md5": "stages: {x: {outs: [{path: x, md5: null}]}}",
    "a number": "stages: {x: {outs: [{path: x, md5: 12345678901234567890123456789012}]}}",
    "md5 outside": "stages: {x: {outs: [{path: x, md5: ../../../etc.dir}]}}",
    "deps": "stages: {x: {deps: [1]}}",
}


@pytest.mark.parametrize("text", LOCKS.values(), ids=LOCKS)
def test_a_malformed_lock_is_one_line(project, text):
    (project / "dvc.lock").write_text(text)
    with pytest.raises(ContractError) as caught:
        restore(project)
    assert str(caught.value).startswith(f"{project}/dvc.lock: ")
    assert str(caught.value).isprintable()


def test_rebuild_says_so_and_leaves(project):
    (project / "dvc.lock").write_text("stages: [")
    found = command("rebuild")
    assert found.returncode == 2
    assert found.stdout.startswith("mirror: dvc.lock: content: expected YAML")
    assert (found.stdout.count("\n"), found.stderr) == (1, "")


@pytest.mark.parametrize(
    "params",
    [
        *(1, {"params.yaml": 1}, {"params.yaml": {"seed": "x"}}, {"params.yaml": {1: 2}}),
        *({"params.yaml": {"x": {"a": 1}, "x.a.b": 2}}, {"params.yaml": {"x.a": {1, 2}}}, {"params.yaml": {"x.a": "\ud800"}}),
    ],
)
def test_params_of_the_lock_that_no_record_holds_are_left_out(pulled, params):
    pulled.output("x", pulled.files("index.html"))
    pulled.stages["x"]["params"] = params
    pulled.lock()
    lines, made = pulled.restored()
    assert made == set()
    assert len(lines) == 2
    assert lines[1].startswith("out/x: left out: dvc.lock: ")
