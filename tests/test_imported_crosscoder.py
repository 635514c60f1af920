"""Crosscoders and SAEs of other libraries become ours with the same values; what is no such thing is one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.artifact import ContractError
from featdiff.config.params import load_study
from featdiff.crosscoder.exchange import to_dictionary_learning, to_saelens
from featdiff.crosscoder.imported import imported
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from test_exchange import CLOSE, MODELS, crosscoder

ROWS, LAYER, TRAIN = 400, 2, load_study().crosscoder.training


def activations(models: list[str] = MODELS) -> ActivationTensor:
    """Of three models, after two blocks."""
    return ActivationTensor(models, 2 * torch.randn(ROWS, len(models), 6, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def source() -> ActivationTensor:
    return activations()


def brought(folder, source) -> Crosscoder:
    found = imported(folder, source, LAYER, TRAIN)
    assert found.train_rows == TRAIN.train_rows(ROWS)
    mean = source.acts_NMD[: found.train_rows].mean(0)
    torch.testing.assert_close(found.mean_MD, found.crosscoder.normalise(mean[None])[0], **CLOSE)
    return found.crosscoder


def rebuilt(crosscoder: Crosscoder, resid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code, and the reconstruction in raw units."""
    code = crosscoder.encode(crosscoder.normalise(resid))
    return code, (crosscoder.decode(code) + crosscoder.mean) / crosscoder.scale[:, None]


@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_out_to_dictionary_learning_and_back_is_the_same_crosscoder(tmp_path, source, threshold):
    ours = crosscoder(threshold)
    to_dictionary_learning(ours, tmp_path)
    found = brought(tmp_path, source)
    assert found.loss == ("threshold" if threshold else "relu")
    for theirs, mine in zip(rebuilt(found, source.acts_NMD), rebuilt(ours, source.acts_NMD), strict=True):
        torch.testing.assert_close(theirs, mine, **CLOSE)
    for model in MODELS:
        torch.testing.assert_close(
            Reader(found, model)(source.acts_NMD[:, 1]), Reader(ours, model)(source.acts_NMD[:, 1]), **CLOSE
        )


def test_a_mean_of_each_model_goes_into_the_biases(tmp_path, source):
    """Theirs may subtract another mean from each model, and tell the scale by deviations alone."""
    to_dictionary_learning(crosscoder(), tmp_path)
    path = tmp_path / "model.safetensors"
    given = load_file(path)
    given["activation_mean"] = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    del given["activation_global_scale"]
    save_file(given, path)
    scale = given["target_rms"] / given["activation_std"].square().sum(1).sqrt()
    x = (source.acts_NMD - given["activation_mean"]) * scale[:, None]
    values = torch.relu(torch.einsum("bmd,mdf->bf", x, given["encoder.weight"]) + given["encoder.bias"])
    values = values * (values * given["decoder.weight"].norm(dim=2).sum(0) > given["threshold"])
    theirs = torch.einsum("bf,mfd->bmd", values, given["decoder.weight"]) + given["decoder.bias"]
    code, resid = rebuilt(brought(tmp_path, source), source.acts_NMD)
    assert 0 < (values > 0).float().mean() < 1
    torch.testing.assert_close(code, values, **CLOSE)
    torch.testing.assert_close(resid, theirs / scale[:, None] + given["activation_mean"], **CLOSE)


@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_an_sae_reads_every_model_with_the_same_dictionary(tmp_path, source, threshold):
    ours = crosscoder(threshold)
    to_saelens(ours, "grpo", tmp_path, "blocks.1.hook_resid_post")
    found, own = brought(tmp_path, source), Reader(ours, "grpo")
    assert found.threshold.shape == (20,)
    for model in MODELS:
        reader = Reader(found, model)
        torch.testing.assert_close(reader(source.acts_NMD[:, 0]), own(source.acts_NMD[:, 0]), **CLOSE)
        torch.testing.assert_close(reader.reconstruct(source.acts_NMD[:, 0]), own.reconstruct(source.acts_NMD[:, 0]), **CLOSE)
    same = source.acts_NMD[:, :1].expand(-1, 3, -1)
    torch.testing.assert_close(rebuilt(found, same)[0], own(source.acts_NMD[:, 0]), **CLOSE)
    (tmp_path / "new").mkdir()
    found.save(tmp_path / "new")
    again = Crosscoder.load(tmp_path / "new")
    torch.testing.assert_close(again.threshold, found.threshold)
    with pytest.raises(ContractError, match="one for all features"):
        to_dictionary_learning(found, tmp_path / "out")


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_what_saelens_saves_has_the_values_that_it_has_there(tmp_path, source, architecture):
    sae_lens = pytest.importorskip("sae_lens", reason="pip install -e .[exchange]")
    config = {"d_in": 6, "d_sae": 20, "apply_b_dec_to_input": True, "device": "cpu", "dtype": "float32"}
    kind = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    }
    make, settings = kind[architecture]
    sae = make(settings(**config, metadata=sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post")))
    generator = torch.Generator().manual_seed(3)
    for weight in sae.parameters():
        weight.data = torch.randn(weight.shape, generator=generator).abs() * (0.3 if weight.ndim == 1 else 1.0)
    sae.save_model(tmp_path)
    reader = Reader(brought(tmp_path, source), "sft")
    torch.testing.assert_close(reader(source.acts_NMD[:, 1]), sae.encode(source.acts_NMD[:, 1]), **CLOSE)
    torch.testing.assert_close(
        reader.reconstruct(source.acts_NMD[:, 1]), sae.decode(sae.encode(source.acts_NMD[:, 1])), **CLOSE
    )


def test_ours_by_another_order_of_names(tmp_path):
    ours, other = crosscoder(), activations(["base", "a", "b"])
    ours.save(tmp_path, layer=2)
    found = brought(tmp_path, other)
    assert found.models == ["base", "a", "b"]
    torch.testing.assert_close(rebuilt(found, other.acts_NMD)[0], rebuilt(ours, other.acts_NMD)[0])


def sae(folder):
    to_saelens(crosscoder(), "grpo", folder, "blocks.1.hook_resid_post")
    return folder / "cfg.json", folder / "sae_weights.safetensors"


def setting(folder, **changes):
    path, _ = sae(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weight(folder, name, change):
    _, path = sae(folder)
    given = load_file(path)
    given[name] = change(given[name])
    save_file(given, path)


REFUSED = {
    "nothing": (lambda folder: None, "found nothing of these"),
    "pickle": (lambda folder: (folder / "ae.pt").write_bytes(b"x"), "found a pickle (ae.pt)"),
    "architecture": (
        lambda folder: setting(folder, architecture="topk"),
        "architecture: expected standard or jumprelu, found topk",
    ),
    "normaliser": (lambda folder: setting(folder, normalize_activations="layer_norm"), "normalize_activations: expected none"),
    "no mapping": (lambda folder: sae(folder)[0].write_text("[]"), "content: expected a mapping"),
    "another layer": (
        lambda folder: setting(folder, metadata={"hook_name": "blocks.2.hook_resid_post"}),
        "expected blocks.1.hook_resid_post, the stream after 2 blocks, found blocks.2.hook_resid_post",
    ),
    "no residual stream": (lambda folder: setting(folder, metadata={"hook_name": "blocks.1.hook_mlp_out"}), "hook_mlp_out"),
    "NaN": (lambda folder: weight(folder, "W_dec", lambda W: W * float("nan")), "W_dec: expected finite numbers"),
    "shape": (lambda folder: weight(folder, "b_enc", lambda b: b[:3]), "b_enc: expected (20,), found (3,)"),
    "no safetensors": (lambda folder: sae(folder)[1].write_bytes(b"no"), "content: expected safetensors"),
    "another width": (
        lambda folder: to_dictionary_learning(wide(), folder),
        "width: expected 6, the models', found 8",
    ),
    "fewer models": (
        lambda folder: to_dictionary_learning(Crosscoder(["a", "b"], 6, 20, "l1"), folder),
        "models: expected 3 (base, sft, grpo), found 2",
    ),
}


def wide() -> Crosscoder:
    return Crosscoder(MODELS, 8, 20, "l1")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_line(tmp_path, source, case):
    make, said = REFUSED[case]
    make(tmp_path)
    with pytest.raises(ContractError) as error:
        imported(tmp_path, source, LAYER, TRAIN)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hook", "fits"),
    [("blocks.2.hook_resid_pre", True), ("model.layers.1", True), ("layers.1", True), ("", True), ("layers.2", False)],
)
def test_names_of_the_stream_after_two_blocks(tmp_path, source, hook, fits):
    setting(tmp_path, metadata={"hook_name": hook})
    if fits:
        brought(tmp_path, source)
    else:
        with pytest.raises(ContractError, match="hook_name"):
            imported(tmp_path, source, LAYER, TRAIN)
