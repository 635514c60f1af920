"""Direct logit attribution against the model's own head, and measured effects against plain forward passes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from featdiff.config.sets import DescribeParams
from featdiff.crosscoder.edits import Editor
from featdiff.description.next_token import direct_logits, effects_of, final_stream, next_token_effects
from featdiff.language.decode import next_token_probabilities
from featdiff.language.models import block, final_norm
from featdiff.language.session import PromptCache
from tiny import SIZES, params_of, random_crosscoder, random_model, tiny_model

PROMPTS = ["rev abcd=", "q=", "sort zx=", "12+7="]


def params(**changes: Any) -> DescribeParams:
    return params_of(DescribeParams, "describe", **{"tokens": 3, "bootstrap": 200, "batch_size": 3} | changes)


def uneven_norm(seed: int) -> tuple[Any, Any]:
    """A tiny model whose final norm weighs every dimension differently."""
    model, tokenizer = tiny_model(seed)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(16, generator=torch.Generator().manual_seed(seed)) + 0.5)
    return model, tokenizer


def prompts_of(tokenizer: Any) -> list[list[int]]:
    return tokenizer(PROMPTS)["input_ids"]


def alone(model: Any, ids: list[int], change_D: Tensor | None = None) -> Tensor:
    """Next-token probabilities of one prompt without cache and padding, its last token's stream after block 1 changed."""

    def hook(_module: Any, _inputs: Any, resid: Tensor) -> Tensor:
        if change_D is not None:
            resid[:, -1] += change_D
        return resid

    handle = block(model, 1).register_forward_hook(hook)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    handle.remove()
    return logits.softmax(-1)


def uneven(kind: str) -> PreTrainedModel:
    """A model of another kind whose norm has weights that differ."""
    model = random_model(kind)
    with torch.no_grad():
        for weight in final_norm(model.base_model).parameters():
            weight.uniform_(0.5, 2.0)
        model.get_output_embeddings().weight.normal_()
    return model


@pytest.mark.parametrize("kind", [None, *SIZES])
def test_direct_attribution_is_the_slope_of_the_head_where_the_norm_keeps_its_scale(kind: str | None) -> None:
    model, generator = uneven_norm(0)[0] if kind is None else uneven(kind), torch.Generator().manual_seed(1)
    final_PD = torch.randn(3, 16, generator=generator) * torch.tensor([[0.5], [1.0], [5.0]])
    span_DP = torch.linalg.qr(torch.cat([final_PD, torch.ones(1, 16)]).T).Q  # and the mean, which a LayerNorm takes out
    written_SD = torch.randn(2, 16, generator=generator)
    written_SD -= written_SD @ span_DP @ span_DP.T  # across every stream, so that a small change leaves the scale alone

    def head(stream_PD: Tensor) -> Tensor:
        with torch.no_grad():
            return model.get_output_embeddings()(final_norm(model.base_model)(stream_PD))

    step = 2e-3
    moved_SV = torch.stack([(head(final_PD + step * d) - head(final_PD - step * d)).mean(0) / (2 * step) for d in written_SD])
    wanted_SV = moved_SV - moved_SV.mean(-1, keepdim=True)
    assert wanted_SV.abs().max() > 0.5
    torch.testing.assert_close(direct_logits(model, written_SD, final_PD), wanted_SV, rtol=1e-2, atol=1e-2)


def test_probabilities_are_those_of_each_prompt_alone_every_time() -> None:
    model, tokenizer = tiny_model(0)
    prompts = prompts_of(tokenizer)
    wanted, shared = torch.stack([alone(model, ids) for ids in prompts]), PromptCache()
    for kept in (None, shared, shared):
        found = next_token_probabilities(model, prompts, pad=tokenizer.pad_token_id, batch_size=3, shared=kept)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_prompt_of_one_token_has_nothing_to_read_first() -> None:
    model, tokenizer = tiny_model(0)
    made = next_token_probabilities(model, [[7]], pad=tokenizer.pad_token_id, batch_size=3, shared=PromptCache())
    torch.testing.assert_close(made[0], alone(model, [7]), rtol=1e-3, atol=1e-5)


def test_what_enters_the_norm_gives_the_probabilities() -> None:
    model, tokenizer = uneven_norm(1)
    prompts, pad = sorted(prompts_of(tokenizer), key=len, reverse=True), tokenizer.pad_token_id
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(final_stream(model, prompts, pad, 3)))
    found = next_token_probabilities(model, prompts, pad=pad, batch_size=3)
    torch.testing.assert_close(logits.softmax(-1), found, rtol=1e-3, atol=1e-5)


def test_measured_effects_are_those_of_one_feature_at_its_largest_value_at_the_last_token_of_the_original() -> None:
    (original, tokenizer), (tuned, _) = tiny_model(0), uneven_norm(1)
    coder, largest = random_crosscoder(d_model=16, n_features=8), torch.linspace(1, 3, 8)
    editor = Editor(coder, "base", 1, torch.device("cpu"), largest, donor_name="grpo")
    edits = {k: editor.edit("add", [k], "prompt_last", 1.0) for k in (5, 2)}
    prompts, written = prompts_of(tokenizer), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    made = next_token_effects(original, tuned, prompts, written, edits, tokenizer.pad_token_id, params(), 0)
    before = torch.stack([alone(original, ids) for ids in prompts])
    final = final_stream(tuned, prompts, tokenizer.pad_token_id, 4)
    for k, direct_V in zip((5, 2), direct_logits(tuned, written, final), strict=True):
        direction = coder.W_dec[k, coder.slot("base")] / coder.scale[coder.slot("base")]
        after = torch.stack([alone(original, ids, largest[k] * direction) for ids in prompts])
        change = (after - before).mean(0)
        assert change.abs().max() > 0.01
        effects = made[k]
        assert [row["token_id"] for row in effects.more_likely] == change.topk(3).indices.tolist()
        assert [row["token_id"] for row in effects.less_likely] == (-change).topk(3).indices.tolist()
        for row in effects.more_likely + effects.less_likely:
            v = row["token_id"]
            assert row["change"].value == pytest.approx(change[v].item(), rel=1e-3, abs=1e-5)
            assert (row["before"], row["after"]) == pytest.approx(
                (before[:, v].mean().item(), after[:, v].mean().item()), rel=1e-3
            )
            assert row["change"].low <= row["change"].value <= row["change"].high
            assert row["change"].n == len(prompts)
        assert [row["token_id"] for row in effects.promoted] == direct_V.topk(3).indices.tolist()
        assert effects.suppressed[0]["logit"] == pytest.approx(direct_V.min().item(), rel=1e-4)


def test_tokens_that_do_not_move_that_way_are_not_named() -> None:
    before = torch.tensor([[0.2, 0.3, 0.5]])
    effects = effects_of(torch.tensor([0.0, 2.0, -1.0]), before, torch.tensor([[0.3, 0.3, 0.4]]), params(), 0)
    assert [row["token_id"] for row in effects.more_likely] == [0]
    assert [row["token_id"] for row in effects.less_likely] == [2]
    assert (effects.promoted, effects.suppressed) == ([{"token_id": 1, "logit": 2.0}], [{"token_id": 2, "logit": -1.0}])
    still = effects_of(torch.zeros(3), before, before, params(), 0)
    assert still == ([], [], [], [])
