"""featdiff against its peers and the machine's limit: `make bench`, or `python -m benchmarks CASE ...`.

Contestants of a case are processes that wait for each other: every round each does one block of the same work, so that what the
machine does meanwhile meets all of them. The first round warms up and is not counted. A ratio is the median over rounds of the
other's time over ours. Writes metrics/benchmarks.json, and from it the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from featdiff.artifacts.artifact import read_json, write_json
from featdiff.artifacts.documents import fill, markdown
from featdiff.config.params import load_study
from featdiff.tracking.record import by_pipeline, finished, pauses, runs_folder

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
RESULTS, PAGE, PEERS = ROOT / "metrics/benchmarks.json", ROOT / "docs/performance.md", ROOT / ".featdiff/peers"
OURS, LIMIT, STUDY = "featdiff", "limit", "study"
BOTH = {"models": 3, "batch": 1024, "lr": 1e-3}
WIDE = BOTH | {"width": 576, "features": 8192, "k": 32, "aux_k": 512, "block": 4, "rows": 32_768}
NARROW = BOTH | {"width": 96, "features": 768, "k": 16, "aux_k": 64, "block": 60, "rows": 65_536}
GROWTH = {"width": 16, "features": 128, "batch": 4096, "shard": 65_536, "warm": 100_000, "block": 1}
NEVER = 10**9


class Contestant(NamedTuple):
    script: str
    peer: str = ""
    """The package of peers.txt that it needs; none: featdiff's own environment."""
    arguments: tuple[str, ...] = ()
    changes: Mapping[str, float] = {}
    """Numbers of the case that are others for it."""


class Case(NamedTuple):
    title: str
    numbers: Mapping[str, float]
    contestants: Mapping[str, Contestant]
    rounds: int = 9


def steps(**changes: float) -> Contestant:
    return Contestant("step_featdiff.py", changes=changes)


def in_two_ways(script: str, usual: str) -> dict[str, Contestant]:
    """The same work as featdiff does it and the ``usual`` way."""
    return {label: Contestant(script, arguments=(label,)) for label in (OURS, usual)}


def growing(way: str) -> dict[str, Contestant]:
    """The same work on more and more tokens; a ratio is that of the times of a token."""
    each = {OURS if millions == 1 else f"on {millions}M": 1_000_000 * millions for millions in (1, 2, 4, 8)}
    return {label: Contestant("growth.py", arguments=(way,), changes={"tokens": tokens}) for label, tokens in each.items()}


SAELENS, SPARSIFY = Contestant("step_saelens.py", "sae-lens"), Contestant("step_sparsify.py", "eai-sparsify")
GEMM = Contestant("step_gemm.py")
CASES = {
    "step": Case(
        "BatchTopK step, D 576, M 3, F 8192, B 1024, k 32",
        WIDE | {"dead_after": NEVER},
        {OURS: steps(), "sae-lens BatchTopK": SAELENS, "sparsify TopK": SPARSIFY, LIMIT: GEMM},
    ),
    "small_step": Case(
        "BatchTopK step, D 96, M 3, F 768, B 1024, k 16",
        NARROW | {"dead_after": NEVER},
        {OURS: steps(), "sae-lens BatchTopK": SAELENS, "sparsify TopK": SPARSIFY, LIMIT: GEMM},
    ),
    "l1_step": Case(
        "ReLU+L1 step, D 576, M 3, F 8192, B 1024",
        WIDE | {"dead_after": NEVER},
        {OURS: steps(l1=3.0), "sae-lens Standard": SAELENS._replace(changes={"l1": 3.0}), LIMIT: GEMM},
    ),
    "l1_sparse_step": Case(
        "ReLU+L1 step as above, from weights under which 64 features fire on a row",
        WIDE | {"dead_after": NEVER, "active": 64, "lr": 1e-5},
        {OURS: steps(l1=3.0), "sae-lens Standard": SAELENS._replace(changes={"l1": 3.0}), LIMIT: GEMM},
    ),
    "dead": Case(
        "BatchTopK step as in the first row, a tenth of the features dead, against none",
        WIDE | {"dead_after": 4096, "lr": 1e-9},
        {OURS: steps(dead=0.1), "none dead": steps(dead_after=NEVER)},
    ),
    "wider": Case(
        "BatchTopK step as in the first row, with more features, and with fewer and more models",
        WIDE | {"dead_after": NEVER},
        {OURS: steps(), "F 32768": steps(features=32_768), "M 2": steps(models=2), "M 5": steps(models=5)},
        rounds=6,
    ),
    "answers": Case(
        "120 questions under 24 edits, model of the default study",
        {"questions": 120, "edits": 24, "block": 1},
        in_two_ways("answers.py", "generate with a hook"),
        rounds=6,
    ),
    "harvest": Case(
        "Residual stream at half depth, SmolLM2-135M's shape",
        {"texts": 32, "batch": 16, "block": 1},
        in_two_ways("harvest.py", "whole forward pass")
        | {
            "nnsight, stopped": Contestant("harvest_nnsight.py", "nnsight"),
            "TransformerLens, stopped": Contestant("harvest_lens.py", "sae-lens"),
        },
        rounds=5,
    ),
    "reads": Case(
        "Shuffled rows of a store, 3 x 576, bfloat16, 300,000 rows",
        {"models": 3, "width": 576, "rows": 300_000, "batch": 4096, "block": 1},
        {OURS: Contestant("reads.py")},
        rounds=3,
    ),
    "fits": Case(
        "Six crosscoders on three models that run where rows are read, D 192, 8 blocks, F 1024, 1,200 tokens",
        {"width": 192, "layers": 8, "features": 1024, "k": 16, "aux_k": 64, "lr": 1e-3, "rows": 1200, "batch": 128, "block": 1},
        in_two_ways("fits.py", "one by one"),
        rounds=3,
    ),
    "harvest_growth": Case(
        "Harvest of 1M tokens, ms for a thousand, D 16, one block, bfloat16, shards of 65,536 rows",
        GROWTH,
        growing("harvest"),
        rounds=2,
    ),
    "fit_growth": Case(
        "Crosscoder on 1M rows of a store, ms for a thousand, D 16, M 2, F 128, B 4096",
        GROWTH,
        growing("fit"),
        rounds=2,
    ),
}


def python_of(peer: str) -> str:
    """The Python under which ``peer`` is installed, which is made where it is missing."""
    if not peer:
        return sys.executable
    pinned = [line for line in (HERE / "peers.txt").read_text(encoding="utf-8").splitlines() if line.startswith(f"{peer}==")]
    place = PEERS / pinned[0].replace("==", "-")
    python, done = place / "bin/python", place / ".installed"
    if not done.exists():
        print(f"installing {pinned[0]} into {place.relative_to(ROOT)}", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        own = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", own, *pinned], check=True)
        done.touch()
    return str(python)


class Process:
    """A contestant at work."""

    def __init__(self, label: str, contestant: Contestant, numbers: Mapping[str, float]) -> None:
        self.label, script = label, str(HERE / contestant.script)
        given = json.dumps(dict(numbers) | dict(contestant.changes))
        command = [python_of(contestant.peer), script, given, *contestant.arguments]
        environment = os.environ | {
            "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT / 'src'}",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process; a pipe that nobody reads would fill)
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
        )

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """The next value that it says; what libraries print in between is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        self.said.seek(0)
        raise SystemExit(f"{self.label} stopped: {self.said.read()[-2000:]}")

    def end(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.hear()


@contextlib.contextmanager
def at_work(case: Case) -> Iterator[dict[str, Process]]:
    numbers = {**case.numbers, "steps": case.rounds * case.numbers["block"]}
    processes = {label: Process(label, contestant, numbers) for label, contestant in case.contestants.items()}
    try:
        yield processes
    finally:
        for each in processes.values():
            each.process.kill()
            each.process.wait()


def agreement(ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> dict[str, int]:
    """How many answers, under each edit to each question, are the same token by token."""
    pairs = [pair for under in zip(ours, theirs, strict=True) for pair in zip(*under, strict=True)]
    return {"equal": sum(a == b for a, b in pairs), "of": len(pairs)}


def run(name: str, case: Case) -> dict[str, Any]:
    """Seconds of a step of each contestant in each round but the first, and what each found."""
    rounds: dict[str, list[float]] = {label: [] for label in case.contestants}
    with at_work(case) as processes:
        for each in processes.values():
            each.hear()
        for _ in tqdm(range(case.rounds), desc=name, unit="round"):
            for label, each in processes.items():
                each.ask()
                rounds[label].append(median(each.hear()))
        found = {label: each.end() for label, each in processes.items()}
    if "answers" in found[OURS]:
        found[OURS] |= agreement(*(each.pop("answers") for each in found.values()))
    results = {}
    for label, seconds in rounds.items():
        ratios = [other / own for other, own in zip(seconds[1:], rounds[OURS][1:], strict=True)]
        results[label] = {
            "milliseconds": 1000 * median(seconds[1:]),
            "ratio": median(ratios),
            "least_ratio": min(ratios),
            "most_ratio": max(ratios),
            "found": found[label] or {},
        }
    return results


def table(results: Mapping[str, Any]) -> str:
    """One line for each case and contestant."""
    body = []
    for name, case in CASES.items():
        known = results.get(name, {})
        for label in [label for label in case.contestants if label in known]:  # ours, which bears the title, before the others
            one = known[label]
            ratio = "" if label == OURS else f"{one['ratio']:.2f} ({one['least_ratio']:.2f} to {one['most_ratio']:.2f})"
            facts = ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in one["found"].items()
            )
            body.append([case.title if label == OURS else "", label, f"{one['milliseconds']:.1f}", ratio, facts])
    return markdown(["work", "by", "ms", "times ours (least to most)", "found"], body)


def study() -> dict[str, Any]:
    """Seconds of the stages of the last whole run of the default study here, by kind, from its records."""
    runs = by_pipeline(finished(load_study().profile))
    whole = [run for run in runs if run[0]["stage"] in ("prepare", "base") and run[-1]["stage"] == "report"]
    if not whole:
        raise SystemExit(
            f"benchmarks: {runs_folder()}: no run of the whole study; dvc repro in a checkout without its results first"
        )
    seconds: dict[str, list[float]] = {}
    for each in whole[-1]:
        seconds.setdefault(each["stage"], []).append(each["observed"]["wall_seconds"])
    between = sum(pauses(whole[-1]))
    kinds = {stage: {"stages": len(walls), "seconds": sum(walls)} for stage, walls in seconds.items()}
    return {"kinds": kinds, "between": between, "whole": whole[-1][-1]["ended"] - whole[-1][0]["started"]}


def study_table(found: Mapping[str, Any]) -> str:
    body = [[kind, str(one["stages"]), f"{one['seconds']:.0f}"] for kind, one in found["kinds"].items()]
    last = [
        ["pauses before stages, together", "", f"{found['between']:.0f}"],
        ["first start to last end", "", f"{found['whole']:.0f}"],
    ]
    return markdown(["kind of stage", "stages", "seconds"], body + last)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)} and {STUDY}; none: all but {STUDY}"
    )
    chosen = parser.parse_args().cases or list(CASES)
    if unknown := set(chosen) - {*CASES, STUDY}:
        raise SystemExit(f"benchmarks: {', '.join(sorted(unknown))}: unknown; known: {', '.join(CASES)}, {STUDY}")
    held = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cases": {}}
    for name in chosen:
        if name == STUDY:
            held[STUDY] = study()
        else:
            held["cases"][name] = run(name, CASES[name])
            threads = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
            held["machine"] = threads | {"torch": torch.__version__, "python": platform.python_version()}
        write_json(RESULTS, held)
        held = read_json(RESULTS)  # in the order in which it lies there
        page = fill(PAGE.read_text(encoding="utf-8"), "benchmarks", table(held["cases"]))
        PAGE.write_text(fill(page, STUDY, study_table(held[STUDY])) if STUDY in held else page, encoding="utf-8")
    print(table({name: held["cases"][name] for name in chosen if name in CASES}))


if __name__ == "__main__":
    main()
