"""What stages import, imported once before they are forked."""

import featdiff.analysis.describe
import featdiff.analysis.dynamics
import featdiff.intervention.sensitivity
import featdiff.training.grpo
import featdiff.training.imported
import featdiff.training.pretrain
import featdiff.training.sft  # noqa: F401
