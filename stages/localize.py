"""The features behind what the tuned model gained: scores on flipped samples of the find split, thresholded and intersected."""

from functools import partial

from safetensors.torch import save_file

from featdiff.artifacts.artifact import read_json, write_json
from featdiff.artifacts.tables import EVAL_SAMPLES, SCORES, SWEEP
from featdiff.crosscoder.model import Crosscoder
from featdiff.language.models import load_model, load_tokenizer, truncate
from featdiff.localization.flipped import find_tasks, flipped_answers, read_flipped
from featdiff.localization.localize import as_json, score_rows, select
from featdiff.localization.search import Search
from featdiff.pipeline.stage import stage
from featdiff.processes.ranks import rank, shared_out
from featdiff.tasks.task import load_samples, load_tasks

with stage("localize", out="analysis/localize") as run:
    params, roles, data = run.params, run.study.roles, run.read("data", "tasks.json", "eval.parquet")
    fits = {name: run.read(f"crosscoders/{name}") for name in params.fits}
    crosscoders = {name: Crosscoder.load(folder).to(run.device) for name, folder in fits.items()}
    tasks, samples = load_tasks(data), {sample.sample_id: sample for sample in load_samples(data, "eval")}
    folders = {name: run.read(f"models/{name}") for name in crosscoders[params.fit].models}
    layer, tokenizer = read_json(fits[params.fit] / "config.json")["layer"], load_tokenizer(folders[roles.original])
    trunks = {name: truncate(load_model(folder), layer).to(run.device) for name, folder in folders.items()}
    before, after = (EVAL_SAMPLES.read(run.read(f"evals/{name}")) for name in (roles.original, roles.tuned))
    asked, skipped = find_tasks(flipped_answers(before, after, tasks, "find"), tasks, params.min_flipped)
    ask = partial(read_flipped, trunks, tokenizer, batch_size=params.batch_size)
    jobs = [partial(ask, tasks[name], [samples[i] for i in asked[name]], list(asked[name].values())) for name in asked]
    readings = dict(zip(asked, shared_out(jobs, "flipped samples"), strict=True))
    search = Search(crosscoders, readings, params, roles)
    found = select(search.differences(), skipped, params, run.seed)
    facts, sweep = search.robustness(found.features, found.threshold, run.seed) if readings else ({}, [])
    if rank() == 0:
        write_json(run.out / "features.json", as_json(found, params) | facts)
        SCORES.write(run.out, score_rows(found))
        SWEEP.write(run.out, sweep)
        save_file(search.directions(found.features, run.seed) if readings else {}, run.out / "directions.safetensors")
    run.attach("features.json")
    run.metrics({"status": found.status, "features": len(found.features), "expected_intersection": found.expected_intersection})
