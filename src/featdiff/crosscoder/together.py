"""Several crosscoders of a study from one read of their rows: ``python -m featdiff.crosscoder.together [FIT …]`` (ours).

Where activations are not kept (``activations.source: models``) each stage ``crosscoder`` runs the models for itself, for the
mean, for its steps and for its statistics. Here they are run once for all: the fits do their steps in turns, on rows that are
at hand for each of them. Nothing is published. What a fit makes is kept whole in the scratch of its stage, which takes it up
when DVC runs it, and is otherwise as it would be alone: the same bytes, whoever else was there. Fits that find no room beside
the others on the device are made after them, from another read.

Without names: those that DVC holds for changed and whose activations are there, on the hardware of ``$ACCELERATE_CONFIG``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

import psutil
import torch

from featdiff.activations.mixing import BUFFER_ROWS
from featdiff.activations.store import SharedSource, SharedStore
from featdiff.activations.turns import Turns, in_turns
from featdiff.artifacts.artifact import ContractError, one_line, read_json
from featdiff.config.dictionary import PAIR, CrosscoderTraining
from featdiff.config.params import Study, load_study
from featdiff.config.reading import ConfigError, closest
from featdiff.crosscoder.make import Made, make_in_turns
from featdiff.pipeline.checkpoint import Scratch
from featdiff.pipeline.stage import Run, beforehand
from featdiff.processes import signals
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.ranks import largest, process_state
from featdiff.processes.signals import say

FLOAT = torch.float32.itemsize
TRAINED = 4
"""Numbers in float32 of a weight that is trained: itself, its gradient and Adam's two moments."""
SURE = 0.9
"""Share of the free memory that is reckoned with: what is freed and taken again leaves gaps."""


def held(p: CrosscoderTraining, width: int) -> float:
    """Bytes of a crosscoder between its steps, for models that have ``width`` numbers a token together."""
    return TRAINED * FLOAT * 2 * p.n_features * width


def in_a_step(p: CrosscoderTraining, width: int) -> float:
    """Bytes for each token of a batch, more or less, while a crosscoder does a step."""
    return FLOAT * (6 * p.n_features + 6 * width)


def groups(names: Iterable[str], fit: Callable[[list[str]], bool]) -> list[list[str]]:
    """``names`` in their order, in as few groups as that allows, each of which ``fit`` together, or is of one."""
    found: list[list[str]] = []
    for name in names:
        if found and fit([*found[-1], name]):
            found[-1].append(name)
        else:
            found.append([name])
    return found


def free() -> float:
    """Bytes that this process may still take where it computes; of a machine's memory each rank there has its part."""
    if (device := process_state().device).type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _running(folder: Path) -> float:
    """Bytes of the model that runs for the rows of the store in ``folder``; 0 where they lie there."""
    index = read_json(folder / "index.json")
    if "streamed" not in index:
        return 0.0
    from transformers import AutoConfig, AutoModelForCausalLM  # which takes seconds

    from featdiff.activations.stream import Streamed
    from featdiff.language.models import truncate

    config = AutoConfig.from_pretrained(Streamed(**index["streamed"]).series["acts"][0], local_files_only=True)
    with torch.device("meta"):
        trunk = truncate(AutoModelForCausalLM.from_config(config, dtype=config.dtype), index["layer"])
    return float(sum(weight.numel() * weight.element_size() for weight in trunk.parameters()))


def _forget_models() -> None:
    """Let go of models that are kept for whoever reads next: those of the next group may be others, and need the room."""
    from featdiff.activations.stream import forget  # with transformers, which takes seconds

    forget()


class _Fits:
    """Crosscoders that are made in turns."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._runs, self.failed = runs, list[str]()
        self._folders: dict[str, dict[str, Path]] = {}
        """Stores that each of them reads, by model."""
        self._todo: dict[str, Scratch] = {}
        for name, run in runs.items():
            models = {model: run.read(f"activations/{model}") for model in run.study.fits[name].slots.values()}
            scratch = run.scratch()
            if not scratch.kept():
                self._todo[name], self._folders[name] = scratch, models

    def make(self) -> None:
        """Make what is not there yet. Raises Stopped where that was asked for, when all have kept what they had."""
        room, running = SURE * -largest(-int(free())), cache(_running)
        parts = groups(self._todo, lambda names: self._takes(names, running) <= room)
        for number, names in enumerate(parts, 1):
            if len(parts) > 1:
                say(f"crosscoders, read {number} of {len(parts)}: {', '.join(names)}; more at once find no room")
            store = SharedStore(self._models(names))
            with signals.deferred():
                in_turns({name: self._work(name, store) for name in names}, self._keep, self._leave, _stops)
            _forget_models()

    def _models(self, names: list[str]) -> dict[str, Path]:
        """Stores of all models that the fits ``names`` have."""
        return {model: folder for name in names for model, folder in self._folders[name].items()}

    def _takes(self, names: list[str], running: Callable[[Path], float]) -> float:
        """Bytes of all that is held at once for the fits ``names``: them, a step of the largest, models that run, and the
        buffer of their rows where that is not memory of another kind."""
        models = self._models(names)
        index = read_json(next(iter(models.values())) / "index.json")
        chosen = [(self._runs[name], self._runs[name].study.fits[name]) for name in names]
        fits = [(run.params.training, len(fit.slots) * index["d_model"]) for run, fit in chosen]
        step = max(p.batch_tokens * in_a_step(p, width) for p, width in fits)
        rows = min(index["rows"], BUFFER_ROWS) if process_state().device.type == "cpu" else 0
        buffer = FLOAT * rows * index["d_model"] * len(models)
        return sum(held(p, width) for p, width in fits) + step + buffer + sum(map(running, models.values()))

    def _work(self, name: str, store: SharedStore) -> Turns[Made]:
        run, scratch = self._runs[name], self._todo[name]
        chosen, tied = run.study.fits[name], not run.study.null(name)
        source = SharedSource(store, chosen.slots)
        return make_in_turns(source, chosen, run.params.training, run.seed, run.log, name, scratch, tied)

    def _keep(self, name: str, made: Made) -> None:
        self._todo[name].keep(made.save, step=self._runs[name].params.training.steps, metrics=made.metrics)
        process_state().wait_for_everyone()

    def _leave(self, name: str, error: Exception) -> None:
        """Go on without one whose numbers or files are bad. Ranks must not part: what ends one of several ends all."""
        if not isinstance(error, (ContractError, FloatingPointError)) or process_state().num_processes > 1:
            raise error
        say(f"crosscoder@{name}: {one_line(str(error))}; the others go on")
        self.failed.append(name)


def _stops() -> bool:
    return largest(int(bool(signals.asked()))) > 0


def _stage(study: Study, name: str) -> str:
    """What DVC calls the stage that makes a crosscoder."""
    if name in study.crosscoder.fits:
        return f"crosscoder@{name}"
    return f"wide@{name}" if name in study.crosscoder.wide else f"pair@{name.removeprefix(PAIR)}"


def _changed(study: Study) -> list[str]:
    """Crosscoders that are to be fitted, as DVC has it, and can be."""
    from featdiff.pipeline.repro import stages

    changed = stages().changed
    fits = {name: fit for name, fit in study.fits.items() if _stage(study, name) in changed and not fit.source}
    return [name for name, fit in fits.items() if all(Path("activations", model).is_dir() for model in fit.models)]


def main(arguments: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.crosscoder.together", description="several crosscoders from one read")
    parser.add_argument("fits", nargs="*", metavar="FIT", help="names of crosscoders; none: all that are to be fitted")
    names = list(dict.fromkeys(parser.parse_args(arguments).fits))
    try:
        study = load_study()
        here = [name for name, fit in study.fits.items() if not fit.source]
        if unknown := [name for name in names if name not in here]:
            raise ConfigError(f"{unknown[0]!r}: no crosscoder that is fitted here; {closest(unknown[0], here)}")
        if not names:
            if len(names := _changed(study)) < 2:
                say("no crosscoders to fit together; dvc repro fits one alone")
                return 0
            # this process becomes the launcher of those that make them
            words = ["-m", "featdiff.processes.launch", "-m", "featdiff.crosscoder.together", *names]
            os.execv(sys.executable, [sys.executable, *words])
    except ConfigError as error:
        say(str(error))
        return EXIT_BAD_INPUT
    with beforehand("crosscoder", {name: f"crosscoders/{name}" for name in names}) as runs:
        (fits := _Fits(runs)).make()
    if fits.failed:
        say(f"failed: {', '.join(fits.failed)}; what the others made is kept, and dvc repro takes it up")
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
