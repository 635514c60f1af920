"""Attribution methods against the truth: crosscoders fitted on synthetic activations, whose features are known.

    x^m = mean + Σ_i f_i · strength_i^m · direction_i^m + noise
A true feature i fires at its own rate with a log-normal value. Its strength and direction in each model are those of its kind.
Every method is asked which features the last model has alone.
N token rows, M models, D width, P true features, F learned features.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from io import StringIO
from math import radians
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from numpy import fmax, fmin
from pydantic import Field, model_validator
from scipy.stats import binomtest
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.artifact import write_json
from featdiff.artifacts.documents import fill, markdown
from featdiff.attribution.norms import mas, nrn
from featdiff.attribution.scaling import LatentScaling, latent_scaling
from featdiff.config.dictionary import SHARED, AttributionParams, CrosscoderTraining
from featdiff.config.parse import parse
from featdiff.config.reading import read_yaml
from featdiff.config.values import Fraction, Level, LossName, Name, Params, Positive, Rate
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import measure
from featdiff.pipeline.checkpoint import Scratch
from featdiff.stats import Interval, over_runs

SETTINGS = Path("conf/golden.yaml")
METRICS = Path("metrics/golden.json")
DOCUMENT = Path("docs/golden.md")
OWN = "tuned_only"

Method = Literal["nrn", "mas", "scaling", "nrn_scaling"]


class Kind(Params):
    """True features that have the same fate. All kinds name the same models in the same order."""

    count: Positive
    strength: dict[Name, Annotated[list[float], Field(min_length=2, max_length=2)]]
    """For each model the bounds between which a feature's strength is drawn."""
    degrees: dict[Name, float]
    """For each model how far its direction is turned."""
    rate: Level | None = None
    """Share of the tokens on which each feature fires; None: what the case and ``rates`` say."""
    along: Name | None = None
    """A kind of as many features, whose directions these take. They fire at times of their own."""


class Case(Params):
    active: Positive
    """Features that are active per token, on average, without those of kinds with a ``rate``."""
    noise: Annotated[float, Field(ge=0)]
    """Root mean square norm of the noise, over that of the features."""
    mean: Annotated[float, Field(ge=0)]
    """Norm of the mean of all activations, over the same."""
    seeds: Positive = 1
    """How often it is made and fitted, with seeds from 0 on."""
    only: Name | None = None
    """All features are of this kind; None: of every kind as many as it counts."""


class Reach(Params):
    """What must be so, for ``make golden`` not to fail: with the interval over seeds on the safe side."""

    case: Name
    loss: LossName
    method: Method
    found: Fraction
    """Least share of the true ``tuned_only`` features to be called so."""
    shared_called: Fraction
    """Largest share of the shared ones to be called so."""


class GoldenParams(Params):
    d_model: Positive
    rows: Positive
    spread: Rate
    rates: Annotated[float, Field(ge=1)]
    kinds: dict[Name, Kind]
    cases: dict[Name, Case]
    losses: list[LossName]
    least_cosine: Fraction
    confidence: Level
    attribution: AttributionParams
    training: dict[str, Any]
    """Values of CrosscoderTraining except k."""
    reach: Reach

    @property
    def models(self) -> list[str]:
        return list(next(iter(self.kinds.values())).strength)

    @property
    def own(self) -> list[str]:
        """Kinds that no model but the last has when it has them."""
        return [name for name, kind in self.kinds.items() if all(high == 0 for _, high in list(kind.strength.values())[:-1])]

    @model_validator(mode="after")
    def _twins_fit(self) -> GoldenParams:
        for name, kind in self.kinds.items():
            if kind.along and (kind.along not in self.kinds or self.kinds[kind.along].count != kind.count):
                raise ValueError(f"kinds.{name}.along = {kind.along} is not a kind of {kind.count} features")
        return self


class Truth(NamedTuple):
    acts_NMD: Float[Tensor, "N M D"]
    direction_PMD: Float[Tensor, "P M D"]
    """What one unit of each feature adds to each model."""
    kind: list[str]
    """Kind of each true feature."""


def _of(kinds: list[str], kind: str) -> Bool[Tensor, " P"]:
    """Which of ``kinds`` are ``kind``."""
    return torch.tensor([other == kind for other in kinds])


def synthesise(params: GoldenParams, case: Case, generator: torch.Generator) -> Truth:
    """Activations with known features: random directions, independent firing, isotropic noise of each model's own."""
    kind = [case.only or name for name, group in params.kinds.items() for _ in range(group.count)]
    groups = [params.kinds[name] for name in kind]
    along_PD = normalize(torch.randn(len(kind), params.d_model, generator=generator), dim=1)
    for name in dict.fromkeys(kind):
        if twin := params.kinds[name].along:
            along_PD[_of(kind, name)] = along_PD[_of(kind, twin)]
    aside_PD = torch.randn(along_PD.shape, generator=generator)
    aside_PD = normalize(aside_PD - (aside_PD * along_PD).sum(1, keepdim=True) * along_PD, dim=1)
    low_PM, high_PM = torch.tensor([list(group.strength.values()) for group in groups]).unbind(-1)
    strength_PM = low_PM + (high_PM - low_PM) * torch.rand(low_PM.shape, generator=generator)
    angle_PM = torch.tensor([[radians(turn) for turn in group.degrees.values()] for group in groups])
    turned_PMD = torch.einsum("pm,pd->pmd", angle_PM.cos(), along_PD) + torch.einsum("pm,pd->pmd", angle_PM.sin(), aside_PD)
    direction_PMD = strength_PM[:, :, None] * turned_PMD
    fixed_P = torch.tensor([group.rate or 0.0 for group in groups])
    rate_P = params.rates ** torch.rand(len(kind), generator=generator) * (fixed_P == 0)
    rate_P = fixed_P + rate_P * case.active / rate_P.sum()
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

    The cosine is the largest over models: a decoder row that was shrunk to nothing must not hide which feature it was. Each
    model's counts by the norm of its learned row, over that of the feature's longest: the direction of a row that is next to
    nothing must not say which feature it is either."""
    longest_F11 = W_dec_FMD.norm(dim=2, keepdim=True).amax(1, keepdim=True)
    learned_FMD = W_dec_FMD / longest_F11.clamp(min=torch.finfo(W_dec_FMD.dtype).tiny)
    cosine_PF = torch.einsum("pmd,fmd->mpf", normalize(direction_PMD, dim=2), learned_FMD).amax(0)
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


def examine(params: GoldenParams, name: str, loss: LossName, seed: int) -> list[dict[str, Any]]:
    """Make the activations of the case ``name``, fit a crosscoder under ``loss`` and count, for each method, what it calls the
    tuned model's own.

    Of the ``planted`` features of each kind ``matched`` have a learned feature, and that of ``called`` was called. In all
    ``features`` of the ``alive`` learned ones were called, and ``own`` of them are nearest to a feature of the last model's own
    (``GoldenParams.own``)."""
    case = params.cases[name]
    truth = synthesise(params, case, torch.Generator().manual_seed(seed))
    source = ActivationTensor(params.models, truth.acts_NMD)
    training = parse(CrosscoderTraining, params.training | {"k": case.active}, str(SETTINGS))
    fitted = fit(source, loss, training, seed, lambda *_: None, f"{name} {loss} {seed}", scratch=Scratch())
    crosscoder, (metrics, features) = fitted.crosscoder, measure(source, *fitted)
    alive_F = features["firing_rate"] > 0
    matches = match(truth.direction_PMD, crosscoder.W_dec, alive_F, params.least_cosine)
    scaling = latent_scaling(crosscoder, source, 0, min(params.attribution.scaling_tokens, source.rows))
    own_P = torch.tensor([kind in params.own for kind in truth.kind])
    is_own_F = own_P[matches.true_F] & (matches.true_F >= 0)
    found_P, of_kind = matches.feature_P >= 0, {kind: _of(truth.kind, kind) for kind in dict.fromkeys(truth.kind)}
    facts = {"case": name, "loss": loss, "seed": seed, "fve": metrics["fve"], "l0": metrics["l0"], "alive": int(alive_F.sum())}
    facts |= {"planted": {kind: int(is_P.sum()) for kind, is_P in of_kind.items()}}
    facts |= {"matched": {kind: int((found_P & is_P).sum()) for kind, is_P in of_kind.items()}}
    rows = []
    for method, called_F in called_own(crosscoder.W_dec, scaling, params).items():
        called_F = called_F & alive_F
        called_P = called_F[matches.feature_P] & found_P
        counts = {"called": {kind: int((called_P & is_P).sum()) for kind, is_P in of_kind.items()}}
        rows.append(
            facts | {"method": method, "own": int((called_F & is_own_F).sum()), "features": int(called_F.sum())} | counts
        )
    return rows


def _quietly(task: tuple[GoldenParams, str, LossName, int]) -> list[dict[str, Any]]:
    """:func:`examine` on one thread, without the bar of its fit: with others beside it, in a process of its own."""
    torch.set_num_threads(1)
    with redirect_stderr(StringIO()):
        return examine(*task)


def examine_all(params: GoldenParams) -> list[dict[str, Any]]:
    """Every case under every loss with every seed, on all cores, one thread each. The bytes do not depend on their number."""
    tasks = [
        (params, name, loss, seed)
        for name, case in params.cases.items()
        for seed in range(case.seeds)
        for loss in params.losses
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = tqdm(pool.map(_quietly, tasks), total=len(tasks), desc="golden", unit="crosscoder")
        return [row for rows in found for row in rows]


def share(hits_S: Sequence[int], of_S: Sequence[int], confidence: float) -> Interval | None:
    """Mean over seeds of ``hits_S`` / ``of_S`` with an interval; None where there was nothing to hit. ``n`` is what was there.

    It reaches on either side as far as the farther of two: the exact binomial interval of the pooled counts (Clopper and
    Pearson 1934), which takes the features of one fit for independent, and Student's t over the seeds, which does not, and
    which has no width where all seeds agree (to take both is ours)."""
    counts = [(hits, of) for hits, of in zip(hits_S, of_S, strict=True) if of]
    if not counts:
        return None
    runs = over_runs([hits / of for hits, of in counts], confidence=confidence)
    hits, n = (sum(column) for column in zip(*counts, strict=True))
    pooled = binomtest(hits, n).proportion_ci(confidence, method="exact")
    low, high = fmin(pooled.low, runs.low), fmax(pooled.high, runs.high)  # a single seed's t is NaN, which fmin passes over
    return Interval(runs.value, max(0.0, float(low)), min(1.0, float(high)), n)


def summarise(rows: list[dict[str, Any]], params: GoldenParams) -> list[dict[str, Any]]:
    """For each case, loss and method the rows of all seeds as shares with intervals: of the planted features of each kind those
    ``matched`` and ``called``; ``right``, of the features called those that are the last model's own; ``named``, of the living
    features those called."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["loss"], row["method"]), []).append(row)

    def over(hits_S: list[int], of_S: list[int]) -> dict[str, float] | None:
        found = share(hits_S, of_S, params.confidence)
        return found and {"value": found.value, "low": found.low, "high": found.high, "n": found.n}

    summary = []
    for (case, loss, method), group in groups.items():
        row = {"case": case, "loss": loss, "method": method, "seeds": len(group)}
        row |= {"fve": fmean(min(r["fve"].values()) for r in group), "l0": fmean(r["l0"] for r in group)}
        for column in ("matched", "called"):
            row[column] = {
                kind: over([r[column][kind] for r in group], [r["planted"][kind] for r in group])
                for kind in group[0]["planted"]
            }
        row["right"] = over([r["own"] for r in group], [r["features"] for r in group])
        row["named"] = over([r["features"] for r in group], [r["alive"] for r in group])
        summary.append(row)
    return summary


def _cell(found: dict[str, float] | None) -> str:
    """A share with its interval, in percent."""
    if found is None:
        return "none"
    digits = (f"{100 * found[key]:.1f}".removesuffix(".0") for key in ("value", "low", "high"))
    return "{} ({}–{})".format(*digits)


def tables(summary: list[dict[str, Any]], params: GoldenParams) -> str:
    """The summary as Markdown: the case of ``reach`` by loss and method, what its crosscoders hold, the cases of one kind, and
    the rest."""
    reach, kinds, methods = params.reach, list(params.kinds), get_args(Method)
    main = [row for row in summary if row["case"] == reach.case]
    rest: dict[tuple[str, str], dict[str, Any]] = {}  # by case and loss, then by method
    for row in summary:
        if row["case"] != reach.case:
            rest.setdefault((row["case"], row["loss"]), {})[row["method"]] = row
    single = {(name, loss): rows for (name, loss), rows in rest.items() if params.cases[name].only}
    mixed = {(name, loss): rows for (name, loss), rows in rest.items() if not params.cases[name].only}
    parts = [
        f"Case `{reach.case}`, seeds: {main[0]['seeds']}. Percent of the planted features of each kind that were called the "
        f"tuned model's own, with {100 * params.confidence:g} % interval; of all learned features called, percent that are.",
        markdown(
            ["loss", "method", *(f"{kind} ({params.kinds[kind].count})" for kind in kinds), "right of all called"],
            (
                [row["loss"], row["method"], *(_cell(row["called"][kind]) for kind in kinds), _cell(row["right"])]
                for row in main
            ),
        ),
        "The same crosscoders: percent of the planted features that have a learned one.",
        markdown(
            ["loss", "FVE", "L0", *kinds],
            (
                [row["loss"], f"{row['fve']:.3f}", f"{row['l0']:.1f}", *(_cell(row["matched"][kind]) for kind in kinds)]
                for row in main
                if row["method"] == reach.method
            ),
        ),
        "Cases whose features are all of one kind: percent of all living learned features that each method calls.",
        markdown(
            ["case", "kind", "seeds", "loss", *methods],
            (
                [name, str(params.cases[name].only), str(rows[reach.method]["seeds"]), loss]
                + [_cell(rows[method]["named"]) for method in methods]
                for (name, loss), rows in single.items()
            ),
        ),
        f"Other cases: percent of {OWN} and {SHARED} that {reach.method} calls; for each method percent right of all called.",
        markdown(
            ["case", "seeds", "loss", OWN, SHARED, *(f"right: {method}" for method in methods)],
            (
                [name, str(rows[reach.method]["seeds"]), loss]
                + [_cell(rows[reach.method]["called"][kind]) for kind in (OWN, SHARED)]
                + [_cell(rows[method]["right"]) for method in methods]
                for (name, loss), rows in mixed.items()
            ),
        ),
        missed(summary, params) or f"Reached: {_figures(summary, params)}.",
    ]
    return "\n\n".join(parts)


def _reached(summary: list[dict[str, Any]], params: GoldenParams) -> dict[str, Any]:
    """What the case, loss and method of ``reach`` called."""
    wanted = params.reach.case, params.reach.loss, params.reach.method
    called: dict[str, Any] = next(row for row in summary if (row["case"], row["loss"], row["method"]) == wanted)["called"]
    return called


def _figures(summary: list[dict[str, Any]], params: GoldenParams) -> str:
    reach, called = params.reach, _reached(summary, params)
    return (
        f"{reach.case}, {reach.loss}, {reach.method}: {_cell(called[OWN])} % of {OWN} found (from {100 * reach.found:g} % on), "
        f"{_cell(called[SHARED])} % of shared called so (up to {100 * reach.shared_called:g} %)"
    )


def missed(summary: list[dict[str, Any]], params: GoldenParams) -> str:
    """One line on what was not reached, intervals included; empty where everything was."""
    called = _reached(summary, params)
    if called[OWN]["low"] >= params.reach.found and called[SHARED]["high"] <= params.reach.shared_called:
        return ""
    return f"Missed: {_figures(summary, params)}."


def main() -> None:
    """``python -m featdiff.attribution.golden``: writes counts, summary and the tables of the document, and exits with 1 where
    ``reach`` is missed."""
    params = parse(GoldenParams, read_yaml(SETTINGS), str(SETTINGS))
    rows = examine_all(params)
    summary = summarise(rows, params)
    METRICS.parent.mkdir(exist_ok=True)
    write_json(METRICS, {"rows": rows, "summary": summary})
    text = tables(summary, params)
    print(text)
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), "golden", text), encoding="utf-8")
    if line := missed(summary, params):
        print(f"featdiff: {line}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
