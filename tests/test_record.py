"""The local record: what is written, when, and that it is cheap."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from featdiff.artifacts.dvc import read_yaml
from featdiff.processes.ranks import alive, process_start
from featdiff.tracking import record as record_module
from featdiff.tracking.record import Record, curated, home, numbers, pauses

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _in_empty_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATDIFF_MIRROR", "off")
    for name in ("DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


def new_record(label="sft", main=True):
    record = Record(label, label, "", {"lr": 0.1}, 7, main=main)
    if main:
        # a second record of one process and second would get the same name
        record.folder = record.folder.rename(record.folder.with_name(f"{record.folder.name}-{time.monotonic_ns()}"))
    return record


def info_of(record):
    return json.loads((record.folder / "run.json").read_text())


def test_curves_hold_every_step_and_no_clock():
    both = []
    for _ in range(2):
        record = new_record()
        record.log(0, {"loss": 2.0})
        time.sleep(0.002)
        record.log(5, {"loss": 1.0, "accuracy": 0.5})
        both.append((record.folder / "metrics.jsonl").read_bytes())
        times = [int(line) for line in (record.folder / "times.txt").read_text().split()]
        assert len(times) == 2
        assert times[0] < times[1] <= time.time() * 1000
        record.close("FINISHED")
    assert both[0] == both[1]
    assert [json.loads(line) for line in both[0].splitlines()] == [
        {"step": 0, "loss": 2.0},
        {"step": 5, "loss": 1.0, "accuracy": 0.5},
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_logged():
    record = new_record()
    record.log(1, {"loss": 1.0})
    assert json.loads((record.folder / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    assert info_of(record)["status"] == "RUNNING"


def test_values_that_are_no_numbers_stay_readable_json():
    record = new_record()
    record.log(1, {"loss": float("nan"), "norm": float("inf")})
    record.summary({"loss": float("nan"), "nested": {"ok": 1, "word": "x"}})
    record.close("FAILED")

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads((record.folder / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": "nan", "norm": "inf"}
    summary = json.loads((record.folder / "run.json").read_text(), parse_constant=refuse)["summary"]
    assert summary == {"loss": "nan", "nested/ok": 1.0}


def test_save_writes_curves_for_dvc_and_keeps_attached_files(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("report")
    record = new_record()
    record.log(0, {"loss": 2.0})
    record.log(1, {"loss": 1.0, "late": 3.0})
    record.attach("index.html")
    record.save(out)
    assert (out / "metrics.jsonl").read_bytes() == (record.folder / "metrics.jsonl").read_bytes()
    with (out / "curves.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [
            {"step": "0", "loss": "2.0", "late": ""},
            {"step": "1", "loss": "1.0", "late": "3.0"},
        ]
    assert (record.folder / "files" / "index.html").read_text() == "report"


def test_without_curves_nothing_is_added_to_the_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    new_record().save(out)
    assert list(out.iterdir()) == []


def test_inputs_have_the_digest_of_dvc_and_survive_a_kill():
    Path("dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  prepare:\n    cmd: x\n    outs:\n"
        "    - {path: data, md5: 0123456789abcdef0123456789abcdef.dir}\n"
    )
    os.utime("dvc.lock", (0, 0))
    record = new_record()
    record.input("data")
    record.input("models/unknown")
    assert info_of(record)["inputs"] == {"data": "0123456789abcdef0123456789abcdef.dir", "models/unknown": ""}
    Path("dvc.lock").write_text(f"schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - {{path: data, md5: {'f' * 32}}}\n")
    os.utime("dvc.lock", (0, 1))
    record.input("data")
    assert info_of(record)["inputs"]["data"] == "f" * 32


LOCK = """schema: '2.0'
stages:
  prepare:
    cmd: x
    outs:
    - path: data
      hash: md5
      md5: 0123456789abcdef0123456789abcdef.dir
      size: 10
  base:
    cmd: y
    deps:
    - path: data
      md5: 0123456789abcdef0123456789abcdef.dir
    params:
      params.yaml:
        base.source: pretrain
    outs:
    - path: models/base
      md5: fedcba9876543210fedcba9876543210.dir
    - path: provenance/models/base.json
      md5: ffffffffffffffffffffffffffffffff
"""
DIGESTS = {
    "data": "0123456789abcdef0123456789abcdef.dir",
    "models/base": "fedcba9876543210fedcba9876543210.dir",
    "provenance/models/base.json": "f" * 32,
}


@pytest.mark.parametrize("size", range(len(LOCK) + 1))
def test_of_a_lock_file_that_is_being_written_nothing_wrong_is_believed(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC writes it in place, from its beginning to its end."""
    Path("dvc.lock").write_text(LOCK[:size])
    monkeypatch.setattr(record_module.time, "sleep", lambda _seconds: None)
    found = {path: record_module._dvc_digest(path) for path in DIGESTS}
    assert all(md5 in ("", DIGESTS[path]) for path, md5 in found.items())
    if size > LOCK.index("cmd: y"):
        assert found["data"] == DIGESTS["data"]


def test_a_lock_file_is_waited_for_until_it_is_whole() -> None:
    lock = Path("dvc.lock").absolute()  # the folder is another once a test has failed
    lock.write_text(LOCK[: LOCK.index("  base:")])
    writer = threading.Timer(0.5, lambda: lock.write_text(LOCK))
    writer.start()
    assert record_module._dvc_digest("models/base") == DIGESTS["models/base"]
    writer.join()
    os.utime(lock, (0, 0))
    began = time.monotonic()
    assert record_module._dvc_digest("models/unknown") == ""
    assert time.monotonic() - began < 0.5


def test_close_records_the_end_once():
    record = new_record()
    record.observe(device="cpu", tokens_per_second=10.0)
    record.close("KILLED")
    first = info_of(record)
    record.close("FINISHED")
    assert info_of(record) == first
    assert first["status"] == "KILLED"
    assert first["ended"] >= first["started"]
    assert first["observed"].keys() == {"cpu", "device", "tokens_per_second", "wall_seconds", "peak_memory_mib"}


def test_ranks_other_than_the_first_write_nothing(tmp_path):
    record = new_record(main=False)
    record.log(1, {"loss": 1.0})
    record.observe(device="cpu")
    record.summary({"a": 1})
    record.input("data")
    record.attach("x")
    record.save(tmp_path)
    record.close("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_curated_params_are_few_and_readable():
    params = {
        "tasks": {
            "add": {"source": "family", "role": "train"},
            "sort": {"source": "family", "role": "find"},
            "mul": {"role": "train"},
        },
        "samples": {"find": 1, "tune": 2},
        "empty": {},
    }
    assert curated(params) == {
        "tasks.train": "add, mul",
        "tasks.find": "sort",
        "samples.find": 1,
        "samples.tune": 2,
        "empty": {},
    }
    fits = {"training": {"k": 16}, "fits": {"a": {"loss": "l1", "models": ["base", "sft"]}, "b": {"loss": "batchtopk"}}}
    assert curated(fits, "a") == {"training.k": 16, "fits.loss": "l1", "fits.models": ["base", "sft"]}
    assert curated(fits)["fits.b.loss"] == "batchtopk"


def test_a_record_holds_the_params_of_the_whole_study_that_can_change_a_result():
    text = (REPOSITORY / "conf/profiles/organism.yaml").read_text()
    Path("params.yaml").write_text(text.replace("profile: organism", "profile: mine"))
    info = info_of(new_record())
    assert info["profile"] == info["study"]["profile"] == "mine"
    assert info["study"]["prepare.teacher"] == "foreign"
    assert info["study"]["grpo.lr"] == 0.0004
    assert info["study"]["roles.tuned"] == "grpo"
    assert not {name.partition(".")[0] for name in info["study"]} & {"dpo", "noise", "imported", "resume"}
    assert not {"report.title", "report.about"} & info["study"].keys()


def test_numbers_keeps_order_and_drops_words():
    assert list(numbers({"b": 1, "a": {"x": True, "y": "word"}, "c": 2.5}).items()) == [("b", 1.0), ("a/x", 1.0), ("c", 2.5)]


def test_a_process_is_alive_until_it_ends_also_unreaped():
    assert alive(os.getpid(), process_start(os.getpid()))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = process_start(child.pid)
    assert alive(child.pid, start)
    if sys.platform == "linux":
        assert not alive(child.pid, start + 1)  # the same number, another process
    child.kill()
    deadline = time.monotonic() + 5
    while alive(child.pid, start) and time.monotonic() < deadline:
        time.sleep(0.01)
    if sys.platform == "linux":
        assert not alive(child.pid, start)
    child.wait()
    assert not alive(child.pid, start)


def test_records_of_a_temporary_experiment_lie_beside_the_repository(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc/tmp/exps/standalone/x"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert home() == tmp_path / ".featdiff"


def test_pauses_are_counted_from_the_stage_whose_place_another_took():
    """Two lanes: 0-10, 12-20, 21-30 and 0-5, 6-19, and at last one that waited for both."""
    times = [(0, 10), (0, 5), (6, 19), (12, 20), (21, 30), (33, 40)]
    assert pauses({"started": start, "ended": end} for start, end in times) == [1, 2, 1, 3]
    assert pauses([]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the process tree is read from /proc")
def test_pipeline_is_the_outermost_dvc_process(tmp_path):
    report = "import json; from featdiff.tracking.record import _pipeline; print(json.dumps(_pipeline()))"
    launcher = tmp_path / "dvc"
    launcher.write_text(
        "import os, subprocess, sys\nprint(os.getpid(), flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {report!r}], env=os.environ | {{'DVC_EXP_NAME': 'it\\'s-x'}})\n"
    )
    shown = subprocess.run([sys.executable, str(launcher), "repro"], capture_output=True, text=True, check=True).stdout.split(
        "\n", 1
    )
    pipeline = json.loads(shown[1])
    assert pipeline["pid"] == int(shown[0])
    assert f"-{pipeline['pid']}-{pipeline['start']}-it_s-x" in pipeline["id"]


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is read from /proc")
def test_peak_memory_is_the_stages_own_not_its_parents():
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from featdiff.tracking.record import _peak_memory_kib; print(_peak_memory_kib())"
    kib = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 5_000 < kib < 150_000
    del ballast


def test_importing_the_record_is_cheap():
    heavy = ("torch", "mlflow", "pydantic", "numpy", "yaml")
    code = f"import sys, featdiff.tracking.record; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_git_is_no_error(tmp_path, monkeypatch):
    if shutil.which("git"):
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert info_of(new_record())["commit"] == ""


@pytest.mark.parametrize("text", [b"", b"a: [", b"- a", b"\xff", b"a: &a [*a]", b"[" * 100_000, None])
def test_yaml_that_cannot_be_read_is_taken_as_empty_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None
) -> None:
    path = tmp_path / "dvc.lock"
    assert read_yaml(path) == {}
    assert capsys.readouterr().err == ""
    path.mkdir() if text is None else path.write_bytes(text)
    assert read_yaml(path) == {}
    assert capsys.readouterr().err.count("\n") == 1
