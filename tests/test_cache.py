"""A cache that grows in place against the library's, which copies; and branches of it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from featdiff.language.cache import GrowingLayer, branch, croppable, new_cache, size
from featdiff.language.decode import _closed_up

H, K = 2, 3


def some(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(rows, H, tokens, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_and_which_rows_stay_is_as_in_the_librarys_layer(seed: int) -> None:
    """Random sequences of new tokens, rows that leave, change places or are repeated, tokens forgotten, and branches."""
    generator = torch.Generator().manual_seed(seed)
    pairs: list[tuple[Any, Any]] = [(GrowingLayer(), DynamicLayer())]
    rows = [4]
    for step in range(60):
        which = int(torch.randint(len(pairs), (1,), generator=generator))
        ours, theirs = pairs[which]
        action = int(torch.randint(6, (1,), generator=generator)) if theirs.is_initialized else 0
        if action <= 1:
            new = some(rows[which], int(torch.randint(1, 9, (1,), generator=generator)), seed * 100 + step)
            for mine, other in zip(ours.update(new, -new), theirs.update(new, -new), strict=True):
                assert mine.equal(other)
        elif action == 2:
            indices = torch.randint(rows[which], (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)
            for each in (ours, theirs):
                each.batch_select_indices(indices)
            rows[which] = len(indices)
        elif action == 3 and rows[which] > 1:
            order = torch.randperm(rows[which], generator=generator)[:-1]
            for each in (ours, theirs):
                each.batch_select_indices(order)
            rows[which] -= 1
        elif action == 4 and theirs.get_seq_length() > 2:
            for each in (ours, theirs):
                each.crop(-1)
        elif len(pairs) < 6:
            other = DynamicLayer()
            other.update(theirs.keys, theirs.values)
            pairs.append((ours.branch(), other))
            rows.append(rows[which])
        for mine, reference in pairs:
            if reference.is_initialized:
                assert mine.get_seq_length() == reference.get_seq_length()
                assert mine.keys.equal(reference.keys)
                assert mine.values.equal(reference.values)


def test_tokens_are_copied_a_bounded_number_of_times() -> None:
    layer, moves = GrowingLayer(), 0
    layer.update(some(1, 8, 0), some(1, 8, 0))
    for step in range(2000):
        before = layer._memory
        layer.update(some(1, 1, step), some(1, 1, step))
        moves += layer._memory is not before
    assert moves < 45  # room grows by an eighth: log(2000 / 128) / log(9 / 8), and eight steps of sixteen before


def test_a_whole_cache_branches_and_tells_its_size(make_model: Any) -> None:
    model = make_model(seed=90)
    cache = new_cache(model)
    assert croppable(cache)
    assert size(cache) == 0
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 4, 5]]), past_key_values=cache)
        other = branch(cache)
        model(input_ids=torch.tensor([[6]]), past_key_values=other)
    assert (cache.get_seq_length(), other.get_seq_length()) == (3, 4)
    assert size(cache) * 4 == size(other) * 3 > 0
    assert all(mine.keys.equal(theirs.keys[:, :, :3]) for mine, theirs in zip(cache.layers, other.layers, strict=True))


def test_rows_that_stay_keep_their_place_and_the_last_ones_fill_the_gaps() -> None:
    assert _closed_up([0, 2, 3, 6, 7]) == [0, 6, 2, 3, 7]
    assert _closed_up([0, 1]) == [0, 1]
    assert _closed_up([5]) == [5]
    assert _closed_up([]) == []
