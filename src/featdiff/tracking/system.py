"""How busy the machine is while a stage runs, under the names by which MLflow shows system metrics."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from threading import Event, Thread

SYSTEM = "system.jsonl"
SECONDS = 10.0
"""From one sample to the next; a stage that takes no longer has none."""
MIB = 1 << 20


CPUINFO = Path("/proc/cpuinfo")
VECTORS = ("avx512f", "avx2", "avx", "sve", "asimd")
"""Sets of vector instructions, of which libraries take the first that a CPU has."""


def processor() -> str:
    """The CPU's name and its widest vectors, by both of which libraries choose how they sum: two kinds of CPU may give a model
    other bits. Beside Linux, what Python knows."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (told.get("flags") or told.get("features") or "").split()
    widest = next((name for name in VECTORS if name in flags), "")
    return " ".join(filter(None, [told.get("model name") or platform.machine(), widest]))


class Sampler:
    """Appends a line ``{"time": milliseconds, <name>: value, …}`` to a file every :data:`SECONDS`."""

    def __init__(self, path: Path, seconds: float = SECONDS) -> None:
        self._path, self._seconds, self._over = path, seconds, Event()
        self._thread = Thread(target=self._sample, name="system metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no further sample."""
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        psutil.cpu_percent()  # it tells the load since its last call
        while not self._over.wait(self._seconds):
            memory = psutil.virtual_memory()
            values = {
                "cpu_utilization_percentage": psutil.cpu_percent(),
                "system_memory_usage_megabytes": round((memory.total - memory.available) / MIB, 1),
                "system_memory_usage_percentage": memory.percent,
            } | _gpus()
            try:
                with self._path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"time": time.time_ns() // 1_000_000} | values) + "\n")
            except OSError:  # the folder is gone or the disk is full: samples are not worth a word, what the stage writes is
                return


def _gpus() -> dict[str, float]:
    """Memory in use on every GPU, where this process has any to do with one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    found = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found[f"gpu_{number}_memory_usage_megabytes"] = round((total - free) / MIB, 1)
        found[f"gpu_{number}_memory_usage_percentage"] = round(100 * (total - free) / total, 1)
    return found
