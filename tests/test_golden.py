"""Attribution against known features, on a small version of what ``make golden`` runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.documents import fill
from featdiff.attribution import golden
from featdiff.attribution.golden import (
    Case,
    GoldenParams,
    called_own,
    examine,
    match,
    missed,
    share,
    summarise,
    synthesise,
    tables,
)
from featdiff.attribution.norms import attribute
from featdiff.attribution.scaling import latent_scaling
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.config.parse import parse
from featdiff.config.reading import ConfigError, read_yaml
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import measure
from featdiff.crosscoder.model import Crosscoder
from featdiff.pipeline.checkpoint import Scratch
from tiny import ROOT

SETTINGS = read_yaml(ROOT / golden.SETTINGS)
SMALL = {"d_model": 32, "rows": 20000}
TRAINING = {"n_features": 128, "batch_tokens": 256, "steps": 800, "dead_after_tokens": 20000}
COUNTS = {"shared": 24, "tuned_only": 8, "base_only": 8, "reweighted": 8, "rotated": 8}
COUNTS |= {"rare_shared": 2, "rare_tuned": 2, "decoupled": 4, "decoupled_base": 4}


def small(**changes: Any) -> GoldenParams:
    kinds = {name: kind | {"count": COUNTS[name]} for name, kind in SETTINGS["kinds"].items()}
    cases = SETTINGS["cases"] | {"moderate": SETTINGS["cases"]["moderate"] | {"active": 4}}
    training = SETTINGS["training"] | TRAINING
    return parse(
        GoldenParams, SETTINGS | SMALL | {"kinds": kinds, "cases": cases, "training": training} | changes, "golden.yaml"
    )


def kinds_of(models: tuple[str, ...], strengths: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Eight features of each kind, by their strength in each model."""
    return {
        name: {
            "count": 8,
            "strength": {model: [level, level] for model, level in zip(models, levels, strict=True)},
            "degrees": dict.fromkeys(models, 0.0),
        }
        for name, levels in strengths.items()
    }


def of_kind(kinds: list[str], kind: str) -> list[int]:
    return [i for i, other in enumerate(kinds) if other == kind]


def test_every_kind_is_what_its_name_says() -> None:
    _, directions, kinds = synthesise(small(), Case(active=4, noise=0.0, mean=0.0), torch.Generator().manual_seed(0))
    base, tuned = directions.unbind(1)
    norms, cosine = directions.norm(dim=2), torch.cosine_similarity(base, tuned, dim=1)
    factor = norms[:, 1] / norms[:, 0]
    one = pytest.approx(1.0, abs=1e-5)
    for i in of_kind(kinds, "shared"):
        assert torch.equal(base[i], tuned[i])
        assert norms[i].tolist() == [one, one]
    assert [norms[i].tolist() for i in of_kind(kinds, "tuned_only")] == [[0.0, one]] * 8
    assert [norms[i].tolist() for i in of_kind(kinds, "base_only")] == [[one, 0.0]] * 8
    reweighted, rotated = of_kind(kinds, "reweighted"), of_kind(kinds, "rotated")
    assert factor[reweighted].min() >= 1.3
    assert factor[reweighted].max() <= 2.0
    assert factor[reweighted].std() > 0.05
    assert cosine[reweighted].tolist() == [one] * 8
    assert cosine[rotated].tolist() == pytest.approx([0.766] * 8, abs=1e-3)
    assert factor[rotated].tolist() == [one] * 8
    there, here = of_kind(kinds, "decoupled"), of_kind(kinds, "decoupled_base")
    assert torch.equal(tuned[there], base[here])
    assert norms[there].tolist() == [[0.0, one]] * 4
    assert norms[here].tolist() == [[one, 0.0]] * 4
    assert small().own == ["tuned_only", "rare_tuned", "decoupled"]


def fired(params: GoldenParams, case: Case) -> tuple[torch.Tensor, list[str]]:
    """When each feature fires: its value is what is left of the activations in a width that holds every direction exactly."""
    acts, directions, kinds = synthesise(params, case, torch.Generator().manual_seed(0))
    return acts.flatten(1) @ torch.linalg.pinv(directions.flatten(1)) > 1e-3, kinds


def test_rare_features_fire_at_their_rate_and_decoupled_ones_at_times_of_their_own() -> None:
    fires, kinds = fired(small(d_model=64, rows=40000), Case(active=8, noise=0.0, mean=0.0))
    rare = fires[:, of_kind(kinds, "rare_shared") + of_kind(kinds, "rare_tuned")]
    assert 6 <= rare.sum() <= 30  # of 16 expected, standard deviation 4
    common = fires.sum() - rare.sum()
    assert common / 40000 == pytest.approx(8, rel=0.02)
    there, here = fires[:, of_kind(kinds, "decoupled")].float(), fires[:, of_kind(kinds, "decoupled_base")].float()
    together, chance = (there * here).mean(0), there.mean(0) * here.mean(0)
    torch.testing.assert_close(together, chance, rtol=0, atol=0.004)


def test_where_every_feature_is_shared_both_models_differ_by_noise_alone() -> None:
    case = Case(active=4, noise=0.0, mean=1.0, only="shared")
    acts, directions, kinds = synthesise(small(rows=500), case, torch.Generator().manual_seed(0))
    assert kinds == ["shared"] * sum(COUNTS.values())
    torch.testing.assert_close(acts[:, 0], acts[:, 1])
    assert torch.equal(directions[:, 0], directions[:, 1])


def test_directions_can_be_taken_only_of_as_many_features() -> None:
    twins = kinds_of(("base", "tuned"), {"shared": (1.0, 1.0), "again": (0.0, 1.0)})
    for along, count in (("shared", 7), ("nothing", 8)):
        with pytest.raises(ConfigError, match=rf"again\.along = {along} is not a kind of {count} features"):
            small(kinds=twins | {"again": twins["again"] | {"along": along, "count": count}})


def test_activations_are_the_sums_with_mean_and_noise_of_the_size_asked_for() -> None:
    def made(noise: float, mean: float) -> torch.Tensor:
        return synthesise(small(), Case(active=3, noise=noise, mean=mean), torch.Generator().manual_seed(0)).acts_NMD

    plain, moved, noisy = made(0.0, 0.0), made(0.0, 2.0), made(0.5, 0.0)
    size = (plain - plain.mean(0)).square().sum(2).mean().sqrt()
    shift = moved - plain
    torch.testing.assert_close(shift, shift[:1, :1].expand_as(shift), rtol=1e-3, atol=1e-4)
    assert shift[0, 0].norm() / size == pytest.approx(2.0, rel=1e-3)
    noise = noisy - plain
    assert noise.square().sum(2).mean().sqrt() / size == pytest.approx(0.5, rel=0.02)
    assert torch.cosine_similarity(noise[:, 0].flatten(), noise[:, 1].flatten(), dim=0).abs() < 0.02


def exact(params: GoldenParams) -> tuple[Crosscoder, ActivationTensor, list[str]]:
    """A crosscoder whose decoder is the truth and whose code is exact, as there are fewer features than dimensions."""
    case = Case(active=4, noise=0.0, mean=0.0)
    acts, directions, kinds = synthesise(params, case, torch.Generator().manual_seed(0))
    crosscoder = Crosscoder(params.models, params.d_model, len(kinds), "l1")
    with torch.no_grad():
        crosscoder.W_dec.copy_(directions)
        crosscoder.W_enc.copy_(torch.linalg.pinv(directions.flatten(1)).unflatten(0, (len(params.models), -1)))
    return crosscoder, ActivationTensor(params.models, acts), kinds


def test_the_truth_is_called_by_its_name() -> None:
    crosscoder, source, kinds = exact(small(d_model=64, rows=2000))
    scaling = latent_scaling(crosscoder, source, 0, 2000)
    for method, called in called_own(crosscoder.W_dec.detach(), scaling, small()).items():
        assert called[of_kind(kinds, "tuned_only")].all(), method
        # A direction that fires in the other model at other times looks like one that the other model does not have.
        assert called[of_kind(kinds, "decoupled")].all(), method
        others = {"shared", "base_only", "rotated", "decoupled_base"} | ({"reweighted"} if method != "mas" else set())
        assert not any(called[of_kind(kinds, kind)].any() for kind in others), method


def test_with_three_models_a_feature_must_be_absent_from_both_others() -> None:
    strengths = {"shared": (1.0, 1.0, 1.0), "tuned_only": (0.0, 0.0, 1.0), "of_both_arms": (0.0, 1.0, 1.0)}
    kinds = kinds_of(("base", "sft", "grpo"), strengths)
    crosscoder, source, kind = exact(small(kinds=kinds, rows=2000))
    calls = called_own(crosscoder.W_dec.detach(), latent_scaling(crosscoder, source, 0, 2000), small())
    assert {method: called.nonzero().squeeze(1).tolist() for method, called in calls.items()} == dict.fromkeys(
        ("nrn", "mas", "scaling", "nrn_scaling"), of_kind(kind, "tuned_only")
    )


def test_true_and_learned_features_find_each_other() -> None:
    truth = synthesise(small(), Case(active=4, noise=0.0, mean=0.0), torch.Generator().manual_seed(0))
    directions = truth.direction_PMD[:5].clone()
    order = torch.tensor([3, 0, 4, 1, 2])
    learned = torch.cat([directions[order] * 3, directions[:1] + 0.01, torch.zeros(1, 2, 32)])
    learned[0, 0] = 0  # shrunk in base: still the same feature
    alive = torch.ones(7, dtype=torch.bool)
    found = match(directions, learned, alive, 0.7)
    assert found.feature_P.tolist() == [1, 3, 4, 0, 2]
    assert found.true_F.tolist() == [3, 0, 4, 1, 2, 0, -1]
    alive[1] = False
    found = match(directions, learned, alive, 0.7)
    assert found.feature_P.tolist() == [5, 3, 4, 0, 2]
    assert found.true_F.tolist() == [3, -1, 4, 1, 2, 0, -1]
    assert (
        match(directions, torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(9)), alive[:3] | True, 0.7)[0].max() < 0
    )
    lone = torch.stack([directions[0].clone(), directions[0].clone()])  # one direction, in either model alone
    lone[0, 0], lone[1, 1] = 0, 0
    traces = lone.flip(1) * 1e-3  # and next to nothing of it in the other: each is still its own
    assert match(lone, lone + traces, alive[:2] | True, 0.7).feature_P.tolist() == [0, 1]
    near = torch.stack([directions[0], directions[0] + 0.3 * directions[1]])  # one learned feature cannot stand for both
    assert match(near, directions[:1], alive[:1], 0.7).feature_P.tolist() == [0, -1]


def test_of_four_models_what_all_tuned_ones_gained_is_new_and_what_one_gained_its_own() -> None:
    models = ("base", "sft", "grpo", "rft")
    strengths = {
        "shared": (1.0, 1.0, 1.0, 1.0),
        "new": (0.0, 1.0, 1.0, 1.0),
        "rft": (0.0, 0.0, 0.0, 1.0),
        "base": (1.0, 0.0, 0.0, 0.0),
        "mixed": (0.0, 0.0, 1.0, 1.0),
    }
    params = small(kinds=kinds_of(models, strengths))
    truth = synthesise(params, Case(active=4, noise=0.3, mean=1.0), torch.Generator().manual_seed(0))
    source = ActivationTensor(params.models, truth.acts_NMD)
    training = parse(CrosscoderTraining, params.training | {"k": 4}, "golden.yaml")
    fitted = fit(source, "batchtopk", training, 0, lambda *_: None, "four", scratch=Scratch())
    features = measure(source, *fitted)[1]
    scaling = latent_scaling(fitted.crosscoder, source, 0, source.rows)
    rows = attribute("four", fitted.crosscoder, features, scaling, params.attribution)
    found_P = match(truth.direction_PMD, fitted.crosscoder.W_dec, features["firing_rate"] > 0, 0.7).feature_P
    assert (found_P >= 0).all()
    assert [rows[k]["feature_class"] for k in found_P.tolist()] == truth.kind
    assert [rows[k]["specific"] for k in found_P.tolist()] == [kind not in ("shared", "mixed") for kind in truth.kind]


@pytest.fixture(scope="module")
def moderate() -> list[dict[str, Any]]:
    """What each loss and method called in the moderate case."""
    return [row for loss in small().losses for row in examine(small(), "moderate", loss, 0)]


def of(rows: list[dict[str, Any]], loss: str, method: str) -> dict[str, Any]:
    return next(row for row in rows if (row["loss"], row["method"]) == (loss, method))


@pytest.mark.parametrize("loss", ["batchtopk", "dedicated", "delta"])
def test_selection_with_latent_scaling_finds_what_tuning_added_and_nothing_shared(
    moderate: list[dict[str, Any]], loss: str
) -> None:
    row = of(moderate, loss, "nrn_scaling")
    assert sum(row["matched"][kind] for kind in ("shared", "tuned_only", "base_only", "reweighted", "rotated")) >= 54  # of 56
    assert [row["called"][kind] for kind in ("shared", "base_only", "reweighted", "rotated")] == [0, 0, 0, 0]
    assert row["called"]["tuned_only"] >= 7
    assert row["called"]["decoupled"] >= 3
    assert row["own"] >= 0.9 * row["features"]


def test_under_l1_norms_take_reweighted_features_for_new_ones_and_latent_scaling_does_not(
    moderate: list[dict[str, Any]],
) -> None:
    norms, scaled = of(moderate, "l1", "mas"), of(moderate, "l1", "nrn_scaling")
    assert norms["called"]["reweighted"] >= 4
    assert scaled["called"]["reweighted"] == 0
    assert scaled["called"]["tuned_only"] >= 7


def test_counts_stay_within_what_there_is_and_what_was_called(moderate: list[dict[str, Any]]) -> None:
    for row in moderate:
        assert row["planted"] == COUNTS
        assert all(row["called"][kind] <= row["matched"][kind] <= COUNTS[kind] for kind in COUNTS)
        assert row["called"]["tuned_only"] <= row["own"] <= row["features"] <= row["alive"]


def test_a_share_of_one_seed_has_the_exact_binomial_interval() -> None:
    found = share([0], [96], 0.95)
    assert found is not None
    assert (found.value, found.low, found.n) == (0.0, 0.0, 96)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 96))  # Clopper and Pearson's for no hit
    assert share([0, 0], [0, 0], 0.95) is None


def test_the_interval_is_that_of_the_seeds_where_they_differ_and_of_the_counts_where_they_agree() -> None:
    agreeing, differing = share([30] * 5, [32] * 5, 0.95), share([22, 30, 32, 32, 32], [32] * 5, 0.95)
    assert agreeing is not None
    assert differing is not None
    assert agreeing.low < 30 / 32 < agreeing.high
    spread = math.sqrt(sum((hits / 32 - 148 / 160) ** 2 for hits in (22, 30, 32, 32, 32)) / 4 / 5)
    assert differing.value == pytest.approx(148 / 160)
    assert differing.low == pytest.approx(148 / 160 - 2.7764451 * spread)  # Student's t, four degrees of freedom
    assert differing.high == 1.0
    empty = share([5, 0], [10, 0], 0.95)
    assert empty is not None
    assert (empty.value, empty.n) == (0.5, 10)


def made_up(*tuned_only: int, shared: int = 0) -> list[dict[str, Any]]:
    """Rows of a run in which each method called so many features, one number per seed; of a case without difference and of
    another one beside it."""
    nothing = dict.fromkeys(COUNTS, 0)
    facts = {"loss": "batchtopk", "fve": {"base": 0.9, "tuned": 0.8}, "l0": 4.0, "alive": 200}
    whole = facts | {"planted": {kind: 20 * count for kind, count in COUNTS.items()}, "matched": COUNTS, "features": 170}
    null = {"planted": {"shared": 960}, "matched": {"shared": 960}, "called": {"shared": 0}, "own": 0, "features": 0}
    rows = []
    for method in ("nrn", "mas", "scaling", "nrn_scaling"):
        for seed, found in enumerate(tuned_only):
            counts = {"called": nothing | {"tuned_only": found, "shared": shared}, "own": found}
            rows.append(whole | counts | {"case": "moderate", "method": method, "seed": seed})
        rows.append(rows[-1] | {"case": "noisy", "seed": 0})
        rows.append(facts | null | {"case": "no_difference", "method": method, "seed": 0})
    return rows


def test_what_is_missed_is_one_line_and_the_interval_counts() -> None:
    params = small()

    def line(rows: list[dict[str, Any]]) -> str:
        return missed(summarise(rows, params), params)

    assert line(made_up(160, 160, 160)) == ""
    # 98.75 % of 160 is enough, and its interval is not: it reaches down to 95.6 % or, where one seed misses them all, lower.
    assert line(made_up(158)) == ""
    assert "98.1 (94.6–99.6) % of tuned_only found (from 95 % on)" in line(made_up(157))
    assert "% of tuned_only found" in line(made_up(150, 160, 160))
    assert "1.7 (0.7–3.3) % of shared called so (up to 2 %)" in line(made_up(160, shared=8))


def test_the_tables_have_the_shares() -> None:
    params = small()
    text = tables(summarise(made_up(160, 152), params), params)
    assert "| loss | method | shared (24) | tuned_only (8) |" in text
    assert "| batchtopk | nrn_scaling | 0 (0–0.4) | 97.5 (65.7–100) |" in text
    assert "| batchtopk | 0.800 | 4.0 | 5 " in text
    assert f"| no_difference | shared | 1 | batchtopk |{' 0 (0–1.8) |' * 4}\n" in text
    assert f"| noisy | 1 | batchtopk | 95 (90.4–97.8) | 0 (0–0.8) |{' 89.4 (83.8–93.6) |' * 4}\n" in text
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_make_golden_writes_metrics_and_tables_and_fails_where_the_figures_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "SETTINGS", ROOT / golden.SETTINGS)
    monkeypatch.chdir(tmp_path)
    golden.DOCUMENT.parent.mkdir()
    golden.DOCUMENT.write_text("top\n<!-- golden:begin -->\nold\n<!-- golden:end -->\nbottom\n", encoding="utf-8")
    rows = made_up(60)
    monkeypatch.setattr(golden, "examine_all", lambda params: rows)
    with pytest.raises(SystemExit):
        golden.main()
    written = json.loads(golden.METRICS.read_text(encoding="utf-8"))
    params = parse(GoldenParams, SETTINGS, "golden.yaml")
    assert written == {"rows": rows, "summary": summarise(rows, params)}
    page = golden.DOCUMENT.read_text(encoding="utf-8")
    assert page == f"top\n<!-- golden:begin -->\n{tables(written['summary'], params)}\n<!-- golden:end -->\nbottom\n"
    assert capsys.readouterr().err.startswith("featdiff: Missed: moderate, batchtopk, nrn_scaling: 37.5 (")
    with pytest.raises(ValueError, match="without the markers"):
        fill("nothing", "golden", "text")


def test_the_document_shows_the_committed_metrics() -> None:
    page, metrics = (ROOT / golden.DOCUMENT).read_text(encoding="utf-8"), read_json(ROOT / golden.METRICS)
    assert fill(page, "golden", tables(metrics["summary"], parse(GoldenParams, SETTINGS, "golden.yaml"))) == page, (
        "run make golden"
    )
    assert metrics["summary"] == summarise(metrics["rows"], parse(GoldenParams, SETTINGS, "golden.yaml"))


def test_every_case_is_examined_under_every_loss_with_every_seed_in_processes_of_their_own(
    capfd: pytest.CaptureFixture[str],
) -> None:
    cases = {"a": {"active": 2, "noise": 0.3, "mean": 1.0, "seeds": 2}}
    training = SETTINGS["training"] | {"n_features": 80, "batch_tokens": 32, "steps": 3}
    params = small(cases=cases, losses=["delta"], training=training, rows=400)
    rows = golden.examine_all(params)
    assert [row["seed"] for row in rows] == [0] * 4 + [1] * 4
    assert rows[4:] == examine(params, "a", "delta", 1)
    printed = capfd.readouterr().err
    assert "2/2" in printed
    assert "crosscoder a delta" not in printed.split("2/2")[0]
