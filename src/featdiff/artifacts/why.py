"""Why a stage reruns, in words: ``python -m featdiff.artifacts.why [STAGE …]`` (``arm`` means every ``arm@…``; none, all).

DVC says that something changed; this says from what to what, in which files, and which stage upstream is to blame.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from featdiff.artifacts.dvc import LOCK
from featdiff.config.reading import ConfigError, closest, flatten

AGAIN = ", as "
STATES = {
    "deleted": "is missing; dvc checkout brings it back without a run",
    "modified": "was changed since; dvc checkout puts it right without a run",
    "not in cache": "is neither here nor in DVC's cache; make pull may bring it",
}
"""Of an output, in DVC's words and in ours."""
MANY = 5
"""Files or params named one by one."""
BAD_INPUT = 2


class Graph:
    """The stages of a repository, as dvc.yaml has them now."""

    def __init__(self, repo: Any) -> None:
        self.stages: dict[str, Any] = {stage.addressing: stage for stage in repo.index.stages}
        # A hidden file is a mark, there for the order alone: made again it is the same, and nothing else reruns.
        self._made = {out.def_path: name for name, stage in self.stages.items() for out in stage.outs if out.def_path[0] != "."}
        self._reasons: dict[str, list[str]] = {}

    def named(self, word: str) -> list[str]:
        """Stages that ``word`` names: itself, or all of a group. Raises ConfigError where there are none."""
        found = [name for name in self.stages if word in (name, name.partition("@")[0])]
        if not found:
            raise ConfigError(f"{word!r}: no stage of dvc.yaml; {closest(word, self.stages)}")
        return found

    def reasons(self, name: str) -> list[str]:
        """Why the stage ``name`` would rerun now; empty if it would not."""
        if name not in self._reasons:
            self._reasons[name] = [*self._own(name), *self._upstream(name)]
        return self._reasons[name]

    def _own(self, name: str) -> Iterator[str]:
        stage = self.stages[name]
        if not any(out.hash_info for out in stage.outs):
            yield f"it never ran: {LOCK} has nothing of it"
            return
        for entry in stage.status().get(name, []):
            if entry == "changed command":
                yield "its command in dvc.yaml is another"
                continue
            for path, state in entry.get("changed deps", {}).items():
                yield from self._params(stage, path, state) if isinstance(state, dict) else self._dependency(stage, path, state)
            for path, state in entry.get("changed outs", {}).items():
                yield f"{path}: what it made {STATES.get(state, state)}"

    def _upstream(self, name: str) -> Iterator[str]:
        roots: dict[str, list[str]] = {}
        for dependency in self.stages[name].deps:
            for maker in self._makers(dependency.def_path):
                if maker != name and (first := next(iter(self.reasons(maker)), "")):
                    paths = roots.setdefault(first.partition(AGAIN)[2] or f"{maker} reruns: {first}", [])
                    paths += [dependency.def_path] if dependency.def_path not in paths else []
        for root, paths in roots.items():
            yield f"{', '.join(paths)}: made again{AGAIN}{root}"

    def _makers(self, path: str) -> list[str]:
        """The stages that make ``path``, a folder in which it lies, or files in it."""
        made = self._made.items()
        return [stage for out, stage in made if f"{path}/".startswith(f"{out}/") or out.startswith(f"{path}/")]

    def _params(self, stage: Any, path: str, changed: dict[str, str]) -> Iterator[str]:
        dependency = next(each for each in stage.deps if each.def_path == path)
        then, now = dependency.hash_info.value or {}, dependency.read_params()
        lines = []
        for name, state in changed.items():
            old, new = ({name: values[name]} if name in values else {} for values in (then, now))
            old, new = flatten(old), flatten(new)
            for key in sorted(old.keys() | new.keys()):
                if old.get(key, ...) != new.get(key, ...):
                    lines.append(f"{path}: {key}: was {old.get(key, 'absent')}, is {new.get(key, 'absent')}")
            if not (old or new):
                lines.append(f"{path}: {name}: {state}")
        yield from _few(lines, "params")

    def _dependency(self, stage: Any, path: str, state: str) -> Iterator[str]:
        if makers := self._makers(path):
            if not any(map(self.reasons, makers)):
                yield f"{path}: made anew since, by {' or '.join(makers)}"
            return
        if state == "deleted":
            yield f"{path}: it is missing"
        elif not next(each for each in stage.deps if each.def_path == path).hash_info:
            yield f"{path}: dvc.yaml names it as a dependency, which it did not when the stage ran"
        elif files := [file for file in self._edited if file == path or file.startswith(f"{path}/")]:
            yield from _few([f"{file}: changed since {LOCK} was committed" for file in files], "files")
        else:
            yield f"{path}: changed since the stage ran"

    @cached_property
    def _edited(self) -> list[str]:
        """Files that differ from those of the commit that has the newest dvc.lock, new ones too."""
        last = _git("log", "-1", "--format=%H", "--", LOCK)
        if not last:
            return []
        return sorted({*_git("diff", "--name-only", "--relative", last[0]), *_git("ls-files", "-o", "--exclude-standard")})


def _git(*words: str) -> list[str]:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.splitlines()


def _few(lines: list[str], what: str) -> list[str]:
    return lines if len(lines) <= MANY else [*lines[:MANY], f"and {len(lines) - MANY} more {what}"]


def main(words: list[str]) -> int:
    """See the module."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo, repo.lock:
            graph = Graph(repo)
            names = [name for word in words for name in graph.named(word)] if words else list(graph.stages)
            stale = {name: reasons for name in names if (reasons := graph.reasons(name))}
    except (ConfigError, DvcException) as error:
        print(f"why: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    for name, reasons in stale.items():
        print(f"{name} reruns:", *(f"\n  {reason}" for reason in reasons), sep="")
    if fresh := [name for name in names if name not in stale]:
        print(f"up to date: {fresh[0] if len(names) == 1 else f'{len(fresh)} of {len(names)} stages'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
