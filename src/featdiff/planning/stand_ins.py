"""Small things of the same kind in place of large ones that are not here: a model with its tokenizer, questions, texts (ours).

They carry no meaning. A graph that runs on them has been through every branch that the large ones take.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from featdiff.config.data import SuiteTask, TextSource
from featdiff.config.parse import parse
from featdiff.config.reading import read_yaml
from featdiff.config.values import Params
from featdiff.language.models import save_model
from featdiff.planning.plan import configuration
from featdiff.tasks.suites import ADAPTERS, HARNESS_CONTEXT
from featdiff.tasks.task import LETTERS

NOUNS = (
    "apples", "bottles", "cards", "drums", "eggs", "flags", "grapes", "hats", "keys", "lamps", "maps", "nuts", "pens", "rings",
)  # fmt: skip


class Turn(Params):
    """What stands before the role of a turn of a chat, between it and what is said, and after that."""

    before: str
    role_end: str
    after: str


class Ends(Params):
    """``tokens.yaml`` beside a model's configuration: its special tokens."""

    bos: str | None
    eos: str
    ends: list[str] = Field(min_length=1)
    """All that end an answer."""
    pad: str | None
    turn: Turn


def tokenizer_like(ends: Ends, texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from ``texts``, with the special tokens and the chat turns that ``ends`` names."""
    turn = ends.turn
    special = dict.fromkeys(
        filter(None, [ends.bos, ends.eos, *ends.ends, ends.pad, turn.before, turn.role_end.strip(), turn.after.strip()])
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ends.bos:
        first = (ends.bos, tokenizer.token_to_id(ends.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{ends.bos} $A", special_tokens=[first])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=ends.bos, eos_token=ends.eos, pad_token=ends.pad, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    before, between, after = map(json.dumps, (turn.before, turn.role_end, turn.after))
    said = f"{before} + message['role'] + {between} + message['content'] + {after}"
    answer = f"{before} + 'assistant' + {between}"
    made.chat_template = (
        f"{'{{ bos_token }}' if ends.bos else ''}{{% for message in messages %}}{{{{ {said} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    )
    return made


def model_like(folder: Path, sizes: dict[str, int], vocabulary: int, texts: Iterable[str], dtype: str, out: Path) -> None:
    """Write to ``out`` a model of the architecture that ``folder`` describes, with random weights and ``sizes`` in place of its
    own where it has such a field, and a tokenizer of the kind that ``folder`` names."""
    config, place = configuration(folder), folder / "tokens.yaml"
    ends = parse(Ends, read_yaml(place), str(place))
    tokenizer = tokenizer_like(ends, texts, vocabulary)
    for field, value in sizes.items():
        if hasattr(config, field):
            setattr(config, field, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(ends.ends)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = config.eos_token_id
    out.mkdir(parents=True)
    save_model(model, tokenizer, out)


def _put(row: dict[str, Any], column: str, value: Any) -> None:
    *way, last = column.split(".")
    for key in way:
        row = row.setdefault(key, {})
    row[last] = value


def questions(name: str, task: SuiteTask, count: int) -> Iterator[dict[str, Any]]:
    """``count`` rows in the columns that ``task`` reads, all different, also from those of a task of another ``name``."""
    columns, rng = task.columns or ADAPTERS[task.adapter], np.random.default_rng(0)
    for number in range(count):
        noun, other = (NOUNS[i] for i in rng.choice(len(NOUNS), 2, replace=False))
        a, b = (int(value) for value in rng.integers(2, 50, 2))
        row: dict[str, Any] = {}
        asked = f"Box {number + 1} of {name} has {a} {noun} and {b} {other} in it. How many things are there?"
        _put(row, columns["question"], asked)
        if context := columns.get("context") or HARNESS_CONTEXT.get(task.adapter):
            _put(row, context, f"A shop sells {noun} and {other}.")
        if "options" not in columns:
            _put(row, columns.get("answer") or columns["expression"], str(a + b))
            if "solution" in columns:
                _put(row, columns["solution"], f"{a} + {b} = {a + b}. The answer is \\boxed{{{a + b}}}.")
            yield row
            continue
        places = [place.strip() for place in columns["options"].split(",")]
        options = [str(a + b + shift) for shift in range(len(places) if len(places) > 1 else 4)][::-1]  # the last is right
        if len(places) > 1:
            for place, option in zip(places, options, strict=True):
                _put(row, place, option)
        else:
            _put(row, places[0], options)
        right = len(options) - 1
        if "labels" in columns:
            _put(row, columns["labels"], list(LETTERS[: len(options)]))
            _put(row, columns["answer"], LETTERS[right])
        elif columns["answer"] not in places:
            _put(row, columns["answer"], right)
        yield row


def texts(name: str, source: TextSource, count: int) -> Iterator[dict[str, Any]]:
    """``count`` rows of the source ``name``, with a text of some sentences in its column."""
    rng = np.random.default_rng(1)
    for number in range(count):
        said = [f"Box {number} of {name} has {rng.integers(2, 99)} {NOUNS[i]} in it." for i in rng.integers(0, len(NOUNS), 8)]
        row: dict[str, Any] = {}
        _put(row, source.column, " ".join(said))
        yield row


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
