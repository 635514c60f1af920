"""Writes the results of ``metrics/summary.json`` into README.md, so that no number there is typed by hand.

``python -m featdiff.report.readme``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.documents import fill, markdown
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, ZERO_TUNED
from featdiff.report.words import MISSING

ORDER = ("transfer", "forgetting", "features", "necessary", "sufficient", "dictionary")
"""Of the claims: JSON has them by name."""
ROLES = {
    "train": "math (trained on)",
    "find": "found on",
    "heldout": "held out",
    "control": "control",
    "reported": "reported only",
}


def results(summary: dict[str, Any]) -> str:
    """Verdicts, accuracies and effects as Markdown."""
    roles = {role: name for role, name in ROLES.items() if role in next(iter(summary["accuracy"].values()))}
    parts = [
        markdown(["claim", "verdict"], ([summary["claims"][key], f"**{summary['verdicts'][key]}**"] for key in ORDER)),
        markdown(
            ["accuracy, report split", *roles.values()],
            ([model, *(f"{accuracy[role]:.2f}" for role in roles)] for model, accuracy in summary["accuracy"].items()),
        ),
    ]
    zero, amplify = (summary["effects"].get(purpose, {}) for purpose in (ZERO_TUNED, AMPLIFY_ORIGINAL))
    if zero and amplify:
        sets = ["set taken away from the tuned model", "random sets", "set amplified in the original", "random sets"]
        rows = (
            [task, str(row["n"]), *(cell(of[task]) for of in (zero, amplify) for cell in (_effect, _band))]
            for task, row in zero.items()
        )
        parts += [
            markdown(["change of accuracy", "n", *sets], rows),
            "Effects with 95 % bootstrap interval; random sets, at most as long: 5th to 95th percentile of the draws.",
        ]
    return "\n\n".join(parts)


def _effect(row: dict[str, Any]) -> str:
    return f"{row['effect']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def _band(row: dict[str, Any]) -> str:
    return MISSING if row["random_low"] is None else f"{row['random_low']:+.2f} … {row['random_high']:+.2f}"


def with_results(readme: str, summary: dict[str, Any]) -> str:
    """``readme`` with the results of ``summary``; raises ValueError without markers."""
    return fill(readme, "results", results(summary))


if __name__ == "__main__":
    path = Path("README.md")
    path.write_text(with_results(path.read_text(encoding="utf-8"), read_json(Path("metrics/summary.json"))), encoding="utf-8")
