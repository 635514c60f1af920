"""One step of the optimizer: gradients of all processes, clipped to the norm 1, Adam; and nothing at all from the first loss or
norm on that is not finite."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn


class Descent:
    """Adam on the parameters of ``module``. ``optimizer`` holds its state.

    No step waits for the device: the host asks for :meth:`told` where it reads numbers anyway. Since a step that is not finite
    changes nothing, and none after it, no checkpoint that is made after asking can hold what came of one."""

    def __init__(self, module: nn.Module, lr: float, accelerator: Accelerator) -> None:
        self.parameters, self.accelerator = list(module.parameters()), accelerator
        # A fused kernel copies what is not contiguous, there and back. So it gets views that are: the same numbers in memory,
        # with the dimensions in the order in which they lie there.
        self._orders = [sorted(range(weight.dim()), key=weight.stride, reverse=True) for weight in self.parameters]
        self.weights = [
            nn.Parameter(weight.detach().permute(order)) for weight, order in zip(self.parameters, self._orders, strict=True)
        ]
        self.optimizer = torch.optim.Adam(self.weights, lr=lr, fused=True)
        self._told: Float[Tensor, " 4"] = torch.zeros(4, device=accelerator.device)

    def step(self, number: int, loss: Float[Tensor, ""]) -> None:
        """Go down the gradient that ``loss`` left in the parameters, and take it away."""
        gradients = []
        for weight, parameter, order in zip(self.weights, self.parameters, self._orders, strict=True):
            if parameter.grad is not None:
                weight.grad, parameter.grad = parameter.grad.permute(order), None
                # Reduced before the clip: all processes clip by the norm of one gradient and stay equal.
                if self.accelerator.num_processes > 1:
                    weight.grad = self.accelerator.reduce(weight.grad, "mean")
                gradients.append(weight.grad)
        norm, rate = torch.nn.utils.get_total_norm(gradients), self.optimizer.param_groups[0]["lr"]
        now = torch.stack([torch.full_like(norm, number), loss.detach(), norm, torch.full_like(norm, rate)])
        self._told = torch.where(self._told.isfinite().all(), now, self._told)
        # Optimizers read both for mixed precision. It divides the gradients as it reads them, so that clipping needs
        # no pass of its own; and it leaves everything as it is where it is told that something was not finite.
        self.optimizer.grad_scale = (norm + 1e-6).clamp(min=1.0)  # type: ignore[attr-defined]
        self.optimizer.found_inf = 1.0 - self._told.isfinite().all().float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def told(self) -> tuple[int, dict[str, float]]:
        """Number, loss, norm of the gradient before the clip and learning rate of the last step, or of the first one that was
        not finite."""
        number, loss, norm, rate = self._told.tolist()
        return int(number), {"loss": loss, "grad_norm": norm, "learning_rate": rate}
