"""The residual stream of one model, and of its checkpoints, on the token stream all models share."""

import argparse

from featdiff.activations.harvest import harvest
from featdiff.launch import stage
from featdiff.models import require_same_tokenizer
from featdiff.tasks.task import load_texts

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, choices=["base", "sft", "grpo", "sft_twin"])
name = parser.parse_args().model

with stage("activations", key=name, out=f"activations/{name}") as run:
    data, base, folder = run.read("data", "corpus.parquet"), run.read("models/base"), run.read(f"models/{name}")
    require_same_tokenizer(folder, base)
    run.metrics(harvest(folder, load_texts(data, "corpus"), run.out, run.params, run.scratch()))
