"""Batched decoding with an optional edit of the residual stream: answers by generation and by likelihood.

Our own loop instead of ``generate``: sampling takes an explicit generator, finished rows leave the batch,
options of a question share its context, and an edit (featdiff.crosscoder.edits) sees every step of the
model, with a donor model in lockstep where it needs one.

Shapes: B batch, T token, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from featdiff.language.models import block

OPTIONS_PER_QUESTION = 4
"""Options read at once, per question of a batch: sorted by length, so that little of the work is padding."""


class Edit(Protocol):
    """A change of the residual stream after ``layer`` blocks."""

    layer: int
    donor: PreTrainedModel | None
    """A second model that reads the same tokens, for edits that need its residual stream."""

    @property
    def whole_prompt(self) -> bool:
        """Whether tokens before the last one of the prompt are changed."""

    def __call__(self, resid_BTD: Tensor, donor_BTD: Tensor | None, *, prompt: bool) -> Tensor:
        """The edited residual stream; ``prompt`` tells the pass over the prompt (left-padded, so that its
        last token is at index -1) from the passes over later tokens."""


class _Stream:
    """One model with its key-value cache, fed the same tokens step by step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)

    def feed(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, keep: int) -> Tensor:
        """Logits [B, keep, V] of the last ``keep`` positions (0 keeps all)."""
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits
        return logits

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)


class PromptCache:
    """Prompts read once up to their last token, for many passes whose edits change nothing before it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bytes], DynamicCache] = {}

    def start(self, stream: _Stream, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor) -> None:
        """Leave ``stream`` as if it had read all but the last token of each prompt."""
        # Keys and values of a token depend on it and on those before it. An edit that begins at the last token of the prompt
        # leaves those of all earlier tokens as they are, at every layer: one reading serves the passes with and without it.
        # It is exact for passes that all go through here. Against one reading of the whole prompt, T tokens are now read as
        # T − 1 and 1, which can round differently.
        # The key stands for the models by identity, so the model must live as long as this cache. The ids include the padding,
        # from which mask and positions follow as long as no prompt begins with the padding token.
        key = (id(stream.model), ids_BT.cpu().numpy().tobytes())
        if key not in self._kept:
            stream.feed(ids_BT[:, :-1], mask_BT[:, :-1], positions_BT[:, :-1], 1)
            self._kept[key] = stream.cache
        stream.cache = _branch(self._kept[key])


def _branch(cache: DynamicCache) -> DynamicCache:
    """A cache that goes its own way from here."""
    # A shallow copy of each layer is enough. DynamicCache appends by torch.cat and selects rows by indexing: both put new
    # tensors into the layer object and leave the old ones, which other branches hold, as they were. A cache that writes in
    # place (StaticCache) would need its tensors copied.
    branch = copy(cache)
    branch.layers = [copy(layer) for layer in cache.layers]
    return branch


class _Session:
    """A model, perhaps edited, perhaps with a donor in lockstep."""

    def __init__(self, model: PreTrainedModel, edit: Edit | None) -> None:
        self.main = _Stream(model)
        self.edit = edit
        self.donor = _Stream(edit.donor) if edit is not None and edit.donor is not None else None
        self.donor_BTD: Tensor | None = None
        self.prompt = True

    def start(
        self, prompts: PromptCache | None, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token ids and position ids of the prompt that are still to be read."""
        if prompts is None or ids_BT.shape[1] == 1:
            return ids_BT, positions_BT
        if self.edit is not None and self.edit.whole_prompt:
            raise ValueError("an edit of the whole prompt cannot share the prompts of other passes")
        for stream in self._streams():
            prompts.start(stream, ids_BT, mask_BT, positions_BT)
        return ids_BT[:, -1:], positions_BT[:, -1:]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        if self.edit is None:
            yield
            return
        edit, handles = self.edit, []

        def change(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
            return edit(output, self.donor_BTD, prompt=self.prompt)

        def watch(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
            self.donor_BTD = output

        handles.append(block(self.main.model, edit.layer).register_forward_hook(change))
        if self.donor is not None:
            handles.append(block(self.donor.model, edit.layer).register_forward_hook(watch))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def feed(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, *, prompt: bool, keep: int = 1) -> Tensor:
        self.prompt = prompt
        if self.donor is not None:
            self.donor.feed(ids_BT, mask_BT, positions_BT, 1)
        return self.main.feed(ids_BT, mask_BT, positions_BT, keep)

    def select(self, rows: Tensor) -> None:
        for stream in self._streams():
            stream.select(rows)

    def branches(self) -> list[DynamicCache]:
        """The state to :meth:`resume` from, any number of times."""
        return [stream.cache for stream in self._streams()]

    def resume(self, branches: list[DynamicCache]) -> None:
        for stream, cache in zip(self._streams(), branches, strict=True):
            stream.cache = _branch(cache)

    def _streams(self) -> list[_Stream]:
        return [self.main] if self.donor is None else [self.main, self.donor]


def left_pad(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids [B, T] of prompts of unequal length."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def batches(lengths: list[int], size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that memory is known from the start."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[i : i + size] for i in range(0, len(order), size)]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos: int,
    pad: int,
    batch_size: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    edit: Edit | None = None,
    shared: PromptCache | None = None,
    progress: str = "",
) -> list[list[int]]:
    """Token ids after each prompt, up to EOS (left out) or ``max_new_tokens``; greedy at temperature 0.

    ``shared`` keeps the prompts read for further passes over the same ones. Raises ValueError for sampling
    without a generator, and for a shared prompt that the edit changes."""
    if temperature > 0 and generator is None:
        raise ValueError("sampling needs an explicit generator")
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in tqdm(batches([len(p) for p in prompts], batch_size), desc=progress, unit="batch", disable=not progress):
        session = _Session(model, edit)
        ids, mask, positions = left_pad([prompts[row] for row in rows], pad, model.device)
        ids, positions = session.start(shared, ids, mask, positions)
        active = torch.tensor(rows)
        with session.hooked():
            for step in range(max_new_tokens):
                logits = session.feed(ids, mask, positions, prompt=step == 0)[:, -1].float()
                chosen = _choose(logits, temperature, generator)
                going = (chosen != eos).nonzero().squeeze(1)
                for row, token in zip(active[going.cpu()].tolist(), chosen[going].tolist(), strict=True):
                    answers[row].append(token)
                if len(going) == 0:
                    break
                if len(going) < len(chosen):
                    session.select(going)
                    mask, positions, chosen, active = mask[going], positions[going], chosen[going], active[going.cpu()]
                ids = chosen.unsqueeze(1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                positions = positions[:, -1:] + 1
    return answers


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities = torch.softmax(logits_BV / temperature, dim=-1)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(1).to(logits_BV.device)


@torch.inference_mode()
def score_options(
    model: PreTrainedModel,
    contexts: list[list[int]],
    options: list[list[list[int]]],
    *,
    pad: int,
    batch_size: int,
    edit: Edit | None = None,
    shared: PromptCache | None = None,
    progress: str = "",
) -> list[list[float]]:
    """Summed log-probability in nats of every option's tokens after its context. The context is read once per question, and
    with ``shared`` once for all passes.

    ``batch_size`` counts questions. Option tokens are the ``generated`` positions of an edit."""
    scores: list[list[float]] = [[] for _ in contexts]
    for rows in tqdm(batches([len(c) for c in contexts], batch_size), desc=progress, unit="batch", disable=not progress):
        session = _Session(model, edit)
        ids, mask, positions = left_pad([contexts[row] for row in rows], pad, model.device)
        ids, positions = session.start(shared, ids, mask, positions)
        lengths = {(i, j): len(option) for i, row in enumerate(rows) for j, option in enumerate(options[row])}
        pairs = sorted(lengths, key=lengths.__getitem__, reverse=True)
        totals: dict[tuple[int, int], float] = {}
        with session.hooked():
            first_BV = session.feed(ids, mask, positions, prompt=True)[:, -1].float().log_softmax(-1)
            branches = session.branches()
            for low in range(0, len(pairs), OPTIONS_PER_QUESTION * batch_size):
                chunk = pairs[low : low + OPTIONS_PER_QUESTION * batch_size]
                session.resume(branches)
                owner = torch.tensor([i for i, _ in chunk], device=model.device)
                texts = [options[rows[i]][j] for i, j in chunk]
                found = _follow(session, texts, first_BV[owner], mask[owner], positions[owner], owner, pad)
                totals |= zip(chunk, found, strict=True)
        for i, row in enumerate(rows):
            scores[row].extend(totals[i, j] for j in range(len(options[row])))
    return scores


def _follow(
    session: _Session,
    texts: list[list[int]],
    first_BV: Tensor,
    mask_BT: Tensor,
    positions_BT: Tensor,
    owner_B: Tensor,
    pad: int,
) -> list[float]:
    """Log-likelihood of each continuation, given the log-probabilities of its first token and the contexts' caches."""
    # log p(t_1 … t_L | context) = Σ_i log p(t_i | context, t_1 … t_i−1). The context's last logits give the first term, and
    # feeding t_1 … t_L−1 gives the rest: the last token is never fed, as nothing is asked about what follows it.
    # Continuations are padded on the right. Padding comes after every real token of its row, so causal attention never sees
    # it from one, and `real` takes its own terms out of the sum. `owner_B` is the row of each continuation's context.
    longest, device = max(map(len, texts)), mask_BT.device
    ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=device)
    real = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    picked = first_BV.gather(1, ids[:, :1])
    if longest > 1:
        session.select(owner_B)
        later_positions = positions_BT[:, -1:] + torch.arange(1, longest, device=device)
        later_mask = torch.cat([mask_BT, real[:, :-1]], dim=1)
        later = session.feed(ids[:, :-1], later_mask, later_positions, prompt=False, keep=0).float().log_softmax(-1)
        picked = torch.cat([picked, later.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)], dim=1)
    return (picked * real).sum(1).tolist()


@torch.inference_mode()
def next_token_probabilities(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    pad: int,
    batch_size: int,
    edit: Edit | None = None,
    shared: PromptCache | None = None,
) -> Tensor:
    """Probabilities [prompts, V] of the token after each prompt; ``shared`` as for :func:`generate`."""
    found: dict[int, Tensor] = {}
    for rows in batches([len(prompt) for prompt in prompts], batch_size):
        session = _Session(model, edit)
        ids, mask, positions = left_pad([prompts[row] for row in rows], pad, model.device)
        ids, positions = session.start(shared, ids, mask, positions)
        with session.hooked():
            logits_BV = session.feed(ids, mask, positions, prompt=True)[:, -1].float()
        found |= zip(rows, logits_BV.softmax(-1).cpu(), strict=True)
    return torch.stack([found[row] for row in range(len(prompts))])


@torch.inference_mode()
def text_nats(
    model: PreTrainedModel, texts: list[list[int]], *, pad: int, batch_size: int, edit: Edit | None = None
) -> list[float]:
    """Mean negative log-probability of the tokens of each text after its first, in nats."""
    nats = [0.0] * len(texts)
    for rows in batches([len(text) for text in texts], batch_size):
        session = _Session(model, edit)
        ids, mask, positions = left_pad([texts[row] for row in rows], pad, model.device)
        with session.hooked():
            logits_BTV = session.feed(ids, mask, positions, prompt=True, keep=0)[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids[:, 1:], reduction="none")
        real = mask[:, :-1]
        for row, value in zip(rows, ((loss * real).sum(1) / real.sum(1)).tolist(), strict=True):
            nats[row] = value
    return nats
