"""Batched decoding with optional edits of the residual stream: answers by generation and by likelihood.

Our own loop instead of ``generate``: sampling takes an explicit generator, finished rows leave the batch, options of a
question share its context, many edits of the same questions share a batch, an answer that can be guessed is read in one
pass, and an edit (featdiff.crosscoder.edits) sees every step of the model, with a donor model in lockstep where it needs one.

Shapes: B batch, Q questions, T token, L tokens of a guess, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import copy
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from featdiff.language.models import block, left_pad
from featdiff.language.session import Edit, PromptCache, Session
from featdiff.language.stream import Stream

OPTIONS_PER_QUESTION = 4
"""Options read at once, per question of a batch: sorted by length, so that little of the work is padding."""
TOGETHER = 8
"""Edits that share a batch at least, if there are so many."""
QUESTIONS = 64
"""Of a batch under several edits, at most."""
TEXTS = 32
"""Texts read whole at once, at most: of more, more is padding, and less stays in a processor's cache."""


def questions_at_once(rows: int, edits: int) -> int:
    """Questions of a batch of ``rows`` that are asked under so many edits. Few questions of like length are little padding, and
    what many edits share is read once."""
    return rows if edits < 2 else max(1, min(QUESTIONS, rows // min(TOGETHER, edits)))


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
    ends: Collection[int],
    pad: int,
    batch_size: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    keep_end: bool = False,
    edit: Edit | None = None,
    shared: PromptCache | None = None,
    progress: str = "",
) -> list[list[int]]:
    """:func:`generate_under` of one edit, or of none."""
    (answers,) = generate_under(
        [edit],
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        ends=ends,
        pad=pad,
        batch_size=batch_size,
        temperature=temperature,
        generator=generator,
        keep_end=keep_end,
        shared=shared,
        progress=progress,
    )
    return answers


@torch.inference_mode()
def generate_under(
    edits: Sequence[Edit | None],
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    ends: Collection[int],
    pad: int,
    batch_size: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    keep_end: bool = False,
    shared: PromptCache | None = None,
    progress: str = "",
) -> list[list[list[int]]]:
    """Under each of ``edits`` the token ids after each prompt, up to the first of the ``ends`` (see
    :func:`featdiff.language.models.end_tokens`) or ``max_new_tokens``; greedy at temperature 0. The end itself is left out
    unless ``keep_end`` is set: an answer of fewer than ``max_new_tokens`` tokens without it, or one that ends with one of
    ``ends``, was ended by the model.

    A batch holds some questions (:func:`questions_at_once`) under as many edits as fit into ``batch_size`` rows. ``shared``
    keeps the prompts read for further passes over the same ones. Raises ValueError for sampling without a generator, for a
    shared prompt that an edit changes, and for edits of different layers or donors."""
    if temperature > 0 and generator is None:
        raise ValueError("sampling needs an explicit generator")
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in edits]
    guesses = shared.guesses if shared is not None and temperature == 0 else {}
    size = questions_at_once(batch_size, len(edits))
    for rows in tqdm(batches([len(p) for p in prompts], size), desc=progress, unit="batch", disable=not progress):
        padded = left_pad([prompts[row] for row in rows], pad, model.device)
        together = max(1, batch_size // len(rows))
        for first in range(0, len(edits), together):
            session = Session(model, edits[first : first + together])
            ids, mask, positions = session.start(shared, *padded)
            texts = [under[row] for under in answers[first : first + together] for row in rows]
            likely = [guesses.get(tuple(prompts[row]), ()) for row in rows] * len(session.edits)
            how = {"keep_end": keep_end, "in_order": temperature > 0}
            going = _Unfinished(session, texts, likely, mask, positions, ends, max_new_tokens, **how)
            with session.hooked():
                logits = session.feed(ids, mask, positions, prompt=True)[:, -1].float()
                going.take(_choose(logits, temperature, generator))
                for part in going.parts():
                    part.check()
                    while part.texts:
                        part.take(_choose(part.feed().float(), temperature, generator))
    return answers


class _Unfinished:
    """Rows of a batch that are still being answered, from their prompts' last tokens on."""

    def __init__(
        self,
        session: Session,
        texts: list[list[int]],
        guesses: list[Sequence[list[int]]],
        mask_BT: Tensor,
        positions_BT: Tensor,
        ends: Collection[int],
        limit: int,
        *,
        keep_end: bool,
        in_order: bool,
    ) -> None:
        self.session, self.ends, self.limit, self.keep_end, self.in_order = session, ends, limit, keep_end, in_order
        self.texts, self.guesses = texts, guesses
        """What each row has answered so far, at most ``limit`` tokens, filled in place; and what it is guessed to answer."""
        self.mask_BT, self.place_B1 = mask_BT, positions_BT[:, -1:] + 1
        """What each row may attend to, and the position of the token that is fed to it next."""
        self.chosen_B = torch.empty(0, dtype=torch.long)
        """That token."""

    def take(self, chosen_B: Tensor) -> None:
        """Write down the token chosen for each row, and go on with the rows that it does not end."""
        going = []
        for row, (text, token) in enumerate(zip(self.texts, chosen_B.tolist(), strict=True)):
            ended = token in self.ends
            if len(text) < self.limit and (self.keep_end or not ended):
                text.append(token)
            if len(text) < self.limit and not ended:
                going.append(row)
        self.chosen_B = chosen_B
        if len(going) < len(self.texts):
            rows = going if self.in_order else _closed_up(going)
            self._keep(torch.tensor(rows, dtype=torch.long, device=chosen_B.device))

    def _keep(self, rows: Tensor) -> None:
        self.session.select(rows)
        self.texts, self.guesses = ([each[row] for row in rows.tolist()] for each in (self.texts, self.guesses))
        self.mask_BT, self.place_B1, self.chosen_B = self.mask_BT[rows], self.place_B1[rows], self.chosen_B[rows]

    def parts(self) -> Iterator[_Unfinished]:
        """Rows with long and with short guesses apart, so that little of what is checked is padding. Each part has the session
        until the next is taken."""
        lengths_B = torch.tensor([len(draft) for draft in self._drafts()], device=self.mask_BT.device)
        long_B = lengths_B > lengths_B.max() / 2 if len(lengths_B) else lengths_B.bool()
        if not long_B.any() or long_B.all():
            yield self
            return
        state = self.session.branches()
        for rows_B in (long_B, ~long_B):
            part = copy(self)
            self.session.resume(state)
            part._keep(rows_B.nonzero().squeeze(1))
            yield part

    def _drafts(self) -> list[list[int]]:
        known = zip(self.texts, self.guesses, strict=True)
        rest = (_draft(text, guesses)[: self.limit - len(text)] for text, guesses in known)
        return [list(takewhile(lambda token: token not in self.ends, draft)) for draft in rest]

    def feed(self) -> Tensor:
        """Logits [B, V] after the token of each row."""
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.mask_BT), 1)], dim=1)
        logits_BV = self.session.feed(self.chosen_B[:, None], self.mask_BT, self.place_B1, prompt=False)[:, -1]
        self.place_B1 = self.place_B1 + 1
        return logits_BV

    def check(self) -> None:
        """Read in one pass what each row is guessed to answer, and take over what it would have chosen itself, with the token
        that it chooses instead of the first wrong one (greedy speculative decoding; Leviathan et al. 2023)."""
        drafts = self._drafts()
        if not any(drafts) or not self.session.forgets:
            return
        # Row b is fed its chosen token and its draft d_1 … d_n; L is 1 + n for the longest. What it chooses after the token at
        # place j is right as long as the tokens up to j are its own. Others are forgotten as far as every row has them wrong,
        # and hidden by the mask in the rest.
        longest, device = 1 + max(map(len, drafts)), self.mask_BT.device
        drafts_BL = torch.tensor([[*draft, *[-1] * (longest - len(draft))] for draft in drafts], device=device)
        ids_BL = torch.cat([self.chosen_B[:, None], drafts_BL[:, :-1].clamp(min=0)], dim=1)
        mask_BT = torch.cat([self.mask_BT, torch.ones_like(ids_BL)], dim=1)
        places_BL = self.place_B1 + torch.arange(longest, device=device)
        choices_BL = self.session.feed(ids_BL, mask_BT, places_BL, prompt=False, keep=0).argmax(-1)
        right_B = (choices_BL == drafts_BL).cumprod(1).sum(1)
        for text, draft, right in zip(self.texts, drafts, right_B.tolist(), strict=True):
            text.extend(draft[:right])
        read = 1 + int(right_B.max())
        self.session.forget(longest - read)
        self.mask_BT = torch.cat([self.mask_BT, (torch.arange(read, device=device) <= right_B[:, None]).long()], dim=1)
        self.place_B1 = self.place_B1 + 1 + right_B[:, None]
        self.take(choices_BL.gather(1, right_B[:, None])[:, 0])


def _closed_up(going: list[int]) -> list[int]:
    """``going``, ascending row numbers, in an order in which as few rows as can be change their place: the last ones take the
    places of those that left. What is drawn for a row would depend on it, so sampled rows stay in order."""
    staying = [row for row in going if row < len(going)]
    moving = iter(going[len(staying) :])
    taken = set(staying)
    return [row if row in taken else next(moving) for row in range(len(going))]


def _draft(text: list[int], guesses: Sequence[list[int]]) -> list[int]:
    """How the first of ``guesses`` that begins like ``text`` goes on."""
    return next((guess[len(text) :] for guess in guesses if guess[: len(text)] == text), [])


def _choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities = torch.softmax(logits_BV / temperature, dim=-1)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(1).to(logits_BV.device)


def score_options(
    model: PreTrainedModel, contexts: list[list[int]], options: list[list[list[int]]], **how: Any
) -> list[list[float]]:
    """Summed log-probability in nats of every option's tokens after its context; the rest as for :func:`score_tokens`."""
    return [list(map(sum, scored)) for scored in score_tokens(model, contexts, options, **how)]


@torch.inference_mode()
def score_tokens(
    model: PreTrainedModel,
    contexts: list[list[int]],
    options: list[list[list[int]]],
    *,
    pad: int,
    batch_size: int,
    edit: Edit | None = None,
    shared: PromptCache | None = None,
    progress: str = "",
) -> list[list[list[float]]]:
    """Log-probability in nats of each token of every option after its context. The context is read once per question, and
    with ``shared`` once for all passes.

    ``batch_size`` counts questions. Option tokens are the ``generated`` positions of an edit."""
    scores: list[list[list[float]]] = [[] for _ in contexts]
    for rows in tqdm(batches([len(c) for c in contexts], batch_size), desc=progress, unit="batch", disable=not progress):
        session = Session(model, [edit])
        ids, mask, positions = session.start(shared, *left_pad([contexts[row] for row in rows], pad, model.device))
        lengths = {(i, j): len(option) for i, row in enumerate(rows) for j, option in enumerate(options[row])}
        pairs = sorted(lengths, key=lengths.__getitem__, reverse=True)
        read: dict[tuple[int, int], list[float]] = {}
        with session.hooked():
            first_BV = session.feed(ids, mask, positions, prompt=True)[:, -1].float().log_softmax(-1)
            branches = session.branches()
            for low in range(0, len(pairs), OPTIONS_PER_QUESTION * batch_size):
                chunk = pairs[low : low + OPTIONS_PER_QUESTION * batch_size]
                session.resume(branches)
                owner = torch.tensor([i for i, _ in chunk], device=model.device)
                texts = [options[rows[i]][j] for i, j in chunk]
                found = _follow(session, texts, first_BV[owner], mask[owner], positions[owner], owner, pad)
                read |= zip(chunk, found, strict=True)
        for i, row in enumerate(rows):
            scores[row].extend(read[i, j] for j in range(len(options[row])))
    return scores


def _follow(
    session: Session,
    texts: list[list[int]],
    first_BV: Tensor,
    mask_BT: Tensor,
    positions_BT: Tensor,
    owner_B: Tensor,
    pad: int,
) -> list[list[float]]:
    """Log-likelihood of each token of each continuation, given those of its first token and the contexts' caches."""
    # log p(t_1 … t_L | context) = Σ_i log p(t_i | context, t_1 … t_i−1). The context's last logits give the first term, and
    # feeding t_1 … t_L−1 gives the rest: the last token is never fed, as nothing is asked about what follows it.
    # Continuations are padded on the right. Padding comes after every real token of its row, so causal attention never sees
    # it from one, and its own terms are cut off. `owner_B` is the row of each continuation's context.
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
    return [row[: len(text)] for row, text in zip(picked.tolist(), texts, strict=True)]


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
        session = Session(model, [edit])
        ids, mask, positions = session.start(shared, *left_pad([prompts[row] for row in rows], pad, model.device))
        with session.hooked():
            logits_BV = session.feed(ids, mask, positions, prompt=True)[:, -1].float()
        found |= zip(rows, logits_BV.softmax(-1).cpu(), strict=True)
    return torch.stack([found[row] for row in range(len(prompts))])


@torch.inference_mode()
def last_token_streams(model: PreTrainedModel, prompts: list[list[int]], layer: int, *, pad: int, batch_size: int) -> Tensor:
    """Residual stream [Q, D] after ``layer`` blocks at the last token of each prompt, in float32 on the CPU."""
    found: dict[int, Tensor] = {}
    kept: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        kept.append(output[:, -1].float().cpu())

    handle = block(model, layer).register_forward_hook(keep)
    try:
        for rows in batches([len(prompt) for prompt in prompts], batch_size):
            ids, mask, positions = left_pad([prompts[row] for row in rows], pad, model.device)
            Stream(model).feed(ids, mask, positions, 1)
            found |= zip(rows, kept.pop(), strict=True)
    finally:
        handle.remove()
    return torch.stack([found[row] for row in range(len(prompts))])


@torch.inference_mode()
def text_nats(
    model: PreTrainedModel, texts: list[list[int]], *, pad: int, batch_size: int, edit: Edit | None = None
) -> list[float]:
    """Mean negative log-probability of the tokens of each text after its first, in nats; ``batch_size`` texts at once, or
    :data:`TEXTS`."""
    nats = [0.0] * len(texts)
    for rows in batches([len(text) for text in texts], min(batch_size, TEXTS)):
        session = Session(model, [edit])
        ids, mask, positions = session.start(None, *left_pad([texts[row] for row in rows], pad, model.device))
        with session.hooked():
            logits_BTV = session.feed(ids, mask, positions, prompt=True, keep=0)[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids[:, 1:], reduction="none")
        real = mask[:, :-1]
        for row, value in zip(rows, ((loss * real).sum(1) / real.sum(1)).tolist(), strict=True):
            nats[row] = value
    return nats
