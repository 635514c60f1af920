"""Which features move over the checkpoints of both arms, read in one fixed dictionary."""

from featdiff.activations.store import ActivationStore
from featdiff.analysis.dynamics import change_from_base, overlap_rows, trajectory_rows
from featdiff.artifact import read_json
from featdiff.crosscoder.model import Crosscoder
from featdiff.launch import stage
from featdiff.tasks.task import write_rows

with stage("dynamics", out="analysis/dynamics") as run:
    crosscoder = Crosscoder.load(run.read(f"crosscoders/{run.params.fit}"))
    base = run.read("activations/base")
    overlaps, trajectories = [], []
    for arm in ("sft", "grpo"):
        folder = run.read(f"activations/{arm}")
        index = read_json(folder / "index.json")
        rows = index["checkpoint_rows"] or index["rows"]
        series = [f"checkpoint{i + 1}" for i in range(index["checkpoints"])] + ["acts"]
        before = ActivationStore({"base": base, arm: folder}).read(0, rows)[:, 0]
        changes = {
            number: change_from_base(crosscoder, before, ActivationStore({arm: folder}, name).read(0, rows)[:, 0], arm)
            for number, name in enumerate(series, start=1)
        }
        overlaps += overlap_rows(arm, changes, run.params.top)
        trajectories += trajectory_rows(arm, changes)
    write_rows(run.out / "overlap.parquet", overlaps)
    write_rows(run.out / "trajectories.parquet", trajectories)
    first = {row["arm"]: row["overlap"] for row in overlaps if row["a"] == 1 and row["top"] == max(run.params.top)}
    run.metrics({"overlap_first_last": first})
