"""The whole graph of a profile that is too large for this machine, small: ``python -m featdiff.planning.rehearse <profile>``.

A clone of this repository gets the profile with the numbers of conf/rehearsal.yaml, a model of the profile's architecture with
random weights (featdiff.planning.stand_ins), questions and texts in the columns that the profile reads, and runs to its report.
What it shows means nothing; that it ends shows that nothing in the profile stops it. All is ours.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import hash_json, read_json, sha256_file
from featdiff.artifacts.documents import markdown
from featdiff.config.data import GENERAL, SUITE, SuiteTask
from featdiff.config.params import Study
from featdiff.config.parse import parse
from featdiff.config.profiles import render_profile
from featdiff.config.reading import PARAMS, parse_yaml, read_yaml
from featdiff.config.values import Params
from featdiff.pipeline.studies import clone, head, shell, status
from featdiff.planning import stand_ins
from featdiff.planning.plan import configuration, kept_of, of_profile
from featdiff.processes.ranks import PACK
from featdiff.processes.signals import say
from featdiff.tracking.record import finished

RULE, PLACE, STAND_INS, HUB = Path("conf/rehearsal.yaml"), Path(".featdiff/rehearsals"), Path("stand_ins"), "hub:"
SPARE = 2.5
"""Rows written for each one that is asked for: some are left out as too long, or belong to another split."""
OPEN = [
    ["whether it fits", "make plan PROFILE=… GPUS=…, which is reckoned and not measured"],
    ["pace", "share of the peak reached; sampling by an inference engine"],
    ["numerics of the GPU", "bfloat16 kernels, attention kernels, NCCL in place of gloo"],
    ["weights, tokenizer, questions and texts themselves", "stand-ins of the same form were used"],
    ["a teacher", "random weights solve nothing; solutions are those of the stand-ins"],
    ["any finding", "the weights are random"],
]
"""What a rehearsal leaves open, and what would show it."""


class Rule(Params):
    """conf/rehearsal.yaml."""

    accelerate: str
    model: dict[str, int]
    vocabulary: int
    params: dict[str, Any]


def rehearsal(profile: str, rule: Rule, place: Path = STAND_INS) -> str:
    """Text of params.yaml: ``profile`` by the rule, with stand-ins at ``place`` in place of what is not on this machine."""
    over, prepare = copy.deepcopy(rule.params), of_profile(profile).prepare
    tasks = [name for name, task in prepare.tasks.items() if isinstance(task, SuiteTask) and task.path.startswith(HUB)]
    small = over.setdefault("prepare", {})
    small |= {"suites": str(place), "tasks": {name: {"path": f"{place}/{name}.jsonl"} for name in tasks}}
    texts = {
        name: f"{place}/texts/{name}.jsonl" for name, source in prepare.corpus.sources.items() if source.path.startswith(HUB)
    }
    if texts:
        one = isinstance(prepare.corpus.general, str)
        general = texts[GENERAL] if one else {name: {"path": path} for name, path in texts.items()}
        small.setdefault("corpus", {})["general"] = general
    # What random weights stand in for solves nothing: there is no teacher among them.
    over |= {"base": {"source": f"{place}/model"}, "teachers!": {}, "problems": "data"}
    return render_profile(profile, over=over, over_from=f"{RULE}: params")


def _file(path: str, suites: str) -> Path:
    found = SUITE.fullmatch(path)
    return Path(suites).joinpath(*found.group("kind", "name"), f"{found['split']}.jsonl") if found else Path(path)


def rows(study: Study) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Files that the small study reads, and rows for them."""
    prepare = study.prepare
    asked = sum(prepare.samples.model_dump().values())
    for name, task in prepare.tasks.items():
        if isinstance(task, SuiteTask):
            count = asked + (prepare.train_problems + prepare.corpus.texts) * (task.role in prepare.trained_on)
            yield _file(task.path, prepare.suites), list(stand_ins.questions(name, task, int(SPARE * count)))
    for name, source in prepare.corpus.sources.items():
        yield _file(source.path, prepare.suites), list(stand_ins.texts(name, source, int(SPARE * prepare.corpus.texts)))


def furnish(folder: Path, profile: str, rule: Rule) -> Study:
    """Put params, model, questions and texts of the small study into ``folder``."""
    # DVC knows what lies outside the repository by its path alone, and rehearsals share a cache: a path that tells its content
    # keeps it from taking one's results for another's.
    new, name = STAND_INS / "new", f"profile {profile}"
    study = parse(Study, parse_yaml(rehearsal(profile, rule, new), name), name)
    shutil.rmtree(folder / STAND_INS, ignore_errors=True)
    written = list(rows(study))
    for path, found in written:
        stand_ins.write_rows(found, folder / path)
    said = [" ".join(map(str, row.values())) for row in chain.from_iterable(found for _, found in written)]
    like = kept_of(of_profile(profile).base.source)
    stand_ins.model_like(like, rule.model, rule.vocabulary, said, study.base.dtype, folder / new / "model")
    files = sorted(path for path in (folder / new).rglob("*") if path.is_file())
    place = new.with_name(hash_json({str(path.relative_to(folder / new)): sha256_file(path) for path in files})[:12])
    (folder / new).rename(folder / place)
    text = rehearsal(profile, rule, place)
    (folder / PARAMS).write_text(text, encoding="utf-8")
    return parse(Study, parse_yaml(text, name), name)


def table(study: Study) -> str:
    """What the records and the audits of the rehearsal here say was run, beside what it leaves open."""
    done = {each["label"] for each in finished(study.profile)}
    audits = [read_json(path) for path in sorted(Path("models").glob("*/audit.json"))]
    run = [
        ["graph", f"{len(done)} stages, to the report"],
        ["architecture", f"{configuration(Path(study.base.source)).model_type}, narrow and shallow"],
        ["engine of arms", "; ".join(sorted({audit["engine"] for audit in audits}))],
        ["precision of arms", "; ".join(sorted({audit["precision"] for audit in audits}))],
        ["activations", "kept" if study.activations.source == "activations" else "of models that run again"],
    ]
    return "\n\n".join([markdown(["rehearsed", "how"], run), markdown(["open", "what shows it"], OPEN)])


def rehearse(profile: str) -> None:
    """Run ``profile`` small, and say what that has shown. Raises ContractError or ConfigError where it cannot be."""
    rule, folder = parse(Rule, read_yaml(RULE), str(RULE)), PLACE / profile
    kept_of(of_profile(profile).base.source)  # a model to be like is asked for before anything is written
    clone(folder, head())
    study = furnish(folder, profile, rule)
    hardware = {"ACCELERATE_CONFIG": os.environ.get("ACCELERATE_CONFIG", rule.accelerate), PACK: "true"}  # as on GPUs
    say(f"{profile}: small, in {folder}, on {hardware['ACCELERATE_CONFIG']}")
    shell(folder, sys.executable, "-m", "featdiff.pipeline.repro", environment=hardware)
    os.chdir(folder)
    print(table(study))
    say(f"report: {folder / 'report/index.html'}")


def main(words: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.planning.rehearse", description="run a large profile small, to its report")
    parser.add_argument("profile", help="of conf/profiles, with a base of the hub whose configuration is in conf/models")
    return status(partial(rehearse, parser.parse_args(words).profile))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
