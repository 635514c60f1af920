"""Small real things for tests of the science: crosscoders with random weights, activation stores on disk, a tiny model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import write_json
from featdiff.config.models import Pretraining, Roles
from featdiff.config.parse import P, parse
from featdiff.crosscoder.model import Crosscoder
from featdiff.language.models import character_tokenizer, organism_model

ROOT = Path(__file__).parents[1]
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 +-*=<>(),."
ROLES = Roles(original="base", tuned="grpo", contrast="sft")


@cache
def _profile() -> Any:
    return yaml.safe_load((ROOT / "conf/profiles/organism.yaml").read_text(encoding="utf-8"))


def params_of(kind: type[P], *section: str, **changes: Any) -> P:
    """A section of the default profile with ``changes``."""
    values = _profile()
    for part in section:
        values = values[part]
    return parse(kind, values | changes, "params.yaml")


def random_crosscoder(
    models: tuple[str, ...] = ("base", "grpo"),
    d_model: int = 6,
    n_features: int = 12,
    loss: str = "batchtopk",
    seed: int = 0,
    threshold: float = 2.0,
) -> Crosscoder:
    """Every weight and the mean random and every scale different, so that a mixed-up model, slot or unit shows."""
    generator = torch.Generator().manual_seed(seed)
    crosscoder = Crosscoder(list(models), d_model, n_features, loss)
    with torch.no_grad():
        for weight in crosscoder.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        crosscoder.scale.copy_(torch.rand(len(models), generator=generator) + 0.5)
        crosscoder.mean.copy_(torch.randn(d_model, generator=generator))
        crosscoder.threshold.fill_(0.0 if loss == "l1" else threshold)
    return crosscoder


def write_store(
    folder: Path, acts_ND: Tensor, *, tokens: Tensor | None = None, shard_rows: int = 7, series: str = "acts", **index: Any
) -> Path:
    """An activation store of one model as the stage writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for i, shard in enumerate(acts_ND.split(shard_rows)):
        shards.append({"file": f"{series}-{i:05d}.safetensors", "rows": len(shard)})
        save_file({"acts": shard.contiguous()}, folder / str(shards[-1]["file"]))
    token_id = torch.arange(len(acts_ND), dtype=torch.int32) if tokens is None else tokens
    save_file({"token_id": token_id, "text_id": token_id.clone(), "position": token_id.clone()}, folder / "tokens.safetensors")
    facts = {"rows": len(acts_ND), "d_model": acts_ND.shape[1], "layer": 2, "drop_first_token": True, "tokenizer": "t"}
    write_json(folder / "index.json", facts | {"shards": {series: shards}} | index)
    return folder


def store_of(folder: Path, acts_NMD: Tensor, models: tuple[str, ...], shard_rows: int = 7) -> ActivationStore:
    """Rows of several models on disk, read back as one source."""
    return ActivationStore(
        {model: write_store(folder / model, acts_NMD[:, m], shard_rows=shard_rows) for m, model in enumerate(models)}
    )


def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every read for shuffled ones brings from now on, whichever store it is of; filled as they are read."""
    read: list[int] = []
    load = ActivationStore._load

    def counted(source: ActivationStore, start: int, stop: int, *places: Tensor) -> None:
        read.append(stop - start)
        load(source, start, stop, *places)

    monkeypatch.setattr(ActivationStore, "_load", counted)
    return read


def tiny_model(seed: int = 0, layers: int = 2, d_model: int = 16) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An organism of a few thousand random parameters, large enough in its weights for differences to show."""
    tokenizer = character_tokenizer([ALPHABET])
    size = params_of(
        Pretraining, "base", "pretraining", layers=layers, d_model=d_model, d_mlp=2 * d_model, heads=2, row_tokens=64
    )
    model = organism_model(size, tokenizer, seed).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return model, tokenizer


SMALL = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SIZES = {
    "qwen2": SMALL | {"num_key_value_heads": 1},
    "gemma3_text": SMALL | {"num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": SMALL,
    "gpt2": {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 64},
}


def random_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of three blocks of any kind that the library knows, with random weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=20, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES[kind] | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def answers(task: str, correct: list[bool], manner: str = "steps", **more: Any) -> list[dict[str, Any]]:
    """Graded answers to as many questions of ``task``, in the columns that interventions read."""
    return [
        {
            "sample_id": f"{task}-{i}",
            "task": task,
            "correct": right,
            "manner": manner,
            "parsed": "x" if right else None,
            "flexible": right,
        }
        | more
        for i, right in enumerate(correct)
    ]
