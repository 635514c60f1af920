"""What a record looks like in MLflow, and how it gets there exactly once.

One parent run per pipeline invocation, one child run per record. The store itself is asked what it already
holds: runs are found by tag, points by key, step and the time that the record has for them, so that a copy which
broke off anywhere can be taken up again. A run that a person deleted stays deleted.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from featdiff.processes.ranks import alive
from featdiff.tracking.record import METRICS, TIMES, curated
from featdiff.tracking.system import SYSTEM

EXPERIMENT = "featdiff"
RECORD_TAG = "featdiff.record"
PIPELINE_TAG = "featdiff.pipeline"
PATH_TAG, DIGEST_TAG = "dvc.path", "dvc.md5"
"""Of a run, the path of what it made; of a model also DVC's digest of it."""
CURVE, RESULT, RUN = "curve", "result", "run"
"""Groups of a stage's metrics. MLflow lays charts out by group, in alphabetical order, and single values as bars."""
EVALUATE, MODELS = "evaluate", "models/"
"""Stage that says how good the model of its key is, and where models lie."""
PARENT_TAG = "mlflow.parentRunId"
MAX_VALUE = 500
"""Characters of a param or tag value."""
MAX_NOTE = 5000
"""Characters of a description."""
MAX_FINAL = 100
"""Final metrics per run."""
BATCH, PARAMS_AT_ONCE = 1000, 100
"""Metrics and params in one request, the store's limits."""
FIELDS = {
    "id",
    "label",
    "stage",
    "key",
    "status",
    "started",
    "host",
    "pid",
    "pid_start",
    "pipeline",
    "experiment",
    "commit",
} | {*("profile", "study", "seed", "params", "inputs", "summary", "observed")}
"""What every run.json holds."""
HEADLINE = "report"
"""Stage whose final metrics are those of the parent run: the few numbers by which studies are compared."""
PAGE, NOTE = "index.html", "summary.md"
"""Files of a record: what can be read of it, and what is said of the whole pipeline."""
DATABASE, ARTIFACTS = Path("mlflow.db"), Path("mlartifacts")
"""The repository's own store, in the folder of the repository, where whoever writes to it works."""
PLACES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))
"""Tables and columns of MLflow's store that hold the places of artifacts."""
DATA = "data"
"""The artifact that is the data set of a pipeline."""
FACE = "?workflowType=machine_learning"
"""Of MLflow's two faces the one that shows runs, params and curves."""
SHARED_VIEW = "featdiff"
PAGE_OF_RUNS = f"runs{FACE}&viewStateShareKey={SHARED_VIEW}"
"""Address, within the experiment, of its table of pipelines."""


def own_store() -> str:
    """URI of the repository's own store."""
    return f"sqlite:///{DATABASE.absolute()}"


def mask(text: str) -> str:
    """``text`` without the user, password and query of any URI in it."""
    return re.sub(
        r"(?<=://)([^/\s]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?",
        lambda m: ("***@" if m[1] else "") + m[2] + ("?***" if m[3] else ""),
        text,
    )


def _key(name: str) -> str:
    """A metric or param name that MLflow accepts."""
    return re.sub(r"[^\w./: -]", "_", name.replace("@", ".")).strip("/")[:250]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return ""


def _text(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def _foremost(values: Mapping[str, Any], limit: int) -> dict[str, float]:
    """At most ``limit`` of ``values``, the least nested first, otherwise in their own order."""
    return {key: float(values[key]) for key in sorted(values, key=lambda key: key.count("/"))[:limit]}


@dataclass(frozen=True)
class Local:
    """A record as it stands on disk now."""

    folder: Path
    info: Mapping[str, Any]
    status: str
    """RUNNING, FINISHED, FAILED or KILLED; a record whose process is gone counts as KILLED."""
    elsewhere: bool
    """Still running on another machine that shares this folder, or left behind there: nobody to wait for."""

    @classmethod
    def read(cls, folder: Path, host: str) -> Self:
        """Raises OSError, JSONDecodeError or KeyError for a folder that is no record."""
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if missing := FIELDS - info.keys():
            raise KeyError(*sorted(missing))
        elsewhere = info["status"] == "RUNNING" and info["host"] != host
        status = info["status"]
        if status == "RUNNING" and not elsewhere and not alive(info["pid"], info["pid_start"]):
            # its last write may have come between reading and looking for the process
            info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            status = "KILLED" if info["status"] == "RUNNING" else info["status"]
        return cls(folder, info, status, elsewhere)

    @property
    def started_ms(self) -> int:
        return int(self.info["started"] * 1000)

    @property
    def ended_ms(self) -> int:
        """End of the stage; of a killed one the time of its last sign of life."""
        if "ended" in self.info:
            return int(self.info["ended"] * 1000)
        written = (path for name in ("run.json", METRICS, TIMES) if (path := self.folder / name).exists())
        return max(self.started_ms, *(int(path.stat().st_mtime * 1000) for path in written))

    def pipeline_alive(self, host: str) -> bool:
        pipeline = self.info["pipeline"]
        return self.info["host"] == host and alive(pipeline["pid"], pipeline["start"])


def follow_a_move(uri: str, place: str) -> None:
    """Correct where artifacts lie, which MLflow keeps as absolute paths: ``place`` is the experiment's, as its store has it.
    Only the repository's own store is touched, where the repository was moved or copied as a whole."""
    here = ARTIFACTS.absolute().as_uri()
    if uri != own_store() or place == here or not place.endswith(f"/{ARTIFACTS.name}"):
        return
    with contextlib.closing(sqlite3.connect(DATABASE)) as store, store:
        for table, column in PLACES:
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?"
            store.execute(moved, (here, len(place) + 1, place, len(place) + 1, f"{place}/"))


class View:
    """The experiment ``featdiff`` in one MLflow store.

    ``beat`` is called before every request: a sign of life for whoever watches over a hanging server.
    Raises MlflowException when the store cannot be reached."""

    def __init__(self, uri: str, beat: Callable[[], None] = lambda: None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import ViewType

        self._beat, self._all = beat, ViewType.ALL
        beat()
        self._client = MlflowClient(tracking_uri=uri)
        served = uri.startswith(("http:", "https:", "databricks"))
        experiment = self._experiment(None if served else ARTIFACTS.absolute())
        follow_a_move(uri, experiment.artifact_location)
        self.experiment_id = str(experiment.experiment_id)
        store = DATABASE if uri == own_store() else mask(uri)  # the repository's own is the same wherever that was moved to
        identity = f"{store} {self.experiment_id} {experiment.creation_time}"
        self.key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        """Names this store and this life of the experiment."""

    @property
    def client(self) -> Any:
        self._beat()
        return self._client

    def _experiment(self, artifacts: Path | None) -> Any:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                self.client.create_experiment(EXPERIMENT, artifacts.as_uri() if artifacts else None)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.client.get_experiment_by_name(EXPERIMENT)
        if found.lifecycle_stage != "active":
            raise MlflowException(
                f"experiment {EXPERIMENT} was deleted; restore it: mlflow experiments restore -x {found.experiment_id}"
            )
        return found

    def find(self, tag: str, value: str) -> Any:
        """The run with this tag, None if there is none. Removes doubles, which a request leaves that its server
        carried out after the client had given it up: they hold nothing but what they were created with."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{tag}` = '{value}'", self._all)
        runs.sort(key=lambda run: (run.info.lifecycle_stage == "active", len(run.data.params), len(run.data.metrics)))
        for double in runs[:-1]:
            if double.info.lifecycle_stage == "active":
                self.client.delete_run(double.info.run_id)
        return runs[-1] if runs else None

    def open(self, tag: str, value: str, name: str, started_ms: int, tags: Mapping[str, str]) -> Any:
        """The run with this tag, created if there is none; None if a person deleted it."""
        run = self.find(tag, value)
        if run is None:
            every = {tag: value, "mlflow.user": _user(), "mlflow.source.type": "PROJECT"} | dict(tags)
            given = {key: _text(text) for key, text in every.items() if text}
            run = self.client.create_run(self.experiment_id, start_time=started_ms, tags=given, run_name=name)
        return run if run.info.lifecycle_stage == "active" else None

    def points(self, run: Any) -> set[tuple[str, int, int]]:
        """Key, step and time of every metric value that the store holds for ``run``."""
        return {
            (key, point.step, point.timestamp)
            for key in run.data.metrics
            for point in self.client.get_metric_history(run.info.run_id, key)
        }

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        every = [Param(_key(name), _text(value)) for name, value in params.items()]
        for start in range(0, len(every), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=every[start : start + PARAMS_AT_ONCE])

    def log_metrics(self, run_id: str, points: Iterable[tuple[str, float, int, int]], model: str | None = None) -> None:
        """Log (key, value, time in ms, step), in order, and return when the store has them; ``model`` is the id of the model
        of which they are said as well."""
        from mlflow.entities import Metric

        metrics = [Metric(*point, model_id=model) for point in points]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def log_inputs(self, run_id: str, inputs: Mapping[str, str]) -> None:
        """Artifacts that a stage read: the path as name, DVC's md5 as digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "input")]
        datasets = [
            DatasetInput(
                Dataset(name=path, digest=digest or "not-tracked", source_type="dvc", source=json.dumps({"path": path})), tags
            )
            for path, digest in inputs.items()
        ]
        if datasets:
            self.client.log_inputs(run_id, datasets=datasets)

    def show(self, metrics: Iterable[str]) -> None:
        """Have the experiment's page show pipelines, not their stages, with these metrics as columns; bounds of intervals are
        left to the page of a run. This is what MLflow keeps when a person shares a view, under a name of ours."""
        columns = [("params", "profile"), ("params", "seed")]
        columns += [("metrics", _key(name)) for name in metrics if name.rpartition("/")[2] not in ("low", "high")]
        state = {
            "searchFilter": f"tags.`{PIPELINE_TAG}` LIKE '%'",
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
            "selectedColumns": [f"{kind}.`{name}`" for kind, name in columns],
        }
        self.client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{SHARED_VIEW}", json.dumps(state))

    def log_model_input(self, run_id: str, model: str) -> None:
        """Say that this run read the model with this id."""
        from mlflow.entities import LoggedModelInput

        self.client.log_inputs(run_id, models=[LoggedModelInput(model)])

    def model(self, path: str, digest: str, parent_id: str) -> str:
        """Id of the model with this DVC digest, created if there is none: named by where it lies, without a copy of it, as the
        work of the run of the same pipeline that made it, if there is one."""
        known = self.client.search_logged_models([self.experiment_id], f"tags.`{DIGEST_TAG}` = '{digest}'")
        if known:
            return str(known[0].model_id)
        makers = self.client.search_runs(
            [self.experiment_id], f"tags.`{PATH_TAG}` = '{path}' and tags.`{PARENT_TAG}` = '{parent_id}'"
        )
        made = self.client.create_logged_model(
            self.experiment_id,
            path.removeprefix(MODELS),
            makers[0].info.run_id if makers else None,
            {PATH_TAG: path, DIGEST_TAG: digest},
            model_type="causal language model",
        )
        return str(self.client.finalize_logged_model(made.model_id, "READY").model_id)


def open_parent(view: View, first: Local) -> Any:
    """The run of one pipeline invocation; None if a person deleted it. Its name begins with what tells it from
    others, because MLflow's table shows some twenty characters."""
    info = first.info
    stamp = time.strftime("%m-%d %H:%M", time.localtime(info["started"]))
    origin = "restored" if info.get("restored") else info["experiment"]
    name = " ".join(part for part in (origin, info["profile"], stamp) if part)
    tags = {
        "git.commit": info["commit"],
        "mlflow.source.git.commit": info["commit"],
        "mlflow.source.name": "dvc.yaml",
        "dvc.exp": info["experiment"],
        "featdiff.profile": info["profile"],
        "featdiff.restored": "true" if info.get("restored") else "",
    }
    run = view.open(PIPELINE_TAG, info["pipeline"]["id"], name, first.started_ms, tags)
    if run is not None:
        view.log_params(run.info.run_id, info["study"])
    return run


def close_parent(view: View, parent_id: str, records: list[Local]) -> None:
    """Write what compares pipelines in one table, then end the parent run with its last record."""
    run = view.find(PIPELINE_TAG, records[0].info["pipeline"]["id"])
    if run is None or run.info.lifecycle_stage != "active":
        return
    ended = max(record.ended_ms for record in records)
    if run.info.status != "RUNNING" and (run.info.end_time or 0) >= ended:
        return
    values, data, note = dict[str, float](), dict[str, str](), ""
    for record in records:
        if record.info["stage"] == HEADLINE:
            values |= record.info["summary"]
            note = _described(view, record)
        data |= {path: digest for path, digest in record.info["inputs"].items() if path == DATA}
    view.log_inputs(parent_id, data)
    if not records[0].info.get("restored"):
        values["minutes"] = round((ended - min(record.started_ms for record in records)) / 60_000, 2)
    view.show(values)
    view.log_metrics(
        parent_id, [(_key(key), float(value), ended, 0) for key, value in values.items() if _key(key) not in run.data.metrics]
    )
    if note:
        view.client.set_tag(parent_id, "mlflow.note.content", note)
    statuses = {record.status for record in records}
    view.client.set_terminated(
        parent_id, "FAILED" if "FAILED" in statuses else "KILLED" if "KILLED" in statuses else "FINISHED", ended
    )


def _described(view: View, record: Local) -> str:
    """The description that a record has for its whole pipeline, and where to see more."""
    files = record.folder / "files"
    if not (files / NOTE).is_file():
        return ""
    note = (files / NOTE).read_text(encoding="utf-8")
    child = view.find(RECORD_TAG, record.info["id"])
    if child is not None and (files / PAGE).is_file():
        note += f"\n\n[report](#/experiments/{view.experiment_id}/runs/{child.info.run_id}/artifacts/{PAGE}{FACE})"
    return note[-MAX_NOTE:]


class Child:
    """One record on its way into the store, from wherever the store stands."""

    def __init__(self, view: View, record: Local, parent_id: str) -> None:
        info = record.info
        tags = {
            PARENT_TAG: parent_id,
            "dvc.stage": info["label"],
            "featdiff.pipeline.stage": info["stage"],
            "featdiff.key": info["key"],
            PATH_TAG: info.get("out", ""),
            "dvc.exp": info["experiment"],
            "git.commit": info["commit"],
            "mlflow.source.git.commit": info["commit"],
            "mlflow.source.name": f"stages/{info['stage']}.py",
            "featdiff.restored": "true" if info.get("restored") else "",
        }
        run = view.open(RECORD_TAG, info["id"], info["label"], record.started_ms, tags)
        self._view, self._line, self._offsets = view, 0, dict[str, int]()
        self.done, self._parent_id = run is None, parent_id
        if run is not None:
            self._run_id: str = run.info.run_id
            self._have = view.points(run)
            view.log_params(self._run_id, {"seed": info["seed"]} | curated(info["params"], info["key"]))

    def advance(self, record: Local) -> None:
        """Copy what the record has gained; once it is closed, complete the run and end it."""
        if self.done:
            return
        self._copy_curves(record)
        if record.status != "RUNNING":
            self._complete(record)
            self.done = True

    def _copy_curves(self, record: Local) -> None:
        lines, offset = self._fresh(record.folder / METRICS)
        times = [int(line) for line in (record.folder / TIMES).read_text().split()] if (record.folder / TIMES).exists() else []
        fresh: list[tuple[str, float, int, int]] = []
        for index, row in enumerate(lines, self._line):
            step, moment = row.pop("step"), times[index] if index < len(times) else record.started_ms
            fresh += [(f"{CURVE}/{_key(key)}", float(value), moment, step) for key, value in row.items()]
        samples, sampled = self._fresh(record.folder / SYSTEM)
        for row in samples:
            moment = row.pop("time")
            seconds = (moment - record.started_ms) // 1000
            fresh += [(f"system/{_key(key)}", float(value), moment, seconds) for key, value in row.items()]
        self._view.log_metrics(self._run_id, [point for point in fresh if (point[0], point[3], point[2]) not in self._have])
        self._offsets |= {METRICS: offset, SYSTEM: sampled}
        self._line += len(lines)

    def _fresh(self, path: Path) -> tuple[list[dict[str, Any]], int]:
        """Whole lines of ``path`` that were not copied yet, and where they end."""
        offset = self._offsets.get(path.name, 0)
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return [], offset
        with stream:
            stream.seek(offset)
            lines = [line for line in stream if line.endswith(b"\n")]
        return [json.loads(line) for line in lines], offset + sum(map(len, lines))

    def _complete(self, record: Local) -> None:
        info, view, run_id, ended = record.info, self._view, self._run_id, record.ended_ms
        view.log_inputs(run_id, info["inputs"])
        if (files := record.folder / "files").is_dir():
            view.client.log_artifacts(run_id, str(files))
        observed = {key: value for key, value in info["observed"].items() if isinstance(value, (int, float))}
        for key in info["observed"].keys() - observed.keys():
            view.client.set_tag(run_id, f"run.{_key(key)}", _text(info["observed"][key]))
        self._log_at_end(RESULT, _foremost(info["summary"], MAX_FINAL), ended, self._evaluated(info))
        self._log_at_end(RUN, observed, ended)
        view.client.set_terminated(run_id, record.status, ended)

    def _log_at_end(self, group: str, values: Mapping[str, Any], ended: int, model: str | None = None) -> None:
        had = {key for key, _, _ in self._have}
        points = [(_key(f"{group}/{key}"), float(value), ended, 0) for key, value in values.items()]
        self._view.log_metrics(self._run_id, [point for point in points if point[0] not in had], model)

    def _evaluated(self, info: Mapping[str, Any]) -> str | None:
        """Id of the model of which this run says how good it is, if that is what it does."""
        path = f"{MODELS}{info['key']}"
        if info["stage"] != EVALUATE or not (digest := info["inputs"].get(path)):
            return None
        model = self._view.model(path, digest, self._parent_id)
        self._view.log_model_input(self._run_id, model)
        return model
