"""Arms by every method, for tests: a tiny base that is right half of the time, and what a method leaves of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import begin, sha256_file, staging_path, write_json
from featdiff.artifacts.tables import TRAIN
from featdiff.config.models import METHODS, Pretraining
from featdiff.language.models import save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state, rank, world_size
from featdiff.tasks.task import Sample, TaskInfo, Text
from featdiff.training.pretrain import pretrain
from tiny import params_of

SMALL: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 2.0, "batch_size": 8, "micro_batch_size": 4, "max_length": 16, "lr": 0.01},
    "grpo": {"steps": 6, "prompts_per_step": 2, "rollouts": 4, "micro_batch_size": 8, "max_new_tokens": 4, "lr": 0.01},
    "rft": {"steps": 6, "batch_size": 8, "micro_batch_size": 4, "max_new_tokens": 4, "samples": 6, "lr": 0.01},
    "dpo": {"steps": 6, "batch_size": 8, "micro_batch_size": 4, "max_new_tokens": 4, "samples": 6, "lr": 0.01},
    "noise": {"size": 0.2},
}
PROBLEMS = [f"{a}{b}=" for a in "abcde" for b in "12345"][:24]


def numbers(method: str, **changes: Any) -> Any:
    sampling = {"sampling_batch_size": 10} if method in ("rft", "dpo") else {}
    return params_of(METHODS[method], method, **{"blocks": None, "checkpoints": 3, **SMALL[method], **sampling, **changes})


def make_world(root: Path) -> Path:
    """A base that answers ``c.`` or ``d.`` to everything, and train problems to which ``c`` is right."""
    size = {"layers": 2, "d_model": 16, "d_mlp": 32, "heads": 2, "row_tokens": 24, "batch_tokens": 192, "steps": 80}
    texts = [Text(PROBLEMS[i % 24], "cd"[i // 24 % 2] + ".", "t") for i in range(2400)]
    made = params_of(Pretraining, "base", "pretraining", **size, warmup_steps=3, lr=0.01)
    save_model(*pretrain(texts, made, 0, lambda *_: None, Scratch()), root / "base")
    write_json(root / "base/manifest.json", {})
    task = TaskInfo("t", "train", "math", "generation", "organism", "strict", chat=False, options=0)
    samples = [Sample(f"t-{i}", "t", "train", prompt, "c", solution="(1)c.", own="<1>c.", foreign="(1)c.") for i, prompt in
               enumerate(PROBLEMS)]  # fmt: skip
    write_data(root / "data", [task], samples)
    return root


def write_data(folder: Path, tasks: list[TaskInfo], samples: list[Sample]) -> None:
    folder.mkdir()
    write_json(folder / "tasks.json", [asdict(task) for task in tasks])
    TRAIN.write(folder, [asdict(sample) for sample in samples])


def trained(
    method: str,
    world: Path,
    target: Path,
    *,
    seed: int = 0,
    data: str = "data",
    base: Path | None = None,
    scratch: Scratch | None = None,
    log: Callable[[int, dict[str, float]], None] = lambda *_: None,
    **changes: Any,
) -> tuple[Path, dict[str, Any]]:
    """The folder that a method leaves, and its audit."""
    if rank() == 0:
        begin(target)
    if world_size() > 1:
        process_state().wait_for_everyone()
    out = staging_path(target)
    train = import_module(f"featdiff.training.{method}").train
    audit = train(base or world / "base", world / data, out, scratch or Scratch(), numbers(method, **changes), seed, log)
    return out, audit


def hashes(out: Path) -> dict[str, str]:
    wanted = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in wanted}
