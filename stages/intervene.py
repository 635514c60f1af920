"""Does the feature set carry the gain? Zeroing it in GRPO and SFT, amplifying it in base, against matched controls."""

from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifact import read_json, write_json
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention.controls import matched_random_sets
from featdiff.intervention.edits import largest_values
from featdiff.intervention.study import intervene, make_subjects
from featdiff.launch import stage
from featdiff.tasks.task import load_samples, load_tasks, write_rows

with stage("intervene", out="analysis/intervene") as run:
    params, data = run.params, run.read("data", "tasks.json", "eval.parquet")
    found = read_json(run.read("analysis/localize") / "features.json")
    fit = run.read(f"crosscoders/{found['fit']}")
    crosscoder, statistics = Crosscoder.load(fit), load_file(fit / "features.safetensors")
    largest = largest_values(crosscoder, ActivationStore({"grpo": run.read("activations/grpo")}))
    folders = {name: run.read(f"models/{name}") for name in crosscoder.models}
    if found["status"] == "found":
        features, samples = found["features"], load_samples(data, "eval")
        rate, contribution = statistics["firing_rate"], statistics["mean_activation"] * crosscoder.decoder_norms().sum(1)
        draws = params.random_sets + params.tuning_random_sets
        drawn = matched_random_sets(features, rate.numpy(), contribution.numpy(), draws, run.seed)
        reported, tuning = drawn[: params.random_sets], drawn[params.random_sets :]
        layer = read_json(fit / "config.json")["layer"]
        subjects = make_subjects(crosscoder, layer, folders, load_tasks(data), largest, params)
        outcome = intervene(subjects, features, reported, tuning, samples, params, run.seed)
        write_json(run.out / "choice.json", outcome.choice)
        for name in ("tuning", "dose", "samples", "effects"):
            write_rows(run.out / f"{name}.parquet", getattr(outcome, name))
        run.attach("effects.parquet")
        run.metrics(outcome.summary())
    else:
        run.metrics({"status": found["status"]})
