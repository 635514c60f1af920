"""Would a screen of the encoder find what is active? ``python benchmarks/screening.py [<folder of a study>]``

With W̄ the mean of the encoder's weights over models, Σ_m x_m W_m = (Σ_m x_m) W̄ + Σ_m (x_m − x̄)(W_m − W̄), and the first term
is a product M times smaller. The second is at most Σ_m ‖x_m − x̄‖ ‖W_m − W̄‖, so that what lies below the cutoff with that
much added is certainly not active. Of a study's crosscoder, on rows that it was not fitted on: how far models and weights are
from their means, what part of the active entries is among as many largest by the first term alone, how many entries the bound
leaves to be computed exactly, and how long both ways take.

B rows, M models, D residual width, F features.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import read_json
from featdiff.crosscoder.losses.batchtopk import batch_top_k
from featdiff.crosscoder.model import Crosscoder

FIT, ROWS, ROUNDS = "joint_topk", 1024, 9
LISTS = (1.0, 1.25, 1.5, 2.0, 3.0)
"""Lengths of the list, over the number of active entries."""


def took(work: Callable[[], object]) -> float:
    """Milliseconds, the median of some rounds after one that is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times[1:])


class Screen:
    """The mean of a crosscoder's encoder, and the lengths of what is not in it."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        W_MDF = crosscoder.W_enc
        self.crosscoder, self.W_DF = crosscoder, W_MDF.mean(0)
        self.apart_MF = (W_MDF - self.W_DF).norm(dim=1)
        self.W_FI = W_MDF.flatten(0, 1).T.contiguous()

    def mean(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        """What the means alone say of the linear part."""
        return torch.addmm(self.crosscoder.b_enc, x_BMD.sum(1), self.W_DF)

    def most(self, x_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, "B F"]:
        """What the linear part is at most, as one product: the lengths are M more columns beside the D of the sum."""
        length_BM = (x_BMD - x_BMD.mean(1, keepdim=True)).norm(dim=2)
        return torch.addmm(
            self.crosscoder.b_enc, torch.cat([x_BMD.sum(1), length_BM], 1), torch.cat([self.W_DF, self.apart_MF])
        )

    def active(self, x_BMD: Float[Tensor, "B M D"], cutoff_F: Float[Tensor, " F"]) -> tuple[Tensor, Tensor]:
        """Places and values of the entries above ``cutoff_F``: those that the bound leaves, computed exactly."""
        place_E = (self.most(x_BMD) >= cutoff_F).flatten().nonzero().squeeze(1)
        row_E, column_E = place_E // len(cutoff_F), place_E % len(cutoff_F)
        x_BI = x_BMD.flatten(1)
        value_E = torch.cat(
            [
                (x_BI.index_select(0, row_e) * self.W_FI.index_select(0, column_e)).sum(1)
                for row_e, column_e in zip(row_E.split(4096), column_E.split(4096), strict=True)
            ]
        )
        value_E += self.crosscoder.b_enc.index_select(0, column_E)
        kept = value_E >= cutoff_F.index_select(0, column_E)
        return place_E[kept], value_E[kept]


@torch.no_grad()
def main(folder: Path) -> None:
    """Print a table for the study in ``folder``."""
    fitted = folder / "crosscoders" / FIT
    crosscoder = Crosscoder.load(fitted)
    store = ActivationStore({model: folder / "activations" / model for model in crosscoder.models})
    heldout = store.rows - read_json(fitted / "metrics.json")["heldout_rows"]
    x_BMD = crosscoder.normalise(store.read(heldout, min(heldout + ROWS, store.rows)).float())
    rows, norms_F = len(x_BMD), crosscoder.decoder_norms().sum(1)
    f_BF = crosscoder.linear(x_BMD)
    cutoff, kept_E = batch_top_k(f_BF, norms_F, round(read_json(fitted / "metrics.json")["l0"] * rows))
    cutoff_F, screen = cutoff / norms_F, Screen(crosscoder)
    W_MDF, mean_BF = crosscoder.W_enc, screen.mean(x_BMD) * norms_F
    apart = screen.apart_MF.norm(dim=0) / W_MDF.norm(dim=(0, 1))
    streams = (x_BMD - x_BMD.mean(1, keepdim=True)).norm(dim=(1, 2)) / x_BMD.norm(dim=(1, 2))
    print(f"{folder}: {len(crosscoder.models)} models, D {crosscoder.d_model}, F {crosscoder.n_features}, {rows} rows")
    print(f"streams from their mean {streams.mean():.3f}, weights {apart.median():.3f} (of their length, mean and median)")
    is_kept = torch.zeros(f_BF.numel(), dtype=torch.bool).index_fill_(0, kept_E, True)
    for times in LISTS:
        length = min(int(times * len(kept_E)), mean_BF.numel())
        found = is_kept[mean_BF.flatten().topk(length, sorted=False).indices].sum().item() / len(kept_E)
        print(f"list of {times:.2f} times the active entries: {found:.5f} of them")
    left = int((screen.most(x_BMD) >= cutoff_F).sum())
    place_E, _ = screen.active(x_BMD, cutoff_F)
    same = torch.equal(place_E, ((f_BF >= cutoff_F).flatten()).nonzero().squeeze(1))
    print(f"the bound leaves {left / rows:.1f} of {crosscoder.n_features} entries a row, {len(kept_E) / rows:.1f} are active")
    dense = took(lambda: (crosscoder.linear(x_BMD) >= cutoff_F).flatten().nonzero())
    screened = took(lambda: screen.active(x_BMD, cutoff_F))
    print(f"dense {dense:.1f} ms, screened {screened:.1f} ms ({dense / screened:.2f} times as fast), same entries: {same}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
