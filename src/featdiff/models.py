"""Language models and tokenizers on disk, and the few facts the study needs about their insides.

Shapes: B batch, T token, D residual width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from featdiff.artifact import ContractError, hash_json
from featdiff.config import Pretraining
from featdiff.tasks.task import Sample

logging.disable_progress_bar()
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"


def character_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per character of ``texts``, BOS put before every text; decoding gives the text back."""
    characters = sorted(set("".join(texts)))
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # "." would leave line ends out
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def organism_model(size: Pretraining, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A small Qwen3 with random weights."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=size.d_model,
            intermediate_size=size.d_mlp,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            head_dim=size.d_model // size.heads,
            max_position_embeddings=4 * size.row_tokens,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_model(folder: Path) -> PreTrainedModel:
    """The causal language model in ``folder``, in evaluation mode and its own dtype.

    Raises ContractError without safetensors weights, with weights that do not fit, or with values that are not finite."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ContractError(
            folder, "weights", "config.json and *.safetensors", "none", "point at a folder written by save_pretrained"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ContractError(
            folder, "weights", "a causal language model", str(error).splitlines()[0], "replace the folder"
        ) from None
    if absent := sorted(report["missing_keys"]):  # the library only warns, and starts these at random
        raise ContractError(folder, absent[0], "every weight of the configuration", "none", "replace the folder")
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ContractError(folder, name, "finite weights", "NaN or infinity", "retrain, or take an earlier checkpoint")
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in ``folder``, set to pad on the left; a missing pad token becomes EOS."""
    if not (folder / "tokenizer.json").is_file():
        raise ContractError(folder, "tokenizer.json", "a fast tokenizer", "none", "save the tokenizer beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ContractError(
            folder / "tokenizer.json", "content", "a fast tokenizer", said, "save the tokenizer again"
        ) from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal for tokenizers that turn every text into the same ids."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"truncation": None, "padding": None}  # settings of the last call, not of the tokenizer
    return hash_json(described)


def require_same_tokenizer(folder: Path, base: Path) -> None:
    """Raise ContractError unless both model folders tokenize alike; only then do token streams line up."""
    hashes = [tokenizer_hash(load_tokenizer(path)) for path in (base, folder)]
    if hashes[0] != hashes[1]:
        raise ContractError(folder, "tokenizer", f"that of {base} ({hashes[0][:12]})", hashes[1][:12], f"train it from {base}")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints of a trained arm in order, the last being the final model."""
    return [*sorted((folder / "checkpoints").glob("*"), key=lambda path: int(path.name)), folder]


def resolve_layer(model: PreTrainedModel, layer: int | str) -> int:
    """Number of blocks below the hooked residual stream; ``middle`` is half of them, rounded down."""
    blocks = model.config.num_hidden_layers
    number = blocks // 2 if layer == "middle" else int(layer)
    if not 1 <= number <= blocks:
        raise ContractError(
            "params.yaml", "activations.layer", f"1 to {blocks} for this model, or middle", layer, "choose a layer that exists"
        )
    return number


def block(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The block whose output is the residual stream after ``layer`` blocks."""
    return model.model.layers[layer - 1]


def truncate(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The trunk of ``model`` that stops after ``layer`` blocks, without final norm and head; its
    ``last_hidden_state`` [B, T, D] is bit-identical to the hooked residual stream. Shares the weights."""
    trunk = model.model
    trunk.layers = trunk.layers[:layer]
    trunk.config.num_hidden_layers = layer
    trunk.norm = torch.nn.Identity()
    return trunk


def encode_prompts(tokenizer: PreTrainedTokenizerFast, samples: list[Sample], *, chat: bool) -> list[list[int]]:
    """Token ids of the prompts, in the tokenizer's chat template where ``chat`` is set."""
    if not chat:
        return tokenizer([sample.prompt for sample in samples])["input_ids"]
    conversations = [[{"role": "user", "content": sample.prompt}] for sample in samples]
    encoded: Any = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def trl_row(sample: Sample, *, chat: bool, solution: bool) -> dict[str, Any]:
    """A row for TRL's trainers: plain text, or the conversational form, which TRL renders with the same template."""
    if not chat:
        return {"prompt": sample.prompt} | ({"completion": sample.solution} if solution else {})
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": sample.prompt}]}
    return row | ({"completion": [{"role": "assistant", "content": sample.solution}]} if solution else {})
