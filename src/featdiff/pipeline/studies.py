"""Whole studies beside the default one: each in a clone of its own that shares this one's cache, so that what they have in
common is computed once. Their verdicts are held against what is known to be true (ours).

python -m featdiff.pipeline.studies [--jobs N] [<study> or <study>-<seed> …]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from pydantic import Field

from featdiff.artifacts.artifact import ContractError, read_json, write_json
from featdiff.artifacts.documents import fill, markdown
from featdiff.artifacts.dvc import cache_folder
from featdiff.config.parse import parse
from featdiff.config.reading import PARAMS, ConfigError, closest, read_yaml
from featdiff.config.values import Name, Params, Seed
from featdiff.processes.launch import EXIT_BAD_INPUT, share_of_cores
from featdiff.processes.signals import EXIT_STOPPED, say
from featdiff.stats import binomial

SETTINGS = Path("conf/studies.yaml")
CLONES = Path(".featdiff/studies")
RESULTS = Path("metrics/studies")
DOCUMENT = Path("docs/calibration.md")
CONFIDENCE = 0.95


class Plan(Params):
    """One profile with several seeds, and which claims hold or fail by construction."""

    profile: Name
    seeds: list[Seed]
    holds: list[Name] = Field(default_factory=list)
    fails: list[Name] = Field(default_factory=list)

    def truth(self, claim: str) -> bool | None:
        """Whether ``claim`` holds by construction; None where construction does not say."""
        return True if claim in self.holds else False if claim in self.fails else None


class Plans(Params):
    """Plans by name."""

    plans: dict[Name, Plan]

    @classmethod
    def load(cls) -> Plans:
        """What conf/studies.yaml says."""
        return parse(cls, {"plans": read_yaml(SETTINGS)}, str(SETTINGS))

    def chosen(self, wanted: Iterable[str]) -> dict[str, tuple[Plan, int]]:
        """Plan and seed by ``<study>-<seed>``: those that are named, or whose study is; all where none is named."""
        every = {f"{name}-{seed}": (plan, seed) for name, plan in self.plans.items() for seed in plan.seeds}
        found: dict[str, tuple[Plan, int]] = {}
        for word in wanted:
            named = {key: value for key, value in every.items() if word in (key, key.rpartition("-")[0])}
            if not named:
                raise ConfigError(f"{word!r}: no study of {SETTINGS}; {closest(word, [*self.plans, *every])}")
            found |= named
        return found or every


def shell(folder: Path, *command: str, log: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run ``command`` in ``folder`` with the code that is there. Raises ContractError where it fails."""
    environment = os.environ | {"PYTHONPATH": str((folder / "src").resolve())} | dict(environment or {})
    with log.open("a", encoding="utf-8") if log else nullcontext() as output:
        done = subprocess.run(command, cwd=folder, env=environment, check=False, stdout=output, stderr=output)
    if done.returncode:
        todo = "what was computed is kept: say it again"
        raise ContractError(log or folder, " ".join(command[1:]), "status 0", done.returncode, todo)


def head() -> str:
    """The commit that is checked out here."""
    return subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def clone(folder: Path, commit: str) -> None:
    """A clone of this repository at ``commit``, with the cache of this one."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        shell(Path(), "git", "clone", "--quiet", "--no-checkout", ".", str(folder))
    shell(folder, "git", "fetch", "--quiet", "origin")
    shell(folder, "git", "checkout", "--quiet", "--force", "--detach", commit)
    cache = cache_folder(Path()).parents[1].resolve()  # above files/md5: what DVC calls its cache holds the run cache, too
    shell(folder, sys.executable, "-m", "dvc", "config", "--quiet", "--local", "cache.dir", str(cache))


def prepare(folder: Path, commit: str, profile: str, seed: int) -> None:
    """A :func:`clone` with ``profile`` and ``seed``."""
    clone(folder, commit)
    shell(folder, sys.executable, "-m", "featdiff.config.profiles", "use", profile, "--discard")
    params = folder / PARAMS
    text, count = re.subn(r"^seed: .*$", f"seed: {seed}", params.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if count != 1:
        raise ContractError(params, "seed", "one line", count, "say it once in the profile")
    params.write_text(text, encoding="utf-8")


def run(name: str, plan: Plan, seed: int, jobs: int = 1) -> None:
    """Run one study to its end, unless it has a result, and keep what its report says. One of several that run side by side
    runs its share of the stages at a time, and writes to a file in place of the terminal."""
    result = RESULTS / f"{name}.json"
    if result.exists():
        say(f"{name}: has a result; a study is run once ({result})")
        return
    commit = head()
    folder, log = CLONES / name, CLONES / f"{name}.log" if jobs > 1 else None
    say(f"{name}: profile {plan.profile}, seed {seed}, in {folder}" + (f"; what it says is in {log}" if log else ""))
    prepare(folder, commit, plan.profile, seed)
    shell(folder, sys.executable, "-m", "featdiff.pipeline.repro", "--jobs", str(share_of_cores(jobs)), log=log)
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = {"commit": commit, "profile": plan.profile, "seed": seed}
    write_json(result, facts | {"summary": read_json(folder / "metrics/summary.json")})
    say(f"{name}: done; {result}")


def run_all(chosen: dict[str, tuple[Plan, int]], jobs: int) -> None:
    """Run studies, ``jobs`` at a time; after one that failed, or Ctrl-C, no further one begins."""
    ended = threading.Event()

    def unless_ended(name: str, plan: Plan, seed: int) -> None:
        if not ended.is_set():
            try:
                run(name, plan, seed, jobs)
            except BaseException:
                ended.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for study in [pool.submit(unless_ended, name, plan, seed) for name, (plan, seed) in chosen.items()]:
                study.result()
        except BaseException:
            ended.set()
            raise


def tables(plans: Plans) -> str:
    """Verdicts of every study that has a result, beside the truth, and how often the two differ."""
    every = plans.chosen([])
    found = {name: read_json(path) for name in every if (path := RESULTS / f"{name}.json").is_file()}
    if not found:
        return "No study has a result yet."
    claims = sorted({claim for result in found.values() for claim in result["summary"]["verdicts"]})
    rows, counted = [], dict[tuple[str, str, bool], list[bool]]()
    for name, result in found.items():
        (plan, _), study = every[name], name.rpartition("-")[0]
        cells = []
        for claim in claims:
            verdict, truth = result["summary"]["verdicts"][claim], plan.truth(claim)
            if truth is not None:
                counted.setdefault((study, claim, truth), []).append(verdict == "supported")
            cells.append(verdict if truth is None else f"{verdict} ({'true' if truth else 'false'})")
        rows.append([name, result["commit"][:7], *cells])
    rates = [[study, claim, str(truth).lower(), *_share(supported)] for (study, claim, truth), supported in counted.items()]
    return "\n\n".join(
        (
            "Verdicts, and in brackets what holds by construction.",
            markdown(["study", "commit", *claims], rows),
            f"How often a claim comes out as supported, with exact {100 * CONFIDENCE:g} % interval. Each kind of study by "
            "itself: the rules were made with the seeds of `design` in view.",
            markdown(["study", "claim", "truth", "studies", "supported", "share"], rates),
        )
    )


def _share(supported: list[bool]) -> list[str]:
    rate = binomial(sum(supported), len(supported), CONFIDENCE)
    return [str(rate.n), str(sum(supported)), f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"]


def status(work: Callable[[], None]) -> int:
    """Exit status of ``work`` in clones; what is wrong, or that it was stopped, in one line."""
    try:
        work()
    except (ContractError, ConfigError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        say("stopped; what was computed is kept: say it again")
        return EXIT_STOPPED
    return 0


def main(arguments: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.pipeline.studies", description="run whole studies whose truth is known")
    parser.add_argument("studies", nargs="*", help=f"names of {SETTINGS}, with or without a seed; none: all")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="studies side by side")
    asked = parser.parse_args(arguments)

    def work() -> None:
        plans = Plans.load()
        run_all(plans.chosen(asked.studies), asked.jobs)
        DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), "studies", tables(plans)), encoding="utf-8")

    return status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
