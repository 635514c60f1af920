"""What is intervened on, and which way a claim says that accuracy moves."""

from __future__ import annotations

PURPOSES = {"zero_grpo": "grpo", "zero_sft": "sft", "amplify_base": "base"}
"""What is edited, by what for."""


def sign_of(purpose: str) -> int:
    """Direction in which the claim says that accuracy moves."""
    return 1 if purpose == "amplify_base" else -1
