"""The same stream (harvest.py) by nnsight, which stops the forward pass where it was read."""

from __future__ import annotations

import torch
from nnsight import NNsight

import harvest_model
from pace import case, timed

given = case()
BATCH = int(given["batch"])
texts, sums = harvest_model.texts(int(given["texts"])), [0.0]
model = NNsight(harvest_model.model())


@torch.inference_mode()
def stopped() -> None:
    found = []
    for low in range(0, len(texts), BATCH):
        some = texts[low : low + BATCH]
        with model.trace(**harvest_model.padded(some), use_cache=False) as tracer:
            resid_BTD = model.model.layers[harvest_model.LAYER - 1].output.save()
            tracer.stop()
        found += harvest_model.kept(resid_BTD, some)
    sums[0] = float(torch.cat(found).double().sum())


timed(stopped, int(given["block"]), lambda: {"tokens": sum(len(text) - 1 for text in texts), "sum": sums[0]})
