"""Delta features: a part of the dictionary must explain, alone, how the other models differ from the first.

After Delta-Crosscoder (arXiv 2603.04426), from its abstract and public descriptions: BatchTopK, delta features beside shared
ones, and a loss on the difference between the models. Ours: one k for both parts, where the source gives each its own (one
threshold says what is active at inference); the difference in the units of the reconstruction; no contrastive pairs of texts.
B batch, M models, the first of which is the original, D residual width, F features, E kept entries.
"""

from __future__ import annotations

from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor

from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.losses.batchtopk import BatchTopK, Kept
from featdiff.crosscoder.losses.loss import Step, part_of, rebuild, squared
from featdiff.crosscoder.model import Crosscoder


def delta_loss(x_BMD: Float[Tensor, "B M D"], rebuilt_BMD: Float[Tensor, "B M D"]) -> Float[Tensor, ""]:
    """Mean over tokens of Σ_{m>0} ‖(x^m − x^0) − (x̂^m − x̂^0)‖², where x̂ is ``rebuilt_BMD``."""
    return squared(x_BMD[:, 1:] - x_BMD[:, :1], rebuilt_BMD[:, 1:] - rebuilt_BMD[:, :1])


class Delta(BatchTopK):
    """BatchTopK, and ``delta_weight`` times :func:`delta_loss` of the first ``delta_share`` of the features as the batch's
    cutoff left them, divided by the same variance as the error.

    Delta features take part in the reconstruction as all others do. Raises ContractError where there would be none."""

    def __init__(self, crosscoder: Crosscoder, params: CrosscoderTraining, variance: float, accelerator: Accelerator) -> None:
        super().__init__(crosscoder, params, variance, accelerator)
        self.features = int(params.delta_share * crosscoder.n_features)
        if not self.features:
            expected = f"a share of at least one of {crosscoder.n_features} features"
            raise ContractError("params.yaml", "crosscoder.training.delta_share", expected, params.delta_share, "change it")

    def _step(self, x_BMD: Float[Tensor, "B M D"], kept: Kept, dead_F: Bool[Tensor, " F"]) -> Step:
        step = super()._step(x_BMD, kept, dead_F)
        delta_E = kept.places_E[kept.places_E % self.crosscoder.n_features < self.features]
        _, (rebuilt_BMD,) = rebuild(self.crosscoder, x_BMD, part_of(kept.f_BF, delta_E))
        difference = delta_loss(x_BMD, rebuilt_BMD + self.crosscoder.b_dec) / self.variance
        return step._replace(total=step.total + self.params.delta_weight * difference)
