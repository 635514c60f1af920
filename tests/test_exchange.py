"""Crosscoders in other libraries' formats give the same values there. Where the library is installed, it is asked itself."""

import errno
import json
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from featdiff.crosscoder.exchange import main, to_dictionary_learning, to_saelens
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader

MODELS = ["base", "sft", "grpo"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def crosscoder(threshold: float = 0.3) -> Crosscoder:
    generator = torch.Generator().manual_seed(0)
    made = Crosscoder(MODELS, 6, 20, "batchtopk" if threshold else "l1")
    made.initialise(0.4, generator, tied=False)
    with torch.no_grad():
        for tensor in (made.b_enc, made.b_dec, made.mean):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        made.scale.copy_(torch.tensor([0.7, 1.3, 2.0]))
        made.threshold.fill_(threshold)
    return made.eval().requires_grad_(False)


@pytest.fixture
def resid():
    """Raw residual streams [B, M, D]."""
    return 2 * torch.randn(200, 3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_a_swap_readout_is_a_jumprelu_sae(tmp_path, resid, threshold):
    made = crosscoder(threshold)
    to_saelens(made, "grpo", tmp_path)
    sae, x, reader = load_file(tmp_path / "sae_weights.safetensors"), resid[:, 2], Reader(made, "grpo")
    before = torch.relu(x @ sae["W_enc"] + sae["b_enc"])
    values = before * (before > sae["threshold"])
    torch.testing.assert_close(values, reader(x), **CLOSE)
    torch.testing.assert_close(values @ sae["W_dec"] + sae["b_dec"], reader.reconstruct(x), **CLOSE)
    assert 0 < (values > 0).float().mean() < 1


def test_saelens_reads_it(tmp_path, resid):
    sae_lens = pytest.importorskip("sae_lens", reason="pip install -e .[exchange]")
    made = crosscoder()
    to_saelens(made, "grpo", tmp_path, "blocks.1.hook_resid_post")
    sae, reader = sae_lens.SAE.load_from_disk(tmp_path), Reader(made, "grpo")
    values = sae.encode(resid[:, 2])
    torch.testing.assert_close(values, reader(resid[:, 2]), **CLOSE)
    torch.testing.assert_close(sae.decode(values), reader.reconstruct(resid[:, 2]), **CLOSE)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_dictionary_learning_reads_it(tmp_path, resid, threshold):
    theirs: ModuleType = pytest.importorskip("dictionary_learning.dictionary", reason="the science-of-finetuning fork")
    if not hasattr(theirs, "CrossCoder"):
        pytest.skip("another dictionary_learning than the science-of-finetuning fork")
    made = crosscoder(threshold)
    name = to_dictionary_learning(made, tmp_path)
    loaded = getattr(theirs, name).from_pretrained(str(tmp_path), from_hub=True).eval()
    values = loaded.encode(resid)
    torch.testing.assert_close(values, made.encode(made.normalise(resid)), **CLOSE)
    ours = (made.decode(values) + made.mean) / made.scale[:, None]
    torch.testing.assert_close(loaded.decode(values), ours, **CLOSE)


@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_what_dictionary_learning_is_given_works_out_to_the_same_values(tmp_path, resid, threshold):
    made = crosscoder(threshold)
    name = to_dictionary_learning(made, tmp_path)
    assert name == ("BatchTopKCrossCoder" if threshold else "CrossCoder")
    given = load_file(tmp_path / "model.safetensors")
    x = (resid - given["activation_mean"]) * given["activation_global_scale"][:, None]
    values = torch.relu(torch.einsum("bmd,mdf->bf", x, given["encoder.weight"]) + given["encoder.bias"])
    weights = given["decoder.weight"].norm(dim=2).sum(0)
    values = values * (values * weights > given.get("threshold", torch.tensor(0.0)))
    torch.testing.assert_close(values, made.encode(made.normalise(resid)), **CLOSE)
    sums = (given["activation_std"] ** 2).sum(-1)
    torch.testing.assert_close(given["target_rms"] / sums.sqrt(), made.scale)
    assert json.loads((tmp_path / "config.json").read_text())["num_layers"] == 3


def test_from_the_terminal_and_what_it_refuses(tmp_path, capsys):
    folder = tmp_path / "fit"
    folder.mkdir()
    crosscoder().save(folder)
    assert main(["saelens", str(folder), str(tmp_path / "sae"), "--model", "sft"]) == 0
    assert main(["dictionary_learning", str(folder), str(tmp_path / "dl")]) == 0
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert {path.name for path in (tmp_path / "dl").iterdir()} == {"config.json", "model.safetensors"}
    capsys.readouterr()
    for words, said in (
        (["saelens", str(folder), str(tmp_path / "new")], "--model: expected one of base, sft, grpo, found none"),
        (["saelens", str(folder), str(tmp_path / "new"), "--model", "x"], "found x"),
        (["saelens", str(folder), str(tmp_path / "sae"), "--model", "sft"], "expected one that is empty or not there"),
        (["saelens", str(tmp_path / "nowhere"), str(tmp_path / "new"), "--model", "sft"], "config.json"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert said in err
    assert not (tmp_path / "new").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "fit").mkdir()
    crosscoder().save(tmp_path / "fit")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("featdiff.crosscoder.exchange.write_json", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space"):
        main(["saelens", str(tmp_path / "fit"), str(tmp_path / "sae"), "--model", "sft"])
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]
