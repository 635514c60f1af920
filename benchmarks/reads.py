"""Shuffled batches of a store of three models on disk, in bfloat16: how fast rows come, how long the longest wait is once the
first batch is there, and the most memory that it took."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import save_file

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import write_json
from featdiff.processes.memory import keep_freed
from pace import case, timed

given = case()
keep_freed()  # as in every stage
ROWS, WIDTH, SHARD, BATCH, MODELS = int(given["rows"]), int(given["width"]), 32_768, int(given["batch"]), int(given["models"])


def write(folder: Path) -> Path:
    folder.mkdir()
    shards = [{"file": f"acts-{low:07d}.safetensors", "rows": min(SHARD, ROWS - low)} for low in range(0, ROWS, SHARD)]
    for shard in shards:
        save_file({"acts": torch.randn(int(shard["rows"]), WIDTH).bfloat16()}, folder / str(shard["file"]))
    save_file({"token_id": torch.zeros(ROWS, dtype=torch.int32)}, folder / "tokens.safetensors")
    facts = {"rows": ROWS, "d_model": WIDTH, "layer": 1, "drop_first_token": True, "tokenizer": "none"}
    write_json(folder / "index.json", facts | {"shards": {"acts": shards}})
    return folder


with tempfile.TemporaryDirectory() as place:
    store = ActivationStore({f"model {m}": write(Path(place) / str(m)) for m in range(MODELS)})
    batches = store.shuffled(BATCH, torch.Generator().manual_seed(0), 0, ROWS)
    longest = [0.0]

    def one_pass() -> None:
        for _ in range(ROWS // BATCH):
            start = perf_counter()
            next(batches)
            longest[0] = max(longest[0], perf_counter() - start)

    def found() -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"rows": ROWS // BATCH * BATCH, "longest_wait": longest[0], "peak_gib": peak}

    next(batches)
    timed(one_pass, int(given["block"]), found)
