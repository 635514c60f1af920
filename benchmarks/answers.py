"""The same questions under many edits of the residual stream: as `intervene` asks them, and the usual way.

The usual way is the library's ``generate``, once for each edit, with a hook that adds a vector at the last token of the prompt.
Both read the tuned model and the report questions of the study in this checkout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featdiff.config.params import load_study
from featdiff.crosscoder.edits import Change
from featdiff.language.decode import batches, generate_under
from featdiff.language.models import block, encode_prompts, end_tokens, left_pad, load_model, load_tokenizer, resolve_layer
from featdiff.language.session import PromptCache
from featdiff.processes.memory import keep_freed
from featdiff.tasks.task import first_of_each, load_samples
from pace import case, timed

asking = load_study().intervene
LIMIT, BATCH = asking.max_new_tokens, asking.batch_size
given, way = case(), sys.argv[2]
model, tokenizer = load_model(Path("models/grpo")), load_tokenizer(Path("models/grpo"))
FAMILIES = ("reverse", "double", "last", "shift")
reported = [sample for sample in load_samples(Path("data"), "eval") if sample.split == "report" and sample.task in FAMILIES]
samples = first_of_each(reported, int(given["questions"]) // len(FAMILIES))
asked = encode_prompts(tokenizer, samples, chat=False)
layer, generator = resolve_layer(model, "middle"), torch.Generator().manual_seed(0)
pushes_ED = torch.randn(int(given["edits"]), model.config.hidden_size, generator=generator)
answers: list[list[list[int]]] = []


@dataclass
class Push(Change):
    """The same vector at every token."""

    vector_D: Tensor

    def delta(self, resid_BTD: Tensor, _donor: Tensor | None) -> Tensor:
        return self.vector_D.expand_as(resid_BTD)


def ours() -> None:
    edits = [Push(layer, "prompt_last", 1.0, push_D) for push_D in pushes_ED]
    answers[:] = generate_under(
        edits,
        model,
        asked,
        max_new_tokens=LIMIT,
        ends=end_tokens(model, tokenizer),
        pad=tokenizer.pad_token_id,
        batch_size=BATCH,
        shared=PromptCache(),
    )


@torch.inference_mode()
def naive() -> None:
    answers.clear()
    for push_D in pushes_ED:

        def push(_module: torch.nn.Module, _inputs: object, output: Tensor, push_D: Tensor = push_D) -> Tensor:
            return output if output.shape[1] == 1 else torch.cat([output[:, :-1], output[:, -1:] + push_D], dim=1)

        under: list[list[int]] = [[] for _ in asked]
        hook = block(model, layer).register_forward_hook(push)
        for rows in batches([len(ids) for ids in asked], BATCH):
            ids_BT, mask_BT, _ = left_pad([asked[row] for row in rows], tokenizer.pad_token_id, model.device)
            found_BT = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=LIMIT, do_sample=False)
            for row, ids in zip(rows, found_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
                under[row] = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        hook.remove()
        answers.append(under)


if way == "featdiff":
    keep_freed()  # as in every stage
timed({"featdiff": ours, "generate with a hook": naive}[way], int(given["block"]), lambda: {"answers": answers})
