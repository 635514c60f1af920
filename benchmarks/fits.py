"""Six crosscoders on models that run where their rows are read: from one read for all of them, and each from its own.

Models of random weights and a crosscoder beside which they cost what a small language model does beside one of its width: some
15 times the operations of a fit on as many tokens."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from featdiff.activations.harvest import harvest
from featdiff.activations.store import ActivationStore, SharedSource, SharedStore
from featdiff.activations.turns import Turns, alone, in_turns
from featdiff.config.dictionary import ActivationsParams, CrosscoderTraining, Fit
from featdiff.crosscoder.make import Made, make_in_turns
from featdiff.language.models import character_tokenizer, save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Text
from pace import case, timed

given, way = case(), sys.argv[2]
WIDTH, BLOCKS, TOKENS, BATCH = (int(given[name]) for name in ("width", "layers", "rows", "batch"))
MODELS = ("first", "second", "third")
FITS = {
    "three": Fit(models=list(MODELS), loss="batchtopk", seed=0),
    "three again": Fit(models=list(MODELS), loss="batchtopk", seed=1),
    "three, ReLU+L1": Fit(models=list(MODELS), loss="l1", seed=0),
    "pair": Fit(models=["first", "second"], loss="batchtopk", seed=0),
    "another pair": Fit(models=["first", "third"], loss="batchtopk", seed=0),
    "null pair": Fit(models=["first", "first"], loss="batchtopk", seed=0),
}
TRAINING = CrosscoderTraining(
    n_features=int(given["features"]), batch_tokens=BATCH, steps=TOKENS // BATCH, lr=given["lr"], warmup_share=0.05,
    decay_share=0.2, k=int(given["k"]), aux_k=int(given["aux_k"]), aux_weight=1 / 32, dead_after_tokens=10**9, l1_weight=1.0,
    l1_warmup_share=0.05, decoder_norm=0.1, heldout_share=0.05, log_every=10**6,
)  # fmt: skip
READ = ActivationsParams(
    source="models", layer=BLOCKS, tokens=TOKENS, checkpoint_tokens=TOKENS, max_length=128, drop_first_token=True,
    batch_size=16, dtype="float32", shard_rows=2048,
)  # fmt: skip


def write(place: Path, name: str, seed: int) -> Path:
    """Folder from which the activations of a model are read."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer(["0123456789 +="])
    size = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=8 * WIDTH // 3, num_hidden_layers=BLOCKS + 1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=WIDTH // 4, max_position_embeddings=256,
    )  # fmt: skip
    save_model(Qwen3ForCausalLM(size), tokenizer, place / "models" / name)
    folder = place / name
    folder.mkdir()
    texts = [Text(" + ".join(str(i * j) for j in range(5 + i % 20)), "=", "sums") for i in range(7, TOKENS)]
    harvest(place / "models" / name, texts, folder, READ, Scratch())
    return folder


def work(name: str, source: ActivationStore | SharedSource) -> Turns[Made]:
    return make_in_turns(source, FITS[name], TRAINING, 0, lambda *_: None, name, Scratch(), True)


with tempfile.TemporaryDirectory() as root:
    folders = {name: write(Path(root), name, seed) for seed, name in enumerate(MODELS)}
    sums: list[float] = []

    def note(made: Mapping[str, Made]) -> None:
        sums.append(sum(float(made[name].crosscoder.W_dec.double().abs().sum()) for name in FITS))

    def together() -> None:
        shared, made = SharedStore(folders), dict[str, Made]()
        works = {name: work(name, SharedSource(shared, fit.slots)) for name, fit in FITS.items()}

        def failed(_name: str, error: Exception) -> None:
            raise error

        in_turns(works, made.__setitem__, failed, lambda: False)
        note(made)

    def one_by_one() -> None:
        slots = {name: {slot: folders[model] for slot, model in fit.slots.items()} for name, fit in FITS.items()}
        note({name: alone(work(name, ActivationStore(read))) for name, read in slots.items()})

    timed({"featdiff": together, "one by one": one_by_one}[way], int(given["block"]), lambda: {"sum": sums[-1]})
