"""The limit of a crosscoder step on CPUs: the encoder's matrix product alone, which no exact method is spared."""

import torch

from pace import case, timed

given = case()
x_BI = torch.randn(int(given["batch"]), int(given["models"] * given["width"]))
W_IF = torch.randn(x_BI.shape[1], int(given["features"]))
out_BF = torch.empty(len(x_BI), W_IF.shape[1])
timed(lambda: torch.mm(x_BI, W_IF, out=out_BF), int(given["block"]))
