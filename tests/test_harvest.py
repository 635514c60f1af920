"""Token stream and residual streams on disk."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from featdiff.activations import residual
from featdiff.activations.harvest import harvest
from featdiff.activations.residual import TokenStream, packed, read_residual, shards, token_stream
from featdiff.activations.store import ActivationStore
from featdiff.artifacts.artifact import ContractError, read_json
from featdiff.config.dictionary import ActivationsParams
from featdiff.language.models import block, load_model, save_model, truncate
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Text
from tiny import params_of, tiny_model

TEXTS = [Text(f"add {i} {i * 7}=", f"<{i}>{i * 8}.", "add") for i in range(12)] + [
    Text("", "a", "short"),
    Text("rev abc=", "cba.", "rev"),
]


def params(**changes: Any) -> ActivationsParams:
    small = {"layer": 1, "tokens": 100, "checkpoint_tokens": 30, "max_length": 12, "batch_size": 4, "shard_rows": 40}
    return params_of(ActivationsParams, "activations", **small | changes)


@pytest.mark.parametrize("drop", [True, False])
def test_the_stream_is_the_corpus_in_order_cut_and_without_first_tokens(drop: bool) -> None:
    _, tokenizer = tiny_model()
    stream = token_stream(TEXTS, tokenizer, params(drop_first_token=drop))
    ids = [tokenizer(text.prompt + text.completion)["input_ids"][:12] for text in TEXTS]
    assert list(stream.texts) == ids[: len(stream.texts)]
    assert stream.rows == sum(len(text) - drop for text in stream.texts) >= 100
    assert stream.rows - (len(stream.texts[-1]) - drop) < 100


def test_a_corpus_that_is_too_short_is_one_line() -> None:
    _, tokenizer = tiny_model()
    with pytest.raises(
        ContractError, match=r"params.yaml: activations.tokens: expected at most [0-9]+ \(the corpus\), found 9999"
    ):
        token_stream(TEXTS, tokenizer, params(tokens=9999))


STREAMS = st.builds(
    lambda lengths, skip, in_one: TokenStream((packed if in_one else list)(list(range(n + skip)) for n in lengths), skip),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(0, 1),
    st.booleans(),
)


@settings(deadline=None)
@given(STREAMS, st.integers(1, 60))
def test_shards_are_whole_texts_that_together_are_the_stream(stream: TokenStream, shard_rows: int) -> None:
    parts = shards(stream, shard_rows)
    assert [ids for shard in parts for ids in shard.texts] == list(stream.texts)
    assert all(shard.skip == stream.skip for shard in parts)
    assert all(shard.rows >= shard_rows for shard in parts[:-1])
    assert all(shard.rows - (len(shard.texts[-1]) - shard.skip) < shard_rows for shard in parts)


@settings(deadline=None)
@given(STREAMS, st.integers(1, 60))
def test_the_first_rows_are_the_fewest_texts_that_suffice(stream: TokenStream, rows: int) -> None:
    first = stream.first(rows)
    assert list(first.texts) == list(stream.texts)[: len(first.texts)]
    assert first.rows >= min(rows, stream.rows)
    if len(first.texts) > 1:
        assert first.rows - (len(first.texts[-1]) - stream.skip) < rows


@settings(deadline=None)
@given(STREAMS)
def test_columns_say_of_every_row_its_token_its_text_and_its_place(stream: TokenStream) -> None:
    wanted = [
        (token, text, place) for text, ids in enumerate(stream.texts) for place, token in enumerate(ids) if place >= stream.skip
    ]
    columns = stream.columns()
    assert list(columns) == ["token_id", "text_id", "position"]
    assert all(column.dtype == np.int32 for column in columns.values())
    assert list(zip(*(column.tolist() for column in columns.values()), strict=True)) == wanted


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STREAMS)
def test_files_that_are_written_in_pieces_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: TokenStream
) -> None:
    monkeypatch.setattr(residual, "TOKENIZED_TEXTS", 3)
    found, wanted = tmp_path / "found.safetensors", tmp_path / "wanted.safetensors"
    stream.save_columns(found)
    save_file({name: torch.tensor(column) for name, column in stream.columns().items()}, wanted)
    assert found.read_bytes() == wanted.read_bytes()
    stream.save(found)
    ids, lengths = [token for text in stream.texts for token in text], [len(text) for text in stream.texts]
    save_file({"ids": torch.tensor(ids, dtype=torch.int32), "lengths": torch.tensor(lengths)}, wanted)
    assert found.read_bytes() == wanted.read_bytes()
    assert list(TokenStream.load(found, stream.skip).texts) == list(stream.texts)


def test_a_stream_takes_little_memory_and_no_more_of_the_corpus_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "TOKENIZED_TEXTS", 50)
    _, tokenizer = tiny_model()
    texts = [Text("add 1 2=" * 40, "3." * 40, "add")] * 700
    asked: list[int] = []

    def counted(together: list[str], **how: Any) -> Any:
        asked.append(len(together))
        return tokenizer(together, **how)

    token_stream(texts, counted, params(tokens=5000, max_length=400))  # what libraries load once
    asked.clear()
    tracemalloc.start()
    stream = token_stream(texts, counted, params(tokens=200_000, max_length=400))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    stream.save_columns(tmp_path / "tokens.safetensors")
    stream.save(tmp_path / "texts.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(asked) == 550, "of 700: 399 rows a text"
    assert len(load_file(tmp_path / "tokens.safetensors")["token_id"]) == stream.rows >= 200_000
    assert held < stream.rows / 2
    assert peak - held < 50 * 40 * 400, "a few times the columns of 50 texts, of which there are ten times as many"


@pytest.mark.parametrize("skip", [0, 1])
def test_rows_are_the_hooked_stream_of_each_text_alone_in_stream_order(skip: int) -> None:
    model, tokenizer = tiny_model(layers=3)
    stream = TokenStream([tokenizer(text.prompt + text.completion)["input_ids"] for text in TEXTS], skip)
    wanted, seen = [], []
    handle = block(model, 2).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        for ids in stream.texts:
            model(input_ids=torch.tensor([ids]))
            wanted.append(seen.pop()[0, skip:].clone())
    handle.remove()
    rows = read_residual(truncate(model, 2), stream, batch_size=4, pad=tokenizer.pad_token_id, dtype=torch.float32)
    torch.testing.assert_close(rows, torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_the_truncated_model_has_the_bits_of_the_hooked_one() -> None:
    model, tokenizer = tiny_model(layers=3)
    seen: list[torch.Tensor] = []
    handle = block(model, 2).register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    ids = torch.tensor([tokenizer("sort cab=<a>")["input_ids"]])
    with torch.inference_mode():
        model(input_ids=ids)
        handle.remove()
        assert torch.equal(truncate(model, 2)(input_ids=ids, use_cache=False).last_hidden_state, seen[0])


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of a model with two earlier checkpoints, and its store."""
    folder, out = tmp_path_factory.mktemp("grpo"), tmp_path_factory.mktemp("store")
    save_model(*tiny_model(5), folder)
    for number in (1, 2):
        save_model(*tiny_model(number), folder / "checkpoints" / str(number))
    assert harvest(folder, TEXTS, out, params(), Scratch()).keys() == {"rows", "texts", "checkpoints"}
    return folder, out


def test_the_store_holds_every_row_of_the_stream_and_its_tokens(harvested: tuple[Path, Path]) -> None:
    folder, out = harvested
    _, tokenizer = tiny_model()
    stream, index = token_stream(TEXTS, tokenizer, params()), read_json(out / "index.json")
    assert (index["layer"], index["d_model"], index["rows"], index["checkpoints"], index["dtype"]) == (
        1,
        16,
        stream.rows,
        2,
        "float32",
    )
    assert len(index["shards"]["acts"]) > 1
    source = ActivationStore({"grpo": out})
    wanted = read_residual(truncate(load_model(folder), 1), stream, 4, tokenizer.pad_token_id, torch.float32)
    torch.testing.assert_close(source.read(0, source.rows)[:, 0], wanted, rtol=1e-4, atol=1e-5)
    columns = load_file(out / "tokens.safetensors")
    for token, text, place in zip(*(columns[name].tolist() for name in ("token_id", "text_id", "position")), strict=True):
        assert stream.texts[text][place] == token
        assert place >= 1
    assert len(columns["token_id"]) == stream.rows


def test_checkpoints_come_in_order_on_the_first_texts(harvested: tuple[Path, Path]) -> None:
    folder, out = harvested
    _, tokenizer = tiny_model()
    short = token_stream(TEXTS, tokenizer, params()).first(30)
    assert read_json(out / "index.json")["checkpoint_rows"] == short.rows
    for number in (1, 2):
        source = ActivationStore({"grpo": out}, f"checkpoint{number}")
        assert source.rows == short.rows
        trunk = truncate(load_model(folder / "checkpoints" / str(number)), 1)
        wanted = read_residual(trunk, short, 4, tokenizer.pad_token_id, torch.float32)
        torch.testing.assert_close(source.read(0, source.rows)[:, 0], wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_that_does_not_exist_is_one_line(harvested: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ContractError, match=r"params.yaml: activations.layer: expected 1 to 2 for this model, or middle, found 9"
    ):
        harvest(harvested[0], TEXTS, tmp_path, params(layer=9), Scratch())


def test_streams_of_base_and_arm_line_up(harvested: tuple[Path, Path], tmp_path: Path) -> None:
    save_model(*tiny_model(0), tmp_path / "model")
    (tmp_path / "base").mkdir()
    harvest(tmp_path / "model", TEXTS, tmp_path / "base", params(batch_size=3, shard_rows=1000), Scratch())
    source = ActivationStore({"base": tmp_path / "base", "grpo": harvested[1]})
    assert source.read(0, source.rows).shape == (source.rows, 2, 16)
    assert read_json(tmp_path / "base" / "index.json")["checkpoints"] == 0
