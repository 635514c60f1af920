"""The sparse coder of eai-sparsify on concatenated models, stepped as its trainer does: unit decoder rows before, parallel
gradients out after, counting of dead features, the auxiliary loss; Adam. Its trainer does not clip, and wants a language model.
Without Triton, as on CPUs, it decodes by embedding_bag."""

from __future__ import annotations

import torch
from sparsify import SparseCoder, SparseCoderConfig

from pace import Paced, case, explained, planted_rows, say

given = case()
inputs, features, batch = int(given["models"] * given["width"]), int(given["features"]), int(given["batch"])
rows = planted_rows(inputs, int(given["rows"]))
held = len(rows) // 10
torch.manual_seed(0)
coder = SparseCoder(inputs, SparseCoderConfig(num_latents=features, k=int(given["k"])), "cpu", torch.float32)
optimizer = torch.optim.Adam(coder.parameters(), lr=given["lr"])
idle_F = torch.zeros(features, dtype=torch.long)
paced = Paced(rows[:-held], batch, int(given["block"]))
for _ in range(int(given["steps"])):
    x_BI = next(paced)
    coder.set_decoder_norm_to_unit_norm()
    out = coder(x=x_BI, dead_mask=idle_F > int(given["dead_after"]))
    (out.fvu + out.auxk_loss / 32).backward()
    float(out.fvu.detach()), float(out.auxk_loss.detach())  # its trainer reads both in every step
    coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    idle_F += batch
    idle_F[out.latent_indices.flatten().unique()] = 0
paced.finish()
with torch.no_grad():
    found = coder(rows[-held:])
    fve = explained(rows[-held:], found.sae_out)
say({"fve": fve, "l0": given["k"]})
