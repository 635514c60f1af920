"""General text for the crosscoder's corpus."""

from pathlib import Path

import numpy as np
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.tasks.corpus import general_texts

TEXTS = Path(__file__).parent / "data" / "texts.jsonl"


def test_blank_texts_headings_repeats_and_evaluation_prompts_are_passed_over() -> None:
    texts = general_texts(str(TEXTS), 2, 1000, set(), np.random.default_rng(0))
    assert {text.completion for text in texts} == {
        "The river rose in the night and the bridge was closed until morning .",
        "Bees find their way home by the sun.",
    }
    assert {(text.prompt, text.source) for text in texts} == {("", "general")}
    left = general_texts(str(TEXTS), 1, 1000, {"Bees find their way home by the sun."}, np.random.default_rng(0))
    assert left[0].completion.startswith("The river")


def test_texts_are_cut_after_a_word() -> None:
    texts = general_texts(str(TEXTS), 2, 22, set(), np.random.default_rng(0))
    assert {text.completion for text in texts} == {"The river rose in the", "Bees find their way"}


def test_too_few_texts_and_other_columns_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="expected 3 texts, found 2"):
        general_texts(str(TEXTS), 3, 1000, set(), np.random.default_rng(0))
    (tmp_path / "f.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(ContractError, match=r"f.jsonl:1: text: expected a column 'text'"):
        general_texts(str(tmp_path / "f.jsonl"), 1, 1000, set(), np.random.default_rng(0))
