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
from transformers import PreTrainedModel

from featdiff.activations.residual import TokenStream, read_residual, require_finite_stream, shards, token_stream
from featdiff.activations.stream import TEXTS, Streamed, fingerprint
from featdiff.artifacts.artifact import write_json
from featdiff.config.dictionary import ActivationsParams
from featdiff.language.models import checkpoint_folders, load_model, load_tokenizer, resolve_layer, tokenizer_hash, truncate
from featdiff.pipeline.checkpoint import Scratch
from featdiff.processes.ranks import process_state
from featdiff.tasks.task import Text


def _save_shard(
    model: Path, trunk: torch.nn.Module, shard: TokenStream, pad: int, file: str, params: ActivationsParams, place: Path
) -> None:
    acts = read_residual(trunk, shard, params.batch_size, pad, getattr(torch, params.dtype))
    require_finite_stream(model, [acts])
    save_file({"acts": acts.contiguous()}, place / file)


def harvest(folder: Path, corpus: list[Text], out: Path, params: ActivationsParams, scratch: Scratch) -> dict[str, int]:
    """Write the store of the model in ``folder`` and of its checkpoints to ``out``.

    Files: ``index.json``, ``tokens.safetensors`` (token_id, text_id, position [N]), and either ``acts-*.safetensors`` (acts
    [n, D]) and for checkpoints ``checkpoint<i>-*.safetensors``, of which with n ranks each writes every n-th; or, where
    ``params.source`` says so, ``texts.safetensors``, with what whoever reads needs to run the models again. Returns the numbers
    of rows, texts and checkpoints. Raises ContractError for a corpus that is too small and for activations that are not
    finite."""
    state = process_state()
    tokenizer, final = load_tokenizer(folder), load_model(folder)
    layer = resolve_layer(final, params.layer)
    stream = token_stream(corpus, tokenizer, params)
    *earlier, _ = checkpoint_folders(folder)
    short = stream.first(params.checkpoint_tokens) if earlier else stream.part(0, 0)
    index: dict[str, object] = {
        "tokenizer": tokenizer_hash(tokenizer),
        "drop_first_token": params.drop_first_token,
        "dtype": params.dtype,
        "rows": stream.rows,
        "layer": layer,
        "d_model": final.config.hidden_size,
        "checkpoint_rows": short.rows,
        "checkpoints": len(earlier),
    }
    series = {"acts": (folder, stream)} | {f"checkpoint{i}": (path, short) for i, path in enumerate(earlier, start=1)}
    if params.source == "models":
        runs = {name: (path.as_posix(), fingerprint(path), len(part.texts)) for name, (path, part) in series.items()}
        index["streamed"] = Streamed(params.batch_size, params.shard_rows, tokenizer.pad_token_id, runs)._asdict()
    else:
        index["shards"] = _write_shards(series, final, layer, tokenizer.pad_token_id, out, params, scratch)
    if state.is_main_process:
        stream.save_columns(out / "tokens.safetensors")
        if params.source == "models":
            stream.save(out / TEXTS)
        write_json(out / "index.json", index)
    state.wait_for_everyone()
    return {"rows": stream.rows, "texts": len(stream.texts), "checkpoints": len(earlier)}


def _write_shards(
    series: dict[str, tuple[Path, TokenStream]],
    final: PreTrainedModel,
    layer: int,
    pad: int,
    out: Path,
    params: ActivationsParams,
    scratch: Scratch,
) -> dict[str, list[dict[str, object]]]:
    """The shards of every series, this rank's share of them written."""
    state = process_state()
    parts = {name: shards(stream, params.shard_rows) for name, (_, stream) in series.items()}
    files: dict[str, list[dict[str, object]]] = {}
    bar = tqdm(
        total=sum(map(len, parts.values())),
        desc=f"activations {series['acts'][0].name}",
        unit="shard",
        disable=not state.is_main_process,
    )
    for name, (path, _) in series.items():
        trunk = truncate(final if name == "acts" else load_model(path), layer).to(state.device)
        files[name] = [{"file": f"{name}-{i:05d}.safetensors", "rows": shard.rows} for i, shard in enumerate(parts[name])]
        for i, shard in enumerate(parts[name]):
            if i % state.num_processes == state.process_index:
                file = str(files[name][i]["file"])
                save = partial(_save_shard, path, trunk, shard, pad, file, params)
                scratch.bring(f"shards/{file}", out, save)
            bar.update(1)
    bar.close()
    return files
