"""The reasoning-gym package, imported late, and its scorers: all that grading needs of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from featdiff.artifacts.artifact import ContractError


@cache
def package() -> Any:
    """The package's registry; imported late, because it is an extra and slow to import."""
    try:
        import reasoning_gym  # noqa: F401  (fills the registry)
        from reasoning_gym import factory
    except ModuleNotFoundError as error:
        raise ContractError(
            "params.yaml",
            "prepare.tasks",
            "the package reasoning-gym installed",
            f"no module {error.name}",
            "pip install -e .[smollm2]",
        ) from None
    return factory


@cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
    scorer: Callable[[str, dict[str, Any]], float] = package().get_score_answer_fn(dataset)
    return scorer


def score(answer: str, meta: dict[str, Any]) -> float:
    """The package's score of ``answer``, 0 to 1; ``meta`` is a sample's own."""
    scorer = _scorer(meta["dataset"])
    try:
        return float(scorer(answer, meta["entry"]))
    except Exception:  # its scorers raise all kinds of errors on text they do not expect: that is a wrong answer
        return 0.0
