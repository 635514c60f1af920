"""Token detectors and features of context told apart by planting."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from featdiff.activations.residual import TokenStream
from featdiff.config.sets import DescribeParams
from featdiff.description.planting import plan, planted
from featdiff.description.reading import PARTS, FeatureReader, Reading
from tiny import params_of

TOKEN, BEFORE = 7, 3
Rule = Callable[[list[int], int], float]
"""Value of a feature at a place of a text."""


def on_token(ids: list[int], place: int) -> float:
    return 2.0 if ids[place] == TOKEN else 0.0


def in_context(ids: list[int], place: int) -> float:
    return 2.0 if ids[place] == TOKEN and ids[place - 1] == BEFORE else 0.0


def weak_alone(ids: list[int], place: int) -> float:
    return max(in_context(ids, place), 0.05 * on_token(ids, place))


def never(_ids: list[int], _place: int) -> float:
    return 0.0


class Rules(FeatureReader):
    """Features that are rules on token ids."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules, self.features, self.seen = rules, list(range(len(rules))), []

    def read(self, stream: TokenStream, parts: Sequence[str] = PARTS) -> Reading:
        self.seen += stream.texts
        values = [[rule(ids, place) for rule in self.rules] for ids in stream.texts for place in range(stream.skip, len(ids))]
        return Reading(stream, {part: torch.tensor(values) for part in parts})


def params(**changes: Any) -> DescribeParams:
    defaults = {"planted_tokens": 2, "planted_texts": 40, "bootstrap": 200, "token_detector": 0.5}
    return params_of(DescribeParams, "describe", **defaults | changes)


def corpus(texts: int = 160, seed: int = 0) -> TokenStream:
    """Texts of tokens 0 to 9 after a first token; those with an even number never hold TOKEN."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, 10, 12) for _ in range(texts)]
    return TokenStream([[99, *np.where((i % 2 == 0) & (ids == TOKEN), 1, ids).tolist()] for i, ids in enumerate(drawn)], 1)


def answers() -> TokenStream:
    return TokenStream([[99, 5, BEFORE, TOKEN, i % 5] for i in range(30)], 1)


def test_a_token_detector_and_a_feature_of_context_are_told_apart() -> None:
    reader = Rules([on_token, in_context, weak_alone, never])
    read, stored = reader.read(answers()), reader.read(corpus())
    made = planted(reader, [read, stored], stored, params(), 0)
    assert [row["verdict"] for row in made] == ["token", "context", "context", "untested"]
    assert [[token["token_id"] for token in row["tokens"]] for row in made] == [[TOKEN]] * 3 + [[]]
    token, context, weak = (row["tokens"][0] for row in made[:3])
    assert (token["ratio"].value, token["rate"].value, token["natural"].value) == (1, 1, 1)
    assert token["original"].value == token["planted"].value == 2
    assert (context["natural"].value < 0.5, context["ratio"].value < 0.3) == (True, True)
    assert weak["rate"].value == 1
    assert weak["ratio"].value > 0.05
    assert {row["ratio"].n for row in (token, context, weak)} == {40}
    lenient = planted(reader, [read, stored], stored, params(token_detector=0.05), 0)
    assert [row["verdict"] for row in (lenient[0], lenient[2])] == ["token", "token"]


def test_a_feature_that_planting_half_wakes_is_undecided() -> None:
    def after_even(ids: list[int], place: int) -> float:
        return 2.0 if ids[place] == TOKEN and ids[place - 1] % 2 == 0 else 0.0

    reader = Rules([on_token, after_even])
    stored = reader.read(corpus())
    (token,) = planted(reader, [stored], stored, params(), 0)[1]["tokens"]
    assert token["ratio"].low < 0.5 < token["ratio"].high
    assert token["verdict"] == "undecided"
    for bound, verdict in ((0.1, "token"), (0.9, "context")):
        assert planted(reader, [stored], stored, params(token_detector=bound), 0)[1]["verdict"] == verdict


def test_each_top_token_is_judged_by_itself() -> None:
    def mixed(ids: list[int], place: int) -> float:
        return 5.0 if ids[place] == 8 else in_context(ids, place)

    reader = Rules([on_token, mixed])
    read, stored = reader.read(answers()), reader.read(corpus())
    row = planted(reader, [read, stored], stored, params(), 0)[1]
    verdicts = {token["token_id"]: token["verdict"] for token in row["tokens"]}
    assert verdicts == {8: "token", TOKEN: "context"}, "the answers' strongest token beside that of the corpus"
    assert row["verdict"] == "token"
    found = {token["token_id"]: token for token in row["tokens"]}
    assert (found[8]["original"].value, found[8]["planted"].value) == (5, 5)
    assert found[TOKEN]["original"].value == 2


def test_tokens_end_silent_texts_of_the_corpus() -> None:
    reader = Rules([in_context])
    read, stored = reader.read(answers()), reader.read(corpus())
    reader.seen.clear()
    planted(reader, [read, stored], stored, params(), 0)
    assert len(reader.seen) == 40
    for ids in reader.seen:
        assert ids[-1] == TOKEN
        whole = next(text for text in stored.stream.texts if text[: len(ids) - 1] == ids[:-1] and len(text) > len(ids) - 1)
        assert not any(in_context(whole, place) for place in range(1, len(whole)))
        assert len(ids) > 1


def test_a_feature_of_every_text_is_planted_where_it_is_silent_in_the_quietest() -> None:
    stream = TokenStream([[99, 1, TOKEN, 2, TOKEN, 4] for _ in range(30)], 1)
    reader = Rules([on_token, lambda ids, place: on_token(ids, place) * (1 + (ids[0] == 98))])
    stored = reader.read(TokenStream([[98, *ids[1:]] if i < 25 else ids for i, ids in enumerate(stream.texts)], 1))
    made = plan([stored], stored, 1, params(planted_texts=5), np.random.default_rng(0))
    assert made.silent == 0
    assert len(made.texts) == 5
    for ids in made.texts:
        assert ids[0] == 99, "the five in which it is weaker"
        assert len(ids) in (1, 3, 5), "in place of a token on which it is silent"


def test_top_tokens_are_those_of_the_strongest_contexts() -> None:
    def graded(ids: list[int], place: int) -> float:
        return {8: 5.0, 6: 4.0, 4: 0.1}.get(ids[place], 0.0)

    reader = Rules([graded])
    texts = TokenStream([[99, 4, 4, 4]] * 50 + [[99, 6, 4, 1]] * 3 + [[99, 4, 8, 6]] * 4, 1)
    stored = reader.read(texts)
    made = plan([stored], stored, 0, params(planted_texts=7, planted_tokens=1), np.random.default_rng(0))
    assert made.original == {8: [5.0] * 4}
    both = plan([stored], stored, 0, params(planted_texts=7), np.random.default_rng(0))
    assert list(both.original.items()) == [(8, [5.0] * 4), (6, [4.0] * 3)]
