"""System metrics: sampled beside a stage, and gone with it."""

import json
import threading
import time

from featdiff.tracking import system
from featdiff.tracking.system import Sampler, processor


def test_samples_are_whole_lines_with_their_time_until_the_stage_ends(tmp_path):
    path, before = tmp_path / "system.jsonl", time.time_ns() // 1_000_000
    sampler = Sampler(path, 0.05)
    time.sleep(0.4)
    sampler.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= 2
    times = [row.pop("time") for row in rows]
    assert before < times[0] < times[-1] <= time.time_ns() // 1_000_000
    assert all(0 <= row["cpu_utilization_percentage"] <= 100 for row in rows)
    assert all(0 < row["system_memory_usage_percentage"] < 100 for row in rows)
    assert not any(thread.name == "system metrics" for thread in threading.enumerate())
    time.sleep(0.1)
    assert len(path.read_text().splitlines()) == len(rows)


def test_a_short_stage_has_no_samples_and_does_not_wait_for_one(tmp_path):
    began = time.monotonic()
    Sampler(tmp_path / "system.jsonl").close()
    assert time.monotonic() - began < 5
    assert not (tmp_path / "system.jsonl").exists()


def test_a_folder_that_goes_away_ends_the_samples_without_a_word(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    sampler = Sampler(tmp_path / "gone" / "system.jsonl", 0.01)
    time.sleep(0.3)
    assert not any(thread.name == "system metrics" for thread in threading.enumerate())
    sampler.close()
    assert said == []


def test_the_processor_is_told_by_name_and_vectors(tmp_path, monkeypatch):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: fpu avx avx2 sse\n\nmodel name\t: another\n")
    monkeypatch.setattr(system, "CPUINFO", told)
    assert processor() == "Fast 9000 avx2"
    told.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert processor().endswith(" asimd")
    monkeypatch.setattr(system, "CPUINFO", tmp_path / "none")
    assert "asimd" not in processor()
