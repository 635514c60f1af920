"""A model in two parts: texts are read once up to the layer of the edits, and every row above it."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from featdiff.language.decode import generate_under
from featdiff.language.models import block, blocks
from featdiff.language.session import PromptCache, Session
from featdiff.language.stream import Stream, halves
from test_decode import NEW, PROMPTS, Borrow, Push

SIZES = {"vocab_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2}
GROUPED = SIZES | {"num_key_value_heads": 1}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, GROUPED),
    "mistral, a window of 4": (MistralForCausalLM, GROUPED | {"sliding_window": 4, "head_dim": 8}),
    "gemma2, every other layer with a window": (Gemma2ForCausalLM, GROUPED | {"sliding_window": 4, "head_dim": 8}),
    "qwen2": (Qwen2ForCausalLM, GROUPED),
    "qwen3": (Qwen3ForCausalLM, GROUPED | {"head_dim": 8}),
    "gpt2": (GPT2LMHeadModel, {"vocab_size": 24, "n_embd": 16, "n_layer": 4, "n_head": 2}),
    "neox": (GPTNeoXForCausalLM, SIZES),
}


def made(kind: str, seed: int = 0) -> Any:
    cls, sizes = KINDS[kind]
    torch.manual_seed(seed)
    return cls(cls.config_class(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def pushes(layer: int) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    places = ("prompt_last", "generated", "prompt_last", "generated")
    return [None, *(Push(torch.randn(16, generator=generator) * 3, place, layer) for place in places)]


def answers(model: Any, edits: list[Any], **how: Any) -> list[list[list[int]]]:
    usual = {"max_new_tokens": NEW, "ends": [2], "pad": 0, "batch_size": 100}
    return generate_under(edits, model, PROMPTS, **usual | how)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_edits_together_give_the_answers_of_each_alone(kind: str, layer: int) -> None:
    model = made(kind)
    assert halves(model, layer) is not None
    edits = [*pushes(layer), Borrow(made(kind, 1), everywhere=False, layer=layer)]
    alone = [answers(model, [edit])[0] for edit in edits]
    assert len({str(each) for each in alone}) > 2
    assert answers(model, edits) == alone
    assert answers(model, edits, shared=PromptCache()) == alone
    likely = {tuple(prompt): [alone[0][i], alone[1][i]] for i, prompt in enumerate(PROMPTS)}
    assert answers(model, edits, shared=PromptCache(likely)) == alone


def test_rows_that_have_the_same_text_are_read_once_below_the_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = made("qwen3"), list[int]()
    below = Stream.below

    def counted(self: Stream, trunk: Any, ids_UT: Any, *rest: Any) -> Any:
        read.append(len(ids_UT))
        return below(self, trunk, ids_UT, *rest)

    assert halves(model, 1)
    monkeypatch.setattr(Stream, "below", counted)
    same = [Push(torch.zeros(16), "generated") for _ in range(6)]
    answers(model, same)
    assert max(read) == len(PROMPTS)
    read.clear()
    answers(model, pushes(1))
    assert len(PROMPTS) == read[0] < max(read) < len(PROMPTS) * 5


def test_an_edit_alone_reads_as_before() -> None:
    model = made("qwen3")
    assert Session(model, [pushes(1)[1]]).halves is None
    assert Session(model, [None, None]).halves is None
    assert Session(model, pushes(1)).halves is not None


def test_a_model_whose_upper_blocks_read_more_than_the_residual_stream_is_read_whole() -> None:
    """As one whose later layers take over the keys of earlier ones."""
    model = made("qwen3")
    last, forward = blocks(model.base_model)[3], blocks(model.base_model)[3].forward

    def reads_below(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        keys = kwargs["past_key_values"].layers[0].keys
        return forward(hidden_states + keys.mean(), *args, **kwargs)

    last.forward = reads_below
    assert halves(model, 2) is None
    edits = pushes(2)
    assert answers(model, edits) == [answers(model, [edit])[0] for edit in edits]


def test_the_model_itself_stays_as_it_is() -> None:
    model = made("llama")
    before = {name: module.forward for name, module in model.named_modules()}
    hooks = len(block(model, 2)._forward_hooks)
    answers(model, pushes(2))
    assert before == {name: module.forward for name, module in model.named_modules()}
    assert hooks == len(block(model, 2)._forward_hooks)
