"""One search for features, and the same search done otherwise: with another readout, at other positions, in the
dictionary of another seed, with identities shuffled, and with no dictionary at all.

S samples, D residual width, F features.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.config.params import LocalizeParams, Readout, Roles
from featdiff.crosscoder.model import Crosscoder
from featdiff.localization.flipped import FlippedStreams, feature_differences
from featdiff.localization.robustness import common, seed_stability, shuffled_identities, strongest, sweep


class Search(NamedTuple):
    """What a search for features reads: crosscoders by fit, and readings by task and positions, with streams by model."""

    crosscoders: dict[str, Crosscoder]
    readings: dict[str, dict[str, FlippedStreams]]
    params: LocalizeParams
    roles: Roles

    def differences(
        self, fit: str | None = None, readout: Readout | None = None, positions: str | None = None
    ) -> dict[str, Float[Tensor, "S F"]]:
        """f^tuned − f^original per sample, by task; as the params say where nothing else is asked for."""
        p = self.params
        crosscoder = self.crosscoders[fit or p.fit]
        return {
            task: feature_differences(crosscoder, reading[positions or p.positions], readout or p.readout, self.roles)
            for task, reading in self.readings.items()
        }

    def variants(self) -> list[dict[str, Any]]:
        """The set under every readout and at every position."""
        return [
            {
                "readout": readout,
                "positions": positions,
                "features": common(self.differences(None, readout, positions), self.params.threshold),
            }
            for readout in get_args(Readout)
            for positions in next(iter(self.readings.values()))
        ]

    def robustness(self, features: list[int], seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The searches done otherwise as part of ``features.json``, and the threshold sweep."""
        p, differences = self.params, self.differences()
        sets = {name: common(self.differences(name), p.threshold) for name in self.crosscoders}
        generator = torch.Generator().manual_seed(seed)
        facts = {
            "seeds": seed_stability(sets, self.crosscoders, p.least_cosine),
            "variants": self.variants(),
            "shuffled": strongest(shuffled_identities(differences, generator), max(1, len(features))),
        }
        return facts, sweep(differences, p.thresholds, features, p.shuffles, generator)

    def directions(self, seed: int) -> dict[str, Float[Tensor, " D"]]:
        """Directions of the residual stream that need no dictionary, at the positions of the search. Three are of equal length:
        the mean difference tuned − original, for which every task counts the same, the first principal component of the
        differences, which points the same way, and a random direction. The fourth is the mean of the original model."""
        original, tuned = self.roles.original, self.roles.tuned
        readings = [reading[self.params.positions] for reading in self.readings.values()]
        per_task = [reading.mean(reading.resid[tuned] - reading.resid[original]) for reading in readings]
        mean_D = torch.stack([rows.mean(0) for rows in per_task]).mean(0)
        rows_SD = torch.cat(per_task)
        component_D = torch.linalg.svd(rows_SD - rows_SD.mean(0), full_matrices=False).Vh[0]
        random_D = torch.randn(len(mean_D), generator=torch.Generator().manual_seed(seed))
        length = mean_D.norm()
        return {
            "mean_difference": mean_D,
            "first_component": component_D * length * (1 if component_D @ mean_D >= 0 else -1),
            "random_direction": random_D / random_D.norm() * length,
            "original_mean": torch.stack([reading.mean(reading.resid[original]).mean(0) for reading in readings]).mean(0),
        }
