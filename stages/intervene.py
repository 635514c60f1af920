"""Does the set carry the gain? Zeroed in the tuned model, its repeats and the contrast, amplified in the original."""

from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json
from featdiff.crosscoder.edits import Editor, largest_values
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention.controls import Controls
from featdiff.intervention.models import EditableModels
from featdiff.intervention.purposes import purposes
from featdiff.intervention.sensitivity import sensitivity
from featdiff.intervention.study import Questions, intervene
from featdiff.pipeline.stage import stage
from featdiff.processes.ranks import process_state

with stage("intervene", out="analysis/intervene") as run:
    params, roles, data = run.params, run.study.roles, run.read("data", "tasks.json", "eval.parquet", "corpus.parquet")
    localized = run.read("analysis/localize")
    found = read_json(localized / "features.json")
    fit = run.read(f"crosscoders/{found['fit']}")
    crosscoder, layer = Crosscoder.load(fit), read_json(fit / "config.json")["layer"]
    largest = largest_values(crosscoder, ActivationStore({roles.tuned: run.read(f"activations/{roles.tuned}")}))
    asked = purposes(roles, run.study.repeats(roles.tuned))
    folders = {each: run.read(f"models/{each.model}") for each in asked if each.slot_in(crosscoder.models)}
    summary = {"status": found["status"]}
    if found["status"] == "found":
        controls = Controls.of(crosscoder, load_file(fit / "features.safetensors"), roles.original, run.seed)
        sets = controls.sets(found["features"], found["shuffled"], params)
        device, directions = process_state().device, load_file(localized / "directions.safetensors")
        editor = Editor(crosscoder, roles.tuned, layer, device, largest, donor_name=roles.tuned, directions=directions)
        questions, once = Questions.load(data, params.collateral_texts), run.scratch().part
        models = EditableModels(folders, editor, questions.tasks, params)
        result = intervene(models, sets, questions, params, run.seed, once)
        tried = sensitivity(models, result, found["variants"], controls.random, questions.tune, params.tuning_random_sets, once)
        result.save(run.out, sensitivity=tried)
        run.attach("effects.parquet")
        summary = result.summary()
    run.metrics(summary)
