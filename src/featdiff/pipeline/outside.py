"""What a study reads that DVC does not track: files and folders that params.yaml names by their paths (ours).

DVC sees such a path in params.yaml, and not that other weights lie there now. So the stage ``check`` writes down, for each
stage that may read any, what lies there, and that stage depends on it. ``make repro`` looks before it asks DVC; a plain
``dvc repro`` looks when params.yaml has changed. What comes from the hub has its commit in params.yaml, and what comes with an
installed package has its version in constraints.txt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from featdiff.artifacts import artifact
from featdiff.artifacts.artifact import ContractError, one_line, read_json
from featdiff.config.data import SuiteTask, suite_file
from featdiff.config.models import ImportedParams
from featdiff.config.params import Study

if TYPE_CHECKING:
    from dvc.repo import Repo

OUTSIDE = Path(".outside")
NEVER_READ = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
"""Pickles; weights are read from safetensors alone."""
Digests = dict[str, dict[str, str]]
"""By the field of params.yaml that names a path: the md5 of each file there."""


def named(study: Study) -> dict[str, dict[str, str]]:
    """By the file under ``.outside`` on which a stage depends: the paths that it reads, by the field of params.yaml that names
    them. What comes from the hub, or from a package, has a path that leads nowhere."""
    prepare, fits = study.prepare, {"fits": study.crosscoder.fits, "wide": study.crosscoder.wide}
    tasks = {f"prepare.tasks.{name}.path": task.path for name, task in prepare.tasks.items() if isinstance(task, SuiteTask)}
    texts = {f"prepare.corpus.general.{name}": source.path for name, source in prepare.corpus.sources.items()}
    found = {"prepare.json": {field: suite_file(path, prepare.suites) or path for field, path in (tasks | texts).items()}}
    found["base.json"] = {} if study.base.source == "pretrain" else {"base.source": study.base.source}
    for name, teacher in study.teachers.items():
        found[f"teachers/{name}.json"] = {f"teachers.{name}.source": teacher.source}
    for name in study.arms:
        numbers = study.numbers(name)
        brought: dict[str, str] = {}
        if isinstance(numbers, ImportedParams):
            brought = {f"arms.{name}.checkpoints[{i}]": path for i, path in enumerate(numbers.checkpoints)}
            brought[f"arms.{name}.source"] = str(numbers.source)
        found[f"arms/{name}.json"] = brought
    for section, fit_of in fits.items():
        for name, fit in fit_of.items():
            found[f"crosscoders/{name}.json"] = {f"crosscoder.{section}.{name}.source": fit.source} if fit.source else {}
    return found


def record(study: Study) -> None:
    """Write what lies outside now, a file for each stage that may read of it."""
    staging = artifact.begin(OUTSIDE)
    for name, digests in _now(study):
        (staging / name).parent.mkdir(exist_ok=True)
        artifact.write_json(staging / name, digests)
    artifact.publish(OUTSIDE)


def forget_changed(study: Study) -> list[str]:
    """Remove what was written of that which is otherwise now, so that DVC runs ``check`` again; returns the fields of
    params.yaml whose paths hold something else than they did."""
    changed = []
    for name, digests in _now(study):
        if (before := _written(name)) is not None and before != digests:
            changed += [field for field, files in digests.items() if before.get(field, files) != files]
            (OUTSIDE / name).unlink()
    return changed


def _written(name: str) -> Digests | None:
    return read_json(OUTSIDE / name) if (OUTSIDE / name).is_file() else None


def _now(study: Study) -> Iterator[tuple[str, Digests]]:
    """What lies where ``study`` says. A path that leads nowhere keeps what was written of it: its stage says so when it runs,
    and need not run where its output came from a remote."""
    with ExitStack() as opened:
        repo = cache(lambda: opened.enter_context(_repo()))
        for name, paths in named(study).items():
            before, digests = _written(name) or {}, {}
            for field, path in paths.items():
                digests[field] = {file.name: _md5(file, repo()) for file in _files(Path(path))} or before.get(field, {})
            yield name, digests


def _repo() -> Repo:
    from dvc.repo import Repo  # here: half a second, and most studies read nothing from outside

    return Repo(_wait_for_lock=True)


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder that a model or a crosscoder could be read from."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    kept = (file for file in path.iterdir() if file.suffix not in NEVER_READ and not file.name.startswith("."))
    return sorted(file for file in kept if file.is_file())


def _md5(file: Path, repo: Repo) -> str:
    """Hashed once: DVC remembers it until size or time of the file changes."""
    from dvc.fs import localfs
    from dvc_data.hashfile.hash import hash_file

    try:
        return str(hash_file(str(file.absolute()), localfs, "md5", state=repo.state)[1].value)
    except OSError as error:
        said = one_line(str(error.strerror))
        raise ContractError(file, "file", "one that can be read", said, "correct its permissions or params.yaml") from None
