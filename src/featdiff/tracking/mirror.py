"""Copies the local records to MLflow, beside the stages and never in their way.

``follow``       what a stage starts: copy records while they grow, leave when the pipeline has ended
``sync``         fill in what is missing now; ``--wait SECONDS`` for a server or another mirror
``rebuild``      after ``dvc pull``: add runs for results that were computed elsewhere (featdiff.tracking.backfill)
``ui [port]``    sync, then open MLflow on this machine
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from featdiff.tracking.mlflow_view import PAGE_OF_RUNS, Child, Local, View, close_parent, mask, open_parent, own_store
from featdiff.tracking.record import home, runs_folder

POLL_SECONDS = 3.0
GIVE_UP_SECONDS = 60.0
"""So long a follower tries a store that fails; the next stage starts another."""
REQUEST_SECONDS = 10
"""So long a server may take over one answer."""
STUCK_SECONDS = 150
"""No single request or import takes so long: the process ends itself, and loses nothing."""
SETTLED = "mirror.json"


def tracking_uri() -> str:
    """``$MLFLOW_TRACKING_URI``, or the SQLite file beside the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_store()


def say(text: str) -> None:
    print(f"mirror: {mask(' '.join(text.split()))}", flush=True)


def prepare_environment() -> None:
    """Settings of MLflow's client for this process only: short patience, no chatter, no reports to its makers."""
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would override the parent of every run
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(REQUEST_SECONDS)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    for name, value in {"MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)


@contextmanager
def lock(wait: float = 0.0) -> Iterator[bool]:
    """One mirror per repository; yields whether this process is the one. The file names the holder's pid."""
    path, deadline = home() / "mirror.lock", time.monotonic() + wait
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.2)
            else:
                handle.truncate(0)
                handle.write(str(os.getpid()))
                handle.flush()
                yield True
                return


class Mirror:
    """Brings one store up to the local records, pass by pass. All it remembers can be found again in the store,
    so after an error it is thrown away and a new one goes on."""

    def __init__(self, view: View) -> None:
        self._view, self._host = view, socket.gethostname()
        self.experiment_id = view.experiment_id
        self._settled: set[str] = set()
        self._parents: dict[str, str | None] = {}
        self._children: dict[str, Child] = {}
        self.copied = 0
        """Records completed by this mirror."""
        self.refused: list[str] = []
        """Records that cannot be copied, with the reason."""

    def advance(self) -> int:
        """Copy what is new; returns the number of pipelines that are still under way on this machine."""
        under_way = 0
        for pipeline, records in self._pipelines().items():
            if pipeline not in self._parents:
                parent = open_parent(self._view, records[0])
                self._parents[pipeline] = parent.info.run_id if parent is not None else None
            parent_id = self._parents[pipeline]
            if parent_id is not None:
                for record in records:
                    self._copy(record, parent_id)
            if any(
                record.pipeline_alive(self._host) or (record.status == "RUNNING" and not record.elsewhere) for record in records
            ):
                under_way += 1
            elif not any(record.elsewhere for record in records):
                if parent_id is not None:
                    close_parent(self._view, parent_id, records)
                self._settle(records)
        return under_way

    def pending(self) -> bool:
        """Whether there are records of this machine that are not settled; asks the disk only."""
        return any(not any(record.elsewhere for record in records) for records in self._pipelines().values())

    def _pipelines(self) -> dict[str, list[Local]]:
        """Records that are not settled in this store, by pipeline, the oldest first."""
        found: dict[str, list[Local]] = {}
        for folder in sorted(runs_folder().glob("*")) if runs_folder().is_dir() else []:
            if folder.name in self._settled:
                continue
            if self._view.key in _read_settled(folder):
                self._settled.add(folder.name)
                continue
            try:
                record = Local.read(folder, self._host)
            except (OSError, json.JSONDecodeError, KeyError) as error:
                self._settled.add(folder.name)
                say(f"{folder}: not a record that this version reads ({error!r}); left out")
                continue
            found.setdefault(record.info["pipeline"]["id"], []).append(record)
        return {pipeline: sorted(records, key=lambda record: record.started_ms) for pipeline, records in found.items()}

    def _copy(self, record: Local, parent_id: str) -> None:
        from mlflow.exceptions import MlflowException

        name = record.folder.name
        if name in self._settled:
            return
        try:
            if name not in self._children:
                self._children[name] = Child(self._view, record, parent_id)
            child, before = self._children[name], self._children[name].done
            child.advance(record)
            self.copied += child.done and not before
        except (MlflowException, ValueError, KeyError) as error:
            if isinstance(error, MlflowException) and error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            # one record that is damaged or that the store will not have must not keep the others out
            self._settled.add(name)
            self.refused.append(f"{name}: {error!r}")
            say(f"{name}: cannot be copied: {error!r}")

    def _settle(self, records: list[Local]) -> None:
        for record in records:
            if record.folder.name in self._settled:
                continue
            path = record.folder / SETTLED
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(_read_settled(record.folder) | {self._view.key: time.time()}), encoding="utf-8")
            temporary.replace(path)
            self._settled.add(record.folder.name)
            self._children.pop(record.folder.name, None)


def _read_settled(folder: Path) -> dict[str, float]:
    try:
        return dict(json.loads((folder / SETTLED).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _still_moving() -> None:
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)


def _until_done(patience: float, *, wait_for_pipelines: bool) -> tuple[Mirror | None, str]:
    """Advance until nothing is under way (or once); gives up after ``patience`` seconds of failures in a row."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    mirror, failing_since = None, None
    while True:
        try:
            mirror = mirror or Mirror(View(tracking_uri(), _still_moving))
            if not mirror.advance() or not wait_for_pipelines:
                return mirror, ""
            failing_since = None
        except (MlflowException, SQLAlchemyError, OSError) as error:
            mirror, failing_since = None, failing_since or time.monotonic()
            if time.monotonic() - failing_since >= patience:
                return None, f"{tracking_uri()}: {error}"
        _still_moving()
        time.sleep(POLL_SECONDS)


def follow() -> None:
    """Mirror until no pipeline of this machine is under way. Records opened while it leaves are taken care of:
    their own follower finds the lock free, or this one sees them after it has let go of the lock."""
    os.nice(10)
    while True:
        with lock() as mine:
            if not mine:
                return
            _still_moving()
            mirror, failure = _until_done(GIVE_UP_SECONDS, wait_for_pipelines=True)
        if mirror is None:
            say(f"gave up on {failure}; the records are kept, python -m featdiff.tracking.mirror sync copies them")
            return
        if not mirror.pending():
            return


def sync(wait: float = 0.0) -> Mirror | None:
    """Copy what is missing, once. Returns None where that was not possible within ``wait`` seconds."""
    started = time.monotonic()
    with lock(wait) as mine:
        if not mine:
            say("another mirror of this repository is at work; it goes on by itself (see .featdiff/mirror.log)")
            return None
        _still_moving()
        mirror, failure = _until_done(wait - (time.monotonic() - started), wait_for_pipelines=False)
        faulthandler.cancel_dump_traceback_later()
    if mirror is None:
        say(f"cannot copy to {failure}; nothing is lost, run it again")
    else:
        say(f"{tracking_uri()}: {mirror.copied} record(s) copied, {len(mirror.refused)} refused")
    return mirror


def ui(port: str) -> NoReturn:
    """Become MLflow's server for the local store, after a sync."""
    uri = tracking_uri()
    mirror = sync()
    if uri.startswith(("http:", "https:")):
        say(f"MLFLOW_TRACKING_URI names a server; open {uri} in a browser")
        sys.exit(0)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(port))) == 0:
            say(f"port {port} is taken; give another: python -m featdiff.tracking.mirror ui {int(port) + 1}")
            sys.exit(2)
    page = f"/#/experiments/{mirror.experiment_id}/{PAGE_OF_RUNS}" if mirror else ""
    print(f"mirror: open http://127.0.0.1:{port}{page} in a browser; Ctrl-C ends it", flush=True)
    # by environment: a URI with a password must not show in the list of processes
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", port, "--workers", "1"])


def _code(mirror: Mirror | None) -> int:
    return 1 if mirror is None or mirror.refused else 0


def _leave(code: int) -> NoReturn:
    """End now: everything is written, and taking MLflow's modules down costs most of a second of CPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str]) -> None:
    prepare_environment()
    os.chdir(home().parent)  # so that a relative store means the same everywhere
    match arguments:
        case ["follow"]:
            follow()
            _leave(0)
        case ["sync"]:
            _leave(_code(sync()))
        case ["sync", "--wait", seconds] if seconds.replace(".", "", 1).isdigit():
            _leave(_code(sync(float(seconds))))
        case ["rebuild"]:
            from featdiff.artifacts.artifact import ContractError
            from featdiff.tracking.backfill import restore

            try:
                lines = restore(Path())
            except ContractError as error:
                say(str(error))
                _leave(2)
            for line in lines:
                say(line)
            _leave(_code(sync()))
        case ["ui"]:
            ui("5000")
        case ["ui", port] if port.isdigit():
            ui(port)
        case _:
            print(
                "usage: python -m featdiff.tracking.mirror follow | sync [--wait SECONDS] | rebuild | ui [PORT]",
                file=sys.stderr,
            )
            sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
