"""One crosscoder on the activations of two or more models, fitted here or brought from elsewhere."""

from featdiff.activations.store import ActivationStore
from featdiff.activations.turns import alone
from featdiff.crosscoder.make import make_in_turns
from featdiff.pipeline.stage import stage, stage_key
from featdiff.processes.ranks import rank

name = stage_key("--fit", __doc__, lambda study: study.fits)

with stage("crosscoder", key=name, out=f"crosscoders/{name}") as run:
    chosen, tied = run.study.fits[name], not run.study.null(name)
    folders = {slot: run.read(f"activations/{model}") for slot, model in chosen.slots.items()}
    scratch = run.scratch()
    if not run.was_made():
        store = ActivationStore(folders)
        made = alone(make_in_turns(store, chosen, run.params.training, run.seed, run.log, name, scratch, tied))
        if rank() == 0:
            made.save(run.out)
        run.metrics(made.metrics)
