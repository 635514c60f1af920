"""The token stream that all models read, and a model's residual stream on it. N token rows, B batch, T token, D width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from featdiff.artifacts.artifact import ContractError
from featdiff.config.dictionary import ActivationsParams
from featdiff.language.decode import left_pad
from featdiff.tasks.task import Text


class TokenStream(NamedTuple):
    """Texts as token ids. First tokens are still in place: the model must read them, even where their rows are left out."""

    texts: list[list[int]]
    skip: int
    """Tokens left out at the start of every text: 1 under the first-token policy, else 0."""

    @property
    def rows(self) -> int:
        """Token rows that the stream gives."""
        return sum(len(ids) - self.skip for ids in self.texts)

    def first(self, rows: int) -> TokenStream:
        """The fewest texts from the start that give at least ``rows`` rows together, or all where they give fewer."""
        total = 0
        for number, ids in enumerate(self.texts, start=1):
            total += len(ids) - self.skip
            if total >= rows:
                return TokenStream(self.texts[:number], self.skip)
        return self


def token_stream(texts: list[Text], tokenizer: PreTrainedTokenizerFast, params: ActivationsParams) -> TokenStream:
    """The first texts of the corpus that give ``params.tokens`` rows, as tokens. The last text is whole, so there can be a few
    rows more. Raises ContractError where the corpus gives fewer."""
    skip = int(params.drop_first_token)
    encoded = tokenizer([text.prompt + text.completion for text in texts], truncation=True, max_length=params.max_length)[
        "input_ids"
    ]
    stream = TokenStream([ids for ids in encoded if len(ids) > skip], skip)
    if stream.rows < params.tokens:
        raise ContractError(
            "params.yaml",
            "activations.tokens",
            f"at most {stream.rows} (the corpus)",
            params.tokens,
            "lower it or raise prepare.corpus.texts",
        )
    return stream.first(params.tokens)


@torch.inference_mode()
def read_residual(trunk: torch.nn.Module, stream: TokenStream, batch_size: int, pad: int, dtype: torch.dtype) -> Tensor:
    """Residual stream [N, D] at every kept token of ``stream``, in its order. ``trunk`` is a model that ends after the layer
    to read; ``batch_size`` counts texts."""
    # Texts of similar length share a batch, so that little of the work is padding. The longest come first: what does not fit
    # into memory fails at once. Batches never reach over a shard, so a shard made again after a kill has the same bytes.
    device = next(trunk.parameters()).device
    order = sorted(range(len(stream.texts)), key=lambda i: -len(stream.texts[i]))
    parts: list[Tensor] = [torch.empty(0)] * len(order)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask, positions = left_pad([stream.texts[i] for i in chosen], pad, device)
        resid_BTD = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        for row, i in enumerate(chosen):
            # Padding is on the left: a text's last tokens are the last ones of its row.
            kept = len(stream.texts[i]) - stream.skip
            parts[i] = resid_BTD[row, -kept:].to(dtype).cpu()
    return torch.cat(parts)
