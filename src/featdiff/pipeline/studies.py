"""Whole studies beside the default one: each in a clone of its own that shares this one's cache, so that what they have in
common is computed once. Their verdicts are held against what is known to be true (ours).

python -m featdiff.pipeline.studies [<study> or <study>-<seed> …]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from featdiff.artifacts.artifact import ContractError, read_json, write_json
from featdiff.artifacts.documents import fill, markdown
from featdiff.artifacts.dvc import cache_folder
from featdiff.config.parse import parse
from featdiff.config.reading import PARAMS, ConfigError, closest, read_yaml
from featdiff.config.values import Name, Params, Seed
from featdiff.processes.launch import EXIT_BAD_INPUT
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


def _run(folder: Path, *command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str((folder / "src").resolve())}
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise ContractError(folder, command[-1], "status 0", done.returncode, "what was computed is kept: say it again")


def prepare(folder: Path, commit: str, profile: str, seed: int) -> None:
    """A clone of this repository at ``commit`` with ``profile`` and ``seed``, and with the cache of this one."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run(Path(), "git", "clone", "--quiet", "--no-checkout", ".", str(folder))
    _run(folder, "git", "fetch", "--quiet", "origin")
    _run(folder, "git", "checkout", "--quiet", "--force", "--detach", commit)
    cache = cache_folder(Path()).parents[1].resolve()  # above files/md5: what DVC calls its cache holds the run cache, too
    _run(folder, sys.executable, "-m", "dvc", "config", "--quiet", "--local", "cache.dir", str(cache))
    _run(folder, sys.executable, "-m", "featdiff.config.profiles", "use", profile, "--discard")
    params = folder / PARAMS
    text, count = re.subn(r"^seed: .*$", f"seed: {seed}", params.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if count != 1:
        raise ContractError(params, "seed", "one line", count, "say it once in the profile")
    params.write_text(text, encoding="utf-8")


def run(name: str, plan: Plan, seed: int) -> None:
    """Run one study to its end, unless it has a result, and keep what its report says."""
    result = RESULTS / f"{name}.json"
    if result.exists():
        say(f"{name}: has a result; a study is run once ({result})")
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    folder = CLONES / name
    say(f"{name}: profile {plan.profile}, seed {seed}, in {folder}")
    prepare(folder, commit, plan.profile, seed)
    _run(folder, sys.executable, "-m", "dvc", "repro")
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = {"commit": commit, "profile": plan.profile, "seed": seed}
    write_json(result, facts | {"summary": read_json(folder / "metrics/summary.json")})


def tables(plans: Plans) -> str:
    """Verdicts of every study that has a result, beside the truth, and how often the two differ."""
    every = plans.chosen([])
    found = {name: read_json(path) for name in every if (path := RESULTS / f"{name}.json").is_file()}
    if not found:
        return "No study has a result yet."
    claims = sorted({claim for result in found.values() for claim in result["summary"]["verdicts"]})
    rows, counted = [], dict[tuple[str, bool], list[bool]]()
    for name, result in found.items():
        plan, _ = every[name]
        cells = []
        for claim in claims:
            verdict, truth = result["summary"]["verdicts"][claim], plan.truth(claim)
            if truth is not None:
                counted.setdefault((claim, truth), []).append(verdict == "supported")
            cells.append(verdict if truth is None else f"{verdict} ({'true' if truth else 'false'})")
        rows.append([name, result["commit"][:7], *cells])
    rates = [[claim, str(truth).lower(), *_share(supported)] for (claim, truth), supported in sorted(counted.items())]
    return "\n\n".join(
        (
            "Verdicts, and in brackets what holds by construction.",
            markdown(["study", "commit", *claims], rows),
            f"How often a claim comes out as supported, with exact {100 * CONFIDENCE:g} % interval.",
            markdown(["claim", "truth", "studies", "supported", "share"], rates),
        )
    )


def _share(supported: list[bool]) -> list[str]:
    rate = binomial(sum(supported), len(supported), CONFIDENCE)
    return [str(rate.n), str(sum(supported)), f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"]


def main(wanted: list[str]) -> int:
    """See the module."""
    try:
        plans = Plans.load()
        for name, (plan, seed) in plans.chosen(wanted).items():
            run(name, plan, seed)
        DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), "studies", tables(plans)), encoding="utf-8")
    except (ContractError, ConfigError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        say("stopped; what was computed is kept: say it again")
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
