"""Harvesting: the residual streams of a model and its checkpoints on one token stream, written as a sharded store.

The stream depends on corpus, tokenizer and parameters alone. So every model reads the same tokens in the same order, and row n
is the same token in every store. N token rows, B batch, T token, D residual width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from featdiff.activations.residual import TokenStream, read_residual, token_stream
from featdiff.artifacts.artifact import ContractError, write_json
from featdiff.config.dictionary import ActivationsParams
from featdiff.language.models import checkpoint_folders, load_model, load_tokenizer, resolve_layer, tokenizer_hash, truncate
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import Text


def _shards(stream: TokenStream, shard_rows: int) -> list[TokenStream]:
    """Whole texts in groups of at least ``shard_rows`` rows; the last group may have fewer."""
    shards, start, rows = [], 0, 0
    for end, kept in enumerate(stream.kept.tolist(), start=1):
        rows += kept
        if rows >= shard_rows or end == len(stream.texts):
            shards.append(stream.part(start, end))
            start, rows = end, 0
    return shards


def _save_shard(
    model: Path, trunk: torch.nn.Module, shard: TokenStream, pad: int, file: str, params: ActivationsParams, place: Path
) -> None:
    acts = read_residual(trunk, shard, params.batch_size, pad, getattr(torch, params.dtype))
    if not torch.isfinite(acts).all():
        raise ContractError(model, "residual stream", "finite values", "NaN or infinity", "check the model")
    save_file({"acts": acts.contiguous()}, place / file)


def harvest(folder: Path, corpus: list[Text], out: Path, params: ActivationsParams, scratch: Scratch) -> dict[str, int]:
    """Write the store of the model in ``folder`` and of its checkpoints to ``out``. With n ranks each writes every n-th shard.

    Files: ``index.json``, ``tokens.safetensors`` (token_id, text_id, position [N]), ``acts-*.safetensors`` (acts [n, D]) and
    for checkpoints ``checkpoint<i>-*.safetensors``. Returns the numbers of rows, texts and checkpoints. Raises ContractError
    for a corpus that is too small and for activations that are not finite."""
    state = process_state()
    tokenizer, final = load_tokenizer(folder), load_model(folder)
    layer = resolve_layer(final, params.layer)
    stream = token_stream(corpus, tokenizer, params)
    folders = checkpoint_folders(folder)
    index: dict[str, object] = {
        "tokenizer": tokenizer_hash(tokenizer),
        "drop_first_token": params.drop_first_token,
        "dtype": params.dtype,
        "rows": stream.rows,
        "layer": layer,
        "d_model": final.config.hidden_size,
        "checkpoint_rows": 0,
        "checkpoints": len(folders) - 1,
    }
    jobs = [("acts", folder, _shards(stream, params.shard_rows))]
    if len(folders) > 1:
        short = stream.first(params.checkpoint_tokens)
        index["checkpoint_rows"] = short.rows
        jobs += [(f"checkpoint{i}", path, _shards(short, params.shard_rows)) for i, path in enumerate(folders[:-1], start=1)]
    files: dict[str, list[dict[str, object]]] = {}
    bar = tqdm(
        total=sum(len(shards) for *_, shards in jobs),
        desc=f"activations {folder.name}",
        unit="shard",
        disable=not state.is_main_process,
    )
    for name, path, shards in jobs:
        trunk = truncate((final if path is folder else load_model(path)).to(state.device), layer)
        files[name] = [{"file": f"{name}-{i:05d}.safetensors", "rows": shard.rows} for i, shard in enumerate(shards)]
        for i, shard in enumerate(shards):
            if i % state.num_processes == state.process_index:
                file = str(files[name][i]["file"])
                save = partial(_save_shard, path, trunk, shard, tokenizer.pad_token_id, file, params)
                scratch.bring(f"shards/{file}", out, save)
            bar.update(1)
    bar.close()
    if state.is_main_process:
        save_file({name: torch.from_numpy(column) for name, column in stream.columns().items()}, out / "tokens.safetensors")
        write_json(out / "index.json", index | {"shards": files})
    state.wait_for_everyone()
    return {"rows": stream.rows, "texts": len(stream.texts), "checkpoints": len(folders) - 1}
