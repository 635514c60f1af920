"""The optimizer's step against PyTorch's own pieces, one after the other."""

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from featdiff.crosscoder.descent import Descent
from featdiff.crosscoder.model import Crosscoder
from tiny import random_crosscoder

MODELS = ("base", "sft", "grpo")


def objective(crosscoder: Crosscoder, step: int, size: float) -> Tensor:
    x = torch.randn(8, len(MODELS), crosscoder.d_model, generator=torch.Generator().manual_seed(step))
    return size * (x - crosscoder.decode(crosscoder.preactivations(x))).square().mean()


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_a_step_is_the_clip_and_adam_of_torch(size: float) -> None:
    ours, theirs = random_crosscoder(MODELS), random_crosscoder(MODELS)
    descent, adam = Descent(ours, 0.01, Accelerator()), torch.optim.Adam(theirs.parameters(), lr=0.01, foreach=False)
    norms = []
    for step in range(1, 8):
        loss = objective(ours, step, size)
        loss.backward()
        descent.step(step, loss)
        objective(theirs, step, size).backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).item())
        adam.step()
        adam.zero_grad()
        number, told = descent.told()
        assert number == step
        assert told == pytest.approx({"loss": loss.item(), "grad_norm": norms[-1], "learning_rate": 0.01}, rel=1e-5)
    assert (min(norms) > 1) == (size > 1), "clipped in one case alone"
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=1e-4, atol=1e-5, msg=name)
        assert weight.grad is None
    assert all(weight.is_contiguous() for weight in descent.weights), "as a fused kernel wants them"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_from_the_first_step_that_is_not_finite_on_nothing_changes(broken: float) -> None:
    crosscoder = random_crosscoder(MODELS)
    descent = Descent(crosscoder, 0.01, Accelerator())
    for step in range(1, 6):
        before = {name: weight.detach().clone() for name, weight in crosscoder.named_parameters()}
        moments = [state["exp_avg"].clone() for state in descent.optimizer.state.values()]
        loss = objective(crosscoder, step, broken if step == 3 else 1.0)
        loss.backward()
        descent.step(step, loss)
        same = all(torch.equal(weight, before[name]) for name, weight in crosscoder.named_parameters())
        assert same == (step >= 3)
        if step >= 3:
            assert all(map(torch.equal, moments, [state["exp_avg"] for state in descent.optimizer.state.values()]))
    number, told = descent.told()
    assert number == 3
    assert not torch.isfinite(torch.tensor(told["loss"]))
