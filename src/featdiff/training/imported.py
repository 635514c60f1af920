"""Models that come from elsewhere: a local folder, a GGUF file in an installed package, the hub. The base may, and an arm may,
which is then a finished model, or a PEFT adapter that is merged into the base.

Only safetensors and GGUF files are read (pickles can run code), remote code stays off, and a hub model is
pinned to a commit. What is returned can be saved as safetensors and loaded again bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from featdiff.artifacts.artifact import ContractError
from featdiff.config.models import ImportedParams
from featdiff.config.reading import legible
from featdiff.config.values import HUB_NAME
from featdiff.language.models import (
    check_folder,
    end_tokens,
    load_model,
    load_tokenizer,
    read_tokenizer,
    save_model,
    settings,
    tokenizer_hash,
)
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state

HUB = re.compile(rf"hub:(?P<name>{HUB_NAME})@(?P<commit>[0-9a-f]{{40}})")
PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
EXTRA, PEFT = "pip install -e .[smollm2]", "pip install -e .[peft]"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGED = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT")
"""Kinds of adapters that change weights alone and read nothing but their folder."""


def load_base(source: str, dtype: str, field: str = "base.source") -> tuple[Any, Any]:
    """Model in evaluation mode and tokenizer of ``source`` (see featdiff.config.models.BaseParams), which is what ``field`` of
    params.yaml says.

    The tokenizer gets its end token as padding where it has none. Raises ContractError where the source is
    missing, pinned to nothing, holds no safetensors or no tokenizer, lacks weights or has some not finite."""
    precision = getattr(torch, dtype)
    if source.startswith("gguf:"):
        model, tokenizer = _from_gguf(source, precision, field)
    elif source.startswith("hub:"):
        match = HUB.fullmatch(source)
        if match is None:
            form = "hub:<owner>/<name>@<40-digit commit>"
            raise ContractError("params.yaml", field, form, legible(source), "pin the revision to a full commit")
        if Path(match["name"]).exists():  # the library would read it and forget the commit
            todo = "give the folder itself, or move it away"
            raise ContractError("params.yaml", field, "a model of the hub", f"a local folder {match['name']}", todo)
        model, tokenizer = _from_pretrained(source, match["name"], precision, revision=match["commit"])
    else:
        model, tokenizer = _from_folder(Path(source), precision, field)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ContractError(source, "tokenizer", "a padding or an end token", "neither", "name one in its configuration")
        tokenizer.pad_token = tokenizer.eos_token
    _check(model, tokenizer, source)
    _declare_ends(model, tokenizer)
    return model.eval(), tokenizer


def place(source: str) -> tuple[str, str | None] | None:
    """From where another program loads the model of ``source``, with the revision on the hub; None for a GGUF file, of which
    here other weights are made."""
    if source.startswith("gguf:"):
        return None
    hub = HUB.fullmatch(source)
    return (hub["name"], hub["commit"]) if hub else (source, None)


def _check(model: Any, tokenizer: Any, source: str) -> None:
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise ContractError(source, f"weight {name}", "finite numbers", "NaN or infinity", "fetch the model again")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ContractError(
            source, "tokenizer", f"at most {rows} tokens, as many as embeddings", len(tokenizer), "use the model's own"
        )


def _declare_ends(model: Any, tokenizer: Any) -> None:
    """Have the generation configuration name every end token: a trainer keeps those, and not all that are named elsewhere."""
    declared, ends = model.generation_config.eos_token_id, end_tokens(model, tokenizer)
    if {*(declared if isinstance(declared, list) else [declared])} != {*ends}:
        model.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def _from_folder(folder: Path, precision: torch.dtype, field: str) -> tuple[Any, Any]:
    if not os.path.isdir(folder):  # noqa: PTH112  (a name that is too long is no folder, and no error)
        todo = "put the path of one, or hub:<owner>/<name>@<commit>, into params.yaml (~ stands for nothing)"
        raise ContractError(legible(str(folder)), field, "a model folder", "nothing", todo)
    todo = "give a folder written by save_pretrained"
    if not (folder / "config.json").is_file():
        raise ContractError(folder, "config.json", "a model configuration", "nothing", todo)
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"a pickle ({pickles[0]})" if pickles else "no weights"
        raise ContractError(folder, "weights", "*.safetensors", found, "save the model as safetensors")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ContractError(folder, "tokenizer", "tokenizer.json", "nothing", todo)
    if (folder / ADAPTER).exists():
        raise ContractError(folder, ADAPTER, "a whole model", "an adapter", "merge it into its base and save that")
    _no_link_out(folder)
    check_folder(folder)
    if (file := folder / "tokenizer_config.json").exists():
        # The library looks for its own names; what older versions wrote here is read by no one.
        for key, value in settings(file).items():
            paths = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
            if key.endswith(("_file", "_files")) and key != "special_tokens_map_file" and any(map(_leads_out, paths)):
                raise ContractError(file, legible(key), "a file of the folder", legible(repr(value)), "remove the entry")
    return _from_pretrained(str(folder), str(folder), precision, local_files_only=True)


def _no_link_out(folder: Path) -> None:
    home = folder.resolve()
    if outside := [path.name for path in sorted(folder.iterdir()) if home not in path.resolve().parents]:
        raise ContractError(folder / outside[0], "link", "a file of the folder", "a link out of it", "copy the folder: cp -rL")


def _leads_out(name: str) -> bool:
    return "/" in name or "\\" in name


def _from_pretrained(source: str, name: str, precision: torch.dtype, **where: Any) -> tuple[Any, Any]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        if getattr(config, "quantization_config", None):
            found, todo = "one: such weights can be neither trained nor edited", "give the unquantised model"
            raise ContractError(source, "quantization_config", "none", found, todo)
        tokenizer = read_tokenizer(name, **where)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=precision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **where,
        )
    except ContractError:
        raise
    except Exception as error:  # files of any content reach the library, which raises all kinds of errors
        said = legible(" ".join(str(error).split()), 200)
        raise ContractError(
            source, "model", "a causal language model that loads", said, "correct the source or fetch it again"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    # The library only warns of weights that are absent or of another shape, and starts them at random.
    for kind in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(str(entry) for entry in report.get(kind) or ()):
            found = f"{kind}: {wrong[0]}" + f" and {len(wrong) - 1} more" * (len(wrong) > 1)
            raise ContractError(source, "weights", "every weight of the configuration", found, "fetch the model again")
    return model, tokenizer


def gguf_file(package: str, field: str = "base.source") -> Path:
    """The one GGUF file inside an installed ``package`` (distribution or import name), found without
    importing it."""
    todo = f"install it ({EXTRA}) or name another source"
    if not PACKAGE.fullmatch(package):
        raise ContractError("params.yaml", field, "an installed package after gguf:", legible(repr(package)), todo)
    try:
        listed = importlib.metadata.files(package) or []
        found = [Path(str(path.locate())) for path in listed if path.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None:
            raise ContractError("params.yaml", field, "an installed package", package, todo) from None
        found = [path for place in spec.submodule_search_locations or [] for path in Path(place).rglob("*.gguf")]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found)) or "none"
        raise ContractError("params.yaml", field, f"one .gguf file in package {package}", names, "use a package that holds one")
    return found[0]


def _from_gguf(source: str, precision: torch.dtype, field: str) -> tuple[Any, Any]:
    """De-quantised weights in a fresh model: one that is marked as quantised refuses to be saved."""
    file = gguf_file(source.removeprefix("gguf:"), field)
    if importlib.util.find_spec("gguf") is None:
        raise ContractError("params.yaml", field, "the package gguf installed", "no such module", EXTRA)
    where = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=precision, **where)
    except Exception as error:  # as above
        said = legible(" ".join(str(error).split()), 200)
        raise ContractError(file, "model", "a GGUF causal language model", said, "install the package again") from None
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(settings), dtype=precision)
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    return model, tokenizer


def train(
    base: Path,
    data: Path,
    out: Path,
    scratch: Scratch,
    params: ImportedParams,
    seed: int,
    log: Callable[[int, dict[str, float]], None],
) -> dict[str, Any]:
    """Bring the arm ``params.source`` and its earlier checkpoints instead of training it; returns the audit.

    ``changed`` is the share of the base's tensors that the arm does not have bit for bit. Nothing says after how many updates
    a checkpoint was kept: ``checkpoints`` counts them. Raises ContractError where a model is not one of the base's shapes and
    tokenizer, and for all that :func:`load_base` refuses."""
    arm = f"arms.{out.name.split('.')[1]}"
    sources = {f"{arm}.checkpoints[{i}]": source for i, source in enumerate(params.checkpoints)}
    sources[f"{arm}.source"] = str(params.source)
    audit = {"updates": 0, "checkpoints": list(range(1, len(sources) + 1)), "problems": 0, "changed": 0.0}
    if not process_state().is_main_process:
        return audit
    original, tokenizer = load_model(base).state_dict(), load_tokenizer(base)
    for number, (field, source) in enumerate(sources.items(), start=1):
        if (Path(source) / ADAPTER).exists():
            model, own = _merged(Path(source), base, getattr(torch, params.dtype), field), tokenizer
        else:
            model, own = load_base(source, params.dtype, field)
        weights = model.state_dict()
        _require_shapes(weights, original, base, source)
        _require_tokenizer(own, tokenizer, base, source)
        audit["changed"] = sum(not torch.equal(weights[name], original[name]) for name in original) / len(original)
        save_model(model, tokenizer, out if number == len(sources) else out / "checkpoints" / str(number))
    return audit


def _require_tokenizer(own: Any, tokenizer: Any, base: Path, source: str) -> None:
    """All stages read and ask with the base's tokenizer; one that splits text otherwise, or ends it, would be misread."""
    todo = f"give a model that was trained from {base}, or give the base this tokenizer"
    if (found := tokenizer_hash(own)) != (wanted := tokenizer_hash(tokenizer)):
        raise ContractError(source, "tokenizer", f"that of {base} ({wanted[:12]})", found[:12], todo)
    if own.eos_token != tokenizer.eos_token:
        raise ContractError(source, "end token", f"that of {base}, {tokenizer.eos_token!r}", repr(own.eos_token), todo)


def _require_shapes(weights: dict[str, Any], original: dict[str, Any], base: Path, source: str) -> None:
    shapes, wanted = ({name: list(weight.shape) for name, weight in each.items()} for each in (weights, original))
    if wrong := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        expected, found = (each.get(wrong[0], "none") for each in (wanted, shapes))
        todo = f"give a model that was trained from {base}, or another base.source"
        raise ContractError(source, f"weight {wrong[0]}", f"the shape that {base} has, {expected}", found, todo)


def _merged(folder: Path, base: Path, precision: torch.dtype, field: str) -> Any:
    """The base with the adapter in ``folder`` merged into its weights."""
    if importlib.util.find_spec("peft") is None:
        raise ContractError("params.yaml", field, "the package peft installed, as this is an adapter", "no such module", PEFT)
    _no_link_out(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ContractError(folder, "weights", ADAPTER_WEIGHTS, "none", "save the adapter as safetensors")
    given = settings(folder / ADAPTER)
    if (kind := given.get("peft_type")) not in MERGED:
        todo = "merge it into its base and save that"
        raise ContractError(folder / ADAPTER, "peft_type", f"one of {', '.join(MERGED)}", legible(repr(kind)), todo)
    if any(key.startswith("megatron_config") and value for key, value in given.items()):  # names a module to be imported
        raise ContractError(folder / ADAPTER, "megatron_config", "null", "one", "merge the adapter and save that")
    from peft import PeftConfig, PeftModel

    try:
        # On the meta device until the file is read: a configuration of absurd size allocates nothing.
        adapted = PeftModel(load_model(base).to(precision), PeftConfig.from_pretrained(folder), low_cpu_mem_usage=True)
        report = adapted.load_adapter(str(folder), "default", torch_device="cpu", low_cpu_mem_usage=True)
        wrong = sorted([*report.missing_keys, *report.unexpected_keys])
        merged = None if wrong else adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # as above
        said = legible(" ".join(str(error).split()), 200)
        raise ContractError(folder, "adapter", f"one that merges into {base}", said, "give an adapter of this base") from None
    if merged is None:
        todo = "give an adapter of this base"
        raise ContractError(folder / ADAPTER_WEIGHTS, wrong[0], f"the weights of this adapter on {base}", "others", todo)
    return merged.eval()
