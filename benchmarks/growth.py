"""Time and memory as the number of tokens grows: of harvesting a model into a store, and of a crosscoder on stored rows.

``harvest`` is what the stage `activations` calls, from a model on disk and a corpus to the files of the store. Not included are
the corpus, which the stage holds as a list of texts and which makes each text here when it is asked for, and the hashes of what
was written. ``fit`` is what the stage `crosscoder` calls, from opening the stores of two models to the statistics of features,
with as many steps as give one pass over the training rows. Not included are checkpoints. Another process writes its stores.

A step is all of this, and its time is given for a thousand tokens. Memory is that of the whole process, with libraries and
mapped files: ``start_mib`` before a step and ``peak_mib`` the most within it. Linux only."""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import overload

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from featdiff.activations.harvest import harvest
from featdiff.activations.store import ActivationStore
from featdiff.activations.turns import alone
from featdiff.artifacts.artifact import write_json
from featdiff.config.dictionary import ActivationsParams, CrosscoderTraining, Fit
from featdiff.crosscoder.make import make_in_turns
from featdiff.language.models import character_tokenizer, save_model
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.memory import keep_freed
from featdiff.tasks.task import Text
from pace import case, planted_rows, say

given, way = case(), sys.argv[2]
keep_freed()  # as in every stage
WIDTH, FEATURES, BATCH, SHARD = (int(given[name]) for name in ("width", "features", "batch", "shard"))
WARM, TOKENS = int(given["warm"]), int(given["tokens"])
"""Tokens of the first round, which is not counted, and of the others."""
MODELS = ("first", "second")
WORDS = 12
"""Numbers in a text, of four digits and a space: 60 characters, each a token."""


class Corpus(Sequence[Text]):
    """Texts that nobody holds."""

    def __init__(self, texts: int) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return self.texts

    @overload
    def __getitem__(self, which: int) -> Text: ...
    @overload
    def __getitem__(self, which: slice) -> list[Text]: ...
    def __getitem__(self, which: int | slice) -> Text | list[Text]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        return Text("", "".join(f"{(which * 7919 + 31 * word) % 10_000:04d} " for word in range(WORDS)), "numbers")


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = character_tokenizer(["0123456789 "])
    size = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=WIDTH // 2, max_position_embeddings=128,
    )  # fmt: skip
    save_model(Qwen3ForCausalLM(size), tokenizer, folder)


def write_stores(folders: dict[str, Path], rows: int) -> None:
    """Stores of both models, with sparse sums of random directions."""
    held = planted_rows(len(MODELS) * WIDTH, SHARD).view(SHARD, len(MODELS), WIDTH).bfloat16()
    shards = [{"file": f"acts-{low // SHARD:05d}.safetensors", "rows": min(SHARD, rows - low)} for low in range(0, rows, SHARD)]
    columns = dict.fromkeys(("token_id", "text_id", "position"), torch.zeros(rows, dtype=torch.int32))
    facts = {"rows": rows, "d_model": WIDTH, "layer": 1, "drop_first_token": True, "tokenizer": "none"}
    for m, folder in enumerate(folders.values()):
        folder.mkdir(parents=True)
        for number, shard in enumerate(shards):
            order = torch.randperm(SHARD, generator=torch.Generator().manual_seed(number))[: int(shard["rows"])]
            save_file({"acts": held[order, m].contiguous()}, folder / str(shard["file"]))
        save_file({name: column.clone() for name, column in columns.items()}, folder / "tokens.safetensors")
        write_json(folder / "index.json", facts | {"shards": {"acts": shards}})


def harvesting(place: Path, tokens: int) -> Callable[[], object]:
    model, params = place / "model", ActivationsParams(
        source="activations", layer="middle", tokens=tokens, checkpoint_tokens=tokens, max_length=112, drop_first_token=True,
        batch_size=256, dtype="bfloat16", shard_rows=SHARD,
    )  # fmt: skip
    write_model(model)

    def step() -> None:
        with tempfile.TemporaryDirectory(dir=place) as out:
            harvest(model, Corpus(tokens // (5 * WORDS - 1) + 1), Path(out), params, Scratch())  # type: ignore[arg-type]

    return step


def fitting(place: Path, tokens: int) -> Callable[[], object]:
    folders = {model: place / model for model in MODELS}
    writer = multiprocessing.get_context("fork").Process(target=write_stores, args=(folders, tokens))
    writer.start()  # what it took does not stay with this process
    writer.join()
    params = CrosscoderTraining(
        n_features=FEATURES, batch_tokens=BATCH, steps=1, lr=1e-3, warmup_share=0.05, decay_share=0.2, k=8, aux_k=16,
        aux_weight=1 / 32, dead_after_tokens=100_000, l1_weight=1.0, l1_warmup_share=0.0, decoder_norm=0.1,
        heldout_share=0.05, log_every=100,
    )  # fmt: skip
    params = params.model_copy(update={"steps": params.train_rows(tokens) // BATCH})
    chosen = Fit(models=list(MODELS), loss="batchtopk", seed=0)
    return lambda: alone(make_in_turns(ActivationStore(folders), chosen, params, 0, lambda *_: None, "growth", Scratch(), True))


def memory(field: str) -> float:
    """MiB of this process that Linux tells under ``field``."""
    told = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert told
    return int(told[1]) / 1024


def seconds(step: Callable[[], object], tokens: int) -> float:
    """Of ``step``, for a thousand of its ``tokens``."""
    start = perf_counter()
    step()
    return 1000 * (perf_counter() - start) / tokens


with tempfile.TemporaryDirectory() as root:
    prepare = {"harvest": harvesting, "fit": fitting}[way]
    # Both before either runs: threads that torch has started do not survive a fork.
    warm, step = (prepare(Path(root) / str(tokens), tokens) for tokens in (WARM, TOKENS))
    say(None)
    sys.stdin.readline()
    say([seconds(warm, WARM)])
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the most memory so far
    start_mib = memory("VmRSS")
    while sys.stdin.readline().strip():
        say([seconds(step, TOKENS)])
    say({"tokens": TOKENS, "start_mib": start_mib, "peak_mib": memory("VmHWM")})
