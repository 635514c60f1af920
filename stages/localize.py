"""The features behind what GRPO gained: scores on flipped samples of the find split, thresholded and intersected."""

from featdiff.analysis.flipped import feature_differences, flipped_answers, needed_models
from featdiff.analysis.localize import describe, score_rows, select
from featdiff.artifact import read_json, write_json
from featdiff.crosscoder.model import Crosscoder
from featdiff.launch import stage
from featdiff.models import load_model, load_tokenizer, truncate
from featdiff.tasks.task import load_samples, load_tasks, read_rows, write_rows

with stage("localize", out="analysis/localize") as run:
    params, data = run.params, run.read("data", "tasks.json", "eval.parquet")
    fit = run.read(f"crosscoders/{params.fit}")
    tasks, samples = load_tasks(data), {sample.sample_id: sample for sample in load_samples(data, "eval")}
    crosscoder, layer = Crosscoder.load(fit), read_json(fit / "config.json")["layer"]
    folders = {name: run.read(f"models/{name}") for name in needed_models(crosscoder, params.readout)}
    trunks = {name: truncate(load_model(folder), layer) for name, folder in folders.items()}
    before, after = (read_rows(run.read(f"evals/{name}") / "samples.parquet") for name in ("base", "grpo"))
    flipped = flipped_answers(before, after, tasks, "find")
    differences, skipped = {}, {}
    for name, task in tasks.items():
        if task.role == "find" and len(flipped[name]) < params.min_flipped:
            skipped[name] = f"{len(flipped[name])} flipped samples, {params.min_flipped} needed"
        elif task.role == "find":
            chosen = [samples[sample_id] for sample_id in flipped[name]]
            differences[name] = feature_differences(
                crosscoder, trunks, load_tokenizer(folders["base"]), task, chosen, list(flipped[name].values()), params
            )
    found = select(differences, skipped, params, run.seed)
    write_json(run.out / "features.json", describe(found, params))
    run.attach("features.json")
    write_rows(run.out / "scores.parquet", score_rows(found))
    run.metrics({"status": found.status, "features": len(found.features), "expected_intersection": found.expected_intersection})
