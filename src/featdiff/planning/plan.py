"""What a study costs, before it is run.

python -m featdiff.planning.plan [profile] [--config <folder of a model>] [--gpus <of a node> [--nodes N] [--gpu <kind>]]

Operations, bytes and memory follow from params (featdiff.planning.work). Time follows from how fast this machine multiplies
matrices, measured in a second, and from what each kind of stage took for its work in studies that were run and recorded:
``python -m featdiff.planning.plan --learn`` reads that from the records here and writes it into metrics/rates.json, where
there is an entry for each profile. ``--gpus`` asks about nodes with GPUs that need not be here (featdiff.planning.gpus).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from featdiff.artifacts.artifact import ContractError, one_line, place_json, read_json
from featdiff.config.params import Study, load_study
from featdiff.config.parse import parse
from featdiff.config.profiles import render_profile
from featdiff.config.reading import ConfigError, parse_yaml
from featdiff.language.models import character_tokenizer, organism_model
from featdiff.pipeline.repro import side_by_side
from featdiff.planning import gpus
from featdiff.planning.units import scaled, sized, timed
from featdiff.planning.work import GPU, Size, Work, one_by_one, work
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import say
from featdiff.tracking.record import by_pipeline, finished, pauses, runs_folder
from featdiff.training.imported import gguf_file

RATES = Path("metrics/rates.json")
CONFIGURATIONS = Path("conf/models")
"""Of models of the hub, by the model's name: what a plan needs of them without a network."""
ORGANISM_CHARACTERS = 100
"""About as many as the texts of the organism have."""
MATRIX, TRIES = 1024, 12


def of_profile(name: str) -> Study:
    """The study of a profile. Raises ConfigError where there is none of this name."""
    return parse(Study, parse_yaml(render_profile(name), f"profile {name}"), f"profile {name}")


def size_of(study: Study, folder: Path | None = None) -> Size:
    """The size of the study's base: of ``folder`` if given, else of ``base.source``, read without its weights.

    Raises ContractError where its configuration is not on this machine."""
    source = study.base.source
    if folder is None and source == "pretrain":
        tokenizer = character_tokenizer([chr(0x4E00 + i) for i in range(ORGANISM_CHARACTERS)])
        with torch.device("meta"):
            config = organism_model(study.base.pretraining, tokenizer, 0).config
    elif folder is None and source.startswith("hub:"):
        config = configuration(kept_of(source))
    elif folder is None and source.startswith("gguf:"):
        file = gguf_file(source.removeprefix("gguf:"))
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    else:
        config = configuration(folder or Path(source))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text, way_in, way_out = config.get_text_config(), model.get_input_embeddings, model.get_output_embeddings
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Size(
        layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        d_mlp=text.intermediate_size,
        d_kv=head * (getattr(text, "num_key_value_heads", None) or heads),
        vocabulary=text.vocab_size,
        weights=sum(weight.numel() for weight in model.parameters()),
        embeddings=sum(weight.numel() for weight in {ends().weight for ends in (way_in, way_out)}),
    )


def kept_of(source: str) -> Path:
    """The folder of :data:`CONFIGURATIONS` with the configuration of ``source``, a model of the hub. Raises ContractError where
    there is none."""
    kept = CONFIGURATIONS / source.partition("@")[0].rpartition("/")[2]
    if not kept.is_dir():
        todo = "put its config.json there, or give the folder of a model of that size: make plan CONFIG=folder"
        raise ContractError(kept, "config.json", f"that of {source}", "nothing", todo)
    return kept


def configuration(folder: Path) -> PreTrainedConfig:
    """What the ``config.json`` in ``folder`` describes. Raises ContractError where that is nothing."""
    if not (folder / "config.json").is_file():
        raise ContractError(folder, "config.json", "a model configuration", "nothing", "give the folder of a model")
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # files of any content reach the library, which raises all kinds of errors
        raise ContractError(folder, "config.json", "one that loads", one_line(str(error)), "give another folder") from None


def peak() -> float:
    """Operations a second of a product of matrices in float32 with torch's threads, the best of a few."""
    a, best = torch.randn(MATRIX, MATRIX), 0.0
    for _ in range(TRIES):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * MATRIX**3 / (time.perf_counter() - start))
    return best


def seconds(works: Iterable[Work], rates: Mapping[str, Any], speed: float, weights: int) -> dict[str, float | None]:
    """Expected seconds of each stage on a machine of this ``speed``, for models with so many ``weights``; None for a kind that
    no recorded study had. A large model makes more of a machine than a small one: ``rates`` of studies are taken for the sizes
    of their models, what lies between follows on a line in logarithms, and beyond them the nearest holds."""
    studies = sorted(rates.values(), key=itemgetter("weights"))
    sizes = np.log([study["weights"] for study in studies])
    start = float(np.interp(np.log(weights), sizes, [study["start"] for study in studies]))

    def took(each: Work) -> float | None:
        had = [i for i, study in enumerate(studies) if each.kind in study["kinds"]]
        if not had:
            return None
        per_unit = np.log([studies[i]["kinds"][each.kind] * studies[i]["peak"] for i in had])
        return float(np.exp(np.interp(np.log(weights), sizes[had], per_unit))) * each.amount / speed + start

    return {each.stage: took(each) for each in works}


def learn(study: Study, speed: float) -> dict[str, Any]:
    """Rates from the records of ``study`` here, of each stage the fastest, which was disturbed least: seconds for each unit of
    work, by kind of stage, on a machine of ``speed``; and what a stage takes to start, the median of the time between two of
    one pipeline.

    Raises ContractError where nothing is recorded."""
    done = finished(study.profile)
    walls = defaultdict[str, list[float]](list)
    for each in done:
        walls[each["label"]].append(each["observed"]["wall_seconds"])
    amounts, spent = defaultdict[str, float](float), defaultdict[str, float](float)
    size = size_of(study)
    works = work(study, size)
    before = {stage.stage for each in works for stage in each.alone}  # their records do not hold what made them
    for planned in works:
        if planned.stage not in before and (took := walls.get(planned.stage.replace(" ", "@"))):
            amounts[planned.kind] += planned.amount
            spent[planned.kind] += min(took)
    starts = [pause for run in by_pipeline(done) for pause in pauses(run)]
    if not spent or not starts:
        raise ContractError(runs_folder(), "records", f"a pipeline of profile {study.profile}", "none", "dvc repro first")
    rates = {kind: spent[kind] / amounts[kind] for kind in spent}
    return {
        "weights": size.weights, "peak": speed, "threads": torch.get_num_threads(), "start": median(starts), "kinds": rates,
    }  # fmt: skip


def lines(works: list[Work], took: Mapping[str, float | None], memory: float, disk: float, jobs: int = 1) -> Iterator[str]:
    """A line per stage, their sums, and what does not fit with the smallest change that would. Of ``jobs`` stages side by side
    all may be among those that take most memory."""
    width = max(len(each.stage) for each in works)
    yield f"{'stage':{width}}  {'work':>10}  {'disk':>9}  {'memory':>9}  {'time':>8}"
    for each in works:
        done = scaled(each.amount, "FLOP") if each.computes else ""
        sizes = f"{sized(each.disk):>9}  {sized(each.memory):>9}"
        yield f"{each.stage:{width}}  {done:>10}  {sizes}  {timed(took[each.stage]):>8}"
    known = [value for value in took.values() if value is not None]
    total = sum(each.disk for each in works)
    most = sum(sorted((each.memory for each in works), reverse=True)[:jobs])
    yield f"{'all':{width}}  {'':>10}  {sized(total):>9}  {sized(most):>9}  {timed(sum(known)):>8}"
    if jobs > 1:
        yield f"{jobs} at a time (make repro): {timed(sum(known) / jobs)}, and more where stages wait for each other."
    yield from one_by_one(works)
    yield f"This machine: {sized(memory)} of memory, {sized(disk)} of disk free."
    if most > memory and jobs > 1:
        yield f"does not fit: {jobs} stages at a time may take {sized(most)}; make repro JOBS={jobs - 1}"
    for each in works:
        if each.memory > memory:
            batch = each.fitting(memory)
            change = (
                f"{each.field}: {batch} in place of {each.batch}" if batch else "no batch fits: more memory or a smaller model"
            )
            yield f"does not fit: {each.stage} takes {sized(each.memory)}; {change}"
    if total > disk:
        yield f"does not fit: {sized(total)} on a disk with {sized(disk)} free; fewer checkpoints or activations.tokens"


def main(words: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.planning.plan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("profile", nargs="?", help="of conf/profiles (default: params.yaml as it is)")
    parser.add_argument("--config", type=Path, help="folder of a model as large as the base, where the base is not here")
    parser.add_argument("--gpus", type=int, choices=range(1, 65), metavar="N", help="GPUs of a node: reckon for those")
    parser.add_argument("--nodes", type=int, choices=range(1, 1025), default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpu", default="h100", help=f"of {gpus.FOLDER} (default: h100)")
    parser.add_argument("--learn", action="store_true", help="write metrics/rates.json from the records of this study")
    given = parser.parse_args(words)
    try:
        study = load_study() if given.profile is None else of_profile(given.profile)
        if given.gpus:
            size = size_of(study, given.config)
            cluster = gpus.Cluster(gpus.Gpu.called(given.gpu), given.nodes, given.gpus, gpus.alone())
            print(*gpus.lines(work(study, size, GPU), size, cluster), sep="\n")
            print(f"Pace and price as {gpus.FOLDER / given.gpu}.yaml states them: nothing of this was measured.")
            return 0
        torch.set_num_threads(study.threads or torch.get_num_threads())
        speed = peak()
        if given.learn:
            place_json(RATES, read_json(RATES) | {study.profile: learn(study, speed)})
            print(f"{RATES}: written")
            return 0
        memory = psutil.virtual_memory().total
        size = size_of(study, given.config)
        works = [each.within(memory) for each in work(study, size)]
        rates = read_json(RATES)
        took = seconds(works, rates, speed, size.weights)
    except (ConfigError, ContractError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    print(*lines(works, took, memory, shutil.disk_usage(".").free, side_by_side(study)), sep="\n")
    known = ", ".join(f"{name} ({each['weights'] / 1e6:.3g}M weights)" for name, each in rates.items())
    print(f"Times: {speed / 1e9:.0f} GFLOP/s here ({torch.get_num_threads()} threads), and what studies made of that: {known}.")
    if size.weights > max(each["weights"] for each in rates.values()):
        print("Not tried with models this large, which ought to make more of it and take less.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
