"""All that a crosscoder of a study is: fitted, measured, and written to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from featdiff.activations.store import ActivationStore, SharedSource
from featdiff.activations.turns import Turns
from featdiff.config.dictionary import CrosscoderTraining, Fit
from featdiff.crosscoder.fit import Log, fit_in_turns
from featdiff.crosscoder.imported import imported
from featdiff.crosscoder.measure import measure_in_turns
from featdiff.crosscoder.model import Crosscoder
from featdiff.pipeline.checkpoint import Scratch


class Made(NamedTuple):
    """A crosscoder, what it was made on and how well it is."""

    crosscoder: Crosscoder
    features: dict[str, Float[Tensor, " F"]]
    metrics: dict[str, Any]
    layer: int
    chosen: Fit

    def save(self, folder: Path) -> None:
        brought = {"source": self.chosen.source} if self.chosen.source else {}
        self.crosscoder.save(folder, layer=self.layer, seed=self.chosen.seed, **brought)
        save_file(self.features, folder / "features.safetensors")


def make_in_turns(
    source: ActivationStore | SharedSource,
    chosen: Fit,
    params: CrosscoderTraining,
    seed: int,
    log: Log,
    label: str,
    scratch: Scratch,
    tied: bool,
) -> Turns[Made]:
    """The crosscoder that ``chosen`` describes, fitted or brought from elsewhere, piece by piece. ``seed`` is the study's; what
    else is given and raised is as of :func:`featdiff.crosscoder.fit.fit` and :func:`featdiff.crosscoder.imported.imported`."""
    if chosen.source:
        fitted = imported(Path(chosen.source), source, source.layer, params)
    else:
        fitted = yield from fit_in_turns(
            source, chosen.loss, params, seed + chosen.seed, log, label, scratch=scratch, tied=tied
        )
    metrics, features = yield from measure_in_turns(source, *fitted)
    return Made(fitted.crosscoder, features, metrics, source.layer, chosen)
