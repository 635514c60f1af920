"""Supervised fine-tuning of the base on the teacher's solutions."""

from featdiff.launch import stage
from featdiff.training.sft import train_sft

with stage("sft", out="models/sft") as run:
    base, data = run.read("models/base"), run.read("data", "tasks.json", "train.parquet")
    audit = train_sft(base, data, run.out, run.scratch, run.params, run.seed, run.log)
    run.metrics({name: value for name, value in audit.items() if isinstance(value, (int, float))})
