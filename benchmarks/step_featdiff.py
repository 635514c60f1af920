"""featdiff's own fit, from its first line to its last: reading, selection, auxiliary loss, dead features, clipping, Adam."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.losses.batchtopk import batch_top_k
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.selection import above, places
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.memory import keep_freed
from pace import Paced, case, explained, planted_rows, say, sparse_bias

given = case()
keep_freed()  # as in every stage
M, D = int(given["models"]), int(given["width"])
LOSS = "l1" if given.get("l1") else "batchtopk"


class Rows:
    """Planted rows as an activation source."""

    models, d_model = [f"model {number}" for number in range(M)], D

    def __init__(self) -> None:
        self.held = planted_rows(M * D, int(given["rows"]))
        self.rows = len(self.held)
        self.paced: Paced | None = None

    def read(self, start: int, stop: int) -> Tensor:
        return self.held[start:stop].view(-1, M, D)

    def shuffled(self, batch: int, generator: torch.Generator, start: int, stop: int, skip: int = 0) -> Iterator[Tensor]:
        self.paced = Paced(self.held[start:stop], batch, int(given["block"]))
        return (rows.view(-1, M, D) for rows in self.paced)


def begun(source: Rows) -> Crosscoder:
    """A crosscoder in which a share ``dead`` of the features is too weakly decoded to be chosen, as dead ones are, or in which
    ``active`` features fire on a row, as in one that was trained for long."""
    crosscoder = Crosscoder(source.models, D, int(given["features"]), LOSS)
    crosscoder.initialise(0.1, torch.Generator().manual_seed(0), tied=True)
    with torch.no_grad():
        crosscoder.W_dec[: int(given.get("dead", 0) * crosscoder.n_features)] *= 1e-3
        if "active" in given:
            crosscoder.b_enc.fill_(sparse_bias(source.held[:512], crosscoder.W_enc.flatten(0, 1), given["active"]))
    return crosscoder


source = Rows()
params = CrosscoderTraining(
    n_features=int(given["features"]), batch_tokens=int(given["batch"]), steps=int(given["steps"]), lr=given["lr"],
    warmup_share=0.0, decay_share=0.0, k=int(given["k"]), aux_k=int(given["aux_k"]), aux_weight=1 / 32,
    dead_after_tokens=int(given["dead_after"]), l1_weight=given.get("l1") or 1.0, l1_warmup_share=0.0, decoder_norm=0.1,
    heldout_share=0.1, log_every=int(given["steps"]),
)  # fmt: skip
curves: list[dict[str, float]] = []
warm = begun(source) if {"dead", "active"} & given.keys() else None
crosscoder, _, train_rows = fit(
    source, LOSS, params, 0, lambda _, point: curves.append(point), "benchmark", scratch=Scratch(), warm=warm
)
assert source.paced is not None
source.paced.finish()
x_BMD = crosscoder.normalise(source.read(train_rows, source.rows))
f_BF = crosscoder.linear(x_BMD)
if LOSS == "l1":
    kept_E = places(above(f_BF, 0.0))
else:  # as the others select: after so few steps the threshold for inference still runs after the cutoffs
    _, kept_E = batch_top_k(f_BF, crosscoder.decoder_norms().sum(1), params.k * len(f_BF))
code_BF = torch.zeros_like(f_BF).flatten().index_copy(0, kept_E, f_BF.flatten()[kept_E]).view_as(f_BF)
fve = explained(x_BMD.flatten(1), crosscoder.decode(code_BF).flatten(1))
say({"fve": fve, "l0": len(kept_E) / len(f_BF), "dead": curves[-1]["dead"]})
