"""Pretraining of the organism's base: packing, isolation of texts, schedule, loss."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from featdiff.artifacts.artifact import ContractError
from featdiff.config.models import Pretraining
from featdiff.language.models import character_tokenizer
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Text
from featdiff.training.pretrain import _loss, pack, pretrain
from tiny import ALPHABET, params_of, tiny_model

ROW = 24
WORDS = st.text("abc12", min_size=0, max_size=9)
TEXTS = st.lists(st.builds(lambda prompt, completion: Text(prompt, completion, "t"), WORDS, WORDS), min_size=1, max_size=30)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer([ALPHABET])


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.floats(0, 1, width=32))
def test_every_text_is_packed_whole_and_in_order_with_its_positions_and_weights(
    texts: list[Text], prompt_weight: float
) -> None:
    rows = pack(texts, tokenizer(), ROW, prompt_weight)
    pad, bos, eos = tokenizer().pad_token_id, tokenizer().bos_token_id, tokenizer().eos_token_id
    assert rows.ids_RT.shape == rows.positions_RT.shape == rows.weight_RT.shape == (len(rows.ids_RT), ROW)
    found, wanted_weight = [], []
    for ids, positions, weight in zip(rows.ids_RT.tolist(), rows.positions_RT.tolist(), rows.weight_RT.tolist(), strict=True):
        starts = [place for place, token in enumerate(ids) if token == bos]
        assert starts[0] == 0
        length = len(ids) - ids.count(pad)
        assert ids[length:] == [pad] * (ROW - length)
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            assert positions[start:end] == list(range(end - start))
            assert ids[end - 1] == eos
            found.append((ids[start:end], weight[start:end]))
        assert positions[length:] == list(range(ROW - length))
        assert weight[length:] == [0] * (ROW - length)
    for text in texts:
        prompt, completion = (
            tokenizer()(text.prompt)["input_ids"],
            tokenizer()(text.completion, add_special_tokens=False)["input_ids"],
        )
        weights = [0.0, *[prompt_weight] * (len(prompt) - 1), *[1.0] * (len(completion) + 1)]
        wanted_weight.append(([*prompt, *completion, eos], weights))
    assert found == wanted_weight


def test_no_row_could_have_taken_the_next_text() -> None:
    texts = [Text("a" * (i % 7), "b" * (i % 5), "t") for i in range(40)]
    rows = pack(texts, tokenizer(), ROW, 0.1)
    lengths = [len(text.prompt) + len(text.completion) + 2 for text in texts]
    wanted, used = 1, 0
    for length in lengths:
        if used + length > ROW:
            wanted, used = wanted + 1, 0
        used += length
    assert len(rows.ids_RT) == wanted


def test_a_text_longer_than_a_row_is_one_line() -> None:
    assert len(pack([Text("a" * 10, "b" * 12, "t")], tokenizer(), ROW, 0.1).ids_RT) == 1
    with pytest.raises(
        ContractError, match=r"base.pretraining.row_tokens: expected at least 25, found 24; raise it for 'aaaaaaaaaa'"
    ):
        pack([Text("a" * 10, "b" * 13, "t")], tokenizer(), ROW, 0.1)


def test_texts_of_a_row_do_not_see_each_other() -> None:
    model, _ = tiny_model()
    texts = [Text("add 1 2=", "3.", "t"), Text("rev ab=", "ba.", "t"), Text("q=", "1", "t"), Text("sort zx=", "<x,z>xz.", "t")]
    rows = pack(texts, tokenizer(), 32, 0.1)
    assert len(rows.ids_RT) > 1
    with torch.inference_mode():
        packed = model(input_ids=rows.ids_RT, position_ids=rows.positions_RT, use_cache=False).logits
        for row, ids in enumerate(rows.ids_RT.tolist()):
            starts = [place for place, token in enumerate(ids) if token == tokenizer().bos_token_id]
            for start, end in zip(starts, [*starts[1:], len(ids) - ids.count(tokenizer().pad_token_id)], strict=True):
                alone = model(input_ids=torch.tensor([ids[start:end]]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_weighted_mean_over_targets() -> None:
    model, _ = tiny_model()
    rows = pack([Text("ab", "c", "t"), Text("a", "", "t"), Text("b1", "22", "t")], tokenizer(), 16, 0.25)
    total, weights = 0.0, 0.0
    with torch.inference_mode():
        logits = model(input_ids=rows.ids_RT, position_ids=rows.positions_RT, use_cache=False).logits
        for row in range(len(rows.ids_RT)):
            for place in range(1, 16):
                weight = rows.weight_RT[row, place].item()
                target = functional.log_softmax(logits[row, place - 1], dim=-1)[rows.ids_RT[row, place]].item()
                total, weights = total - weight * target, weights + weight
        assert _loss(model, *rows).item() == pytest.approx(total / weights, rel=1e-4)
    assert weights == pytest.approx(0.25 * 5 + 6)


def params(**changes: Any) -> Pretraining:
    small = {
        "layers": 1,
        "d_model": 16,
        "d_mlp": 32,
        "heads": 2,
        "row_tokens": ROW,
        "batch_tokens": 8 * ROW,
        "steps": 30,
        "warmup_steps": 3,
        "threads": None,
    }
    return params_of(Pretraining, "base", "pretraining", **small | changes)


def corpus(count: int) -> list[Text]:
    return [Text(f"{'abc'[i % 3]}{i % 2}=", "abc"[i % 3] * 4, "t") for i in range(count)]


def test_a_short_run_learns_repeats_exactly_and_knows_every_character() -> None:
    logged: list[list[float]] = [[], []]
    first, again = (
        pretrain(corpus(900), params(), 0, lambda _, point, run=run: logged[run].append(point["loss"]), Scratch())[0]
        for run in (0, 1)
    )
    assert logged[0] == logged[1]
    assert logged[0][-1] < 0.75 * logged[0][0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    model, made = pretrain(corpus(900), params(steps=1), 0, lambda *_: None, Scratch())
    assert made.decode(made("xyz(w)7ab", add_special_tokens=False)["input_ids"]) == "xyz(w)7ab"
    assert not model.training


def test_it_takes_the_threads_it_is_given() -> None:
    before, seen = torch.get_num_threads(), set[int]()
    pretrain(corpus(900), params(steps=1, threads=before + 1), 0, lambda *_: seen.add(torch.get_num_threads()), Scratch())
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert seen == {before + 1}
    assert after == before, "what comes after in the process would sum in another order"


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = {}
    schedule = params(steps=75, warmup_steps=10, decay_share=0.5, lr=1e-3, batch_tokens=ROW)
    pretrain(corpus(900), schedule, 0, lambda step, point: rates.setdefault(step, point["learning_rate"]), Scratch())
    assert rates == pytest.approx({1: 0.0, 25: 1e-3, 50: 26 / 38 * 1e-3, 75: 1 / 38 * 1e-3})


def test_too_few_texts_are_one_line() -> None:
    with pytest.raises(
        ContractError, match=r"params.yaml: prepare.pretrain.texts: expected about [0-9]+ for base.pretraining.steps, found 20"
    ):
        pretrain(corpus(20), params(), 0, lambda *_: None, Scratch())
