"""One search for features, and the same search done otherwise: with another readout, at other positions, in the
dictionary of another seed, in one of random directions, with identities shuffled, and with no dictionary at all.

S samples, K features of a set, D residual width, F features.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from featdiff.config.models import Roles
from featdiff.config.sets import LocalizeParams
from featdiff.config.values import Readout
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.localization.flipped import FlippedStreams, feature_differences
from featdiff.localization.robustness import common, seed_stability, shuffled_identities, strongest, sweep
from featdiff.localization.stability import effect_stability, task_mean


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

    @torch.no_grad()
    def decoder_rows(self, features: list[int], fit: str | None = None) -> Float[Tensor, "K D"]:
        """Decoder rows of ``features`` in the original model, in raw units."""
        return Reader(self.crosscoders[fit or self.params.fit], self.roles.original, "swap", features).directions_FD.cpu()

    @torch.no_grad()
    def set_changes(self, features: list[int], fit: str | None = None) -> dict[str, Float[Tensor, "S D"]]:
        """What the edit ``transplant`` of ``features`` adds to the original model's residual stream, in raw units, by task and
        sample, mean over the positions of the search: Σ_k (f_k^tuned − f_k^original) d_k^original, under the swap readout."""
        rows_KD = self.decoder_rows(features, fit)
        return {task: rows[:, features] @ rows_KD for task, rows in self.differences(fit, "swap").items()}

    def mean_difference(self) -> Float[Tensor, " D"]:
        """Mean of tuned − original at the positions of the search, for which every task counts the same."""
        return task_mean(self._differences_of_streams())

    def _differences_of_streams(self) -> dict[str, Float[Tensor, "S D"]]:
        readings = {task: reading[self.params.positions] for task, reading in self.readings.items()}
        return {
            task: reading.mean(reading.resid[self.roles.tuned] - reading.resid[self.roles.original])
            for task, reading in readings.items()
        }

    def _found(self, *otherwise: Any) -> list[int]:
        return common(self.differences(*otherwise), self.params.threshold, self.params.largest_set)

    def variants(self) -> list[dict[str, Any]]:
        """The set under every readout and at every position."""
        return [
            {
                "readout": readout,
                "positions": positions,
                "features": self._found(None, readout, positions),
            }
            for readout in get_args(Readout)
            for positions in next(iter(self.readings.values()))
        ]

    def robustness(self, features: list[int], threshold: float, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The searches done otherwise as part of ``features.json``, and the sweep of thresholds, that in force among them."""
        p, differences = self.params, self.differences()
        other = p.random_dictionary
        sets = {name: self._found(name) for name in (p.fit, *p.seeds)}
        changes = {name: self.set_changes(found, name) for name, found in sets.items()}
        spans = {name: self.decoder_rows(found, name) for name, found in sets.items()}
        generator, size = torch.Generator().manual_seed(seed), max(1, len(features))
        facts = {
            "seeds": seed_stability(sets, self.crosscoders, p.least_cosine)
            | effect_stability(changes, spans, self.mean_difference(), seed),
            "variants": self.variants(),
            "shuffled": strongest(shuffled_identities(differences, generator), size),
            "random_dictionary": {"fit": other, "features": strongest(self.differences(other), size)} if other else None,
        }
        return facts, sweep(differences, sorted({*p.thresholds, threshold}), features, p.shuffles, generator)

    def directions(self, features: list[int], seed: int) -> dict[str, Float[Tensor, " D"]]:
        """Directions of the residual stream at the positions of the search. Three need no dictionary and are of equal length:
        the mean difference tuned − original, for which every task counts the same, the first principal component of the
        differences, which points the same way, and a random direction. ``original_mean`` is the mean of the original model.
        ``set_change`` is the mean over tasks of what transplanting the set ``features`` adds (:meth:`set_changes`), at its own
        length; absent without a set."""
        readings = [reading[self.params.positions] for reading in self.readings.values()]
        mean_D, rows_SD = self.mean_difference(), torch.cat(list(self._differences_of_streams().values()))
        component_D = torch.linalg.svd(rows_SD - rows_SD.mean(0), full_matrices=False).Vh[0]
        random_D = torch.randn(len(mean_D), generator=torch.Generator().manual_seed(seed))
        length = mean_D.norm()
        found = {
            "mean_difference": mean_D,
            "first_component": component_D * length * (1 if component_D @ mean_D >= 0 else -1),
            "random_direction": random_D / random_D.norm() * length,
            "original_mean": torch.stack(
                [reading.mean(reading.resid[self.roles.original]).mean(0) for reading in readings]
            ).mean(0),
        }
        return found | ({"set_change": task_mean(self.set_changes(features))} if features else {})
