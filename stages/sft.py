"""Supervised fine-tuning of the base on the teacher's solutions."""

import argparse

from featdiff.pipeline.stage import stage
from featdiff.training.sft import train_sft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--twin", action="store_true", help="with another seed and no checkpoints, for the null pair")
twin = parser.parse_args().twin

with stage("sft", key="twin" if twin else "", out="models/sft_twin" if twin else "models/sft") as run:
    base, data = run.read("models/base"), run.read("data", "tasks.json", "train.parquet")
    params, seed = run.params.model_copy(update={"checkpoints": 1} if twin else {}), run.seed + twin
    audit = train_sft(base, data, run.out, run.scratch(), params, seed, run.log)
    run.metrics({name: value for name, value in audit.items() if isinstance(value, (int, float))})
