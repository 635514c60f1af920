"""The base model: pretrained here as the organism, or brought from a folder, a GGUF package or the hub."""

from featdiff.language.models import save_model
from featdiff.pipeline.stage import stage
from featdiff.processes.ranks import rank
from featdiff.tasks.task import load_texts
from featdiff.training.imported import load_base
from featdiff.training.pretrain import pretrain

with stage("base", out="models/base") as run:
    data = run.read("data", "pretrain.parquet")
    if run.params.source == "pretrain":
        model, tokenizer = pretrain(load_texts(data, "pretrain"), run.params.pretraining, run.seed, run.log, run.scratch())
    else:
        model, tokenizer = load_base(run.params.source, run.params.dtype)
    if rank() == 0:
        save_model(model, tokenizer, run.out)
    run.metrics({"parameters": model.num_parameters(), "layers": model.config.num_hidden_layers})
