"""What a feature does to the next token: read off its direction, and measured by a forward pass.

P prompts, S features of the set, V vocabulary, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from featdiff import stats
from featdiff.config.sets import DescribeParams
from featdiff.language.decode import next_token_probabilities
from featdiff.language.models import final_norm
from featdiff.language.session import Edit, PromptCache


@torch.inference_mode()
def direct_logits(
    model: PreTrainedModel, written_SD: Float[Tensor, "S D"], final_PD: Float[Tensor, "P D"]
) -> Float[Tensor, "S V"]:
    """Logits that a change of the residual stream gives through final norm and unembedding alone, less their mean over
    the vocabulary (direct logit attribution; Elhage et al. 2021, nostalgebraist 2020).

        Δ_v = u_v · (γ ⊙ d) · mean_p 1/rms(h_p)       γ: weight of the norm, h_p: ``final_PD``, the stream that enters it
    A LayerNorm takes the mean over D from both d and h_p first.
    Two approximations: blocks above the hooked layer see no change, and the norm's scale stays that of the unchanged
    stream, which is exact to first order for d ⟂ h and ignores that a large d lowers all other logits."""
    norm, unembedding_VD = final_norm(model.base_model), model.get_output_embeddings().weight.float()
    final_PD, written_SD = final_PD.float(), written_SD.to(unembedding_VD.device)
    if isinstance(norm, torch.nn.LayerNorm):
        final_PD, written_SD = (each - each.mean(-1, keepdim=True) for each in (final_PD, written_SD))
    scale = final_PD.square().mean(-1).rsqrt().mean()
    logits_SV = (written_SD * _gain(norm, unembedding_VD.shape[1]) * scale) @ unembedding_VD.T
    return (logits_SV - logits_SV.mean(-1, keepdim=True)).cpu()


def _gain(norm: torch.nn.Module, width: int) -> Float[Tensor, " D"]:
    """What ``norm`` multiplies each dimension by, beside its common scale: its weight, in Gemma 1 + its weight."""
    # Asked of the norm itself, of a stream whose mean is 0 and whose mean square is 1, so that it has no scale of its own.
    weight = next(norm.parameters())
    signs_D = torch.ones(width, dtype=weight.dtype, device=weight.device)
    signs_D[1::2] = -1
    gain_D: Tensor = (norm(signs_D) - norm(torch.zeros_like(signs_D))) * signs_D
    return gain_D.float()


def final_stream(model: PreTrainedModel, prompts: list[list[int]], pad: int, batch_size: int) -> Float[Tensor, "P D"]:
    """The residual stream that enters the final norm at every prompt's last token, longest prompt first."""
    found: list[Tensor] = []
    hook = final_norm(model.base_model).register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0][:, -1].float()))
    try:
        next_token_probabilities(model, prompts, pad=pad, batch_size=batch_size)
    finally:
        hook.remove()
    return torch.cat(found)


class Effects(NamedTuple):
    """What one feature does to the next token: token ids with their numbers, strongest first."""

    promoted: list[dict[str, Any]]
    """By direct logit attribution at f^max: ``token_id`` and ``logit``, those above 0."""
    suppressed: list[dict[str, Any]]
    more_likely: list[dict[str, Any]]
    """Measured: ``token_id``, mean probability ``before`` and ``after``, and ``change`` with its interval over prompts."""
    less_likely: list[dict[str, Any]]


def effects_of(
    direct_V: Float[Tensor, " V"],
    before_PV: Float[Tensor, "P V"],
    after_PV: Float[Tensor, "P V"],
    params: DescribeParams,
    seed: int,
) -> Effects:
    """The ``params.tokens`` tokens at either end, by direct attribution and by change of probability."""
    change_V = (after_PV - before_PV).mean(0)
    most = min(params.tokens, len(change_V))

    def ends(values_V: Tensor, sign: int) -> list[int]:
        order = (sign * values_V).argsort(descending=True, stable=True)[:most]
        return [v for v in order.tolist() if sign * values_V[v] > 0]

    def measured(v: int) -> dict[str, Any]:
        interval = stats.paired_difference(
            after_PV[:, v].numpy(),
            before_PV[:, v].numpy(),
            resamples=params.bootstrap,
            confidence=params.confidence,
            seed=seed,
        )
        levels = {"before": before_PV[:, v].mean().item(), "after": after_PV[:, v].mean().item()}
        return {"token_id": v, "change": interval, **levels}

    promoted, suppressed = ([{"token_id": v, "logit": direct_V[v].item()} for v in ends(direct_V, sign)] for sign in (1, -1))
    more_likely, less_likely = ([measured(v) for v in ends(change_V, sign)] for sign in (1, -1))
    return Effects(promoted, suppressed, more_likely, less_likely)


def next_token_effects(
    original: PreTrainedModel,
    tuned: PreTrainedModel,
    prompts: list[list[int]],
    written_SD: Float[Tensor, "S D"],
    edits: Mapping[int, Edit],
    pad: int,
    params: DescribeParams,
    seed: int,
) -> dict[int, Effects]:
    """Effects of every feature of ``edits`` on the token after each of ``prompts``, by feature id.

    They are measured in ``original``, under the edit that adds the feature alone, and told by direct attribution in ``tuned``.
    ``written_SD`` is what each feature writes there at its largest value."""
    size = params.batch_size
    direct_SV = direct_logits(tuned, written_SD, final_stream(tuned, prompts, pad, size))
    read = partial(next_token_probabilities, original, prompts, pad=pad, batch_size=size, shared=PromptCache())
    before_PV = read()
    return {
        k: effects_of(direct_V, before_PV, read(edit=edit), params, seed)
        for direct_V, (k, edit) in zip(direct_SV, edits.items(), strict=True)
    }
