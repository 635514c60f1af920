"""Language models and tokenizers on disk, and the few facts the study needs about their insides.

Shapes: B batch, T token, D residual width.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from featdiff.artifacts.artifact import ContractError, hash_json
from featdiff.config.models import Pretraining
from featdiff.config.reading import flatten, legible
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


INDEX = "model.safetensors.index.json"
MOST_JSON, MOST_HEADER, MOST_LAYERS = 2**24, 2**24, 1000
"""Bytes of a JSON file and of a safetensors header, blocks: far beyond any model's, and read without harm."""
BLOCKS, NORMS = ("layers", "h"), ("norm", "final_layer_norm", "ln_f")
"""What the libraries' models call their blocks, and the norm after the last one: Llama and its kin, GPT-NeoX, GPT-2."""
AS_IT_STANDS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes that add nothing to what tokenizer.json says."""
_BLOCK = re.compile(r"(?:^|\.)([0-9]{1,9})\.")


def settings(path: Path) -> dict[str, Any]:
    """The JSON object in ``path`` with dotted keys; ContractError for anything else."""
    todo = "fetch the model again, or save it with save_pretrained"
    if not path.is_file():
        raise ContractError(path, "file", "a JSON file", "none", todo)
    if (size := path.stat().st_size) > MOST_JSON:
        raise ContractError(path, "size", f"at most {MOST_JSON} bytes", f"{size} bytes", todo)
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return flatten(found)
    except (ValueError, RecursionError) as error:
        raise ContractError(path, "content", "a JSON object", legible(str(error)), todo) from None
    raise ContractError(path, "content", "a JSON object", type(found).__name__, todo)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file, from its header alone."""
    todo = "fetch the file again"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > MOST_HEADER:
        raise ContractError(file, "header", f"at most {MOST_HEADER} bytes", f"{length} bytes", todo)
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ContractError(file, "header", "a whole safetensors file", legible(str(error)), todo) from None


def _weight_files(folder: Path) -> list[Path]:
    """The files that the library would load; ContractError where the index names others than safetensors beside it."""
    names = ["model.safetensors"]
    if (index := folder / INDEX).exists():
        named = sorted({str(value) for key, value in settings(index).items() if key.startswith("weight_map.")})
        for name in named:
            if not name.endswith(".safetensors") or Path(name).name != name or not (folder / name).is_file():
                found = legible(repr(name))
                raise ContractError(index, "weight_map", "safetensors files of its folder", found, "fetch the model again")
        names = names if (folder / names[0]).exists() else named
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        todo = "name the file so, or fetch the index"
        raise ContractError(folder, "weights", f"model.safetensors, or {INDEX}", "neither", todo)
    return files


def check_folder(folder: Path) -> None:
    """Raise ContractError unless the configuration in ``folder`` describes about what its safetensors headers hold.

    Nothing is allocated: a configuration of absurd size would fill memory with random weights before the library noticed
    that the file has others. A weight that is absent or has another shape is left to the library, which then needs at
    most twice the memory of the file."""
    for path in folder.iterdir():
        if not path.is_dir() and not path.is_file():
            raise ContractError(path, "file", "a file", "a broken link, a pipe or a device", "fetch the model again")
    file = folder / "config.json"
    given = settings(file)
    if any(key.partition(".")[0] == "quantization_config" and value for key, value in given.items()):
        todo = "give the unquantised model"
        raise ContractError(file, "quantization_config", "none", "one: such weights can be neither trained nor edited", todo)
    for key, value in given.items():
        name = key.rpartition(".")[2]
        if ("layer" in name or name == "num_labels") and isinstance(value, int) and value > MOST_LAYERS:
            raise ContractError(file, legible(key), f"at most {MOST_LAYERS}", legible(str(value)), "correct the configuration")
    held = {tensor: shape for path in _weight_files(folder) for tensor, shape in _shapes(path).items()}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        described = model.num_parameters()
        layers = config.num_hidden_layers
    except Exception as error:  # settings of any kind reach the library's constructors, which raise all kinds of errors
        said = legible(" ".join(str(error).split()), 200)
        raise ContractError(file, "content", "a causal language model that can be built", said, "correct it") from None
    finally:
        logging.set_verbosity(verbosity)
    numbered = 1 + max((int(match[1]) for match in map(_BLOCK.search, held) if match), default=-1)
    if layers != numbered:
        raise ContractError(file, "num_hidden_layers", f"{numbered}, as in the weights", layers, "fetch the model again")
    if not _named(model.base_model, BLOCKS) or not _named(model.base_model, NORMS):
        expected, found = f"blocks as {' or '.join(BLOCKS)}, and a norm after them", legible(str(config.model_type))
        raise ContractError(file, "model_type", expected, found, "give a decoder of another kind")
    if described > 2 * (numbers := sum(map(math.prod, held.values()))):
        found = f"sizes that make {described}"
        raise ContractError(file, "sizes", f"about the {numbers} numbers of the weights", found, "fetch the model again")


def load_model(folder: Path) -> PreTrainedModel:
    """The causal language model in ``folder``, in evaluation mode and its own dtype.

    Raises ContractError without safetensors weights, with weights that do not fit, or with values that are not finite."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ContractError(
            folder, "weights", "config.json and *.safetensors", "none", "point at a folder written by save_pretrained"
        )
    check_folder(folder)
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


def read_tokenizer(name: str | Path, **where: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or of a model of the hub, as its files describe it. Raises what the library raises."""
    # For some kinds of models, Qwen2 among them, AutoTokenizer takes the class of the kind where the files name a general one,
    # and that class splits text in its own way and may have tokens of its own, whatever tokenizer.json says.
    declared = get_tokenizer_config(name, **where).get("tokenizer_class")
    reader: Any = PreTrainedTokenizerFast if declared in AS_IT_STANDS else AutoTokenizer
    tokenizer: PreTrainedTokenizerFast = reader.from_pretrained(name, trust_remote_code=False, **where)
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in ``folder``, set to pad on the left; a missing pad token becomes EOS."""
    if not (folder / "tokenizer.json").is_file():
        raise ContractError(folder, "tokenizer.json", "a fast tokenizer", "none", "save the tokenizer beside the weights")
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # as above
        said = legible(" ".join(str(error).split()), 200)
        raise ContractError(
            folder / "tokenizer.json", "content", "a fast tokenizer", said, "save the tokenizer again"
        ) from None
    # Whether the hub may be asked is a fact about this process, and would be saved with the tokenizer.
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write both into ``folder``; ``weights`` by name, where ``model`` does not hold them itself."""
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids of all tokens that end an answer of ``model``, ascending: those that its generation configuration, its configuration
    or ``tokenizer`` names. Chat models have several. Raises ContractError where one is outside the vocabulary, or there are
    none."""
    named = {
        "generation_config.json": model.generation_config.eos_token_id if model.generation_config is not None else None,
        "config.json": model.config.get_text_config().eos_token_id,
        "tokenizer": tokenizer.eos_token_id,
    }
    rows, source = model.get_input_embeddings().weight.shape[0], model.config.name_or_path or "model"
    found: set[int] = set()
    for where, ids in named.items():
        for token in ids if isinstance(ids, list) else [ids] * (ids is not None):
            if type(token) is not int or not 0 <= token < rows:
                expected, todo = f"ids of tokens, 0 to {rows - 1}", "correct the model's files"
                raise ContractError(source, f"eos_token_id ({where})", expected, legible(repr(token)), todo)
            found.add(token)
    if not found:
        todo = "name one in generation_config.json: without it no answer ends"
        raise ContractError(source, "eos_token_id", "an end token", "none", todo)
    return tuple(sorted(found))


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


def _named(module: torch.nn.Module, names: Iterable[str]) -> str | None:
    return next((name for name in names if hasattr(module, name)), None)


def blocks(trunk: torch.nn.Module) -> torch.nn.ModuleList:
    """The blocks of a model without head, as ``model.base_model`` is, from the first to be run to the last."""
    found: torch.nn.ModuleList = getattr(trunk, str(_named(trunk, BLOCKS)))
    return found


def final_norm(trunk: torch.nn.Module) -> torch.nn.Module:
    """The norm between the last of :func:`blocks` and the head."""
    found: torch.nn.Module = getattr(trunk, str(_named(trunk, NORMS)))
    return found


def block(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The block whose output is the residual stream after ``layer`` blocks."""
    return blocks(model.base_model)[layer - 1]


def with_shared_weights(module: torch.nn.Module) -> Any:
    """A copy of ``module`` whose modules are new, to be rearranged, and whose weights are those of ``module``."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def truncate(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """The trunk of ``model`` that stops after ``layer`` blocks, without final norm and head; its
    ``last_hidden_state`` [B, T, D] is bit-identical to the hooked residual stream. ``model`` stays as it is and shares its
    weights with the trunk."""
    trunk = with_shared_weights(model.base_model)
    setattr(trunk, str(_named(trunk, BLOCKS)), blocks(trunk)[:layer])
    setattr(trunk, str(_named(trunk, NORMS)), torch.nn.Identity())
    trunk.config.num_hidden_layers = layer
    shortened: torch.nn.Module = trunk
    return shortened


def stitched(lower: PreTrainedModel, upper: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The embeddings and the first ``depth`` blocks of ``lower`` under the other blocks, the norm and the head of ``upper``. It
    shares the weights of both, which stay as they are."""
    model, trunk = with_shared_weights(upper), with_shared_weights(lower.base_model)
    for number, upper_block in enumerate(blocks(model.base_model)):
        if number >= depth:
            blocks(trunk)[number] = upper_block
    setattr(trunk, str(_named(trunk, NORMS)), final_norm(model.base_model))
    setattr(model, model.base_model_prefix, trunk)
    made: PreTrainedModel = model
    return made


def encode_prompts(tokenizer: PreTrainedTokenizerFast, samples: list[Sample], *, chat: bool) -> list[list[int]]:
    """Token ids of the prompts, in the tokenizer's chat template where ``chat`` is set."""
    if not chat:
        return tokenizer([sample.prompt for sample in samples])["input_ids"]
    conversations = [[{"role": "user", "content": sample.prompt}] for sample in samples]
    encoded: Any = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def left_pad(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids [B, T] of prompts of unequal length."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def trl_row(sample: Sample, *, chat: bool, solution: bool) -> dict[str, Any]:
    """A row for TRL's trainers: plain text, or the conversational form, which TRL renders with the same template."""
    if not chat:
        return {"prompt": sample.prompt} | ({"completion": sample.solution} if solution else {})
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": sample.prompt}]}
    return row | ({"completion": [{"role": "assistant", "content": sample.solution}]} if solution else {})
