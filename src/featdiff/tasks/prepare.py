"""Everything `prepare` publishes: train problems, evaluation splits, crosscoder corpus, pretraining texts."""

from __future__ import annotations

import json
from functools import partial

import numpy as np

from featdiff.artifacts.artifact import ContractError
from featdiff.config.data import ORGANISM, FamilyTask, PrepareParams, ReasoningGymTask, SuiteTask, Task
from featdiff.tasks import organism
from featdiff.tasks.corpus import general_texts
from featdiff.tasks.external import file_facts, located
from featdiff.tasks.families import FAMILIES
from featdiff.tasks.gym import GymSource
from featdiff.tasks.suites import SuiteSource
from featdiff.tasks.task import Data, Source, Text


def _source(name: str, task: Task, params: PrepareParams, seed: int, teacher: str) -> Source:
    if isinstance(task, FamilyTask):
        if name not in FAMILIES:
            raise ContractError(
                "params.yaml", f"prepare.tasks.{name}", f"a family ({', '.join(FAMILIES)})", name, "correct the name"
            )
        own = params.pretrain.manners == "own"
        return organism.FamilySource(name, task.role, teacher, grading=params.grading, own_manner=own)
    if isinstance(task, ReasoningGymTask):
        return GymSource(name, task, teacher=teacher, chat=params.chat, grading=params.grading)
    most = params.max_question_chars
    chat, grading, suites = params.chat, params.grading, params.suites
    return SuiteSource(name, task, chat=chat, grading=grading, max_chars=most, seed=seed, suites=suites)


def prepare(params: PrepareParams, seed: int) -> Data:
    """Build and check the data artifact. Every task and part has its own random stream, so that adding
    a task leaves the others as they were."""

    def rng(*key: str) -> np.random.Generator:
        return np.random.default_rng([seed, *json.dumps(key).encode()])

    sources = {name: _source(name, task, params, seed, params.teacher) for name, task in params.tasks.items()}
    evaluation = [
        sample
        for name, source in sources.items()
        for sample in source.eval_samples(params.samples.of(params.tasks[name].role), rng("eval", name))
    ]
    banned = {sample.prompt for sample in evaluation}
    trained_on = [source for source in sources.values() if source.info.role in params.trained_on]
    shares = np.diff(np.linspace(0, params.train_problems, len(trained_on) + 1).astype(int))
    train = [
        sample
        for source, share in zip(trained_on, shares, strict=True)
        for sample in source.train_samples(int(share), banned, rng("train", source.info.name))
    ]
    train = [train[i] for i in rng("order").permutation(len(train))]
    data = Data(
        tasks=[source.info for source in sources.values()],
        train=train,
        eval=evaluation,
        corpus=_corpus(params, banned, seed, rng("corpus")),
        pretrain=_pretrain(params, banned, rng("pretrain")),
    )
    data.check()
    return data


def sources_read(params: PrepareParams) -> dict[str, str]:
    """Which very files of others are read, by task (``corpus`` for its general text, or ``corpus/<source>`` where that has
    several sources): see :func:`file_facts`."""
    paths = {name: task.path for name, task in params.tasks.items() if isinstance(task, SuiteTask)}
    alone = isinstance(params.corpus.general, str)
    for name, source in params.corpus.sources.items():
        paths["corpus" if alone else f"corpus/{name}"] = source.path
    return {name: file_facts(located(path, params.suites)) for name, path in paths.items()}


def _organism_manners(steps: float, params: PrepareParams) -> dict[str, float]:
    right = params.pretrain.direct_right_share
    return {"steps": steps, "direct": (1 - steps) * right, "mistake": (1 - steps) * (1 - right)}


def _families(params: PrepareParams, role: str | None = None) -> list[str]:
    return [name for name, task in params.tasks.items() if task.source == "family" and role in (None, task.role)]


def _pretrain(params: PrepareParams, banned: set[str], rng: np.random.Generator) -> list[Text]:
    if params.pretrain.texts == 0:
        return []
    if not _families(params):
        raise ContractError(
            "params.yaml", "prepare.pretrain.texts", "0 without tasks of source family", params.pretrain.texts, "set it to 0"
        )
    manners, examples = (
        _organism_manners(share, params) for share in (params.pretrain.steps_share, params.pretrain.example_steps_share)
    )
    return organism.texts(
        params.pretrain.texts,
        _families(params),
        manners,
        params.pretrain.example_share,
        examples,
        banned,
        rng,
        own_manners=params.pretrain.manners == "own",
    )


def _corpus(params: PrepareParams, banned: set[str], seed: int, rng: np.random.Generator) -> list[Text]:
    """Worked math and general text (the shares are params), shuffled. The worked math shows both wordings,
    so that features of either arm have text to fire on."""
    wanted = params.corpus.texts
    math = round(wanted * params.corpus.math_share)
    if params.corpus.general == ORGANISM:
        if not _families(params, "train"):
            raise ContractError("params.yaml", "prepare.corpus.general", "a file with a text column", ORGANISM, "give one")
        share, solved = params.pretrain.example_share, {"steps": 0.5, "foreign": 0.5}
        draw = partial(organism.texts, own_manners=params.pretrain.manners == "own")
        mixed = {"steps": 0.5, "direct": 0.2, "mistake": 0.3}
        worked = draw(math, _families(params, "train"), solved, share, solved, banned, rng)
        general = draw(wanted - math, _families(params), mixed, share, mixed, banned, rng)
    else:
        worked = _worked(params, math, banned, seed, rng)
        general = general_texts(params.corpus, params.suites, wanted - math, banned, rng)
    both = worked + general
    return [both[i] for i in rng.permutation(len(both))]


def _worked(params: PrepareParams, count: int, banned: set[str], seed: int, rng: np.random.Generator) -> list[Text]:
    """``count`` solved problems of the training domain, in equal shares of task and wording. A prompt that
    does not lead into its solution (a chat turn) is parted from it by a line break."""
    parts = [
        (name, task, teacher) for name, task in params.tasks.items() if task.role == "train" for teacher in ("own", "foreign")
    ]
    shares = np.diff(np.linspace(0, count, len(parts) + 1).astype(int)).tolist()
    return [
        Text(sample.prompt, ("\n" * params.chat + sample.solution)[: params.corpus.max_chars], f"{name}/{teacher}")
        for (name, task, teacher), share in zip(parts, shares, strict=True)
        for sample in _source(name, task, params, seed, teacher).train_samples(share, banned, rng)
    ]
