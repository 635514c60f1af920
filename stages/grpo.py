"""GRPO of the base on the same problems, rewarded for the final answer alone."""

from featdiff.pipeline.stage import stage
from featdiff.training.grpo import train_grpo

with stage("grpo", out="models/grpo") as run:
    base, data = run.read("models/base"), run.read("data", "tasks.json", "train.parquet")
    audit = train_grpo(base, data, run.out, run.scratch(), run.params, run.seed, run.log)
    run.metrics({name: value for name, value in audit.items() if isinstance(value, (int, float))})
    run.attach("completions.parquet")
