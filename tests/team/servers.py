"""A team's servers on this machine's loopback: PostgreSQL, an S3 server, and MLflow behind a password, its store in the first
and its artifacts, which it hands on itself, in the second. Each stops, and takes its data along, where its context ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "team", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
USER, PASSWORD = "ada", "correct-horse-battery"
BUCKETS = ("featdiff", "mlflow")
NOBODY = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
"""PostgreSQL refuses to run as root."""


def postgres_programs() -> Path | None:
    """Folder of PostgreSQL's programs; packages of Debian keep them off PATH."""
    on_path = shutil.which("initdb")
    places = [Path(on_path).resolve().parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return places[-1] if places else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served(
    command: list[str], port: int, log: Path, environment: Mapping[str, str] | None = None, **started: Any
) -> Iterator[None]:
    """``command`` while it listens on ``port``; what it says goes to ``log``."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True, **started)
    try:
        end = time.monotonic() + 120
        while not listens(port):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < end, "it does not listen"
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def postgres(programs: Path, log: Path) -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server with a password; yields what makes a database and gives its address."""
    folder, port = Path(tempfile.mkdtemp(prefix="featdiff-postgres-")), free_port()
    try:
        password = folder / "password"
        password.write_text(PASSWORD, encoding="utf-8")
        if NOBODY:
            for path in (folder, password):
                shutil.chown(path, NOBODY["user"], NOBODY["group"])
        data = folder / "data"
        make = [programs / "initdb", "-D", data, "-U", USER, f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **NOBODY)
        run = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", "", "-c", "listen_addresses=127.0.0.1"]
        with served(run, port, log, cwd=folder, **NOBODY):

            def database(name: str) -> str:
                import psycopg2

                address = f"{USER}:{PASSWORD}@127.0.0.1:{port}"
                connection = psycopg2.connect(f"postgresql://{address}/postgres")
                connection.autocommit = True
                connection.cursor().execute(f'CREATE DATABASE "{name}"')
                connection.close()
                return f"postgresql+psycopg2://{address}/{name}"

            yield database
    finally:
        shutil.rmtree(folder)


@contextmanager
def object_store(log: Path) -> Iterator[str]:
    """An S3 server with :data:`BUCKETS`; yields its address."""
    import boto3

    port = free_port()
    with served([sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)], port, log):
        address = f"http://127.0.0.1:{port}"
        names = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        client = boto3.client("s3", endpoint_url=address, region_name=KEYS["AWS_DEFAULT_REGION"], **names)
        for bucket in BUCKETS:
            client.create_bucket(Bucket=bucket)
        yield address


@contextmanager
def mlflow(store: str, users: str, objects: str, port: int, folder: Path, log: Path) -> Iterator[None]:
    """MLflow's server behind a password, on ``port``; ``store`` and ``users`` are addresses of databases."""
    settings = folder / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {users}\nadmin_username = {USER}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
        encoding="utf-8",
    )
    environment = os.environ | KEYS
    environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_S3_ENDPOINT_URL": objects, "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": PASSWORD, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", store, "--artifacts-destination", f"s3://{BUCKETS[1]}"]
    with served(command, port, log, environment, cwd=folder):
        yield


def status(address: str) -> int:
    """What a server answers to one who says no password."""
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
