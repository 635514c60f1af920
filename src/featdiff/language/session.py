"""A model, and perhaps a donor in lockstep, that reads and answers under edits of the residual stream; and prompts that many
passes over the same questions share.

Shapes: B batch, Q questions, T token, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from featdiff.language.cache import branch, croppable, size
from featdiff.language.models import block
from featdiff.language.stream import Stream, halves, trunk
from featdiff.processes.memory import prompt_cache_bytes


class Edit(Protocol):
    """A change of the residual stream after ``layer`` blocks."""

    layer: int
    donor: PreTrainedModel | None
    """A second model that reads the same tokens, for edits that need its residual stream."""

    @property
    def whole_prompt(self) -> bool:
        """Whether tokens before the last one of the prompt are changed."""

    @property
    def after_prompt(self) -> bool:
        """Whether tokens after the prompt are changed."""

    def __call__(self, resid_BTD: Tensor, donor_BTD: Tensor | None, *, prompt: bool) -> Tensor:
        """The edited residual stream; ``prompt`` tells the pass over the prompt (left-padded, so that its
        last token is at index -1) from the passes over later tokens."""


Guesses = Mapping[tuple[int, ...], Sequence[list[int]]]
"""By prompt, answers that are likely to be given to it. They change no answer: where one is right, it is read in one pass."""


class PromptCache:
    """What many passes over the same prompts share: prompts read once up to their last token, for edits that change nothing
    before it, and guesses of their answers.

    What is kept of the prompts takes at most ``budget`` bytes, by default what :func:`prompt_cache_bytes` says of the model's
    device when the first are read, and those at hand; others are read again. The budget changes no bit of what is computed."""

    def __init__(self, guesses: Guesses | None = None, *, reads_once: bool = True, budget: int | None = None) -> None:
        self.guesses: Guesses = guesses or {}
        self.reads_once, self.budget = reads_once, budget
        self._at_hand: dict[int, tuple[_Prompts, DynamicCache]] = {}
        """By model, the prompts that were asked for last: many edits of one batch ask for them one after the other."""
        self._kept: OrderedDict[_Prompts, tuple[DynamicCache, int]] = OrderedDict()
        """Caches with their bytes, the least recently used first."""
        self._taken, self._asks = 0, 0
        """Bytes of all caches; and how many times prompts of any kind were asked for."""
        self._asked: dict[_Prompts, int] = {}
        """By prompts, the number of the last of those times."""

    def for_whole_prompts(self) -> PromptCache:
        """The guesses alone, for edits that change the prompt."""
        return PromptCache(self.guesses, reads_once=False)

    def start(self, stream: Stream, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor) -> None:
        """Leave ``stream`` as if it had read all but the last token of each prompt."""
        # Keys and values of a token depend on it and on those before it. An edit that begins at the last token of the prompt
        # leaves those of all earlier tokens as they are, at every layer: one reading serves the passes with and without it.
        # It is exact for passes that all go through here. Against one reading of the whole prompt, T tokens are now read as
        # T − 1 and 1, which can round differently.
        # The key stands for the models by identity, so the model must live as long as this cache. The ids include the padding,
        # from which mask and positions follow as long as no prompt begins with the padding token.
        model = id(stream.model)
        prompts = model, tuple(ids_BT.shape), sha256(ids_BT.cpu().numpy().tobytes()).digest()
        if model not in self._at_hand or self._at_hand[model][0] != prompts:
            before, self._asked[prompts] = self._asked.get(prompts, -1), self._asks
            self._asks += 1
            if prompts in self._kept:
                self._kept.move_to_end(prompts)
                stream.cache = self._kept[prompts][0]
            else:
                stream.feed(ids_BT[:, :-1], mask_BT[:, :-1], positions_BT[:, :-1], 1)
                self._keep(prompts, stream.cache, before, ids_BT.device)
            self._at_hand[model] = prompts, stream.cache
        stream.cache = branch(self._at_hand[model][1])

    def _keep(self, prompts: _Prompts, cache: DynamicCache, before: int, device: torch.device) -> None:
        """Keep ``cache`` if there is room for it, or the least recently used can make room; ``before``: when its prompts were
        last asked for, −1 for never."""
        # Passes ask for all their prompts in turn. If the oldest always gave way to the newest, and not all fit, each would
        # be gone just before it is asked for again, and nothing would ever be found. So it gives way only to prompts that were
        # asked for since it was itself: as many as fit stay, and what no pass asks for any longer goes.
        if self.budget is None:
            self.budget = prompt_cache_bytes(device)
        taken = size(cache)
        while taken <= self.budget < self._taken + taken and self._asked[next(iter(self._kept))] < before:
            self._taken -= self._kept.popitem(last=False)[1][1]
        if self._taken + taken <= self.budget:
            self._kept[prompts] = cache, taken
            self._taken += taken


_Prompts = tuple[int, tuple[int, ...], bytes]
"""A batch of prompts for a model: the model's identity, shape and hash of the ids."""


class Lent(NamedTuple):
    """A donor, of which nothing is read above the layer of the edits."""

    stream: Stream
    trunk: torch.nn.Module


class Session:
    """A model that answers under several edits at once, perhaps with a donor in lockstep.

    The rows of a batch are at first all questions under the first edit, then all under the second, and so on; which edit a row
    is under stays known whatever rows are selected.

    Up to the layer of the edits nothing depends on them but the tokens that were chosen: rows that have the same text so far
    share what the model reads there, and what the donor reads."""

    def __init__(self, model: PreTrainedModel, edits: Sequence[Edit | None]) -> None:
        self.main, self.edits = Stream(model), edits
        made = [edit for edit in edits if edit is not None]
        donors = {id(edit.donor): edit.donor for edit in made if edit.donor is not None}
        if len(donors) > 1 or len({edit.layer for edit in made}) > 1:
            raise ValueError("edits that are answered under at once have one layer and one donor")
        self.layer = made[0].layer if made else None
        donor = next(iter(donors.values()), None)
        self.donor = None if donor is None or self.layer is None else Lent(Stream(donor), trunk(donor, self.layer))
        self.halves = halves(model, self.layer) if self.layer is not None and len(edits) > 1 else None
        """The model in two parts; None where it reads every row whole."""
        self.followed = any(edit.after_prompt for edit in made)
        self.arms = torch.zeros(0, dtype=torch.long)
        """Number of the edit of each row."""
        self.text_B = torch.zeros(0, dtype=torch.long)
        """Number of the text of each row."""
        self.resid_BTD: Tensor | None = None
        self.donor_BTD: Tensor | None = None
        """Residual streams after ``layer`` blocks of what is being read: the model's, where it was read by texts, and the
        donor's."""
        self.prompt = True

    def start(
        self, prompts: PromptCache | None, ids_QT: Tensor, mask_QT: Tensor, positions_QT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and position ids [B, T] of what is still to be read of the prompts, each question once per edit."""
        left = slice(None)
        if prompts is not None and prompts.reads_once and ids_QT.shape[1] > 1:
            if any(edit is not None and edit.whole_prompt for edit in self.edits):
                raise ValueError("an edit of the whole prompt cannot share the prompts of other passes")
            for stream in self._streams():
                prompts.start(stream, ids_QT, mask_QT, positions_QT)
            left = slice(-1, None)
        self.arms = torch.arange(len(self.edits)).repeat_interleave(len(ids_QT))
        rows = torch.arange(len(ids_QT), device=ids_QT.device).repeat(len(self.edits))
        self.text_B = torch.arange(len(ids_QT), device=ids_QT.device)
        self._select(rows)
        return ids_QT[rows][:, left], mask_QT[rows], positions_QT[rows][:, left]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The edits take place meanwhile."""
        if self.layer is None:
            yield
            return

        def change(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
            output = output if self.resid_BTD is None else self.resid_BTD
            if not self.prompt and not self.followed:
                return output
            counts = torch.bincount(self.arms, minlength=len(self.edits)).tolist()
            # An edit sees its rows together. They lie apart where others have taken the places of rows that left.
            order = None if bool((self.arms.diff() >= 0).all()) else self.arms.argsort(stable=True).to(output.device)
            resid_BTD = output if order is None else output[order]
            donor_BTD = self.donor_BTD if order is None or self.donor_BTD is None else self.donor_BTD[order]
            parts, low = [], 0
            for edit, count in zip(self.edits, counts, strict=True):
                rows = slice(low, low := low + count)
                part, given = resid_BTD[rows], None if donor_BTD is None else donor_BTD[rows]
                parts.append(part if edit is None or not count else edit(part, given, prompt=self.prompt))
            changed_BTD = parts[0] if len(parts) == 1 else torch.cat(parts)
            return changed_BTD if order is None else torch.empty_like(changed_BTD).index_copy_(0, order, changed_BTD)

        handle = block(self.halves.upper if self.halves else self.main.model, self.layer).register_forward_hook(change)
        try:
            yield
        finally:
            handle.remove()

    def feed(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, *, prompt: bool, keep: int = 1) -> Tensor:
        """Logits [B, keep, V] of the last ``keep`` positions (0 keeps all)."""
        self.prompt = prompt
        lends = self.donor is not None and (prompt or self.followed)
        if self.halves or lends:
            first_U = self._tell_apart(ids_BT, mask_BT)
            texts = ids_BT[first_U], mask_BT[first_U], positions_BT[first_U]
            if self.donor is not None and lends:
                self.donor_BTD = self.donor.stream.below(self.donor.trunk, *texts)[self.text_B]
            if self.halves and self.layer is not None:
                self.resid_BTD = self.main.below(self.halves.trunk, *texts)[self.text_B]
                return self.main.above(self.halves.upper, self.layer, ids_BT, mask_BT, positions_BT, keep)
        return self.main.feed(ids_BT, mask_BT, positions_BT, keep)

    def _tell_apart(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Number the texts anew, now that these tokens come next; what was read of a text goes over to those that begin with
        it. A row of each text [U]."""
        # Two rows have the same text as long as the same tokens were fed to both and the mask hides the same of them.
        told = torch.cat([self.text_B[:, None], mask_BT, ids_BT], dim=1).cpu().numpy()
        numbers: dict[bytes, int] = {}
        found_B = [numbers.setdefault(row.tobytes(), len(numbers)) for row in told]
        firsts = dict(zip(reversed(found_B), range(len(found_B) - 1, -1, -1), strict=True))
        # In the order of the texts that they go on from, so that most stay where they are.
        order = sorted(firsts, key=lambda number: (told[firsts[number], 0], number))
        place = {number: i for i, number in enumerate(order)}
        first_U = torch.tensor([firsts[number] for number in order], device=ids_BT.device)
        parent_U = self.text_B[first_U]
        self.text_B = torch.tensor([place[number] for number in found_B], device=ids_BT.device)
        if self.halves:
            self.main.select(parent_U, slice(self.layer))
        if self.donor is not None:
            self.donor.stream.select(parent_U)
        return first_U

    def select(self, rows: Tensor) -> None:
        """Keep ``rows``, in their order."""
        self.arms = self.arms[rows.cpu()]
        self._select(rows)

    def _select(self, rows: Tensor) -> None:
        self.text_B = self.text_B[rows]
        self.main.select(rows, slice(self.layer if self.halves else 0, None))

    @property
    def forgets(self) -> bool:
        """Whether the last tokens that were read can be dropped. Where a layer has a window they cannot, and what a mask hides
        would still take up room in it."""
        return all(croppable(stream.cache) for stream in self._streams())

    def forget(self, tokens: int) -> None:
        """Drop the last ``tokens`` that were read."""
        for stream in self._streams():
            if stream is self.main or self.followed:
                stream.cache.crop(-tokens)

    def branches(self) -> tuple[Tensor, Tensor, list[DynamicCache]]:
        """The state to :meth:`resume` from, any number of times."""
        return self.arms, self.text_B, [stream.cache for stream in self._streams()]

    def resume(self, state: tuple[Tensor, Tensor, list[DynamicCache]]) -> None:
        """Go back to ``state``."""
        self.arms, self.text_B, branches = state
        for stream, cache in zip(self._streams(), branches, strict=True):
            stream.cache = branch(cache)

    def _streams(self) -> list[Stream]:
        return [self.main] if self.donor is None else [self.main, self.donor.stream]
