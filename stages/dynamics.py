"""Which features move over the checkpoints of an arm: in one fixed dictionary, and in crosscoders trained on."""

import torch
from safetensors.torch import load_file

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.tables import BOOTSTRAP, OVERLAP, TRAJECTORIES
from featdiff.attribution.dynamics import Followed, follow, overlap_rows, refit
from featdiff.config.dictionary import PAIR
from featdiff.config.values import BASE
from featdiff.crosscoder.model import Crosscoder
from featdiff.pipeline.stage import stage, stage_key

arm = stage_key("--arm", __doc__, lambda study: study.dynamics.arms)

with stage("dynamics", key=arm, out=f"analysis/dynamics/{arm}") as run:
    params, training = run.params, run.study.crosscoder.training
    training = training.model_copy(update={"steps": params.refit_steps, "lr": params.refit_lr})
    base, folder = run.read(f"activations/{BASE}"), run.read(f"activations/{arm}")
    index = read_json(folder / "index.json")
    rows = index["checkpoint_rows"] or index["rows"]
    series = [f"checkpoint{i + 1}" for i in range(index["checkpoints"])] + ["acts"]
    before = ActivationStore({BASE: base, arm: folder}).read(0, rows)[:, 0]
    after = {i: ActivationStore({arm: folder}, name).read(0, rows)[:, 0] for i, name in enumerate(series, start=1)}
    crosscoder, found = Crosscoder.load(run.read(f"crosscoders/{params.fit}")).to(run.device), Followed([], [], [])
    slot = next((name for name in run.study.repeats(arm) if name in crosscoder.models), None)
    if slot:  # an arm that the dictionary has never seen, nor a repeat of it, has no slot there
        texts = load_file(base / "tokens.safetensors")["text_id"][:rows]
        found = follow(arm, crosscoder, slot, before, after, texts, params, run.seed)
    pair = Crosscoder.load(run.read(f"crosscoders/{PAIR}{arm}"))
    pairs = {i: torch.stack([before, acts], dim=1) for i, acts in after.items()}
    ranked = {i: refit(pair, acts, training, run.seed, f"{arm} {i}") for i, acts in pairs.items()}
    again = refit(pair, pairs[len(after)], training, run.seed + 1, f"{arm} again")
    overlaps = found.overlap + overlap_rows(arm, "refit", ranked, (ranked[len(after)], again), params.top)
    OVERLAP.write(run.out, overlaps)
    TRAJECTORIES.write(run.out, found.trajectories)
    BOOTSTRAP.write(run.out, found.bootstrap)
    wanted = {"method": "fixed", "a": 1, "b": len(after), "top": max(params.top)}
    run.metrics({"overlap_first_last": {row["arm"]: row["overlap"] for row in overlaps if wanted.items() <= row.items()}})
