"""What the features of the set are: contexts, effect on the next token, positions, planted tokens, manner; probes of it."""

from featdiff.activations.residual import token_stream
from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json, write_json
from featdiff.artifacts.tables import CONTEXTS, EVAL_SAMPLES, PROBES, TOKEN_VALUES
from featdiff.crosscoder.edits import Editor, largest_values
from featdiff.crosscoder.model import Crosscoder
from featdiff.description.describe import EMPTY, Sources, describe, summary, written_out
from featdiff.description.probe import manner_probes
from featdiff.language.models import load_model, load_tokenizer
from featdiff.pipeline.stage import stage
from featdiff.tasks.task import load_samples, load_tasks, load_texts

with stage("describe", out="analysis/describe") as run:
    found = read_json(run.read("analysis/localize", "features.json") / "features.json")
    roles, (described, contexts, values), probed = run.study.roles, EMPTY, []
    if found["status"] == "found":
        data, fit = run.read("data", "tasks.json", "eval.parquet", "corpus.parquet"), run.read(f"crosscoders/{found['fit']}")
        crosscoder, layer = Crosscoder.load(fit), read_json(fit / "config.json")["layer"]
        parts = [name for name in roles.models if name in crosscoder.models]
        folders = {name: run.read(f"models/{name}") for name in parts}
        answers = {name: EVAL_SAMPLES.read(run.read(f"evals/{name}", "samples.parquet")) for name in parts}
        stores = {name: ActivationStore({name: run.read(f"activations/{name}")}) for name in (roles.original, roles.tuned)}
        tokenizer, tasks = load_tokenizer(folders[roles.original]), load_tasks(data)
        models = {name: load_model(folder).to(run.device) for name, folder in folders.items()}
        texts, largest = load_texts(data, "corpus"), largest_values(crosscoder, stores[roles.tuned], run.device)
        corpus = token_stream(texts, tokenizer, run.study.activations).first(run.params.corpus_tokens)
        editor = Editor(crosscoder, roles.original, layer, run.device, largest, donor_name=roles.tuned)
        edits = {k: editor.edit("add", [k], "prompt_last", 1.0) for k in found["features"]}
        samples = [sample for sample in load_samples(data, "eval") if tasks[sample.task].edited]
        asked = tokenizer, tasks, samples, answers, texts, corpus
        sources = Sources(roles, crosscoder, layer, models, *asked, stores, largest, edits)
        described, contexts, values = describe(sources, run.params, run.seed)
        described, probed = written_out(described, tokenizer), manner_probes(sources, run.params, run.seed)
    write_json(run.out / "features.json", {name: found[name] for name in ("status", "fit")} | {"readout": "swap"} | described)
    for table, rows in ((CONTEXTS, contexts), (TOKEN_VALUES, values), (PROBES, probed)):
        table.write(run.out, rows)
    run.attach("features.json")
    run.metrics({"status": found["status"]} | summary(described))
