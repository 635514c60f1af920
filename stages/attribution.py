"""Whose feature is it? Decoder norms and latent scaling compared between models, null pairs beside them."""

from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.tables import FEATURES, SCALING
from featdiff.attribution.norms import attribute, class_counts
from featdiff.attribution.scaling import latent_scaling, scaling_rows
from featdiff.crosscoder.model import Crosscoder
from featdiff.pipeline.stage import stage

with stage("attribution", out="analysis/attribution") as run:
    params, fits = run.params, run.study.fits
    models = dict.fromkeys(model for chosen in fits.values() for model in chosen.models)
    activations = {str(model): run.read(f"activations/{model}") for model in models}
    rows, scaled, read = [], [], {}
    for name, chosen in fits.items():
        folder = run.read(f"crosscoders/{name}")
        crosscoder = Crosscoder.load(folder).to(run.device)
        statistics = load_file(folder / "features.safetensors")
        store = ActivationStore({slot: activations[model] for slot, model in chosen.slots.items()})
        start = store.rows - read_json(folder / "metrics.json")["heldout_rows"]  # what comes before was fitted on
        stop = min(start + params.scaling_tokens, store.rows)
        middle = (start + stop) // 2
        scaling = latent_scaling(crosscoder, store, start, stop)
        halves = [latent_scaling(crosscoder, store, *part) for part in ((start, middle), (middle, stop))]
        rows += attribute(name, crosscoder, statistics, scaling, params, halves)
        read[name] = stop - start
        scaled += scaling_rows(name, scaling, params.nu_error, params.nu_reconstruction)
    FEATURES.write(run.out, rows)
    SCALING.write(run.out, scaled)
    run.metrics(class_counts(rows) | {"heldout_rows": read})
