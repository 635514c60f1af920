"""Attribution against known features, on a small version of what ``make golden`` runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featdiff.activations.tensor import ActivationTensor
from featdiff.attribution import golden
from featdiff.attribution.golden import Case, GoldenParams, called_own, examine, match, missed, synthesise, table
from featdiff.attribution.norms import attribute
from featdiff.attribution.scaling import latent_scaling
from featdiff.config.params import CrosscoderTraining, parse
from featdiff.config.reading import read_yaml
from featdiff.crosscoder.fit import fit
from featdiff.crosscoder.measure import measure
from featdiff.crosscoder.model import Crosscoder
from featdiff.pipeline.checkpoint import Scratch
from tiny import ROOT

SETTINGS = read_yaml(ROOT / golden.SETTINGS)
SMALL = {"d_model": 32, "rows": 20000}
TRAINING = {"n_features": 128, "batch_tokens": 256, "steps": 800, "dead_after_tokens": 20000}
COUNTS = {"shared": 24, "tuned_only": 8, "base_only": 8, "reweighted": 8, "rotated": 8}


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
        others = [kind for kind in COUNTS if kind not in ("tuned_only", *(["reweighted"] if method == "mas" else []))]
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
def moderate() -> dict[tuple[str, str], dict[str, Any]]:
    """What each loss and method called in the moderate case."""
    return {(row["loss"], row["method"]): row for loss in ("batchtopk", "l1") for row in examine(small(), "moderate", loss)}


def test_batchtopk_with_latent_scaling_finds_what_tuning_added_and_nothing_shared(
    moderate: dict[tuple[str, str], dict[str, Any]],
) -> None:
    row = moderate["batchtopk", "nrn_scaling"]
    assert sum(row["matched"].values()) >= 55  # of 56
    assert row["called"] == {"shared": 0, "tuned_only": 8, "base_only": 0, "reweighted": 0, "rotated": 0}
    assert row["own"] >= 0.9 * row["features"]
    assert missed(list(moderate.values()), small()) == ""


def test_under_l1_norms_take_reweighted_features_for_new_ones_and_latent_scaling_does_not(
    moderate: dict[tuple[str, str], dict[str, Any]],
) -> None:
    norms, scaled = moderate["l1", "mas"], moderate["l1", "nrn_scaling"]
    assert norms["called"]["reweighted"] >= 4
    assert scaled["called"]["reweighted"] == 0
    assert scaled["called"]["tuned_only"] >= 7


def test_counts_stay_within_what_there_is_and_what_was_called(moderate: dict[tuple[str, str], dict[str, Any]]) -> None:
    for row in moderate.values():
        assert all(row["called"][kind] <= row["matched"][kind] <= COUNTS[kind] for kind in COUNTS)
        assert row["called"]["tuned_only"] <= row["own"] <= row["features"]


def made_up(called: dict[str, int]) -> list[dict[str, Any]]:
    facts = {"case": "moderate", "loss": "batchtopk", "fve": {"base": 0.9, "tuned": 0.8}, "l0": 4.0, "own": 7, "features": 9}
    none = dict.fromkeys(COUNTS, 0)
    return [
        facts | {"method": "nrn", "called": none, "matched": COUNTS},
        facts | {"method": "nrn_scaling", "called": none | called, "matched": COUNTS},
    ]


def test_what_is_missed_is_one_line() -> None:
    assert missed(made_up({"tuned_only": 8}), small()) == ""
    assert "88% of tuned_only found (at least 95%)" in missed(made_up({"tuned_only": 7}), small())
    assert "4% of shared called so (at most 2%)" in missed(made_up({"tuned_only": 8, "shared": 1}), small())


def test_the_table_has_the_counts() -> None:
    lines = table(made_up({"tuned_only": 8}), small()).splitlines()
    assert lines[0].endswith(
        "| shared (24) | tuned_only (8) | base_only (8) | reweighted (8) | rotated (8) | right of all called |"
    )
    assert lines[3] == "| moderate | 4 | 0.3 | 1.0 | batchtopk | 0.80 | 4.0 | 56 | nrn_scaling | 0 | 8 | 0 | 0 | 0 | 7 / 9 |"
    assert len({line.count("|") for line in lines}) == 1


def test_make_golden_writes_its_metrics_and_fails_where_the_figures_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "SETTINGS", ROOT / golden.SETTINGS)
    monkeypatch.chdir(tmp_path)
    rows = made_up({"tuned_only": 3})
    monkeypatch.setattr(golden, "examine", lambda params, name, loss: rows if (name, loss) == ("moderate", "batchtopk") else [])
    with pytest.raises(SystemExit):
        golden.main()
    assert json.loads(Path("metrics/golden.json").read_text(encoding="utf-8")) == rows
    printed = capsys.readouterr()
    assert printed.out.startswith("| case |")
    assert printed.err.startswith("featdiff: moderate, batchtopk, nrn_scaling: 9% of tuned_only found")
