"""SAELens' own trainer on concatenated models: its step with its bookkeeping of dead features, its clipping and its Adam."""

from __future__ import annotations

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from pace import Paced, case, explained, planted_rows, say, sparse_bias

given = case()
inputs, features, batch = int(given["models"] * given["width"]), int(given["features"]), int(given["batch"])
rows = planted_rows(inputs, int(given["rows"]))
held = len(rows) // 10
torch.manual_seed(0)
sae: StandardTrainingSAE | BatchTopKTrainingSAE
if given.get("l1"):
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=inputs, d_sae=features, l1_coefficient=given["l1"]))
    if "active" in given:
        with torch.no_grad():
            sae.b_enc.fill_(sparse_bias(rows[:512], sae.W_enc, given["active"]))
else:
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=inputs, d_sae=features, k=given["k"]))
paced = Paced(rows[:-held], batch, int(given["block"]))
config = SAETrainerConfig(
    total_training_samples=int(given["steps"]) * batch,
    train_batch_size_samples=batch,
    lr=given["lr"],
    lr_end=given["lr"],
    dead_feature_window=int(given["dead_after"]) // batch,
)
SAETrainer(config, sae, paced).fit()
paced.finish()
with torch.no_grad():
    sae.eval()
    code_BF = sae.encode(rows[-held:])
    fve = explained(rows[-held:], sae.decode(code_BF))
say({"fve": fve, "l0": float((code_BF > 0).sum(1).float().mean())})
