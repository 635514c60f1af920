"""The same stream (harvest.py) by nnsight, which stops the forward pass where it was read."""

from __future__ import annotations

from nnsight import NNsight
from torch import Tensor

import harvest_model
from pace import case, timed

given = case()
BATCH = int(given["batch"])
texts, sums = harvest_model.texts(int(given["texts"])), [0.0]
model = NNsight(harvest_model.model())


def read(given: dict[str, Tensor]) -> Tensor:
    with model.trace(**given, use_cache=False) as tracer:
        resid_BTD = model.model.layers[harvest_model.LAYER - 1].output.save()
        tracer.stop()
    return resid_BTD


def stopped() -> None:
    sums[0] = harvest_model.total(texts, BATCH, read)


timed(stopped, int(given["block"]), lambda: {"tokens": sum(len(text) - 1 for text in texts), "sum": sums[0]})
