"""General text for the crosscoder's corpus."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import CorpusParams
from featdiff.config.parse import parse
from featdiff.config.reading import ConfigError
from featdiff.tasks.corpus import general_texts
from featdiff.tasks.task import Text

TEXTS = Path(__file__).parent / "data" / "texts.jsonl"
HUB = f"hub:owner/name@{'0' * 40}#train"


def drawn(general: Any, count: int, max_chars: int, banned: set[str] | None = None, seed: int = 0) -> list[Text]:
    given = {"texts": count, "math_share": 0.0, "general": general, "max_chars": max_chars}
    params = parse(CorpusParams, given, "params.yaml")
    return general_texts(params, "hub", count, banned or set(), np.random.default_rng(seed))


def test_blank_texts_headings_repeats_and_evaluation_prompts_are_passed_over() -> None:
    texts = drawn(str(TEXTS), 2, 1000)
    assert {text.completion for text in texts} == {
        "The river rose in the night and the bridge was closed until morning .",
        "Bees find their way home by the sun.",
    }
    assert {(text.prompt, text.source) for text in texts} == {("", "general")}
    left = drawn(str(TEXTS), 1, 1000, {"Bees find their way home by the sun."})
    assert left[0].completion.startswith("The river")


def test_texts_are_cut_after_a_word() -> None:
    assert {text.completion for text in drawn(str(TEXTS), 2, 22)} == {"The river rose in the", "Bees find their way"}


def test_too_few_texts_and_other_columns_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="expected 3 texts, found 2"):
        drawn(str(TEXTS), 3, 1000)
    (tmp_path / "f.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(ContractError, match=r"f.jsonl:1: text: expected a column 'text'"):
        drawn(str(tmp_path / "f.jsonl"), 1, 1000)


def test_several_sources_give_their_shares(tmp_path: Path) -> None:
    talks = [{"turns": [{"from": "user", "value": f"why {i}?"}, {"from": "model", "value": f"so {i}."}]} for i in range(9)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in talks))
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"body": {"plain": f"page {i}"}}) + "\n" for i in range(9)))
    sources = {
        "talks": {"path": str(tmp_path / "talks.jsonl"), "column": "turns.value", "share": 0.3},
        "web": {"path": str(tmp_path / "web.jsonl"), "column": "body.plain", "share": 0.7},
    }
    texts = drawn(sources, 7, 1000)
    assert Counter(text.source for text in texts) == {"talks": 2, "web": 5}
    assert {text.completion for text in texts if text.source == "talks"} < {f"why {i}?\n\nso {i}." for i in range(9)}
    assert {text.completion for text in texts if text.source == "web"} < {f"page {i}" for i in range(9)}
    assert texts != drawn(sources, 7, 1000, seed=1)


@pytest.mark.parametrize(
    ("general", "said"),
    [
        ({"a": {"path": "x", "column": "text", "share": 0.5}}, "general: the shares of its sources add up to 0.5, and must"),
        ({"a": {"path": "x", "column": "text", "share": 1.0, "shar": 1}}, r"general.a.shar: unknown key; did you mean share"),
        ({"a": {"path": "x", "column": "text", "share": 2.0}}, r"general.a.share: .*less than or equal to 1"),
        ({"A b": {"path": "x", "column": "text", "share": 1.0}}, "a name is 1 to 40"),
        (7, "general: .*valid string"),
    ],
)
def test_sources_that_are_not_such_are_named(general: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        drawn(general, 1, 10)


def test_a_data_set_of_the_hub_is_read_as_far_as_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked, read = [], []

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(100_000):
            read.append(i)
            yield {"text": f"text {i}"}

    def load(*words: Any, **how: Any) -> datasets.IterableDataset:
        asked.append((*words, how))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts = [text.completion for text in drawn(HUB, 50, 1000)]
    assert asked == [("owner/name", None, {"revision": "0" * 40, "split": "train", "streaming": True})]
    assert len(set(texts)) == 50
    assert len(read) < 11_000, "as many as are shuffled together, and a few"
    assert max(int(text.split()[1]) for text in texts) > 5_000, "not the first of them"
    assert texts == [text.completion for text in drawn(HUB, 50, 1000)], "the same again"
    assert set(texts) != {text.completion for text in drawn(HUB, 50, 1000, seed=1)}
    with pytest.raises(ContractError, match="expected 100001 texts, found 100000"):
        drawn(HUB, 100_001, 1000)
    read.clear()
    shares = {"all": {"path": HUB, "column": "text", "share": 1.0}, "none": {"path": HUB, "column": "text", "share": 0.0}}
    assert Counter(text.source for text in drawn(shares, 5, 1000)) == {"all": 5}
    assert len(read) < 25_000, "of what has no share hardly more than is shuffled together"


def test_a_stream_that_breaks_off_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def rows() -> Iterator[dict[str, Any]]:
        yield {"text": "one"}
        raise ConnectionError("the network\nis gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(ContractError, match=r"data set: expected a stream that can be read .*the network is gone; check name"):
        drawn(HUB, 5, 1000)
