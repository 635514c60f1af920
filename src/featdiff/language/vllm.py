"""vLLM in place of our own decoder where nothing is edited, once both agree on the first questions (ours).

``$FEATDIFF_VLLM=colocate`` asks for it, as for the completions of GRPO: it holds the model a second time, on the GPU of each
rank. A server is started with one model's weights, and is for GRPO alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

import torch

from featdiff.processes.ranks import COLOCATE, process_state, shared_out, vllm_asked
from featdiff.processes.signals import say

MEMORY = 0.5
"""Of the GPU's, for vLLM's weights and its keys and values; the model itself has the rest."""
TRIED = 32
"""Questions that both decoders answer before one takes the other's place."""
AGREED = 0.9
"""Share of them that must be graded alike. Single tokens may differ: kernels and summation orders are others."""
Grades = Sequence[tuple[str, bool]]
"""Text of each answer, and whether it is right."""


class Vllm:
    """One model in vLLM: that of ``source``, a folder, or a name on the hub with its ``revision``. It answers with up to
    ``longest`` tokens, those of the prompt included. Every rank makes one, at the same time."""

    def __init__(self, source: str, revision: str | None, dtype: torch.dtype, ends: Collection[int], longest: int) -> None:
        from vllm import LLM

        state = process_state()
        with socket.socket() as free:  # where these are set, by a launcher, they stay
            free.bind(("", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        place = {"RANK": state.process_index, "LOCAL_RANK": state.local_process_index, "WORLD_SIZE": state.num_processes}
        os.environ |= {name: str(value) for name, value in place.items()} | meeting | os.environ
        self._ends = frozenset(ends)
        self._llm = LLM(
            model=source,
            revision=revision,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=longest,  # else it sets memory aside for the longest text that the model can read
            gpu_memory_utilization=MEMORY,
            distributed_executor_backend="external_launcher",  # each rank is its own process, as it was started
            seed=0,
        )

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Token ids after each prompt, as :func:`featdiff.language.decode.generate` gives them; a seed for each is drawn from
        ``generator``, so that what is drawn does not depend on what is answered beside it."""
        from vllm import SamplingParams

        seeds = torch.randint(2**31, (len(prompts),), generator=generator).tolist() if temperature else [None] * len(prompts)
        how: dict[str, Any] = {"temperature": temperature, "max_tokens": max_new_tokens, "stop_token_ids": sorted(self._ends)}
        asked = [SamplingParams(**how, seed=seed, detokenize=False) for seed in seeds]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._llm.generate(given, asked, use_tqdm=False)
        return [list(takewhile(lambda token: token not in self._ends, each.outputs[0].token_ids)) for each in answers]


def in_place(
    make: Callable[[], Vllm], ask: Callable[[Vllm | None], Grades], kept: Callable[[str, Callable[[], Any]], Any]
) -> tuple[Vllm | None, dict[str, float]]:
    """What ``make`` makes, where vLLM is asked for and graded as our decoder is; and how far both agree.
    None where it is not asked for, or, with a line that says so, where they do not agree. ``ask`` has either (None: our
    decoder) answer the same questions greedily; ``kept`` computes a value by name, now or before."""
    if vllm_asked() != COLOCATE:
        return None, {}
    vllm = make()

    def compared() -> dict[str, float]:
        pairs = list(zip(ask(None), ask(vllm), strict=True))
        return {
            "vllm_same_text": sum(ours[0] == theirs[0] for ours, theirs in pairs) / max(1, len(pairs)),
            "vllm_same_grade": sum(ours[1] == theirs[1] for ours, theirs in pairs) / max(1, len(pairs)),
        }

    (found,) = shared_out([lambda: kept("vLLM", compared)])  # one answer for all ranks
    if (alike := found["vllm_same_grade"]) < AGREED:
        say(f"vLLM and our decoder are graded alike on {alike:.0%} of {TRIED} questions, not {AGREED:.0%}: ours answers")
        return None, found
    return vllm, found
