"""Solutions of another model to the train problems: sampled, and kept where the answer is right."""

from featdiff.pipeline.stage import stage, stage_key
from featdiff.training.teacher import solve

name = stage_key("--teacher", __doc__, lambda study: study.teachers)

with stage("teacher", key=name, out=f"teachers/{name}", numbers=lambda study: study.teachers[name]) as run:
    data = run.read("data", "tasks.json", "train.parquet")
    run.metrics(solve(name, data, run.out, run.scratch(), run.params, run.seed))
