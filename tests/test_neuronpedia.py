"""What describe found, in the layout of Neuronpedia's bulk import."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.tables import CONTEXTS
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.description.neuronpedia import main
from project import ROOT
from synthetic_study import SET, Plan, published, write_study

Row = dict[str, Any]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A synthetic study with a real crosscoder, in the current folder."""

    def made(status: str = "found") -> Path:
        plan = Plan(status=status)
        write_study(tmp_path, plan)
        fit = read_json(tmp_path / "analysis/describe/features.json")["fit"]
        crosscoder = Crosscoder(["base", "sft", "grpo"], 96, plan.n_features, "batchtopk")
        crosscoder.initialise(0.5, torch.Generator().manual_seed(0), tied=False)
        crosscoder.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
        with published(tmp_path, f"crosscoders/{fit}") as out:
            crosscoder.save(out, layer=2)
        (tmp_path / "params.yaml").write_text((ROOT / "conf/profiles/organism.yaml").read_text())
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return made


def lines(path: Path) -> list[Row]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(("part", "model"), [("tuned", "grpo"), ("original", "base")])
def test_every_feature_and_context_is_there(study: Callable[..., Path], part: str, model: str) -> None:
    root = study()
    assert main(["out", "--model", "tiny", "--part", part, "--set", "mine", "--creator-id", "me"]) == 0
    out = root / "out/tiny/1-mine"
    (release,), (own,), (group,), (source,) = (
        lines(out / f"{name}.jsonl") for name in ("release", "model", "sourceset", "source")
    )
    assert (release["name"], own["id"], group["name"], source["id"]) == ("mine", "tiny", "mine", "1-mine")
    assert group["modelId"] == source["modelId"] == "tiny"
    assert source["setName"] == group["releaseName"] == "mine"
    described = {each["feature_id"]: each for each in read_json(root / "analysis/describe/features.json")["features"]}
    features = {int(row["index"]): row for row in lines(out / "features/batch-0.jsonl.gz")}
    assert set(features) == set(described) == set(SET)
    reader = Reader(Crosscoder.load(root / "crosscoders/joint_topk"), model)
    for k, row in features.items():
        assert (row["modelId"], row["layer"], row["creatorId"], row["hookName"]) == (
            "tiny", "1-mine", "me", "blocks.1.hook_resid_post",
        )  # fmt: skip
        assert torch.equal(torch.tensor(row["vector"]), reader.directions_FD[k])
        assert row["pos_str"] == [each["token"] for each in described[k]["promoted"]]
        assert row["neg_values"] == [each["logit"] for each in described[k]["suppressed"]]
        assert row["frac_nonzero"] == described[k]["corpus_rate"][part]
        assert row["freq_hist_data_bar_heights"] == described[k]["histogram"][part]
        bars = len(row["freq_hist_data_bar_values"])
        assert row["freq_hist_data_bar_values"][0] == pytest.approx(described[k]["histogram"]["upper"] / bars / 2)
    contexts = CONTEXTS.read(root / "analysis/describe")
    activations = lines(out / "activations/batch-0.jsonl.gz")
    assert [(int(row["index"]), row["tokens"], row["values"]) for row in activations] == [
        (each["feature_id"], each["tokens"], each[part]) for each in contexts
    ]
    assert len({row["id"] for row in activations}) == len(activations)
    for row, context in zip(activations, contexts, strict=True):
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert (row["binMin"] == -1) == (context["quantile"] is None)


def test_what_cannot_be_written_is_one_line(study: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = study("too_few_flipped")
    for words, said in (
        (["out", "--model", "tiny"], "status: expected features to write"),
        (["out", "--model", "../x"], "--model: expected letters"),
        (["out", "--model", ".."], "--model: expected letters"),
        ([".", "--model", "tiny"], "expected one that is empty or not there"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert said in err
    assert not (root / "out").exists()
