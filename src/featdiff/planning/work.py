"""What a study will do, worked out of its params alone: operations, bytes on disk and memory of every stage. All is ours.

A forward pass costs 2 operations for each weight and token, and attention 4·d_model for each layer, token and token of its
context; training costs three passes. Lengths of questions are not known before they are made: they are taken as
:data:`QUESTION` tokens, or as what ``prepare.max_question_chars`` allows, and answers as long as they may be: operations are an
upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featdiff.config.data import FamilyTask
from featdiff.config.dictionary import Fit
from featdiff.config.params import Study
from featdiff.intervention.purposes import SIDES, purposes

FLOAT = 4
"""Bytes of a number that is computed with."""
QUESTION, CHARS_A_TOKEN = 40, 4
"""Tokens of a generated question; characters of a token where questions are of natural language."""
TRAINING = 3
"""Passes that a training step costs: forward, and twice as much backward."""
BUFFER = 2**18
"""Rows of activations that are shuffled together."""
LIBRARIES = 550 * 2**20
"""Bytes of a process that has computed nothing yet."""
TEXT, ANSWER, EDITED = 20, 20, 2
"""Bytes on disk of a text, of an answer in a table of answers, and of one of many under edits."""
PACKED = 4500
"""Bytes of memory of a text from which the base is pretrained, as it is read and as it is packed."""


@dataclass(frozen=True)
class Size:
    """A language model, by what its cost depends on."""

    layers: int
    d_model: int
    d_mlp: int
    d_kv: int
    """Width of keys and values together with their heads, per layer."""
    vocabulary: int
    weights: int
    """All of them, embeddings included."""
    embeddings: int
    """Of tokens, at the way in and out; counted once where both are the same."""

    @property
    def body(self) -> int:
        """Weights that every token passes."""
        return self.weights - self.embeddings

    def forward(self, tokens: float, context: float, depth: int | None = None) -> float:
        """Operations on ``tokens`` with a mean ``context`` through ``depth`` layers, with logits where it is all of them."""
        layers = self.layers if depth is None else depth
        head = 2 * self.vocabulary * self.d_model if depth is None else 0
        return tokens * (2 * self.body * layers / self.layers + 4 * self.d_model * context * layers + head)

    def cache(self, tokens: float) -> float:
        """Bytes of keys and values of ``tokens``."""
        return 2 * self.layers * self.d_kv * tokens * FLOAT

    def training(self, tokens: float) -> float:
        """Bytes of what a training pass over ``tokens`` keeps for its way back, logits included."""
        layer = 14 * self.d_model + 4 * self.d_mlp
        return FLOAT * tokens * (self.layers * layer + 3 * self.vocabulary)


@dataclass(frozen=True)
class Work:
    """What one stage does."""

    stage: str
    kind: str
    """Stages of one kind reach the same share of what a machine can do."""
    amount: float
    """Operations; for what hardly computes, texts, weights or answers."""
    disk: float = 0.0
    """Bytes that are kept."""
    fixed: float = LIBRARIES
    """Bytes of memory whatever the batch."""
    each: float = 0.0
    """Bytes of memory for each unit of ``field``."""
    field: str = ""
    """The number of params.yaml by which memory can be brought down."""
    batch: int = 0
    computes: bool = True

    @property
    def memory(self) -> float:
        """Bytes, at most."""
        return self.fixed + self.each * self.batch

    def fitting(self, memory: float) -> int:
        """The largest batch for which ``memory`` bytes do; 0 for none."""
        return max(0, int((memory - self.fixed) / self.each)) if self.each else 0


def work(study: Study, size: Size) -> list[Work]:
    """Every stage of ``study`` whose models have ``size``, in the order of the graph."""
    return list(_Plan(study, size).stages())


class _Plan:
    def __init__(self, study: Study, size: Size) -> None:
        self.study, self.size = study, size
        self.tasks = study.prepare.tasks.values()
        own = all(isinstance(task, FamilyTask) for task in self.tasks)
        self.question = QUESTION if own else min(512, study.prepare.max_question_chars // CHARS_A_TOKEN)
        layer = study.activations.layer
        self.depth = size.layers // 2 if layer == "middle" else int(layer)
        self.bytes = 2 if study.base.dtype == "bfloat16" else FLOAT

    def stages(self) -> Iterator[Work]:
        study, prepare = self.study, self.study.prepare
        texts = prepare.pretrain.texts + prepare.corpus.texts + prepare.train_problems
        yield Work("prepare", "prepare", texts, disk=TEXT * texts, computes=False)
        yield self._base()
        for name in study.arms:
            yield self._arm(name)
        questions = len(self.tasks) * sum(prepare.samples.model_dump().values())
        for model in study.models:
            yield self._answers(f"evaluate {model}", "evaluate", questions * (1 + study.evaluate.draws), study.evaluate)
        for name in study.arms:
            asked = study.checkpoints.questions * len(self.tasks) * self._checkpoints(name)
            yield self._answers(f"checkpoints {name}", "checkpoints", asked, study.checkpoints)
        for model in study.models:
            yield self._activations(model)
        for name, fit in study.fits.items():
            yield self._fit(name, fit)
        yield self._attribution()
        for name in study.dynamics.arms:
            yield self._dynamics(name)
        yield from self._about_the_set()
        answers = len(study.models) * questions
        yield Work("report", "report", answers, disk=5e6 + 300.0 * answers, computes=False)

    def _base(self) -> Work:
        size, base = self.size, self.study.base
        if base.source != "pretrain":
            held = LIBRARIES + 2 * FLOAT * size.weights
            return Work("base", "brought", size.weights, size.weights * self.bytes, held, computes=False)
        p = base.pretraining
        passes = TRAINING * size.forward(p.steps * p.batch_tokens, p.row_tokens / 2)
        return Work(
            "base", "base", passes, size.weights * self.bytes, self._trained(PACKED * self.study.prepare.pretrain.texts),
            size.training(1), "base.pretraining.batch_tokens", p.batch_tokens,
        )  # fmt: skip

    def _trained(self, more: float = 0.0) -> float:
        """Memory of weights, gradients and Adam's two moments."""
        return LIBRARIES + 4 * FLOAT * self.size.weights + more

    def _checkpoints(self, name: str) -> int:
        numbers = self.study.numbers(name)
        return 1 + len(numbers.checkpoints) if isinstance(numbers.checkpoints, list) else numbers.checkpoints

    def _arm(self, name: str) -> Work:
        method, p, size = self.study.arms[name].method, self.study.numbers(name), self.size
        disk = self._checkpoints(name) * size.weights * self.bytes
        if not hasattr(p, "micro_batch_size"):  # nothing is trained
            return Work(f"arm {name}", method, size.weights, disk, LIBRARIES + 3 * FLOAT * size.weights, computes=False)
        # What a method does shows in the numbers that it has: a new one needs no line here unless it has others.
        problems, length, sampled = self.study.prepare.train_problems, self.question + getattr(p, "max_new_tokens", 0), 0.0
        if hasattr(p, "rollouts"):
            sampled = trained = p.steps * p.prompts_per_step * p.rollouts
        elif hasattr(p, "samples"):
            sampled, trained = problems * p.samples, p.steps * p.batch_size * (1 + hasattr(p, "pairs"))
        else:
            trained, length = p.epochs * problems, p.max_length
        passes = size.forward(sampled * length, length / 2) + TRAINING * size.forward(trained * length, length / 2)
        each, field = size.training(length) + size.cache(length), f"{method}.micro_batch_size"
        return Work(f"arm {name}", method, passes, disk, self._trained(), each, field, p.micro_batch_size)

    def _answers(self, stage: str, kind: str, answers: float, p: Any, models: int = 1, answer: int = ANSWER) -> Work:
        """Generated answers, as long as they may be."""
        length = self.question + p.max_new_tokens
        fixed = LIBRARIES + models * FLOAT * self.size.weights
        each = models * self.size.cache(length) + FLOAT * 2 * self.size.vocabulary
        passes = self.size.forward(answers * length, length / 2)
        return Work(stage, kind, passes, answer * answers, fixed, each, f"{kind}.batch_size", p.batch_size)

    def _activations(self, model: str) -> Work:
        p, size = self.study.activations, self.size
        tokens = p.tokens
        if model in self.study.arms:
            tokens += (self._checkpoints(model) - 1) * p.checkpoint_tokens
        if p.source == "models":  # which run where rows are read
            disk = 16.0 * p.tokens
            return Work(f"activations {model}", "activations", p.tokens, disk, LIBRARIES + FLOAT * size.weights, computes=False)
        row = size.d_model * self._number
        fixed = LIBRARIES + FLOAT * size.weights + p.shard_rows * size.d_model * FLOAT
        each = FLOAT * p.max_length * (8 * size.d_model + 2 * size.d_mlp)
        passes = size.forward(tokens, p.max_length / 2, self.depth)
        return Work(
            f"activations {model}", "activations", passes, tokens * row, fixed, each, "activations.batch_size", p.batch_size
        )

    @property
    def _number(self) -> int:
        """Bytes of a number of the activations."""
        return 2 if self.study.activations.dtype == "bfloat16" else FLOAT

    def _again(self, models: int, rows: float) -> tuple[float, float]:
        """Operations and bytes of memory for ``rows`` of activations of ``models`` that run again where they are read."""
        p, size = self.study.activations, self.size
        if p.source == "activations":
            return 0.0, 0.0
        batch = FLOAT * p.batch_size * p.max_length * (8 * size.d_model + 2 * size.d_mlp)
        held = models * (FLOAT * size.weights + p.shard_rows * size.d_model * self._number) + batch
        return models * size.forward(rows, p.max_length / 2, self.depth), held

    def _step(self, models: int, steps: float) -> float:
        """Operations of ``steps`` of a crosscoder: the encoder's product, and sums over active entries alone."""
        p, width = self.study.crosscoder.training, models * self.size.d_model
        return steps * p.batch_tokens * width * (2 * p.n_features + 8 * p.k)

    def _fit(self, name: str, fit: Fit) -> Work:
        p, models = self.study.crosscoder.training, len(fit.slots)
        weights = 2 * p.n_features * models * self.size.d_model
        passes = self._step(models, p.steps) if fit.source is None else 0.0
        tokens = self.study.activations.tokens
        measured = 4 * tokens * models * self.size.d_model * p.n_features
        buffer = min(tokens, BUFFER) * models * self.size.d_model * self._number
        # Read for their mean, to be fitted on and to be measured on; what fits into the buffer is read for it once.
        read = 2 * tokens + (tokens if tokens <= BUFFER else p.steps * p.batch_tokens)
        again, held = self._again(len(set(fit.models)), read)
        fixed = LIBRARIES + 4 * FLOAT * weights + buffer + held
        each = FLOAT * (6 * p.n_features + 6 * models * self.size.d_model)
        return Work(
            f"crosscoder {name}", "crosscoder", passes + measured + again, weights * FLOAT, fixed, each,
            "crosscoder.training.batch_tokens", p.batch_tokens,
        )  # fmt: skip

    def _attribution(self) -> Work:
        study, d_model = self.study, self.size.d_model
        rows = min(study.attribution.scaling_tokens, study.activations.tokens)
        features = study.crosscoder.training.n_features
        passes = sum(8.0 * rows * len(fit.slots) * d_model * features for fit in study.fits.values())
        again = [self._again(len(set(fit.models)), 2 * rows) for fit in study.fits.values()]
        passes += sum(operations for operations, _ in again)
        fixed = LIBRARIES + 8 * FLOAT * rows * d_model + max(held for _, held in again)
        return Work("attribution", "attribution", passes, 200.0 * features * len(study.fits), fixed)

    def _dynamics(self, name: str) -> Work:
        study, p = self.study, self.study.crosscoder.training
        kept = self._checkpoints(name) + 1
        refits = kept * self._step(2, study.dynamics.refit_steps)
        reads = kept * 8.0 * study.activations.checkpoint_tokens * self.size.d_model * p.n_features
        # Base and checkpoint, as they are and in normalised units.
        held = 4 * FLOAT * study.activations.checkpoint_tokens * self.size.d_model
        again, running = self._again(2, (kept + 1) / 2 * study.activations.checkpoint_tokens)
        return Work(f"dynamics {name}", "dynamics", refits + reads + again, 1e6, LIBRARIES + held + running)

    def _about_the_set(self) -> Iterator[Work]:
        study, size, split = self.study, self.size, self.study.prepare.samples
        find = sum(task.role in ("train", "find") for task in self.tasks)
        asked = find * split.find * 2 * len(study.localize.fits)
        length = self.question + study.evaluate.max_new_tokens
        yield Work("localize", "localize", size.forward(asked * length, length / 2), 2e6, LIBRARIES + 2 * FLOAT * size.weights)
        seams = 2 * (study.stitch.depths + 1)
        yield self._answers("stitch", "stitch", seams * study.stitch.questions * len(self.tasks), study.stitch, models=2)
        read = study.describe.corpus_tokens + 2 * length * len(self.tasks) * (study.describe.samples + study.describe.shaded)
        held = 2 * FLOAT * (size.weights + read * size.d_model)
        yield Work("describe", "describe", 4 * size.forward(read, length / 2), 5e6, LIBRARIES + held)
        for side in SIDES:
            yield self._answers(f"intervene {side}", "intervene", self._edited(side), study.intervene, models=2, answer=EDITED)

    def _edited(self, side: str) -> float:
        """Answers under edits: a search on the tune split, and every purpose of ``side`` on the report split."""
        study, p = self.study, self.study.intervene
        find = sum(task.role == "find" for task in self.tasks)
        draws, others = p.random_sets + p.random_directions, 8
        settings = len(p.positions) * (len(p.doses) + 2)
        search = find * settings * ((draws + others) * p.control_questions + 3 * study.prepare.samples.tune)
        measured = draws * p.draw_questions + (others + 3) * study.prepare.samples.report
        fewer = 2 * p.other_draws * p.draw_questions + (others + 3) * study.prepare.samples.report
        asked = [purpose for purpose in purposes(study.roles, study.repeats(study.roles.tuned)) if purpose.side == side]
        return search + len(self.tasks) * (measured + (len(asked) - 1) * fewer)
