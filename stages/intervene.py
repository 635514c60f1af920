"""Does the set carry the gain? Taken away from the tuned model, its repeats and the contrast, amplified in the original."""

from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json
from featdiff.attribution.norms import mas
from featdiff.crosscoder.edits import Editor, largest_values
from featdiff.crosscoder.model import Crosscoder
from featdiff.intervention.controls import Draws
from featdiff.intervention.models import EditableModels
from featdiff.intervention.purposes import purposes
from featdiff.intervention.sensitivity import Otherwise, sensitivity
from featdiff.intervention.study import Questions, intervene
from featdiff.pipeline.stage import stage
from featdiff.processes.ranks import process_state

with stage("intervene", out="analysis/intervene") as run:
    params, roles, data = run.params, run.study.roles, run.read("data", "tasks.json", "eval.parquet", "corpus.parquet")
    localized, store = run.read("analysis/localize"), ActivationStore({roles.tuned: run.read(f"activations/{roles.tuned}")})
    found, summary = read_json(localized / "features.json"), {}
    if found["status"] == "found":
        fits = {name: run.read(f"crosscoders/{name}") for name in found["seeds"]["sets"]}
        layer, device = read_json(fits[found["fit"]] / "config.json")["layer"], process_state().device

        def editor(fit: str) -> Editor:
            crosscoder = Crosscoder.load(fits[fit])
            return Editor(crosscoder, roles.tuned, layer, device, largest_values(crosscoder, store), roles.original)

        editors = {name: editor(name) for name in fits}
        main = editors.pop(found["fit"])
        asked = purposes(roles, run.study.repeats(roles.tuned))
        folders = {each: run.read(f"models/{each.model}") for each in asked if each.slot_in(main.crosscoder.models)}
        shares, original = mas(main.crosscoder.W_dec).numpy(), main.crosscoder.slot(roles.original)
        counts = (params.random_sets, params.random_directions, params.single_features)
        directions = load_file(localized / "directions.safetensors")
        draws = Draws(*counts, shares, original, found["shuffled"], directions, run.seed)
        questions, once = Questions.load(data, params.collateral_texts), run.scratch().part
        models = EditableModels(folders, main, questions.tasks, params)
        result = intervene(models, draws, found["features"], questions, params, run.seed, once)
        others = {name: members for name, members in found["seeds"]["sets"].items() if name in editors}
        otherwise = Otherwise(found["variants"], others, editors)
        tried = sensitivity(models, result, otherwise, questions.tune, run.seed, once)
        result.save(run.out, sensitivity=tried)
        run.attach("effects.parquet")
        summary = result.summary()
    run.metrics({"status": found["status"]} | summary)
