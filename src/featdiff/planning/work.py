"""What a study will do, worked out of its params alone: operations, bytes on disk and memory of every stage. All is ours.

A forward pass costs 2 operations for each weight and token, and attention 4·d_model for each layer, token and token of its
context; training costs three passes, or four. Lengths of questions are not known before they are made: they are taken as
:data:`QUESTION` tokens, or as what ``prepare.max_question_chars`` allows, and answers as long as they may be: operations are an
upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from featdiff.activations.mixing import BUFFER_ROWS
from featdiff.config.data import FamilyTask
from featdiff.config.params import Study
from featdiff.config.values import REPORTED, Role
from featdiff.crosscoder.together import SURE, TRAINED, groups, held, in_a_step
from featdiff.intervention.purposes import SIDES, purposes
from featdiff.pipeline.repro import ONE_READ
from featdiff.planning.units import scaled, sized
from featdiff.tasks.task import GENERATION

FLOAT, HALF = 4, 2
"""Bytes of a number in float32 and in bfloat16."""
QUESTION, CHARS_A_TOKEN, OPTIONS = 40, 4, 60
"""Tokens of a generated question; characters of a token where questions are of natural language; tokens of a question's options
together, where those are read and nothing is generated."""
TRAINING, REMADE = 3, 4
"""Passes of a training step: forward, twice as much backward, and one more where the way back makes again what it needs."""
ROLES: tuple[str, ...] = get_args(Role)
EDITED_ROLES = tuple(role for role in ROLES if role != REPORTED)
LIBRARIES = 550 * 2**20
"""Bytes of a process that has computed nothing yet."""
TEXT, ANSWER, EDITED = 20, 20, 2
"""Bytes on disk of a text, of an answer in a table of answers, and of one of many under edits."""
PACKED = 4500
"""Bytes of memory of a text from which the base is pretrained, as it is read and as it is packed."""
STREAM = 1
"""Bytes of memory of a token whose activations are read, at most: where its text lies, 40 bytes for all tokens of it. Of texts
of 60 tokens, `make bench` finds less than that."""


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

    def trunk(self, depth: int) -> float:
        """Weights up to the stream after ``depth`` layers: what tokens become, and the layers."""
        return self.body * depth / self.layers + self.vocabulary * self.d_model

    def forward(self, tokens: float, context: float, depth: int | None = None) -> float:
        """Operations on ``tokens`` with a mean ``context`` through ``depth`` layers, with logits where it is all of them."""
        layers = self.layers if depth is None else depth
        head = 2 * self.vocabulary * self.d_model if depth is None else 0
        return tokens * (2 * self.body * layers / self.layers + 4 * self.d_model * context * layers + head)

    def cache(self, tokens: float, number: int = FLOAT) -> float:
        """Bytes of keys and values of ``tokens``, of which each number has ``number`` bytes."""
        return 2 * self.layers * self.d_kv * tokens * number

    def training(self, tokens: float, engine: Engine) -> float:
        """Bytes of what a training pass over ``tokens`` keeps for its way back, logits in float32 included."""
        layer = 14 * self.d_model + 4 * self.d_mlp
        kept = self.layers * self.d_model + layer if engine.remade else self.layers * layer
        return tokens * (engine.number * kept + FLOAT * 3 * self.vocabulary)

    @property
    def unit(self) -> float:
        """Weights that are whole on a rank at once where the others are sharded: of a block, or of an end, and of the next."""
        return 2 * max(self.body / self.layers, self.embeddings)


@dataclass(frozen=True)
class Engine:
    """What a stage is computed with."""

    number: int = FLOAT
    """Bytes of a number that arms are trained with."""
    sharded: bool = False
    """Whether ranks share out what is trained (FSDP) or each holds all of it."""
    remade: bool = False
    """Whether what the way back needs is made again (gradient checkpointing) or kept."""
    apart: bool = False
    """Whether it has memory of its own. Rows on their way to it wait in the host's, which is not counted then."""


CPU = Engine()
GPU = Engine(number=HALF, sharded=True, remade=True, apart=True)
"""bf16 products over fp32 weights, FSDP2, gradient checkpointing."""
Way = Literal["train", "forward", "sample", "fit", ""]
"""What the operations of a stage are, each at a pace of its own on a GPU; nothing for a stage that hardly computes."""


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
    way: Way = ""
    sampled: float = 0.0
    """Operations among ``amount`` that draw the answers which are then trained on."""
    repeated: float = 0.0
    """Operations among ``amount`` that every rank does by itself: models that run again where their activations are read."""
    divided: float = 0.0
    """Bytes of memory that the ranks of a stage have together, each its share."""
    single: bool = False
    """Whether products are of float32 numbers, as of models and crosscoders that are read, and not of bfloat16 ones."""
    passes: float = 0.0
    """Passes over a micro batch, for each of which sharded weights are brought together."""
    parts: int = 0
    """Pieces of equal size that ranks share out, none among several of them; 0 where there is something for every rank."""
    alone: tuple[Work, ...] = ()
    """Of what several stages have made for them at once: what each of them does where it makes it by itself."""
    reads: int = 1
    """How often the models run for it."""
    grouped: Callable[[float], Work] | None = None
    """What it is with so many bytes of memory, where that decides what is done at once and what after another."""

    @property
    def computes(self) -> bool:
        """Whether ``amount`` are operations."""
        return bool(self.way)

    @property
    def memory(self) -> float:
        """Bytes, at most, of a stage of one rank."""
        return self.on(1)

    def on(self, ranks: int) -> float:
        """Bytes of each of ``ranks``, at most."""
        return self.fixed + self.divided / ranks + self.each * self.batch

    def fitting(self, memory: float, ranks: int = 1) -> int:
        """The largest batch for which ``memory`` bytes do on each of ``ranks``; 0 for none."""
        return max(0, int((memory - self.fixed - self.divided / ranks) / self.each)) if self.each else 0

    def within(self, memory: float) -> Work:
        """This work where each rank has ``memory`` bytes."""
        return replace(self.grouped(memory), single=self.single) if self.grouped else self

    def fewest(self, memory: float) -> int:
        """The fewest ranks with ``memory`` bytes each on which a batch of one fits; 0 where no number is enough."""
        left = memory - self.fixed - self.each
        return max(1, math.ceil(self.divided / left)) if left > 0 else 0


def work(study: Study, size: Size, engine: Engine = CPU) -> list[Work]:
    """Every stage of ``study`` whose models have ``size``, in the order of the graph."""
    plan = _Plan(study, size, engine)
    return [plan.marked(each) for each in plan.stages()]


def one_by_one(works: Iterable[Work]) -> Iterator[str]:
    """A line on what is different where each stage makes by itself what is made for several at once."""
    for each in works:
        if each.alone:
            again, most = sum(stage.repeated for stage in each.alone), max(stage.memory for stage in each.alone)
            once = "once for all of them" if each.reads == 1 else f"once for each of {each.reads} groups that find room"
            yield (
                f"{each.stage}: make repro runs the models {once}; dvc repro by hand runs them for each, "
                f"{scaled(again, 'FLOP')} in place of {scaled(each.amount, 'FLOP')}, and takes {sized(most)} at most."
            )


class _Plan:
    def __init__(self, study: Study, size: Size, engine: Engine) -> None:
        self.study, self.size, self.engine, self.number = study, size, engine, engine.number
        self.training = REMADE if engine.remade else TRAINING
        self.tasks = study.prepare.tasks.values()
        own = all(isinstance(task, FamilyTask) for task in self.tasks)
        self.question = QUESTION if own else min(512, study.prepare.max_question_chars // CHARS_A_TOKEN)
        layer = study.activations.layer
        self.depth = size.layers // 2 if layer == "middle" else int(layer)
        self.bytes = 2 if study.base.dtype == "bfloat16" else FLOAT
        # What reads a layer's stream holds the model up to there; in the host's memory it was loaded whole.
        self.trunk = size.trunk(self.depth) if engine.apart else size.weights

    def stages(self) -> Iterator[Work]:
        study, prepare = self.study, self.study.prepare
        texts = prepare.pretrain.texts + prepare.corpus.texts + prepare.train_problems
        yield Work("prepare", "prepare", texts, disk=TEXT * texts)
        for name in study.teachers:
            yield self._teacher(name)
        yield self._base()
        for name in study.arms:
            yield self._arm(name)
        questions: float = sum(sum(prepare.samples.of(task.role).values()) for task in self.tasks)
        for model in study.models:
            asked = {ROLES: questions * (1 + study.evaluate.draws)}
            yield self._answers(f"evaluate {model}", "evaluate", asked, study.evaluate)
        for name in study.arms:
            questions_of_each = min(study.checkpoints.questions, prepare.samples.report)
            asked = {ROLES: questions_of_each * len(self.tasks) * self._checkpoints(name)}
            answered = self._answers(f"checkpoints {name}", "checkpoints", asked, study.checkpoints)
            # Each checkpoint is one rank's, who holds the base beside it.
            yield replace(answered, fixed=answered.fixed + self.bytes * self.size.weights, parts=self._checkpoints(name))
        for model in study.models:
            yield self._activations(model)
        yield from self._crosscoders()
        yield self._attribution()
        for name in study.dynamics.arms:
            yield self._dynamics(name)
        yield from self._about_the_set()
        answers = len(study.models) * questions
        yield Work("report", "report", answers, disk=5e6 + 300.0 * answers)

    def marked(self, each: Work) -> Work:
        """``each``, which says now whether it is of float32 numbers: models are read in the dtype in which they lie."""
        trained = each.way == "train" or each.kind == "teacher"
        single = not trained and (each.way == "fit" or self.bytes == FLOAT)
        return replace(each, single=single, alone=tuple(map(self.marked, each.alone)))

    def _base(self) -> Work:
        size, base = self.size, self.study.base
        if base.source != "pretrain":
            held = LIBRARIES + 2 * FLOAT * size.weights
            return Work("base", "brought", size.weights, size.weights * self.bytes, held)
        p = base.pretraining
        operations = self.training * size.forward(p.steps * p.batch_tokens, p.row_tokens / 2)
        fixed, divided = self._trained()
        return Work(
            "base", "base", operations, size.weights * self.bytes, fixed + PACKED * self.study.prepare.pretrain.texts,
            size.training(1, self.engine), "base.pretraining.batch_tokens", p.batch_tokens, "train", divided=divided,
        )  # fmt: skip

    def _teacher(self, name: str) -> Work:
        """As if it were as large as the base: its size is nowhere said."""
        p, size, problems = self.study.teachers[name], self.size, self.study.prepare.train_problems
        length = self.question + p.max_new_tokens
        operations = size.forward(problems * p.samples * length, length / 2)
        return Work(
            f"teacher {name}", "teacher", operations, CHARS_A_TOKEN * problems * p.samples * p.max_new_tokens,
            LIBRARIES + self.number * size.weights, size.cache(length, self.number), f"teachers.{name}.sampling_batch_size",
            p.sampling_batch_size, "sample", operations,
        )  # fmt: skip

    def _trained(self) -> tuple[float, float]:
        """Memory of what is trained: of each rank, and of all together."""
        all_of_it = TRAINED * FLOAT * self.size.weights
        return (LIBRARIES + self.number * self.size.unit, all_of_it) if self.engine.sharded else (LIBRARIES + all_of_it, 0.0)

    def _checkpoints(self, name: str) -> int:
        numbers = self.study.numbers(name)
        return 1 + len(numbers.checkpoints) if isinstance(numbers.checkpoints, list) else numbers.checkpoints

    def _arm(self, name: str) -> Work:
        method, p, size = self.study.arms[name].method, self.study.numbers(name), self.size
        disk = self._checkpoints(name) * size.weights * self.bytes
        if not hasattr(p, "micro_batch_size"):  # nothing is trained
            return Work(f"arm {name}", method, size.weights, disk, LIBRARIES + 3 * FLOAT * size.weights)
        # What a method does shows in the numbers that it has: a new one needs no line here unless it has others.
        problems, length, sampled = self.study.prepare.train_problems, self.question + getattr(p, "max_new_tokens", 0), 0.0
        if hasattr(p, "rollouts"):
            sampled = trained = p.steps * p.prompts_per_step * p.rollouts
        elif hasattr(p, "samples"):
            sampled, trained = problems * p.samples, p.steps * p.batch_size * (1 + hasattr(p, "pairs"))
        else:
            trained, length = p.epochs * problems, p.max_length
        drawn = size.forward(sampled * length, length / 2)
        operations = drawn + self.training * size.forward(trained * length, length / 2)
        fixed, divided = self._trained()
        if sampled and self.engine.sharded:  # answers are drawn by the whole model
            fixed += self.number * size.weights
        each = size.training(length, self.engine) + size.cache(length, self.number)
        return Work(
            f"arm {name}", method, operations, disk, fixed, each, f"{method}.micro_batch_size", p.micro_batch_size, "train",
            drawn, divided=divided, passes=trained / p.micro_batch_size,
        )  # fmt: skip

    def _lengths(self, p: Any, roles: tuple[str, ...] = ROLES) -> list[tuple[int, bool]]:
        """For each task of these roles, the tokens that one of its questions takes with its answer, and whether that is
        generated, as long as ``p`` lets it be, or chosen."""
        generated = [getattr(task, "scoring", GENERATION) == GENERATION for task in self.tasks if task.role in roles]
        return [(self.question + (p.max_new_tokens if each else OPTIONS), each) for each in generated]

    def _reading(self, answers: float, p: Any, roles: tuple[str, ...] = ROLES) -> tuple[float, float]:
        """Operations of ``answers``, shared out evenly over the tasks of these roles: of all, and of the generated ones."""
        lengths = self._lengths(p, roles)
        each = [(self.size.forward(answers / len(lengths) * length, length / 2), drawn) for length, drawn in lengths]
        return sum(done for done, _ in each), sum(done for done, drawn in each if drawn)

    def _answers(
        self, stage: str, kind: str, answers: dict[tuple[str, ...], float], p: Any, models: int = 1, answer: int = ANSWER
    ) -> Work:
        """``answers`` to the questions of tasks of some roles, under as many models at once."""
        longest = max(length for length, _ in self._lengths(p))
        fixed = LIBRARIES + models * self.bytes * self.size.weights
        each = models * self.size.cache(longest, self.bytes) + FLOAT * 2 * self.size.vocabulary
        operations, sampled = map(sum, zip(*(self._reading(count, p, roles) for roles, count in answers.items()), strict=True))
        return Work(
            stage, kind, operations, answer * sum(answers.values()), fixed, each, f"{kind}.batch_size", p.batch_size, "forward",
            sampled,
        )  # fmt: skip

    def _activations(self, model: str) -> Work:
        p, size = self.study.activations, self.size
        tokens = p.tokens
        if model in self.study.arms:
            tokens += (self._checkpoints(model) - 1) * p.checkpoint_tokens
        held = LIBRARIES + STREAM * p.tokens
        if p.source == "models":  # which run where rows are read
            return Work(f"activations {model}", "activations", p.tokens, 16.0 * p.tokens, held + FLOAT * size.weights)
        fixed = held + self.bytes * self.trunk + self._in_host(p.shard_rows * size.d_model * FLOAT)
        operations, row = size.forward(tokens, p.max_length / 2, self.depth), size.d_model * self._row_number
        each = self._batch(1)
        return Work(
            f"activations {model}", "activations", operations, tokens * row, fixed, each, "activations.batch_size",
            p.batch_size, "forward",
        )  # fmt: skip

    @property
    def _row_number(self) -> int:
        """Bytes of a number of the activations."""
        return HALF if self.study.activations.dtype == "bfloat16" else FLOAT

    def _in_host(self, rows: float) -> float:
        """Bytes of rows of activations, which wait in the host's memory and go to a GPU in pieces."""
        return 0.0 if self.engine.apart else rows

    def _batch(self, texts: int) -> float:
        """Bytes of what a model that reads ``texts`` together holds at once."""
        return self.bytes * self.study.activations.max_length * texts * (8 * self.size.d_model + 2 * self.size.d_mlp)

    def _again(self, models: int, rows: float) -> tuple[float, float]:
        """Operations and bytes of memory for ``rows`` of activations of ``models`` that run again where they are read."""
        p, size = self.study.activations, self.size
        if p.source == "activations":
            return 0.0, 0.0
        rows_held = self._in_host(p.shard_rows * size.d_model * self._row_number)
        held = models * (self.bytes * self.trunk + rows_held) + self._batch(p.batch_size)
        return models * size.forward(rows, p.max_length / 2, self.depth), held

    def _step(self, models: int, steps: float) -> float:
        """Operations of ``steps`` of a crosscoder: the encoder's product, and sums over active entries alone."""
        p, width = self.study.crosscoder.training, models * self.size.d_model
        return steps * p.batch_tokens * width * (2 * p.n_features + 8 * p.k)

    def _read(self, models: int, columns: int) -> tuple[float, float]:
        """Operations and bytes of memory for reading rows of ``models``, ``columns`` side by side: for their mean, to be fitted
        on and to be measured on; what fits into the buffer is read for it once."""
        p, tokens = self.study.crosscoder.training, self.study.activations.tokens
        again, held = self._again(models, 2 * tokens + (tokens if tokens <= BUFFER_ROWS else p.steps * p.batch_tokens))
        buffer = min(tokens, BUFFER_ROWS) * columns * self.size.d_model * self._row_number
        return again, held + self._in_host(buffer)

    def _crosscoders(self) -> Iterator[Work]:
        """Where models run for their rows, the fits among them are made of one read (featdiff.crosscoder.together)."""
        fitted = [name for name, fit in self.study.fits.items() if fit.source is None]
        together = fitted if self.study.activations.source == "models" and len(fitted) > 1 else []
        if together:
            yield self._one_read(together)
        for name in self.study.fits:
            yield self._fit(name, reads=name not in together)

    def _one_read(self, names: list[str]) -> Work:
        """Of several fits together: the models, which run once for all, and the memory of everything that is held at once."""
        models = {model for name in names for model in self.study.fits[name].models}
        again, reading = self._read(len(models), len(models))
        fits = [self._fit(name, reads=False) for name in names]
        all_of_them = sum(fit.fixed - LIBRARIES for fit in fits) + max(fit.each * fit.batch for fit in fits)  # steps in turns
        return Work(
            ONE_READ, "activations", again, fixed=LIBRARIES + reading + all_of_them, way="fit", repeated=again,
            alone=tuple(self._fit(name, reads=True) for name in names), grouped=partial(self._in_groups, names),
        )  # fmt: skip

    def _in_groups(self, names: list[str], memory: float) -> Work:
        """The same in groups for each of which ``memory`` bytes do, one after the other."""
        parts = [self._one_read(each) for each in groups(names, lambda some: self._one_read(some).memory <= SURE * memory)]
        again, most = sum(part.amount for part in parts), max(part.fixed for part in parts)
        return replace(self._one_read(names), amount=again, repeated=again, fixed=most, reads=len(parts))

    def _fit(self, name: str, *, reads: bool) -> Work:
        """Of one crosscoder, with what it takes to read its rows or without."""
        p, fit, width = self.study.crosscoder.training, self.study.fits[name], self.size.d_model
        models = len(fit.slots)
        weights = 2 * p.n_features * models * width
        operations = self._step(models, p.steps) if fit.source is None else 0.0
        measured = 4 * self.study.activations.tokens * models * width * p.n_features
        again, reading = self._read(len(set(fit.models)), models) if reads else (0.0, 0.0)
        fixed, each = LIBRARIES + held(p, models * width) + reading, in_a_step(p, models * width)
        return Work(
            f"crosscoder {name}", "crosscoder", operations + measured + again, weights * FLOAT, fixed, each,
            "crosscoder.training.batch_tokens", p.batch_tokens, "fit", repeated=again,
        )  # fmt: skip

    def _attribution(self) -> Work:
        study, d_model = self.study, self.size.d_model
        rows = min(study.attribution.scaling_tokens, study.activations.tokens)
        features = study.crosscoder.training.n_features
        operations = sum(8.0 * rows * len(fit.slots) * d_model * features for fit in study.fits.values())
        again = [self._again(len(set(fit.models)), 2 * rows) for fit in study.fits.values()]
        operations += sum(each for each, _ in again)
        sums = 2 * 8 * max(len(fit.slots) for fit in study.fits.values()) * d_model * features  # in float64
        held = LIBRARIES + sums + self._in_host(8 * FLOAT * rows * d_model) + max(running for _, running in again)
        return Work("attribution", "attribution", operations, 200.0 * features * len(study.fits), held, way="fit")

    def _dynamics(self, name: str) -> Work:
        study, p = self.study, self.study.crosscoder.training
        kept = self._checkpoints(name) + 1
        refits = kept * self._step(2, study.dynamics.refit_steps)
        reads = kept * 8.0 * study.activations.checkpoint_tokens * self.size.d_model * p.n_features
        # Base and checkpoint, as they are and in normalised units.
        held = self._in_host(4 * FLOAT * study.activations.checkpoint_tokens * self.size.d_model)
        again, running = self._again(2, (kept + 1) / 2 * study.activations.checkpoint_tokens)
        return Work(f"dynamics {name}", "dynamics", refits + reads + again, 1e6, LIBRARIES + held + running, way="fit")

    def _about_the_set(self) -> Iterator[Work]:
        study, size, split = self.study, self.size, self.study.prepare.samples
        roles = ("find",)
        find = sum(task.role in roles for task in self.tasks)
        operations, _ = self._reading(find * split.find * 2 * len(study.localize.fits), study.evaluate, roles)
        held = LIBRARIES + len(study.fits[study.localize.fit].slots) * self.bytes * self.trunk
        yield Work("localize", "localize", operations, 2e6, held, way="forward", parts=find)
        seams = 2 * (study.stitch.depths + 1)
        asked = seams * min(study.stitch.questions, split.report) * len(self.tasks)
        yield replace(self._answers("stitch", "stitch", {ROLES: asked}, study.stitch, models=2), parts=seams)
        lengths = [length for length, _ in self._lengths(study.evaluate, EDITED_ROLES)]
        questions = min(study.describe.samples, split.find) + min(study.describe.shaded, split.report)
        read = study.describe.corpus_tokens + 2 * sum(lengths) * questions
        held = LIBRARIES + 2 * (self.bytes * size.weights + self._in_host(FLOAT * read * size.d_model))
        yield Work("describe", "describe", 4 * size.forward(read, max(lengths) / 2), 5e6, held, way="forward")
        for side in SIDES:
            yield self._answers(f"intervene {side}", "intervene", self._edited(side), study.intervene, models=2, answer=EDITED)

    def _edited(self, side: str) -> dict[tuple[str, ...], float]:
        """Answers under edits: a search on the tune split, and every purpose of ``side`` on the report split."""
        study, p, split = self.study, self.study.intervene, self.study.prepare.samples
        find = sum(task.role == "find" for task in self.tasks)
        draws, others = p.random_sets + p.random_directions, 8
        settings = len(p.positions) * (len(p.doses) + 2)
        search = find * settings * ((draws + others) * min(p.control_questions, split.tune) + 3 * split.tune)
        drawn = min(p.draw_questions, split.report)
        measured = draws * drawn + (others + 3) * split.report
        fewer = 2 * p.other_draws * drawn + (others + 3) * split.report
        asked = [purpose for purpose in purposes(study.roles, study.repeats(study.roles.tuned)) if purpose.side == side]
        tasks = sum(task.role in EDITED_ROLES for task in self.tasks)
        return {("find",): search, EDITED_ROLES: tasks * (measured + (len(asked) - 1) * fewer)}
