"""Contexts, positions and the whole description of a set, against values read one text at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featdiff.activations.residual import TokenStream, read_residual
from featdiff.activations.store import ActivationStore
from featdiff.artifacts.tables import CONTEXTS
from featdiff.config.sets import DescribeParams
from featdiff.crosscoder.edits import Editor, largest_values
from featdiff.crosscoder.readout import Reader
from featdiff.description.describe import (
    EMPTY,
    Sources,
    alike,
    contexts,
    describe,
    histograms,
    summary,
    where_it_fires,
    written_out,
)
from featdiff.description.reading import Answered, Reading, answered
from featdiff.language.models import truncate
from featdiff.stats import Interval
from featdiff.tasks.task import Sample, TaskInfo, Text
from tiny import ROLES, params_of, random_crosscoder, tiny_model, write_store

TOKENIZER = tiny_model()[1]
FEATURES = [9, 4]


def params(**changes: Any) -> DescribeParams:
    small = {"samples": 4, "contexts": 2, "window": 3, "tokens": 3, "planted_texts": 6, "bootstrap": 50, "batch_size": 4}
    return params_of(DescribeParams, "describe", **small | changes)


def reading_of(texts: list[str], values: Mapping[str, list[list[float]]], skip: int = 1) -> Reading:
    """Values of one feature, by text and kept token (BOS before each text)."""
    stream = TokenStream(TOKENIZER(texts)["input_ids"], skip)
    return Reading(stream, {part: torch.tensor([[float(v)] for text in held for v in text]) for part, held in values.items()})


def listed(
    reading: Reading, sources: list[str], starts: list[int | None] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    labels = [f"text-{i}" for i in range(len(sources))]
    return list(contexts(reading, sources, labels, starts or [None] * len(sources), [5], TOKENIZER, params(**changes)))


def test_contexts_hold_the_largest_values_of_each_source(tmp_path: Path) -> None:
    tuned = [[0, 1, 0, 0, 3, 0, 0, 2], [0, 7, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 9, 0]]
    original = [[value / 2 for value in part] for part in tuned]
    texts = ["abcdefgh", "ijkl", "mnop", "qrst", "uvwx"]
    made = listed(reading_of(texts, {"tuned": tuned, "original": original}), ["p", "p", "p", "p", "q"])
    assert [(row["source"], row["rank"], row["text"]) for row in made] == [
        ("p", 1, "text-1"), ("p", 2, "text-0"), ("q", 1, "text-4"),
    ]  # fmt: skip
    longest = made[1]
    assert longest["tokens"] == list("bcdefgh"), "three tokens on either side of the fifth"
    assert longest["tuned"] == [1, 0, 0, 3, 0, 0, 2]
    assert longest["original"] == [0.5, 0, 0, 1.5, 0, 0, 1]
    assert all(row["tuned"][row["peak"]] == max(row["tuned"]) for row in made)
    assert {row["feature_id"] for row in made} == {5}
    CONTEXTS.write(tmp_path, made)


def test_a_context_near_each_quantile_beside_the_strongest() -> None:
    texts = ["ab", "cd", "ef", "gh", "ij", "kl"]
    tuned = [[9, 0], [7, 0], [5, 0], [3, 0], [1, 0], [0, 0]]
    reading = reading_of(texts, {"tuned": tuned, "original": tuned})
    labels = [f"text-{i}" for i in range(6)]
    made = list(contexts(reading, ["p"] * 6, labels, [None] * 6, [5], TOKENIZER, params(contexts=1), [0.75, 0.5, 0.25]))
    assert [(row["quantile"], row["text"]) for row in made] == [
        (None, "text-0"), (0.75, "text-1"), (0.5, "text-2"), (0.25, "text-3"),
    ]  # fmt: skip
    assert [row["rank"] for row in made] == [1, 2, 3, 4]
    two = reading_of(texts[:2], {"tuned": tuned[:2], "original": tuned[:2]})
    made = list(contexts(two, ["p"] * 2, labels[:2], [None] * 2, [5], TOKENIZER, params(contexts=1), [0.75, 0.5, 0.25]))
    assert [row["text"] for row in made] == ["text-0", "text-1"], "what was kept is not kept again"


def test_a_histogram_counts_what_fires_in_equal_bins_of_both_models() -> None:
    values = {"tuned": [[0, 1, 8, 7.9]], "original": [[0, 0, 3, 0]]}
    [found] = histograms(reading_of(["abcd"], values), 4)
    assert found == {"upper": 8.0, "tuned": [1, 0, 0, 2], "original": [0, 1, 0, 0]}
    [silent] = histograms(reading_of(["ab"], {"tuned": [[0, 0]], "original": [[0, 0]]}), 2)
    assert silent == {"upper": 0.0, "tuned": [0, 0], "original": [0, 0]}


def test_features_are_alike_whose_values_go_together() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(500, generator=generator), torch.rand(500, generator=generator)
    values = torch.stack([one, other, 3 * one + 0.05 * other, torch.zeros(500)], dim=1)
    stream = TokenStream(TOKENIZER(["a" * 500])["input_ids"], 1)
    reading = Reading(stream, {"tuned": values, "original": values})
    assert alike(reading, [7, 8, 9, 3], 0.9) == [[9], [], [7], []]


def test_equal_contexts_stand_once_and_silence_is_no_context() -> None:
    reading = reading_of(["ab", "ab", "cd"], {model: [[2, 0], [2, 0], [0, 1]] for model in ("tuned", "original")})
    made = listed(reading, ["p"] * 3, contexts=3)
    assert [row["tokens"] for row in made] == [["a", "b"], ["c", "d"]]
    quiet = reading_of(["ab"], {"tuned": [[0, 0]], "original": [[5, 5]]})
    assert listed(quiet, ["p"]) == []


def test_where_the_answer_begins_is_counted_from_the_window() -> None:
    reading = reading_of(["abcdef=gh"], {model: [[0, 0, 0, 0, 0, 0, 4, 0, 0]] for model in ("tuned", "original")})
    start = 1 + len("abcdef=")
    row = listed(reading, ["p"], [start])[0]
    assert row["tokens"][row["answer_from"] :] == ["g", "h"]


def test_positions_are_told_apart_and_every_task_counts_the_same() -> None:
    texts = ["ab=xyz", "c=wv", "d=", "e=u"]
    values = [[1, 0, 5, 7, 0, 4], [0, 3, 0, 2], [2, 0], [0, 6, 0]]
    reading = reading_of(texts, {"tuned": values, "original": [[0] * len(part) for part in values]})
    tasks = ["p", "p", "p", "q"]
    samples = [Sample(f"s{i}", task, "find", text, "") for i, (task, text) in enumerate(zip(tasks, texts, strict=True))]
    answers = Answered(samples, reading.stream.texts, [1 + text.index("=") + 1 for text in texts])
    (rows,) = where_it_fires(reading, answers, params(), 0)
    found = {(row["model"], row["position"], row["task"]): (row["value"], row["rate"]) for row in rows}
    wanted = {  # mean over answers of one task, then over the two tasks
        "prompt": ((0.5 + 0 + 2) / 3 / 2, (0.5 + 0 + 1) / 3 / 2),
        "prompt_last": (((5 + 3 + 0) / 3 + 6) / 2, (2 / 3 + 1) / 2),
        "answer_first": (((7 + 0) / 2 + 0) / 2, (0.5 + 0) / 2),
        "answer_rest": ((2 + 2) / 2, (0.5 + 1) / 2),
    }
    for position, (value, rate) in wanted.items():
        assert found["tuned", position, None][0].value == pytest.approx(value), position
        assert found["tuned", position, None][1].value == pytest.approx(rate), position
        assert found["original", position, None][0].value == 0
    assert found["tuned", "prompt_last", "p"][0].value == pytest.approx(8 / 3)
    assert found["tuned", "prompt_last", "q"][1].value == 1
    assert (found["tuned", "prompt_last", None][0].n, found["tuned", "answer_rest", None][0].n) == (4, 2)
    assert {task for _, position, task in found if position != "prompt_last"} == {None}


TASKS = {
    "rev": TaskInfo("rev", "find", "words", "generation", "organism", "strict", False, 0),
    "quiz": TaskInfo("quiz", "heldout", "questions", "option_text_norm", "letter", "strict", False, 2),
}
MANNERS = ("steps", "direct")


def question(task: str, i: int, split: str = "find") -> Sample:
    options = ("one", "two") if task == "quiz" else ()
    return Sample(f"{task}-{split}-{i}", task, split, f"{task} {'abc'[i % 3]}{i}=", "A" if options else "x", options)


def answer(sample: Sample, mode: str, i: int, completion: str) -> dict[str, Any]:
    manner = MANNERS[i % 2] if sample.task == "rev" else ""
    return {"sample_id": sample.sample_id, "task": sample.task, "split": sample.split, "mode": mode, "draw": 0} | {
        "completion": completion, "parsed": "A", "correct": True, "manner": manner,
    }  # fmt: skip


SAMPLES = [question(task, i, split) for task in TASKS for split in ("find", "report") for i in range(6)]
ANSWERS = [
    answer(sample, mode, i, "one" if sample.task == "quiz" else f"<a>{sample.sample_id[-1]}.")
    for i, sample in enumerate(SAMPLES)
    for mode in (("greedy", "sampled") if sample.task == "rev" else ("option_text", "option_text_norm"))
]
CORPUS = [Text(f"rev a{i}=a.\nrev {'bcde'[i % 4]}=", f"<b>{i}.", f"rev/{MANNERS[i % 2]}") for i in range(12)]


def test_answers_are_the_models_own_on_the_find_split_under_the_tasks_own_rule() -> None:
    wrong = [
        row | {"completion": "zzz"} for row in ANSWERS if row["mode"] in ("sampled", "option_text") or row["split"] == "report"
    ]
    right = [row for row in ANSWERS if row["mode"] in ("greedy", "option_text_norm") and row["split"] == "find"]
    found = answered(TOKENIZER, TASKS, SAMPLES, wrong + right, 4)
    assert answered(TOKENIZER, TASKS, SAMPLES, right + wrong, 4) == found
    assert found.tasks == ["rev"] * 4 + ["quiz"] * 4
    texts = TOKENIZER.batch_decode(found.texts, skip_special_tokens=True)
    assert texts[0] == "rev a0=<a>0."
    assert texts[4] == "quiz a0= one"
    assert TOKENIZER.batch_decode(found.prompts, skip_special_tokens=True) == [sample.prompt for sample in found.samples]
    assert {sample.split for sample in found.samples} == {"find"}


def sources(folder: Path) -> tuple[Sources, dict[str, torch.nn.Module]]:
    """Two tiny models with everything read from them, and their trunks once more."""
    coder = random_crosscoder(("base", "sft", "grpo"), d_model=16, n_features=12, threshold=1.0)
    coder.mean.zero_()  # the features of FEATURES fire
    trunks = {name: truncate(tiny_model(seed)[0], 1) for name, seed in (("base", 0), ("grpo", 1))}
    stream = TokenStream(TOKENIZER([text.prompt + text.completion for text in CORPUS])["input_ids"], 1)
    stores = {}
    for name, trunk in trunks.items():
        acts = read_residual(trunk, stream, 4, TOKENIZER.pad_token_id, torch.float32)
        stores[name] = ActivationStore({name: write_store(folder / name, acts, shard_rows=50)})
    largest = largest_values(coder, stores["grpo"], torch.device("cpu"))
    editor = Editor(coder, "base", 1, torch.device("cpu"), largest, donor_name="grpo")
    edits = {k: editor.edit("add", [k], "prompt_last", 1.0) for k in FEATURES}
    models = {name: tiny_model(seed)[0] for name, seed in (("base", 0), ("grpo", 1))}
    graded = {"base": ANSWERS, "grpo": ANSWERS}
    first = stream.first(150)
    return Sources(ROLES, coder, 1, models, TOKENIZER, TASKS, SAMPLES, graded, CORPUS, first, stores, largest, edits), trunks


def read_alone(trunk: torch.nn.Module, reader: Reader, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return reader(trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0])


def test_the_whole_description_is_of_values_read_one_text_at_a_time(tmp_path: Path) -> None:
    given, trunks = sources(tmp_path)
    described, rows, shaded = describe(given, params(), 0)
    readers = {name: Reader(given.crosscoder, name, features=FEATURES) for name in trunks}
    played = {"base": "original", "grpo": "tuned"}
    found = answered(TOKENIZER, TASKS, SAMPLES, ANSWERS, 4)
    values = {name: [read_alone(trunk, readers[name], ids)[1:] for ids in found.texts] for name, trunk in trunks.items()}
    stored = {name: [read_alone(trunk, readers[name], ids)[1:] for ids in given.corpus.texts] for name, trunk in trunks.items()}
    for s, (k, feature) in enumerate(zip(FEATURES, described["features"], strict=True)):
        assert (feature["feature_id"], feature["largest"]) == (k, given.largest_F[k].item())
        strongest = {row["source"]: row for row in rows if row["feature_id"] == k and row["rank"] == 1}
        for source, parts in (("corpus", stored["grpo"]), ("rev", values["grpo"][:4]), ("quiz", values["grpo"][4:])):
            peak = max(part[:, s].max().item() for part in parts)
            assert peak > 0
            assert strongest[source]["tuned"][strongest[source]["peak"]] == pytest.approx(peak, rel=1e-3)
        i = int(strongest["corpus"]["text"].removeprefix("corpus-"))
        peak = int(stored["grpo"][i][:, s].argmax())
        assert strongest["corpus"]["original"][strongest["corpus"]["peak"]] == pytest.approx(
            stored["base"][i][peak, s].item(), abs=1e-3
        )
        for name, part in played.items():
            rate = (torch.cat(stored[name])[:, s] > 0).float().mean().item()
            assert feature["corpus_rate"][part] == pytest.approx(rate)
            last = [part[start - 2, s].item() for part, start in zip(values[name], found.starts, strict=True)]
            row = next(
                row
                for row in feature["positions"]
                if (row["model"], row["position"], row["task"]) == (part, "prompt_last", None)
            )
            assert row["value"].value == pytest.approx(sum(last) / len(last), rel=1e-3)
            assert feature["manner"]["answers"][part]["fires"] == sum(value > 0 for value in last[:4]), "only rev has a manner"
        assert feature["manner"]["answers"]["original"]["steps"].value == 0.5
        assert feature["manner"]["texts"]["tuned"]["prompts"] == 4
    assert described["set"]["manner"]["answers"]["tuned"]["prompts"] == 4
    assert (described["prompts"], described["corpus_tokens"]) == (8, given.corpus.rows)
    reported = answered(TOKENIZER, TASKS, SAMPLES, ANSWERS, params().shaded, split="report")
    assert reported.samples
    assert {sample.split for sample in reported.samples} == {"report"}
    held = {(row["feature_id"], row["sample_id"]): row for row in shaded}
    for sample, ids, start in zip(*reported, strict=True):
        for s, k in enumerate(FEATURES):
            read = {part: read_alone(trunks[name], readers[name], ids)[1:, s] for name, part in played.items()}
            row = held.pop((k, sample.sample_id), None)
            if row is None:
                assert not any(values_T.any() for values_T in read.values()), "it fires here"
                continue
            assert "".join(row["tokens"][: row["answer_from"]]) == TOKENIZER.decode(ids[1:start])
            for part, values_T in read.items():
                assert row[part] == pytest.approx(values_T.tolist(), abs=1e-3)
    assert not held
    assert shaded


def test_what_is_written_is_json_with_the_text_of_every_token(tmp_path: Path) -> None:
    given, _ = sources(tmp_path)
    written = written_out(describe(given, params(), 0)[0], TOKENIZER)
    again = json.loads(json.dumps(written, allow_nan=False))
    assert again == written
    token = again["features"][0]["more_likely"][0]
    assert token["token"] == TOKENIZER.decode([token["token_id"]])
    assert set(token["change"]) == {"value", "low", "high", "n"}
    assert summary(again)["features"] == 2
    assert sum(summary(again)["verdicts"].values()) == 2
    assert written_out({"a": [Interval(1.0, 0.0, 2.0, 3)]}, TOKENIZER) == {
        "a": [{"value": 1.0, "low": 0.0, "high": 2.0, "n": 3}]
    }


def test_no_set_is_a_description_too() -> None:
    described, rows, shaded = EMPTY
    assert rows == shaded == []
    nothing = {measure: {"answers": {}, "texts": {}} for measure in ("precision", "recall", "auroc")}
    assert summary(described) == {"features": 0, "verdicts": {}} | nothing
    assert json.loads(json.dumps(described)) == described
