"""Does the set carry the gain? Taken away from the tuned model, its repeats and the contrast, or amplified in the original."""

from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.tables import EFFECTS
from featdiff.crosscoder.edits import Editor
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention.controls import Draws
from featdiff.intervention.models import EditableModels
from featdiff.intervention.purposes import SIDES, needed, purposes
from featdiff.intervention.sensitivity import Otherwise, sensitivity
from featdiff.intervention.study import Questions, intervene
from featdiff.pipeline.stage import stage, stage_key
from featdiff.processes.ranks import rank

side = stage_key("--side", __doc__, lambda _: SIDES)
with stage("intervene", out=f"analysis/intervene/{side}", key=side) as run:
    params, roles, data = run.params, run.study.roles, run.read("data", "tasks.json", "eval.parquet", "corpus.parquet")
    localized, store = run.read("analysis/localize"), ActivationStore({roles.tuned: run.read(f"activations/{roles.tuned}")})
    found, summary = read_json(localized / "features.json"), {}
    if found["status"] == "found":
        sets = found["seeds"]["sets"] | {each["fit"]: each["features"] for each in [found["random_dictionary"]] if each}
        fits = {name: run.read(f"crosscoders/{name}") for name in sets}
        layer, pushes = read_json(fits[found["fit"]] / "config.json")["layer"], load_file(localized / "directions.safetensors")
        editors = {name: Editor.of(Crosscoder.load(fit), layer, run.device, store, roles) for name, fit in fits.items()}
        main, asked = editors.pop(found["fit"]), needed(side, purposes(roles, run.study.repeats(roles.tuned)))
        folders = {each: run.read(f"models/{each.model}") for each in asked if each.slot_in(main.crosscoder.models)}
        draws = Draws.of(params, main.crosscoder, roles.original, found, editors, pushes, run.seed)
        questions, once = Questions.load(data, params.collateral_texts), run.shared_scratch().parts
        models = EditableModels(folders, main, questions.tasks, params)
        result = intervene(models, side, draws, found["features"], questions, params, run.seed, once)
        otherwise = Otherwise(found["variants"], {name: sets[name] for name in editors}, editors)
        tried = sensitivity(models, result, otherwise, questions.tune, run.seed, once)
        if rank() == 0:
            result.save(run.out, sensitivity=tried)
        run.attach(EFFECTS.file)
        summary = result.summary()
    run.metrics({"status": found["status"]} | summary)
