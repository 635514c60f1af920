"""The residual stream of one model, and of its checkpoints, on the token stream all models share."""

from featdiff.activations.harvest import harvest
from featdiff.config.values import BASE
from featdiff.language.models import require_same_tokenizer
from featdiff.pipeline.stage import stage, stage_key
from featdiff.tasks.task import load_texts

name = stage_key("--model", __doc__, lambda study: study.models)

with stage("activations", key=name, out=f"activations/{name}") as run:
    data, base, folder = run.read("data", "corpus.parquet"), run.read(f"models/{BASE}"), run.read(f"models/{name}")
    require_same_tokenizer(folder, base)
    run.metrics(harvest(folder, load_texts(data, "corpus"), run.out, run.params, run.scratch()))
