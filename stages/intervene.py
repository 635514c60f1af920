"""Does the feature set carry the gain? Zeroing it in GRPO and SFT, amplifying it in base, against matched controls."""

from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifact import read_json, write_json
from featdiff.crosscoder.model import Crosscoder
from featdiff.evaluation import Examinee
from featdiff.intervention.controls import matched_random_sets
from featdiff.intervention.edits import Editor, largest_values
from featdiff.intervention.study import Subject, intervene
from featdiff.launch import stage
from featdiff.models import load_model, load_tokenizer
from featdiff.ranks import process_state
from featdiff.tasks.task import load_samples, load_tasks, write_rows

with stage("intervene", out="analysis/intervene") as run:
    params, data, found = run.params, run.read("data"), read_json(run.read("analysis/localize") / "features.json")
    fit = run.read(f"crosscoders/{found['fit']}")
    crosscoder, statistics, layer = (
        Crosscoder.load(fit),
        load_file(fit / "features.safetensors"),
        read_json(fit / "config.json")["layer"],
    )
    largest = largest_values(crosscoder, ActivationStore({"grpo": run.read("activations/grpo")}))
    folders = {name: run.read(f"models/{name}") for name in crosscoder.models}
    if found["status"] == "found":
        contribution = statistics["mean_activation"] * crosscoder.decoder_norms().sum(1)
        random_sets = matched_random_sets(
            found["features"],
            statistics["firing_rate"].numpy(),
            contribution.numpy(),
            params.random_sets + params.tuning_random_sets,
            run.seed,
        )
        device = process_state().device
        models = {name: load_model(folder).to(device) for name, folder in folders.items()}
        tasks, tokenizer = load_tasks(data), load_tokenizer(folders["base"])
        subjects = {
            name: Subject(
                Examinee(model, tokenizer, tasks, batch_size=params.batch_size, max_new_tokens=params.max_new_tokens),
                Editor(crosscoder, name, layer, device, largest, donor=models["grpo"]),
            )
            for name, model in models.items()
        }
        outcome = intervene(
            subjects,
            found["features"],
            random_sets[: params.random_sets],
            random_sets[params.random_sets :],
            load_samples(data, "eval"),
            params,
            run.seed,
        )
        write_json(run.out / "choice.json", outcome.choice)
        for name in ("tuning", "dose", "samples", "effects"):
            write_rows(run.out / f"{name}.parquet", getattr(outcome, name))
        run.metrics(outcome.summary())
    else:
        run.metrics({"status": found["status"]})
