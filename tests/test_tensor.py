"""Activations in memory are a source like any other."""

import pytest
import torch

from featdiff.activations.store import in_order
from featdiff.activations.tensor import ActivationTensor
from featdiff.artifacts.artifact import ContractError


def test_rows_in_order_and_every_row_once_per_pass() -> None:
    acts = torch.arange(10.0)[:, None, None].expand(10, 2, 3)
    source = ActivationTensor(["base", "tuned"], acts)
    assert (source.models, source.rows, source.d_model) == (["base", "tuned"], 10, 3)
    assert torch.equal(torch.cat(list(in_order(source, 2, 9))), acts[2:9])
    batches = source.shuffled(3, torch.Generator().manual_seed(0), 1, 10)
    first, second = ([next(batches)[:, 0, 0].tolist() for _ in range(3)] for _ in range(2))
    assert first != second
    for passed in (first, second):
        assert sorted(row for batch in passed for row in batch) == list(range(1, 10))


def test_what_a_pass_leaves_over_is_dropped() -> None:
    source = ActivationTensor(["base"], torch.arange(5.0)[:, None, None])
    batches = source.shuffled(2, torch.Generator().manual_seed(0), 0, 5)
    for _ in range(4):
        one, two = next(batches).flatten().tolist(), next(batches).flatten().tolist()
        assert len({*one, *two}) == 4


def test_fewer_rows_than_a_batch_are_refused_and_as_many_are_not() -> None:
    source = ActivationTensor(["base"], torch.arange(5.0)[:, None, None])
    with pytest.raises(ContractError, match=r"crosscoder.training.batch_tokens: expected at most 4 \(rows at hand\), found 5"):
        next(source.shuffled(5, torch.Generator(), 0, 4))
    assert next(source.shuffled(5, torch.Generator(), 0, 5)).shape == (5, 1, 1)


def test_skipped_batches_are_those_that_came_first() -> None:
    source = ActivationTensor(["base"], torch.arange(11.0)[:, None, None])
    batches = [source.shuffled(3, torch.Generator().manual_seed(0), 1, 11, skip) for skip in range(8)]
    wanted = [next(batches[0]) for _ in range(9)]
    for skip in range(1, 8):
        assert torch.equal(next(batches[skip]), wanted[skip]), skip
