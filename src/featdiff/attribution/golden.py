"""Attribution methods against the truth: crosscoders fitted on synthetic activations, whose features are known.

    x^m = mean + Σ_i f_i · strength_i^m · direction_i^m + noise
A true feature i fires at its own rate with a log-normal value. Its strength and direction in each model are those of its kind.
Every method is asked which features the last model has alone.
N token rows, M models, D width, P true features, F learned features.
"""

from __future__ import annotations

import sys
from math import radians
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.artifact import write_json
from featdiff.attribution.norms import mas, nrn
from featdiff.attribution.scaling import LatentScaling, latent_scaling
from featdiff.config.params import (
    AttributionParams,
    CrosscoderTraining,
    Fraction,
    LossName,
    Name,
    Params,
    Positive,
    Rate,
    parse,
)
from featdiff.config.reading import read_yaml
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import measure
from featdiff.pipeline.checkpoint import Scratch

SETTINGS = Path("conf/golden.yaml")
METRICS = Path("metrics/golden.json")
OWN = "tuned_only"

Method = Literal["nrn", "mas", "scaling", "nrn_scaling"]


class Kind(Params):
    """True features that have the same fate. All kinds name the same models in the same order."""

    count: Positive
    strength: dict[Name, Annotated[list[float], Field(min_length=2, max_length=2)]]
    """For each model the bounds between which a feature's strength is drawn."""
    degrees: dict[Name, float]
    """For each model how far its direction is turned."""


class Case(Params):
    active: Positive
    """Mean number of true features that fire on a token, which is also k of BatchTopK."""
    noise: Annotated[float, Field(ge=0)]
    """Root mean square norm of the noise, relative to the features'."""
    mean: Annotated[float, Field(ge=0)]
    """Norm of the mean that all models share, relative to the root mean square norm of the features."""


class Reach(Params):
    """What one method must reach in one case."""

    case: Name
    loss: LossName
    method: Method
    found: Fraction
    """Least share of the true ``tuned_only`` features to be called so."""
    shared_called: Fraction
    """Largest share of the shared ones to be called so."""


class GoldenParams(Params):
    seed: Annotated[int, Field(ge=0)]
    d_model: Positive
    rows: Positive
    spread: Rate
    rates: Annotated[float, Field(ge=1)]
    kinds: dict[Name, Kind]
    cases: dict[Name, Case]
    losses: list[LossName]
    least_cosine: Fraction
    attribution: AttributionParams
    training: dict[str, Any]
    """Values of CrosscoderTraining except k."""
    reach: Reach

    @property
    def models(self) -> list[str]:
        return list(next(iter(self.kinds.values())).strength)


class Truth(NamedTuple):
    acts_NMD: Float[Tensor, "N M D"]
    direction_PMD: Float[Tensor, "P M D"]
    """What one unit of each feature adds to each model."""
    kind: list[str]
    """Kind of each true feature."""


def synthesise(params: GoldenParams, case: Case, generator: torch.Generator) -> Truth:
    """Activations with known features: random directions, independent firing, isotropic noise of each model's own."""
    kind = [name for name, group in params.kinds.items() for _ in range(group.count)]
    shape = len(kind), params.d_model
    along_PD = normalize(torch.randn(shape, generator=generator), dim=1)
    aside_PD = torch.randn(shape, generator=generator)
    aside_PD = normalize(aside_PD - (aside_PD * along_PD).sum(1, keepdim=True) * along_PD, dim=1)
    low_PM, high_PM = torch.tensor([list(params.kinds[name].strength.values()) for name in kind]).unbind(-1)
    strength_PM = low_PM + (high_PM - low_PM) * torch.rand(low_PM.shape, generator=generator)
    angle_PM = torch.tensor([[radians(turn) for turn in params.kinds[name].degrees.values()] for name in kind])
    turned_PMD = torch.einsum("pm,pd->pmd", angle_PM.cos(), along_PD) + torch.einsum("pm,pd->pmd", angle_PM.sin(), aside_PD)
    direction_PMD = strength_PM[:, :, None] * turned_PMD
    rate_P = params.rates ** torch.rand(len(kind), generator=generator)
    rate_P *= case.active / rate_P.sum()
    fires_NP = torch.rand(params.rows, len(kind), generator=generator) < rate_P
    value_NP = fires_NP * torch.exp(params.spread * torch.randn(fires_NP.shape, generator=generator))
    acts_NMD = torch.einsum("np,pmd->nmd", value_NP, direction_PMD)
    size = (acts_NMD - acts_NMD.mean(0)).square().sum(2).mean().sqrt()
    acts_NMD += case.mean * size * normalize(torch.randn(params.d_model, generator=generator), dim=0)
    acts_NMD += case.noise * size / params.d_model**0.5 * torch.randn(acts_NMD.shape, generator=generator)
    return Truth(acts_NMD, direction_PMD, kind)


class Match(NamedTuple):
    feature_P: Int[Tensor, " P"]
    """The learned feature of each true one, mutually nearest; −1 for none."""
    true_F: Int[Tensor, " F"]
    """The true feature nearest to each learned one; −1 for none."""


def match(
    direction_PMD: Float[Tensor, "P M D"], W_dec_FMD: Float[Tensor, "F M D"], alive_F: Bool[Tensor, " F"], least: float
) -> Match:
    """Which true and learned features belong together: those of largest decoder cosine, from ``least`` on.

    The cosine is the largest over models: a decoder row that was shrunk to nothing must not hide which feature it was."""
    cosine_PF = torch.einsum("pmd,fmd->mpf", normalize(direction_PMD, dim=2), normalize(W_dec_FMD, dim=2)).amax(0)
    cosine_PF = cosine_PF.where(alive_F, -1.0)
    nearest_P, nearest_F = cosine_PF.max(1), cosine_PF.max(0)
    mutual_P = nearest_F.indices[nearest_P.indices] == torch.arange(len(direction_PMD))
    return Match(
        nearest_P.indices.where(mutual_P & (nearest_P.values >= least), -1),
        nearest_F.indices.where(nearest_F.values >= least, -1),
    )


def called_own(
    W_dec_FMD: Float[Tensor, "F M D"], scaling: LatentScaling, params: GoldenParams
) -> dict[Method, Bool[Tensor, " F"]]:
    """Which features each method takes for the last model's alone, against every other model."""
    others = range(W_dec_FMD.shape[1] - 1)
    by_norm_F = torch.stack([nrn(W_dec_FMD[:, [o, -1]]) > params.attribution.shared_band[1] for o in others]).all(0)
    scaled_F = scaling.specific(params.attribution.nu_error, params.attribution.nu_reconstruction)[:-1, -1].all(0)
    return {
        "nrn": by_norm_F,
        "mas": mas(W_dec_FMD)[:, -1] > params.attribution.joint_dominance,
        "scaling": scaled_F,
        "nrn_scaling": by_norm_F & scaled_F,
    }


def examine(params: GoldenParams, name: str, loss: LossName) -> list[dict[str, Any]]:
    """Make the activations of the case ``name``, fit a crosscoder under ``loss`` and count, for each method, what it calls the
    tuned model's own.

    ``matched`` counts the true features of each kind that have a learned feature, ``called`` those whose learned feature was
    called. ``features`` were called in all, and ``own`` of them are nearest to a true feature of the tuned model's own."""
    case = params.cases[name]
    truth = synthesise(params, case, torch.Generator().manual_seed(params.seed))
    source = ActivationTensor(params.models, truth.acts_NMD)
    training = parse(CrosscoderTraining, params.training | {"k": case.active}, str(SETTINGS))
    fitted = fit(source, loss, training, params.seed, lambda *_: None, f"{name} {loss}", scratch=Scratch())
    crosscoder, (metrics, features) = fitted.crosscoder, measure(source, *fitted)
    alive_F = features["firing_rate"] > 0
    matches = match(truth.direction_PMD, crosscoder.W_dec, alive_F, params.least_cosine)
    scaling = latent_scaling(crosscoder, source, 0, min(params.attribution.scaling_tokens, source.rows))
    own_P = torch.tensor([kind == OWN for kind in truth.kind])
    is_own_F = own_P[matches.true_F] & (matches.true_F >= 0)
    rows = []
    for method, called_F in called_own(crosscoder.W_dec, scaling, params).items():
        called_F = called_F & alive_F
        found_P = matches.feature_P >= 0
        counts: dict[str, dict[str, int]] = {"called": {}, "matched": {}}
        for kind in params.kinds:
            of_kind_P = torch.tensor([other == kind for other in truth.kind])
            counts["called"][kind] = int((called_F[matches.feature_P] & found_P & of_kind_P).sum())
            counts["matched"][kind] = int((found_P & of_kind_P).sum())
        facts = {"case": name, "loss": loss, "method": method, "fve": metrics["fve"], "l0": metrics["l0"]}
        rows.append(facts | counts | {"own": int((called_F & is_own_F).sum()), "features": int(called_F.sum())})
    return rows


def table(rows: list[dict[str, Any]], params: GoldenParams) -> str:
    """The counts as a markdown table: of each kind called the tuned model's own, and how many of the features called are."""
    head = ["case", "active", "noise", "mean", "loss", "FVE", "L0", "matched", "method"]
    head += [f"{kind} ({group.count})" for kind, group in params.kinds.items()] + ["right of all called"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        case = params.cases[row["case"]]
        cells = [row["case"], case.active, case.noise, case.mean, row["loss"], f"{min(row['fve'].values()):.2f}"]
        cells += [f"{row['l0']:.1f}", sum(row["matched"].values()), row["method"], *row["called"].values()]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['own']} / {row['features']} |")
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]], params: GoldenParams) -> str:
    """One line on what was not reached; empty where everything was."""
    reach = params.reach
    row = next(row for row in rows if (row["case"], row["loss"], row["method"]) == (reach.case, reach.loss, reach.method))
    found, wrong = (row["called"][kind] / params.kinds[kind].count for kind in (OWN, "shared"))
    if found >= reach.found and wrong <= reach.shared_called:
        return ""
    return (
        f"{reach.case}, {reach.loss}, {reach.method}: {found:.0%} of {OWN} found (at least {reach.found:.0%}), "
        f"{wrong:.0%} of shared called so (at most {reach.shared_called:.0%})"
    )


def main() -> None:
    """``python -m featdiff.attribution.golden``: every case under every loss; exits with 1 where ``reach`` is missed."""
    params = parse(GoldenParams, read_yaml(SETTINGS), str(SETTINGS))
    rows = [row for name in params.cases for loss in params.losses for row in examine(params, name, loss)]
    METRICS.parent.mkdir(exist_ok=True)
    write_json(METRICS, rows)
    print(table(rows, params))
    if line := missed(rows, params):
        print(f"featdiff: {line}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
