"""Is everything on disk what it says it is? ``python -m featdiff.artifacts.integrity`` (``make verify``).

Every artifact is hashed against its manifest, its parents against its provenance, every other output against dvc.lock, and
every object of DVC's cache that dvc.lock names against its own name: DVC checks out an object whose mode says "protected"
without looking.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from featdiff.artifacts import artifact
from featdiff.artifacts.artifact import FILE, RESTORE, ContractError, kind
from featdiff.artifacts.dvc import cache_folder, cached, listing, locked, md5_file, read_yaml
from featdiff.artifacts.provenance import require_parents


def problems(root: Path) -> Iterator[str | None]:
    """One line for every artifact and cache object in turn: None where it is sound."""
    try:
        outputs = {output.path: output.md5 for output in locked(root)}
        cache = cache_folder(root)
    except ContractError as error:
        yield str(error)
        return
    uncached = _uncached(root)
    seen: set[str] = set()
    for path, md5 in sorted(outputs.items()):
        if not (root / path).exists():
            yield f"{path}: not in the workspace; run dvc pull or dvc checkout"
        elif md5.endswith(".dir"):
            yield _artifact(root, path)
        else:
            yield _compared(root, path, md5, "git" if path in uncached else "dvc")
        if path not in uncached:
            yield from _objects(cache, path, md5, seen)


def _uncached(root: Path) -> set[str]:
    """Outputs that git keeps, not DVC: the lock does not tell them from others."""
    path = root / "dvc.yaml"
    stages = read_yaml(path)["stages"].values() if path.is_file() else []
    outs = [out for entry in stages for out in entry.get("do", entry).get("outs", []) if isinstance(out, dict)]
    return {name for out in outs for name, options in out.items() if options.get("cache") is False}


def _compared(root: Path, path: str, md5: str, keeper: str) -> str | None:
    try:
        if (what := kind(root / path)) != FILE:
            raise ContractError(root / path, "file", FILE, what, f"delete it, then {RESTORE}")
        found = md5_file(root / path)
    except ContractError as error:
        return str(error)
    return None if found == md5 else f"{path}: not what dvc.lock names (md5 {found}); run {keeper} checkout, or dvc repro"


def _artifact(root: Path, path: str) -> str | None:
    try:
        artifact.verify(root / path)
        require_parents(root / path, root)
    except ContractError as error:
        return str(error)
    return None


def _objects(cache: Path, path: str, md5: str, seen: set[str]) -> Iterator[str | None]:
    """The cache object ``md5`` of the output ``path``, and those that it lists."""
    if md5 in seen:
        return
    seen.add(md5)
    try:
        stored = cached(cache, md5)
        listed = listing(stored) if md5.endswith(".dir") else {}
    except ContractError as error:
        yield f"{path}: {error}"
        return
    yield None
    for name, file in listed.items():
        yield from _objects(cache, f"{path}/{name}", file, seen)


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
