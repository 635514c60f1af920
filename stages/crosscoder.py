"""One crosscoder on the activations of two or more models, fitted here or brought from elsewhere."""

from pathlib import Path

from safetensors.torch import save_file

from featdiff.activations.store import ActivationStore
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.imported import imported
from featdiff.crosscoder.measure import measure
from featdiff.pipeline.stage import stage, stage_key
from featdiff.processes.ranks import rank

name = stage_key("--fit", __doc__, lambda study: study.fits)

with stage("crosscoder", key=name, out=f"crosscoders/{name}") as run:
    chosen, training = run.study.fits[name], run.params.training
    store = ActivationStore({slot: run.read(f"activations/{model}") for slot, model in chosen.slots.items()})
    seed, tied = run.seed + chosen.seed, not run.study.null(name)
    if chosen.source:
        fitted = imported(Path(chosen.source), store, store.layer, training)
    else:
        fitted = fit(store, chosen.loss, training, seed, run.log, name, scratch=run.scratch(), tied=tied)
    metrics, features = measure(store, *fitted)
    if rank() == 0:
        brought = {"source": chosen.source} if chosen.source else {}
        fitted.crosscoder.save(run.out, layer=store.layer, seed=chosen.seed, **brought)
        save_file(features, run.out / "features.safetensors")
    run.metrics(metrics)
