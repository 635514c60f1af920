"""Models and tokenizers on disk: what loads, what is refused, and the trunk that stops at the hooked layer."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from featdiff.artifacts.artifact import ContractError
from featdiff.language.decode import generate
from featdiff.language.models import (
    block,
    blocks,
    character_tokenizer,
    checkpoint_folders,
    encode_prompts,
    final_norm,
    left_pad,
    load_model,
    load_tokenizer,
    require_same_tokenizer,
    resolve_layer,
    save_model,
    stitched,
    tokenizer_hash,
    trl_row,
    truncate,
)
from featdiff.language.session import PromptCache
from featdiff.tasks.task import Sample
from featdiff.training.imported import load_base
from tiny import SIZES, random_model

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(make_model(), tokenizer, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a good model folder, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_what_this_process_may_ask_of_a_hub_is_not_saved(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for offline in (False, True):
        monkeypatch.setattr("transformers.tokenization_utils_base.is_offline_mode", lambda: offline)  # noqa: B023
        save_model(load_model(folder), load_tokenizer(folder), tmp_path / str(offline))
    for file in (tmp_path / "True").iterdir():
        assert (tmp_path / "False" / file.name).read_bytes() == file.read_bytes(), file.name


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: not any(s in text for s in SPECIAL)))
@example("a\n\nb\r\n")
def test_a_character_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = character_tokenizer([text])
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) + 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_characters_never_seen_become_unknown(tokenizer: Any) -> None:
    ids = tokenizer("aéb", add_special_tokens=False)["input_ids"]
    assert [token == tokenizer.unk_token_id for token in ids] == [False, True, False]


def test_what_is_saved_loads_the_same(saved: Path, make_model: Callable[..., Any], tokenizer: Any) -> None:
    loaded, again = load_model(saved), load_tokenizer(saved)
    assert not loaded.training
    for (name, before), (_, after) in zip(make_model().named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert again("abc =.")["input_ids"] == tokenizer("abc =.")["input_ids"]
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert again.padding_side == "left"


def weights_without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def weights_with(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json and *.safetensors, found none"),
        (lambda folder: (folder / "model.safetensors").unlink(), "config.json and *.safetensors, found none"),
        (only_a_pickle, "config.json and *.safetensors, found none"),
        (cut, "header: expected a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "header: expected a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "header: expected at most 16777216 bytes"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"), "expected model.safetensors, or"),
        (lambda folder: (folder / "config.json").write_text("{"), "content: expected a JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "no_such"}'), "no_such"),
        (lambda folder: weights_without(folder, DOWN), f"{DOWN}: expected every weight of the configuration, found none"),
        (lambda folder: weights_with(folder, DOWN, lambda w: w[:, :4]), "weights: expected a causal language model"),
        (lambda folder: weights_with(folder, NORM, lambda w: w / 0), f"{NORM}: expected finite weights"),
        (lambda folder: weights_with(folder, DOWN, lambda w: w * float("nan")), f"{DOWN}: expected finite weights"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(folder: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(folder)
    with pytest.raises(ContractError) as caught:
        load_model(folder)
    assert str(caught.value).startswith(f"{folder}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_a_model_folder_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "code.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n", encoding="utf-8")
    with pytest.raises(ContractError):
        load_model(folder)
    assert not (folder / "ran").exists()


def test_a_tokenizer_that_is_absent_or_broken_is_one_line(folder: Path) -> None:
    for text in ("{", "[]", "null", '{"model": 7}', "[" * 100_000):
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(ContractError, match=r"tokenizer.json: content"):
            load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ContractError, match=r"model: tokenizer.json: expected a fast tokenizer, found none"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gpt_neox"])
def test_a_tokenizer_is_read_as_its_files_say_whatever_kind_the_model_is(kind: str, tmp_path: Path) -> None:
    own = character_tokenizer(["abcdefghijkl"])
    save_model(random_model(kind), own, tmp_path)
    for found in (load_tokenizer(tmp_path), load_base(str(tmp_path), "float32")[1]):
        assert len(found) == len(own)
        assert tokenizer_hash(found) == tokenizer_hash(own)
        assert found("ab l")["input_ids"] == own("ab l")["input_ids"]


def test_another_tokenizer_than_the_bases_is_refused(folder: Path, saved: Path) -> None:
    require_same_tokenizer(folder, saved)
    character_tokenizer(["abcdef =.x"]).save_pretrained(folder)
    with pytest.raises(ContractError) as caught:
        require_same_tokenizer(folder, saved)
    assert f"{folder}: tokenizer: expected that of {saved}" in str(caught.value)


def test_settings_of_a_call_are_not_part_of_a_tokenizer() -> None:
    tokenizer = character_tokenizer(["abc"])
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(character_tokenizer(["abd"])) != before


def test_a_layer_is_between_one_and_the_number_of_blocks(make_model: Callable[..., Any]) -> None:
    assert [resolve_layer(make_model(layers=n), "middle") for n in (2, 3, 4)] == [1, 1, 2]
    assert resolve_layer(make_model(), 2) == 2
    for layer in (0, 3, -1):
        with pytest.raises(ContractError, match=rf"activations.layer: expected 1 to 2 .* found {layer};"):
            resolve_layer(make_model(), layer)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("kind", [None, *SIZES])
def test_the_trunk_gives_the_hooked_residual_stream_bit_for_bit(
    make_model: Callable[..., Any], kind: str | None, layer: int
) -> None:
    model = make_model(layers=3) if kind is None else random_model(kind)
    ids, mask, positions = left_pad([[1, 4, 5, 6], [1, 7, 8, 9, 10, 4], [1, 5]], 0, torch.device("cpu"))
    seen = []
    handle = block(model, layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        full = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        handle.remove()
        trunk = truncate(model, layer)
        resid = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        known = resid if layer < 3 else final_norm(model.base_model)(resid)  # the library norms the last of its hidden states
    assert torch.equal(resid, seen[0])
    assert torch.equal(known, full.hidden_states[layer])
    assert len(blocks(trunk)) == layer
    assert len(blocks(model.base_model)) == 3


@pytest.mark.parametrize("kind", SIZES)
def test_models_of_other_kinds_answer_as_the_library_says_and_can_be_stitched(kind: str, tmp_path: Path) -> None:
    model, tokenizer = random_model(kind), character_tokenizer(["abcdefghijkl"])
    save_model(model, tokenizer, tmp_path / kind)
    loaded = load_model(tmp_path / kind)
    prompts = [[1, 4, 5, 6], [1, 7, 8, 9, 10, 4], [1, 5]]
    ours = generate(loaded, prompts, max_new_tokens=6, ends=[2], pad=0, batch_size=3, shared=PromptCache())
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
        assert answer == (theirs[: theirs.index(2)] if 2 in theirs else theirs)
    ids, other = torch.tensor([prompts[1]]), random_model(kind, seed=1)
    with torch.inference_mode():
        assert torch.equal(stitched(model, model, 1)(ids).logits, model(ids).logits)
        assert not torch.allclose(stitched(model, other, 1)(ids).logits, model(ids).logits)
        streams = [truncate(each, 1)(ids).last_hidden_state for each in (stitched(model, other, 1), model)]
        assert torch.equal(*streams)


def test_a_model_whose_blocks_have_no_known_name_is_one_line(tmp_path: Path) -> None:
    config = AutoConfig.for_model("opt", vocab_size=20, num_hidden_layers=1, hidden_size=16, ffn_dim=16, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ContractError, match=r"model_type: expected blocks as layers or h, and a norm after them, found opt"):
        load_model(tmp_path)


def test_the_trunk_shares_its_weights_and_leaves_the_model_as_it_is(make_model: Callable[..., Any]) -> None:
    model, ids = make_model(), torch.tensor([[1, 4, 5, 6]])
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        trunk = truncate(model, 1)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    held = {id(weight) for weight in model.parameters()}
    assert [name for name, weight in trunk.named_parameters() if id(weight) not in held] == []
    assert (model.config.num_hidden_layers, trunk.config.num_hidden_layers) == (2, 1)


def test_checkpoints_come_in_order_and_the_model_last(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / "checkpoints" / str(number)).mkdir(parents=True)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["1", "2", "10", tmp_path.name]
    assert checkpoint_folders(tmp_path / "none") == [tmp_path / "none"]


def test_prompts_as_text_and_as_a_conversation() -> None:
    tokenizer = character_tokenizer(["ab: "])
    samples = [Sample("1", "t", "find", "ab", "", solution="ba"), Sample("2", "t", "find", "b", "")]
    plain = encode_prompts(tokenizer, samples, chat=False)
    assert plain == [tokenizer("ab")["input_ids"], tokenizer("b")["input_ids"]]
    tokenizer.chat_template = "{% for m in messages %}b: {{ m.content }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    chat = encode_prompts(tokenizer, samples, chat=True)
    assert [tokenizer.decode(ids) for ids in chat] == ["b: aba:", "b: ba:"]
    assert trl_row(samples[0], chat=False, solution=True) == {"prompt": "ab", "completion": "ba"}
    assert trl_row(samples[0], chat=False, solution=False) == {"prompt": "ab"}
    assert trl_row(samples[0], chat=True, solution=True) == {
        "prompt": [{"role": "user", "content": "ab"}],
        "completion": [{"role": "assistant", "content": "ba"}],
    }
