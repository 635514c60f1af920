"""Every loss by the name that ``Fit.loss`` of params.yaml gives it."""

from featdiff.crosscoder.losses.batchtopk import BatchTopK
from featdiff.crosscoder.losses.dedicated import Dedicated
from featdiff.crosscoder.losses.delta import Delta
from featdiff.crosscoder.losses.frozen import Frozen
from featdiff.crosscoder.losses.l1 import L1
from featdiff.crosscoder.losses.loss import Loss

LOSSES: dict[str, type[Loss]] = {
    "batchtopk": BatchTopK,
    "l1": L1,
    "dedicated": Dedicated,
    "delta": Delta,
    "frozen": Frozen,
}
