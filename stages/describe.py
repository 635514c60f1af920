"""What the features of the set are: contexts, effect on the next token, positions, planted tokens, manner of answering."""

from featdiff.activations.residual import token_stream
from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json, write_json
from featdiff.crosscoder.edits import Editor, largest_values
from featdiff.crosscoder.model import Crosscoder
from featdiff.description.describe import EMPTY, Sources, describe, summary, written_out
from featdiff.description.lens import MODELS
from featdiff.language.models import load_model, load_tokenizer
from featdiff.pipeline.stage import stage
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import load_samples, load_tasks, load_texts, read_rows, write_rows

with stage("describe", out="analysis/describe") as run:
    found = read_json(run.read("analysis/localize", "features.json") / "features.json")
    described, rows = EMPTY
    if found["status"] == "found":
        data, fit = run.read("data", "tasks.json", "eval.parquet", "corpus.parquet"), run.read(f"crosscoders/{found['fit']}")
        folders = {name: run.read(f"models/{name}") for name in MODELS}
        answers = {name: read_rows(run.read(f"evals/{name}", "samples.parquet") / "samples.parquet") for name in MODELS}
        stores = {name: ActivationStore({name: run.read(f"activations/{name}")}) for name in MODELS}
        device, tokenizer = process_state().device, load_tokenizer(folders["base"])
        models = {name: load_model(folder).to(device) for name, folder in folders.items()}
        crosscoder, layer = Crosscoder.load(fit), read_json(fit / "config.json")["layer"]
        texts = load_texts(data, "corpus")
        corpus = token_stream(texts, tokenizer, run.study.activations).first(run.params.corpus_tokens)
        largest = largest_values(crosscoder, stores["grpo"])
        editor = Editor(crosscoder, "base", layer, device, largest)
        edits = {k: editor.edit("add", [k], "prompt_last", 1.0) for k in found["features"]}
        tasks, samples = load_tasks(data), load_samples(data, "eval")
        sources = Sources(crosscoder, layer, models, tokenizer, tasks, samples, answers, texts, corpus, stores, largest, edits)
        described, rows = describe(sources, run.params, run.seed)
        described = written_out(described, tokenizer)
    write_json(run.out / "features.json", {name: found[name] for name in ("status", "fit")} | {"readout": "swap"} | described)
    write_rows(run.out / "contexts.parquet", rows)
    run.attach("features.json")
    run.metrics({"status": found["status"]} | summary(described))
