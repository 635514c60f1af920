"""Decoding against the plainest reference there is: one prompt at a time, full forward passes, no cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from featdiff.artifacts.artifact import ContractError
from featdiff.crosscoder.edits import Editor
from featdiff.language.decode import (
    batches,
    generate,
    generate_under,
    next_token_probabilities,
    questions_at_once,
    score_options,
)
from featdiff.language.models import block, left_pad
from featdiff.language.session import PromptCache, Session
from featdiff.language.stream import Stream
from featdiff.processes.memory import PROMPT_CACHE, SHARE
from tiny import random_crosscoder

PROMPTS = [
    [1, 4, 5, 6, 7],
    [1, 8],
    [1, 9, 10, 11, 4, 4, 5, 12],
    [1],
    [1, 12, 12],
    [1, 5, 6, 8, 9],
    [1, 7, 4],
    [1, 11, 8, 4, 6, 6],
]
NEW = 14


@dataclass
class Push:
    """Adds ``vector`` [D] to the residual stream at the last prompt token or at every later one."""

    vector: Tensor
    positions: str = "prompt_last"
    layer: int = 1
    donor: Any = None
    whole_prompt: bool = False
    passes: list[bool] = field(default_factory=list)

    @property
    def after_prompt(self) -> bool:
        return self.positions == "generated"

    def __call__(self, resid_BTD: Tensor, donor_BTD: Tensor | None, *, prompt: bool) -> Tensor:
        self.passes.append(prompt)
        edited = resid_BTD.clone()
        if self.positions == "prompt_last" and prompt:
            edited[:, -1] += self.vector
        if self.positions == "generated" and not prompt:
            edited += self.vector
        return edited


@dataclass
class Borrow:
    """Puts the donor's residual stream in place of the model's, everywhere or at generated tokens."""

    donor: Any
    everywhere: bool = True
    layer: int = 1
    after_prompt: bool = True

    @property
    def whole_prompt(self) -> bool:
        return self.everywhere

    def __call__(self, resid_BTD: Tensor, donor_BTD: Tensor | None, *, prompt: bool) -> Tensor:
        assert donor_BTD is not None
        assert donor_BTD.shape == resid_BTD.shape
        return donor_BTD if self.everywhere or not prompt else resid_BTD


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(seed=90)


@pytest.fixture(scope="module")
def other(make_model: Callable[..., Any]) -> Any:
    return make_model(seed=87)


@contextmanager
def replaced(model: Any, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = block(model, layer).register_forward_hook(lambda _module, _inputs, output: change(output))
    yield
    handle.remove()


Change = Callable[[Tensor, int, list[int]], Tensor]


@torch.inference_mode()
def by_full_passes(model: Any, prompt: list[int], eos: int, change: Change | None = None) -> list[int]:
    """Greedy answer, each token from a forward pass over everything before it. ``change`` gets the residual stream
    after block 1, the length of the prompt and all tokens."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW:
        now = ids
        with replaced(model, 1, lambda resid, now=now: change(resid, len(prompt), now) if change else resid):
            chosen = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if chosen == eos:
            break
        ids = [*ids, chosen]
    return ids[len(prompt) :]


@pytest.fixture
def ask(tokenizer: Any) -> Callable[..., list[list[int]]]:
    def ask(model: Any, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
        usual = {"max_new_tokens": NEW, "ends": [tokenizer.eos_token_id], "pad": tokenizer.pad_token_id, "batch_size": 3}
        return generate(model, prompts, **usual | settings)

    return ask


def test_greedy_answers_are_those_of_the_library_and_of_full_passes(model: Any, tokenizer: Any, ask: Any) -> None:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids, mask, _ = left_pad(PROMPTS, pad, torch.device("cpu"))
    settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": pad}
    with torch.inference_mode():
        rows = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()
    theirs = [row[: row.index(eos)] if eos in row else row for row in rows]
    ours = ask(model)
    assert ours == theirs == [by_full_passes(model, prompt, eos) for prompt in PROMPTS]
    lengths = {len(answer) for answer in ours}
    assert max(lengths) == NEW  # the fixture shows both ends of an answer: cut off, and EOS after some tokens
    assert any(0 < length < NEW for length in lengths)


@pytest.mark.parametrize("batch_size", [1, 2, 8, 100])
def test_neither_batch_nor_padding_nor_order_matters(model: Any, ask: Any, batch_size: int) -> None:
    expected = ask(model)
    assert ask(model, batch_size=batch_size) == expected
    assert ask(model, PROMPTS[::-1], batch_size=batch_size) == expected[::-1]


def test_length_limits_and_nothing_to_answer(model: Any, ask: Any) -> None:
    expected = ask(model)
    assert ask(model, max_new_tokens=3) == [answer[:3] for answer in expected]
    assert ask(model, []) == []


def test_the_first_of_several_ends_ends_an_answer_and_is_kept_where_asked_for(
    model: Any, ask: Any, tokenizer: Any, together: Any
) -> None:
    whole, eos = ask(model), tokenizer.eos_token_id
    other = whole[2][len(whole[2]) // 2]
    wanted = [answer[: answer.index(other)] if other in answer else answer for answer in whole]
    assert whole != wanted != [[] for _ in whole]
    ends = [other, eos]
    assert ask(model, ends=ends) == wanted
    known = guesses(whole, [[*answer, eos, *answer] for answer in wanted])
    assert together([None], model, ends=ends, shared=PromptCache(known)) == [wanted], "a guess may go on after an end"
    kept = ask(model, ends=ends, keep_end=True)
    assert {answer[-1] for answer in kept if answer[-1] in ends} == {other, eos}
    for answer, full, short in zip(kept, whole, wanted, strict=True):
        ended = other in full or len(full) < NEW
        assert answer == ([*short, other if other in full else eos] if ended else full)
    assert together([None], model, ends=ends, keep_end=True, shared=PromptCache(known)) == [kept]
    cut = ask(model, ends=ends, keep_end=True, max_new_tokens=3)
    assert cut == [answer[:3] for answer in kept]


@torch.inference_mode()
def test_what_is_drawn_for_a_row_depends_on_the_rows_before_it_alone(model: Any, tokenizer: Any, ask: Any) -> None:
    """Rows that are done leave, and the others keep their order: as if each step drew for the rows that go on, one by one."""
    found: dict[int, list[int]] = {}
    generator, going = torch.Generator().manual_seed(4), batches([len(prompt) for prompt in PROMPTS], 100)[0]
    while going:
        texts = [PROMPTS[row] + found.setdefault(row, []) for row in going]
        logits_BV = torch.stack([model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])
        chosen = torch.multinomial(torch.softmax(logits_BV, dim=-1), 1, generator=generator)[:, 0].tolist()
        for row, token in zip(going, chosen, strict=True):
            found[row] += [token] * (token != tokenizer.eos_token_id)
        still = zip(going, chosen, strict=True)
        going = [row for row, token in still if token != tokenizer.eos_token_id and len(found[row]) < NEW]
    drawn = ask(model, temperature=1.0, generator=torch.Generator().manual_seed(4), batch_size=100)
    assert drawn == [found[row] for row in range(len(PROMPTS))]
    lengths = [len(found[row]) for row in batches([len(prompt) for prompt in PROMPTS], 100)[0]]
    assert lengths[0] < max(lengths[1:]), "a row leaves before others, whose order then shows"


def test_equal_generators_give_equal_samples(model: Any, ask: Any) -> None:
    def sample(seed: int) -> list[list[int]]:
        return ask(model, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    torch.manual_seed(0)
    first = sample(1)
    torch.manual_seed(1)
    assert sample(1) == first  # the global generator plays no part


def test_sampling_needs_a_generator(model: Any, ask: Any) -> None:
    with pytest.raises(ValueError, match="generator"):
        ask(model, temperature=1.0)


def test_samples_follow_the_softmax_at_their_temperature(model: Any, ask: Any, tokenizer: Any) -> None:
    draws, temperature, prompt = 3000, 2.0, PROMPTS[0]
    answers = ask(
        model,
        [prompt] * draws,
        max_new_tokens=1,
        batch_size=draws,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    chosen = torch.tensor([answer[0] if answer else tokenizer.eos_token_id for answer in answers])
    with torch.inference_mode():
        wanted = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    found = torch.bincount(chosen, minlength=len(wanted)) / draws
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert ((found - wanted).abs() <= 4.5 * error + 1e-6).all()
    assert (wanted > 0.02).sum() >= 3


OPTIONS = [[[4, 5], [6], [7, 8, 9, 10]], [[4], [5]], [[11, 12], [4, 4, 4]], [[5], [6, 7, 8], [9], [10, 11]]]


@torch.inference_mode()
def likelihood(
    model: Any, context: list[int], option: list[int], change: Callable[[Tensor], Tensor] = lambda resid: resid
) -> float:
    with replaced(model, 1, change):
        logits = model(input_ids=torch.tensor([context + option])).logits[0].log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(option))


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_options_score_what_separate_full_passes_give(model: Any, batch_size: int) -> None:
    contexts = PROMPTS[:4]
    found = score_options(model, contexts, OPTIONS, pad=0, batch_size=batch_size)
    for context, options, scores in zip(contexts, OPTIONS, found, strict=True):
        expected = [likelihood(model, context, option) for option in options]
        assert scores == pytest.approx(expected, abs=1e-4)


def test_questions_whose_options_are_single_tokens(model: Any) -> None:
    found = score_options(model, PROMPTS[:2], [[[4], [5]], [[6], [7]]], pad=0, batch_size=2)
    assert found[1] == pytest.approx([likelihood(model, PROMPTS[1], [token]) for token in (6, 7)], abs=1e-4)


@pytest.mark.parametrize("positions", ["prompt_last", "generated", "none"])
def test_an_edit_that_adds_nothing_changes_no_bit(model: Any, ask: Any, positions: str) -> None:
    nothing = Push(torch.zeros(16), positions)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert ask(model, edit=nothing) == ask(model)
    sampled = [ask(model, temperature=1.0, generator=g, edit=edit) for g, edit in zip(generators, (nothing, None), strict=True)]
    assert sampled[0] == sampled[1]
    plain = score_options(model, PROMPTS[:4], OPTIONS, pad=0, batch_size=2)
    assert score_options(model, PROMPTS[:4], OPTIONS, pad=0, batch_size=2, edit=nothing) == plain


def at(positions: str, vector: Tensor) -> Change:
    def change(resid: Tensor, start: int, _ids: list[int]) -> Tensor:
        edited = resid.clone()
        span = slice(start - 1, start) if positions == "prompt_last" else slice(start, None)
        edited[:, span] += vector
        return edited

    return change


@pytest.mark.parametrize("positions", ["prompt_last", "generated"])
def test_an_edit_acts_at_its_positions_and_nowhere_else(model: Any, ask: Any, tokenizer: Any, positions: str) -> None:
    vector = torch.randn(16, generator=torch.Generator().manual_seed(2)) * 4
    edit = Push(vector, positions)
    edited = ask(model, edit=edit)
    assert edited == [by_full_passes(model, prompt, tokenizer.eos_token_id, at(positions, vector)) for prompt in PROMPTS]
    plain = ask(model)
    assert edited != plain
    assert edit.passes[0] is True
    assert edit.passes.count(True) == 3  # one pass over the prompts of each batch
    if positions == "generated":  # the first token is read off the unedited prompt
        assert [answer[:1] for answer in edited] == [answer[:1] for answer in plain]


@pytest.mark.parametrize("positions", ["prompt_last", "generated"])
def test_an_edit_acts_on_the_likelihood_of_options(model: Any, positions: str) -> None:
    vector = torch.randn(16, generator=torch.Generator().manual_seed(2)) * 4
    found = score_options(model, PROMPTS[:4], OPTIONS, pad=0, batch_size=3, edit=Push(vector, positions))
    for context, options, scores in zip(PROMPTS[:4], OPTIONS, found, strict=True):
        start = len(context)
        expected = [likelihood(model, context, o, lambda r, s=start: at(positions, vector)(r, s, [])) for o in options]
        assert scores == pytest.approx(expected, abs=1e-4)


def borrowed(donor: Any, *, everywhere: bool = True) -> Change:
    """What :class:`Borrow` does, from a full pass of the donor."""

    def change(resid: Tensor, start: int, ids: list[int]) -> Tensor:
        seen: list[Tensor] = []
        handle = block(donor, 1).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        donor(input_ids=torch.tensor([ids]))
        handle.remove()
        return seen[0] if everywhere else torch.cat([resid[:, :start], seen[0][:, start:]], dim=1)

    return change


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_donor_reads_the_same_tokens_in_lockstep(
    model: Any, other: Any, ask: Any, tokenizer: Any, *, everywhere: bool
) -> None:
    edited = ask(model, edit=Borrow(other, everywhere))
    change = borrowed(other, everywhere=everywhere)
    assert edited == [by_full_passes(model, prompt, tokenizer.eos_token_id, change) for prompt in PROMPTS]
    assert edited != ask(model)
    assert edited != ask(other)


@pytest.fixture
def together(tokenizer: Any) -> Callable[..., list[list[list[int]]]]:
    def together(edits: list[Any], model: Any, **settings: Any) -> list[list[list[int]]]:
        usual = {"max_new_tokens": NEW, "ends": [tokenizer.eos_token_id], "pad": tokenizer.pad_token_id, "batch_size": 3}
        return generate_under(edits, model, PROMPTS, **usual | settings)

    return together


def edits_of(other: Any, kinds: tuple[str, ...], positions: tuple[str, ...]) -> list[Any]:
    """None, and every kind at every one of ``positions`` under two doses."""
    crosscoder = random_crosscoder(d_model=16, n_features=24, threshold=0.5)
    maker = Editor(crosscoder, "base", 1, torch.device("cpu"), torch.full((24,), 3.0), donor_name="grpo", donor=other)
    doses = (0.5, 2.0)
    made = [maker.edit(kind, [3, 5, 8], place, dose) for kind in kinds for place in positions for dose in doses]
    return [*made[:2], None, *made[2:]]


@pytest.mark.parametrize("kinds", [("zero", "add"), ("transplant",)])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("batch_size", [5, 20, 500])
def test_answers_under_edits_that_share_a_batch_are_those_under_each_alone(
    model: Any, other: Any, ask: Any, together: Any, kinds: tuple[str, ...], batch_size: int, *, share: bool
) -> None:
    edits = edits_of(other, kinds, ("prompt_last", "generated") if share else ("prompt_last", "generated", "prompt", "all"))
    found = together(edits, model, batch_size=batch_size, shared=PromptCache() if share else None)
    assert found == [ask(model, edit=edit, batch_size=batch_size) for edit in edits]
    assert len({str(answers) for answers in found}) > 1 + len(edits) // 2, "these edits change answers, each its own way"
    assert len({len(answer) for answers in found for answer in answers}) > 4, "rows finish at different steps"


def test_an_edit_that_needs_the_donor_at_generated_tokens_gets_it_beside_edits_that_do_not(
    model: Any, other: Any, ask: Any, tokenizer: Any, together: Any
) -> None:
    push = Push(torch.randn(16, generator=torch.Generator().manual_seed(2)) * 4)
    alone, pushed, lent = together([None, push, Borrow(other, everywhere=False)], model, batch_size=100, shared=PromptCache())
    assert (alone, pushed) == (ask(model), ask(model, edit=push))
    change = borrowed(other, everywhere=False)
    assert lent == [by_full_passes(model, prompt, tokenizer.eos_token_id, change) for prompt in PROMPTS]


def test_edits_of_different_layers_or_donors_share_no_batch(model: Any, other: Any, together: Any) -> None:
    for edits in ([Borrow(other), Borrow(model)], [Push(torch.zeros(16)), Push(torch.zeros(16), layer=2)]):
        with pytest.raises(ValueError, match="one layer and one donor"):
            together(edits, model, batch_size=100)


def test_passes_that_share_their_prompts_give_the_same_answers(model: Any, other: Any, ask: Any) -> None:
    shared = PromptCache()
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)) * 4
    edits = [None, *(Push(vector, positions) for vector in vectors for positions in ("prompt_last", "generated")), None]
    alone = [ask(model, edit=edit) for edit in edits]
    assert [ask(model, edit=edit, shared=shared) for edit in edits] == alone
    assert ask(other, shared=shared) == ask(other)
    assert ask(model, PROMPTS[:3], shared=shared) == alone[0][:3]
    contexts = PROMPTS[:4]
    for edit in (edits[1], edits[2], None):
        scores = score_options(model, contexts, OPTIONS, pad=0, batch_size=3, edit=edit)
        again = score_options(model, contexts, OPTIONS, pad=0, batch_size=3, edit=edit, shared=shared)
        for one, two in zip(scores, again, strict=True):
            assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
@pytest.mark.parametrize("budget", [0, 1, 4_000, 9_000, 10**9])
def test_a_budget_changes_no_bit_of_any_answer(
    model: Any, other: Any, ask: Any, together: Any, budget: int, batch_size: int
) -> None:
    edits = edits_of(other, ("zero", "transplant"), ("prompt_last", "generated"))[:5]
    borrowed = [edit for edit in edits if edit is None or edit.donor is None]

    def everything(shared: PromptCache) -> list[Any]:
        found: list[Any] = []
        for _ in range(2):
            found += together(borrowed, model, batch_size=batch_size, shared=shared)
            found.append(ask(model, edit=Borrow(other, everywhere=False), batch_size=batch_size, shared=shared))
            found.append(ask(other, batch_size=batch_size, shared=shared))
            for edit in borrowed:
                found.append(score_options(model, PROMPTS[:4], OPTIONS, pad=0, batch_size=batch_size, edit=edit, shared=shared))
            found.append(next_token_probabilities(model, PROMPTS, pad=0, batch_size=batch_size, shared=shared).tolist())
        return found

    shared = PromptCache(budget=budget)
    assert everything(shared) == everything(PromptCache(budget=10**12))
    assert held(shared) == shared._taken <= budget


def held(shared: PromptCache) -> int:
    """Bytes of the keys and values that are kept, counted from the tensors."""
    tensors = [each for cache, _ in shared._kept.values() for layer in cache.layers for each in (layer.keys, layer.values)]
    return sum(each.numel() * each.element_size() for each in tensors)


def test_as_many_prompts_as_fit_stay_and_those_no_longer_asked_for_go(
    model: Any, other: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = [[1, 4, 4, *prompt[1:]] for prompt in PROMPTS]
    read: list[tuple[int, ...]] = []
    feed = Stream.feed
    monkeypatch.setattr(
        Stream, "feed", lambda self, ids, *rest: (len(ids[0]) > 1 and read.append(tuple(ids.shape))) or feed(self, ids, *rest)
    )

    def passes(shared: PromptCache, model: Any) -> list[int]:
        """How many batches of prompts each pass read."""
        counts = []
        for _ in range(3):
            read.clear()
            ask(model, longer, batch_size=2, shared=shared)
            counts.append(len(read))
        return counts

    whole = PromptCache(budget=10**9)
    assert passes(whole, model) == [4, 0, 0]
    half = PromptCache(budget=held(whole) // 2)
    first, *later = passes(half, model)
    assert first == 4
    assert all(0 < count < 4 for count in later), "the oldest going for the newest would read all four each time"
    assert passes(half, other) == [4, 4, later[-1]], "other prompts take the place of those that nobody asks for any longer"
    assert passes(PromptCache(budget=0), model) == [4, 4, 4]
    read.clear()
    edits = [Push(torch.full((16,), float(i))) for i in range(20)]
    generate_under(edits, model, longer[:3], max_new_tokens=2, ends=[2], pad=0, batch_size=24, shared=PromptCache(budget=0))
    assert len(read) == 1, "a batch at hand is read once for all edits, whatever the budget"


def test_the_budget_is_a_share_of_free_memory_or_what_the_environment_says(
    model: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PROMPT_CACHE, raising=False)
    shared = PromptCache()
    ask(model, shared=shared)
    total = psutil.virtual_memory().total
    assert shared.budget is not None
    assert 0 < shared.budget < SHARE * total
    assert held(shared) > 0
    monkeypatch.setenv(PROMPT_CACHE, "4e3")
    shared = PromptCache()
    ask(model, shared=shared)
    assert shared.budget == 4000
    assert held(shared) <= 4000
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(PROMPT_CACHE, wrong)
        with pytest.raises(ContractError, match=r"FEATDIFF_PROMPT_CACHE: value: expected a number of bytes"):
            ask(model, shared=PromptCache())


def guesses(*answers: list[list[int]]) -> dict[tuple[int, ...], list[list[int]]]:
    """By prompt, what each of ``answers`` says to it."""
    return {tuple(prompt): list(said) for prompt, said in zip(PROMPTS, zip(*answers, strict=True), strict=True)}


@pytest.mark.parametrize("batch_size", [5, 500])
@pytest.mark.parametrize("share", [False, True])
def test_guesses_change_no_answer(
    model: Any, other: Any, ask: Any, together: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int, *, share: bool
) -> None:
    kinds, places = ("zero", "add", "transplant"), ("prompt_last", "generated")
    edits = edits_of(other, kinds, places if share else (*places, "prompt", "all"))
    alone = [ask(model, edit=edit, batch_size=batch_size) for edit in edits]
    cut = [answer[: len(answer) // 2] for answer in alone[1]]
    astray = [[*answer[:3], *answer[:2], *answer[4:], 5, 6] for answer in alone[2]]
    empty = [list[int]() for _ in PROMPTS]
    for known in (guesses(*alone), guesses(alone[2], ask(model)), guesses(cut, empty), guesses(astray, empty, cut)):
        assert together(edits, model, batch_size=batch_size, shared=PromptCache(known, reads_once=share)) == alone
    passes: list[int] = []
    feed = Session.feed
    monkeypatch.setattr(Session, "feed", lambda self, *given, **how: passes.append(1) or feed(self, *given, **how))
    own = ask(model, batch_size=batch_size)
    unguessed, passes[:] = len(passes), []
    assert together([None], model, batch_size=batch_size, shared=PromptCache(guesses(own))) == [own]
    batches = -(-len(PROMPTS) // batch_size)
    assert len(passes) <= 3 * batches < unguessed, "the prompts' last tokens, then long guesses and short ones"


def test_sampling_takes_no_guess(model: Any, ask: Any) -> None:
    def sample(**more: Any) -> Any:
        return ask(model, temperature=1.0, generator=torch.Generator().manual_seed(3), **more)

    assert sample(shared=PromptCache(guesses(ask(model)))) == sample(shared=PromptCache())


def test_an_edit_of_the_whole_prompt_shares_no_prompt(model: Any, other: Any, ask: Any) -> None:
    with pytest.raises(ValueError, match="whole prompt"):
        ask(model, edit=Borrow(other), shared=PromptCache())
    for edit in edits_of(other, ("zero",), ("prompt", "all")):
        if edit is not None:
            with pytest.raises(ValueError, match="whole prompt"):
                ask(model, edit=edit, shared=PromptCache())


def test_no_hook_stays_behind(model: Any, other: Any, ask: Any) -> None:
    def hooks() -> int:
        return len(block(model, 1)._forward_hooks) + len(block(other, 1)._forward_hooks)

    ask(model, edit=Borrow(other))
    assert hooks() == 0
    with pytest.raises(RuntimeError):
        ask(model, edit=Push(torch.zeros(15)))
    assert hooks() == 0


def test_left_padding() -> None:
    ids, mask, positions = left_pad([[1, 2, 3], [7]], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [9, 9, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "edits", "questions"), [(2048, 24, 64), (2048, 2, 64), (256, 8, 32), (16, 8, 2), (256, 1, 256), (2, 8, 1)]
)
def test_questions_under_edits_are_few_and_of_like_length(rows: int, edits: int, questions: int) -> None:
    assert questions_at_once(rows, edits) == questions
