"""Is everything on disk what it says it is? ``python -m featdiff.integrity`` (``make verify``).

Every artifact is hashed against its manifest, its parents against the manifests it was made from, and every object of
DVC's cache that dvc.lock names against its own name: DVC checks out an object whose mode says "protected" without looking.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from featdiff import artifact
from featdiff.artifact import ContractError
from featdiff.restore import cache_folder
from featdiff.tracking import read_yaml


def problems(root: Path) -> Iterator[str | None]:
    """One line for every artifact and cache object in turn: None where it is sound."""
    outputs = {
        output["path"]: output["md5"]
        for entry in read_yaml(root / "dvc.lock").get("stages", {}).values()
        for output in entry.get("outs", [])
        if "md5" in output
    }
    uncached = _uncached(root)
    seen: set[str] = set()
    cache = cache_folder(root)
    for path, md5 in sorted(outputs.items()):
        if not (root / path).exists():
            yield f"{path}: not in the workspace; run dvc pull or dvc checkout"
        elif md5.endswith(".dir"):
            yield _artifact(root, path)
        if path not in uncached:
            yield from _objects(cache, path, md5, seen)
        elif (root / path).is_file():
            found = _md5(root / path)
            yield None if found == md5 else f"{path}: not what dvc.lock names (md5 {found}); run git checkout, or dvc repro"


def _uncached(root: Path) -> set[str]:
    """Outputs that git keeps, not DVC: the lock does not tell them from others."""
    path = root / "dvc.yaml"
    stages = read_yaml(path)["stages"].values() if path.is_file() else []
    outs = [out for entry in stages for out in entry.get("do", entry).get("outs", []) if isinstance(out, dict)]
    return {name for out in outs for name, options in out.items() if options.get("cache") is False}


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _artifact(root: Path, path: str) -> str | None:
    try:
        artifact.verify(root / path)
        artifact.require_parents(root / path, root)
    except ContractError as error:
        return str(error)
    return None


def _objects(cache: Path, path: str, md5: str, seen: set[str]) -> Iterator[str | None]:
    """The cache object ``md5`` of the output ``path``, and those that it lists."""
    if md5 in seen:
        return
    seen.add(md5)
    stored = cache / md5[:2] / md5[2:]
    if not stored.is_file():
        yield f"{path}: cache object {md5} is missing; run dvc pull, or dvc repro -f its stage"
        return
    found = _md5(stored)
    if found != md5.removesuffix(".dir"):
        yield f"{path}: cache object {stored} is damaged (md5 {found}); delete it, then dvc pull, or dvc repro -f its stage"
        return
    yield None
    if md5.endswith(".dir"):
        for entry in json.loads(stored.read_text(encoding="utf-8")):
            yield from _objects(cache, f"{path}/{entry['relpath']}", entry["md5"], seen)


def main() -> None:
    """Print what is wrong and exit with 1, or say how much was found sound."""
    sound, wrong = 0, []
    for line in tqdm(problems(Path()), desc="verify", unit="object", disable=not sys.stderr.isatty()):
        if line is None:
            sound += 1
        else:
            wrong.append(line)
    for line in wrong:
        print(f"featdiff: {line}", file=sys.stderr)
    print(f"{sound} artifacts and cache objects as they should be, {len(wrong)} not")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
