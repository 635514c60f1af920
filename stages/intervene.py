"""Does the feature set carry the gain? Zeroing it in GRPO and SFT, amplifying it in base, against every control."""

from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json, write_json
from featdiff.crosscoder.edits import largest_values
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention.controls import Controls
from featdiff.intervention.sensitivity import sensitivity
from featdiff.intervention.study import intervene, make_subjects
from featdiff.pipeline.stage import stage
from featdiff.tasks.task import load_samples, load_tasks, load_texts, write_rows

with stage("intervene", out="analysis/intervene") as run:
    params, data = run.params, run.read("data", "tasks.json", "eval.parquet", "corpus.parquet")
    localized = run.read("analysis/localize")
    found = read_json(localized / "features.json")
    fit = run.read(f"crosscoders/{found['fit']}")
    crosscoder, statistics = Crosscoder.load(fit), load_file(fit / "features.safetensors")
    largest = largest_values(crosscoder, ActivationStore({"grpo": run.read("activations/grpo")}))
    folders = {name: run.read(f"models/{name}") for name in crosscoder.models}
    if found["status"] == "found":
        controls = Controls.of(crosscoder, statistics, run.seed)
        drawn = controls.random(found["features"], params.random_sets + params.tuning_random_sets)
        sets = controls.sets(found["features"], drawn[: params.random_sets], found["shuffled"], params.single_features)
        layer, directions = read_json(fit / "config.json")["layer"], load_file(localized / "directions.safetensors")
        subjects = make_subjects(crosscoder, layer, folders, load_tasks(data), largest, directions, params)
        texts = load_texts(data, "corpus")[-params.collateral_texts :]
        samples, scratch = load_samples(data, "eval"), run.scratch()
        outcome = intervene(subjects, sets, drawn[params.random_sets :], samples, texts, params, run.seed, scratch)
        tried = sensitivity(subjects, outcome, found["variants"], controls.random, samples, params.tuning_random_sets, scratch)
        write_json(run.out / "choice.json", outcome.choice)
        write_rows(run.out / "sensitivity.parquet", tried)
        for name in ("tuning", "dose", "samples", "effects", "collateral"):
            write_rows(run.out / f"{name}.parquet", getattr(outcome, name))
        run.attach("effects.parquet")
        run.metrics(outcome.summary())
    else:
        run.metrics({"status": found["status"]})
