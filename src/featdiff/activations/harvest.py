"""Harvesting: the residual streams of a model and its checkpoints on one token stream, written as a sharded store.

The stream depends on corpus, tokenizer and parameters alone. So every model reads the same tokens in the same order, and row n
is the same token in every store. N token rows, B batch, T token, D residual width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from featdiff.artifact import ContractError, write_json
from featdiff.config import ActivationsParams
from featdiff.decode import left_pad
from featdiff.models import checkpoint_folders, load_model, load_tokenizer, resolve_layer, tokenizer_hash, truncate
from featdiff.ranks import process_state
from featdiff.resume import Scratch
from featdiff.tasks.task import Text


class TokenStream(NamedTuple):
    """Texts as token ids. First tokens are still in place: the model must read them, even where their rows are left out."""

    texts: list[list[int]]
    skip: int
    """Tokens left out at the start of every text: 1 under the first-token policy, else 0."""

    @property
    def rows(self) -> int:
        """Token rows that the stream gives."""
        return sum(len(ids) - self.skip for ids in self.texts)

    def first(self, rows: int) -> TokenStream:
        """The fewest texts from the start that give at least ``rows`` rows together, or all where they give fewer."""
        total = 0
        for number, ids in enumerate(self.texts, start=1):
            total += len(ids) - self.skip
            if total >= rows:
                return TokenStream(self.texts[:number], self.skip)
        return self


def token_stream(texts: list[Text], tokenizer: PreTrainedTokenizerFast, params: ActivationsParams) -> TokenStream:
    """The first texts of the corpus that give ``params.tokens`` rows, as tokens. The last text is whole, so there can be a few
    rows more. Raises ContractError where the corpus gives fewer."""
    skip = int(params.drop_first_token)
    encoded = tokenizer([text.prompt + text.completion for text in texts], truncation=True, max_length=params.max_length)[
        "input_ids"
    ]
    stream = TokenStream([ids for ids in encoded if len(ids) > skip], skip)
    if stream.rows < params.tokens:
        raise ContractError(
            "params.yaml",
            "activations.tokens",
            f"at most {stream.rows} (the corpus)",
            params.tokens,
            "lower it or raise prepare.corpus.texts",
        )
    return stream.first(params.tokens)


def _shards(stream: TokenStream, shard_rows: int) -> list[TokenStream]:
    """Whole texts in groups of at least ``shard_rows`` rows; the last group may have fewer."""
    shards, start, rows = [], 0, 0
    for end, ids in enumerate(stream.texts, start=1):
        rows += len(ids) - stream.skip
        if rows >= shard_rows or end == len(stream.texts):
            shards.append(TokenStream(stream.texts[start:end], stream.skip))
            start, rows = end, 0
    return shards


@torch.inference_mode()
def read_residual(trunk: torch.nn.Module, stream: TokenStream, batch_size: int, pad: int, dtype: torch.dtype) -> Tensor:
    """Residual stream [N, D] at every kept token of ``stream``, in its order. ``trunk`` is a model that ends after the layer
    to read; ``batch_size`` counts texts."""
    # Texts of similar length share a batch, so that little of the work is padding. The longest come first: what does not fit
    # into memory fails at once. Batches never reach over a shard, so a shard made again after a kill has the same bytes.
    device = next(trunk.parameters()).device
    order = sorted(range(len(stream.texts)), key=lambda i: -len(stream.texts[i]))
    parts: list[Tensor] = [torch.empty(0)] * len(order)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask, positions = left_pad([stream.texts[i] for i in chosen], pad, device)
        resid_BTD = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        for row, i in enumerate(chosen):
            # Padding is on the left: a text's last tokens are the last ones of its row.
            kept = len(stream.texts[i]) - stream.skip
            parts[i] = resid_BTD[row, -kept:].to(dtype).cpu()
    return torch.cat(parts)


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
        kept = [
            (token, text, place)
            for text, ids in enumerate(stream.texts)
            for place, token in enumerate(ids)
            if place >= stream.skip
        ]
        columns = torch.tensor(kept, dtype=torch.int32)
        save_file(
            {name: columns[:, i].contiguous() for i, name in enumerate(("token_id", "text_id", "position"))},
            out / "tokens.safetensors",
        )
        write_json(out / "index.json", index | {"shards": files})
    state.wait_for_everyone()
    return {"rows": stream.rows, "texts": len(stream.texts), "checkpoints": len(folders) - 1}
