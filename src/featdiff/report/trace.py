"""From a claim to the artifacts, commits and tracking runs behind its numbers, and from an artifact to the claims that read it:
``python -m featdiff.report.trace [claim | artifact]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import ContractError, read_json
from featdiff.artifacts.dvc import locked
from featdiff.config.reading import ConfigError, closest
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import say
from featdiff.tracking.record import runs_folder

FILE = Path("report/claims.json")


def made(path: str) -> str:
    """Which run made the artifact at ``path`` as the newest finished record has it: commit, record, and its time."""
    found = []
    for file in runs_folder().glob("*/run.json"):
        try:
            info = read_json(file)
        except ContractError:
            continue
        if info.get("out") == path and info["status"] == "FINISHED":
            found.append((info["ended"], info["commit"][:12] or "no commit", info["id"]))
    return "run {2} at commit {1}".format(*max(found)) if found else "no record here; make pull fetches what others recorded"


def of_claim(trace: dict[str, Any], key: str) -> list[str]:
    """What the numbers of one claim were worked out of."""
    claim = trace["claims"][key]
    lines = [f"{key}: {claim['verdict']}: {claim['claim']}"]
    for name, number in claim["numbers"].items():
        lines.append(f"  {name}: {number['value']:+.4f} [{number['low']:+.4f}, {number['high']:+.4f}], n {number['n']}")
        for rows in number["rows"]:
            where = "; ".join(f"{column} {', '.join(map(str, values))}" for column, values in rows["where"].items())
            lines.append(f"    {rows['count']} rows of {rows['table']} ({where})")
    tables = [rows["table"] for number in claim["numbers"].values() for rows in number["rows"]]
    current = {output.path: output.md5 for output in locked(Path())}
    for path in dict.fromkeys(table.rpartition("/")[0] for table in tables):
        md5 = trace["artifacts"][path]
        state = "" if current.get(path) == md5 else "; dvc.lock has another one now: the report is older"
        lines.append(f"  {path}: md5 {md5}{state}; {made(path)}")
    return lines


def of_artifact(trace: dict[str, Any], path: str) -> list[str]:
    """Which numbers of which claims were worked out of the artifact at ``path``."""
    readers = [
        f"  {key}: {name}"
        for key, claim in trace["claims"].items()
        for name, number in claim["numbers"].items()
        if any(rows["table"].startswith(f"{path}/") for rows in number["rows"])
    ]
    return [f"{path}: md5 {trace['artifacts'][path]}; {made(path)}; read by", *readers]


def main(words: list[str]) -> int:
    """See the module."""
    try:
        if not FILE.is_file():
            raise ConfigError(f"{FILE}: not found; make pull STAGE=report, or dvc repro")
        trace = read_json(FILE)
        for word in words or trace["claims"]:
            known = [*trace["claims"], *trace["artifacts"]]
            if word not in known:
                raise ConfigError(f"{word!r}: no claim and no artifact behind one; {closest(word, known)}")
            print(*(of_claim if word in trace["claims"] else of_artifact)(trace, word), sep="\n")
    except (ConfigError, ContractError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
