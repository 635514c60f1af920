"""Both ways of finding few among many give the same, and it is what the words say."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featdiff.crosscoder import selection

ROUND = st.sampled_from([-1.5, 0.0, 0.25, 0.25, 2.0, float("nan")])
"""Few values, so that many are equal."""


BOTH = pytest.mark.parametrize("on_cpu", [True, False])
"""By NumPy, and as on other devices."""


@contextmanager
def way(on_cpu: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_on_cpu", lambda tensor: on_cpu)
        yield


@BOTH
@settings(deadline=None)
@given(arrays(np.float32, (7, 5), elements=ROUND), arrays(np.float32, 5, elements=ROUND))
def test_places_are_those_of_a_loop(on_cpu: bool, values: np.ndarray, floors: np.ndarray) -> None:
    wanted = [i for i, value in enumerate(values.flatten().tolist()) if value > floors[i % 5]]
    with way(on_cpu):
        assert selection.places(selection.above(torch.from_numpy(values), torch.from_numpy(floors))).tolist() == wanted
        alike = [i for i, value in enumerate(values.flatten().tolist()) if value > 0.25]
        assert selection.places(selection.above(torch.from_numpy(values), 0.25)).tolist() == alike


@BOTH
@settings(deadline=None)
@given(arrays(np.float32, (4, 9), elements=st.floats(0, 9, width=32)), st.integers(1, 9))
def test_the_largest_of_rows(on_cpu: bool, values: np.ndarray, count: int) -> None:
    wanted = [[sorted(row, reverse=True)[count - 1]] for row in values.tolist()]
    with way(on_cpu):
        assert selection.largest_of_rows(torch.from_numpy(values), count).tolist() == wanted


@BOTH
@settings(deadline=None)
@given(st.lists(st.integers(0, 11), max_size=60), st.sampled_from([12, 1 << 16, 1 << 17]))
def test_order_is_stable(on_cpu: bool, numbers: list[int], top: int) -> None:
    numbers = [*numbers, top - 1, 0, top - 1]
    wanted = sorted(range(len(numbers)), key=lambda place: numbers[place])
    with way(on_cpu):
        assert selection.order_of(torch.tensor(numbers), top).tolist() == wanted
