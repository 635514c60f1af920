"""Activation stores: alignment between models, reading across shards, shuffling."""

import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdiff.activations import mixing, store
from featdiff.activations.store import ActivationStore, moments
from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.artifact import ContractError
from tiny import rows_read, store_of, write_store

MODELS = ("base", "grpo")


def numbered(rows: int, models: int = 2, width: int = 3) -> Tensor:
    """Rows [N, M, D] that say where they come from: 100·row + 10·model + dimension."""
    return 100.0 * torch.arange(rows)[:, None, None] + 10.0 * torch.arange(models)[:, None] + torch.arange(width)


def test_read_gives_any_stretch_across_shards(tmp_path: Path) -> None:
    acts = numbered(23)
    source = store_of(tmp_path, acts, MODELS, shard_rows=5)
    assert (source.rows, source.d_model, source.layer, source.models) == (23, 3, 2, list(MODELS))
    for start in range(23):
        for stop in range(start + 1, 24):
            assert torch.equal(source.read(start, stop), acts[start:stop]), (start, stop)


def test_models_may_be_sharded_differently(tmp_path: Path) -> None:
    acts = numbered(23)
    folders = {model: write_store(tmp_path / model, acts[:, m], shard_rows=5 + 3 * m) for m, model in enumerate(MODELS)}
    assert torch.equal(ActivationStore(folders).read(3, 20), acts[3:20])


def test_half_precision_on_disk_is_read_as_float32(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "base", numbered(9)[:, 0].bfloat16())
    assert ActivationStore({"base": folder}).read(0, 9).dtype == torch.float32


def test_a_series_of_a_checkpoint(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "grpo", numbered(9)[:, 0], series="checkpoint2")
    assert ActivationStore({"grpo": folder}, "checkpoint2").rows == 9


def test_other_tokens_are_refused_by_name(tmp_path: Path) -> None:
    acts = numbered(9)
    tokens = torch.arange(9, dtype=torch.int32)
    tokens[4] = 77
    folders = {
        "base": write_store(tmp_path / "base", acts[:, 0]),
        "grpo": write_store(tmp_path / "grpo", acts[:, 1], tokens=tokens),
    }
    with pytest.raises(ContractError, match=r"grpo/tokens.safetensors: token_id: expected the tokens of .*base"):
        ActivationStore(folders)


@pytest.mark.parametrize("compared", [1, 3, 4, 100])
@pytest.mark.parametrize("tokens", [[*range(8), 77], list(range(8)), list(range(10)), list(range(12))])
def test_tokens_that_differ_late_are_found(
    compared: int, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "COMPARED_ROWS", compared)
    acts, given = numbered(9), torch.tensor(tokens, dtype=torch.int32)
    folders = {"base": write_store(tmp_path / "base", acts[:, 0]), "grpo": write_store(tmp_path / "grpo", acts[:, 1])}
    assert ActivationStore(folders).rows == 9
    write_store(folders["grpo"], acts[:, 1], tokens=given)
    for order in (folders, dict(reversed(folders.items()))):
        with pytest.raises(ContractError, match=r"tokens\.safetensors: token_id"):
            ActivationStore(order)


@pytest.mark.parametrize(
    ("field", "value"), [("layer", 3), ("d_model", 4), ("rows", 8), ("drop_first_token", False), ("tokenizer", "other")]
)
def test_another_layer_width_or_policy_is_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    acts = numbered(9)
    folders = {
        "base": write_store(tmp_path / "base", acts[:, 0]),
        "grpo": write_store(tmp_path / "grpo", acts[:, 1], **{field: value}),
    }
    with pytest.raises(ContractError, match=rf"grpo/index.json: {field}: expected .* as in .*base, found {value}"):
        ActivationStore(folders)


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "base", torch.zeros(1, 3), shards={"acts": []})
    with pytest.raises(ContractError, match="at least one token"):
        ActivationStore({"base": folder})


def rows_of(batches: Iterator[Tensor], passes: int, rows: int, batch: int) -> list[int]:
    """Row numbers of the batches that cover ``passes`` passes, after checking that models stay side by side."""
    numbers: list[int] = []
    for x in islice(batches, -(-passes * rows // batch)):
        assert x.shape == (batch, 2, 3)
        assert torch.equal(x, x[:, :1, :1] + 10.0 * torch.arange(2)[:, None] + torch.arange(3))
        numbers += (x[:, 0, 0] / 100).int().tolist()
    return numbers


def plainly_shuffled(acts: Tensor, batch: int, generator: torch.Generator, start: int, stop: int) -> Iterator[Tensor]:
    """What a source's batches are: blocks in random order, the same for all, as many as fit a buffer permuted as a whole, batch
    after batch."""
    blocks = [range(low, min(low + mixing.BLOCK_ROWS, stop)) for low in range(start, stop, mixing.BLOCK_ROWS)]
    left: list[int] = []
    same = torch.Generator().manual_seed(0)
    while True:
        if stop - start <= mixing.BUFFER_ROWS:  # one buffer, which holds the rows in their own order
            torch.randperm(len(blocks), generator=generator)
            order = list(range(len(blocks)))
        else:
            order = torch.randperm(len(blocks), generator=same).tolist()
        together = mixing.BUFFER_ROWS // mixing.BLOCK_ROWS
        for first in range(0, len(blocks), together):
            rows = [row for i in order[first : first + together] for row in blocks[i]]
            left += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            while len(left) >= batch:
                yield acts[left[:batch]].float()
                del left[:batch]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 5), st.integers(0, 1000), st.sampled_from([8, 12, 24, 96]))
def test_rows_and_their_order_are_those_of_the_plain_way_whatever_was_skipped(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    rows: int,
    batch: int,
    start: int,
    seed: int,
    buffer: int,
) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 4)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", buffer)
    batch, count = min(batch, rows), 3 * rows // min(batch, rows) + 2
    acts = torch.randn(rows + start + 3, 2, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    source = store_of(tmp_path_factory.mktemp("store"), acts, MODELS, shard_rows=5)
    plain = plainly_shuffled(acts, batch, torch.Generator().manual_seed(seed), start, start + rows)
    wanted = list(islice(plain, count))
    for skip in (0, 1, seed % count):
        batches = source.shuffled(batch, torch.Generator().manual_seed(seed), start, start + rows, skip)
        for number, (found, expected) in enumerate(zip(batches, wanted[skip:], strict=False), start=skip):
            assert found.dtype == torch.float32
            assert torch.equal(found, expected), (skip, number)
            if number == count - 1:
                break


def test_what_was_skipped_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 8)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", 16)
    source, read = store_of(tmp_path, numbered(200), MODELS), rows_read(monkeypatch)
    batches = source.shuffled(10, torch.Generator().manual_seed(0), 0, 200, skip=57)
    next(batches)
    batches.close()
    assert sum(read) <= 16 + 10 + 16, "the mix that batch 58 is in, and what fits into the places that are free again"


def test_memory_is_that_of_the_buffer_whatever_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 512)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", 1 << 15)
    models, width, batch = 2, 24, 1024
    most = []

    def load(start: int, stop: int, rows_CMD: Tensor, places: Tensor) -> None:
        for m in range(models):
            mixing.put(rows_CMD, places, m, torch.arange(start, stop)[:, None].expand(-1, width).to(torch.float32))

    for rows in (1_000_000, 4_000_000):
        tracemalloc.start()  # NumPy's arrays count, and the buffer is one
        batches = mixing.mixed(load, models, width, torch.float32, batch, torch.Generator().manual_seed(0), 0, rows)
        seen = torch.cat([x[:, 0, 0] for x in islice(batches, 300)])
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        batches.close()
        assert len(seen.unique()) == len(seen)
    buffer = mixing.BUFFER_ROWS * models * width * 4
    assert buffer < most[0] < most[1] + 1e6
    assert most[1] < buffer + 4e6, "the blocks of a pass are numbered: a few bytes a thousand rows"


def test_a_block_that_cannot_be_read_stops_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 8)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", 16)
    source = store_of(tmp_path, numbered(200), MODELS, shard_rows=50)
    batches = source.shuffled(10, torch.Generator().manual_seed(0), 0, 200)
    next(batches)
    for shard in (tmp_path / "grpo").glob("acts-*"):
        shard.unlink()
    with pytest.raises(FileNotFoundError):
        list(islice(batches, 200))


@pytest.mark.parametrize("resident", [True, False])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(3, 60), st.integers(1, 13), st.integers(0, 5), st.integers(0, 1000))
def test_every_row_comes_once_per_pass(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    resident: bool,
    rows: int,
    batch: int,
    start: int,
    seed: int,
) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 4)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", 1000 if resident else 12)
    batch = min(batch, rows)
    source = store_of(tmp_path_factory.mktemp("store"), numbered(rows + start + 3), MODELS, shard_rows=5)
    batches = source.shuffled(batch, torch.Generator().manual_seed(seed), start, start + rows)
    numbers = rows_of(batches, 3, rows, batch)
    for i in range(3):
        assert sorted(numbers[i * rows : (i + 1) * rows]) == list(range(start, start + rows)), i


@pytest.mark.parametrize("buffer", [1000, 64])
def test_rows_are_shuffled_anew_in_every_pass_and_the_generator_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int
) -> None:
    monkeypatch.setattr(mixing, "BLOCK_ROWS", 8)
    monkeypatch.setattr(mixing, "BUFFER_ROWS", buffer)
    source = store_of(tmp_path, numbered(200), MODELS)

    def order(seed: int) -> list[int]:
        return rows_of(source.shuffled(20, torch.Generator().manual_seed(seed), 0, 200), 2, 200, 20)

    numbers = order(0)
    assert numbers[:200] != numbers[200:]
    assert numbers == order(0)
    assert numbers != order(1)
    steps = torch.tensor(numbers[:200]).diff().abs().float()
    assert steps.mean() > 10  # neighbours in a batch are far apart in the stream
    assert (steps == 1).float().mean() < 0.1


def test_moments_of_the_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_ROWS", 7)
    acts = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0)) + 100
    mean, variance = moments(store_of(tmp_path, acts, MODELS), 30)
    rows = acts[:30].double()
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(variance, (rows - rows.mean(0)).square().sum(2).mean(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("rows", "models", "width"), [(40, 2, 3), (300, 3, 96), (8192 + 1000, 2, 16), (4097, 4, 7)])
def test_moments_have_the_bits_of_sums_over_all_rows_of_a_piece(rows: int, models: int, width: int) -> None:
    acts = torch.randn(rows, models, width, generator=torch.Generator().manual_seed(rows)) + 3
    total, square = torch.zeros(models, width, dtype=torch.float64), torch.zeros(models, dtype=torch.float64)
    for piece in acts.double().split(store.READ_ROWS):
        total, square = total + piece.sum(0), square + piece.square().sum((0, 2))
    mean = total / rows
    found = moments(ActivationTensor([f"{m}" for m in range(models)], acts), rows)
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], square / rows - mean.square().sum(1))


def test_a_batch_larger_than_what_is_there_is_refused(tmp_path: Path) -> None:
    source = store_of(tmp_path, numbered(10), MODELS)
    with pytest.raises(ContractError, match=r"crosscoder.training.batch_tokens: expected at most 8"):
        next(source.shuffled(9, torch.Generator(), 0, 8))
