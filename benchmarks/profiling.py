"""Where our side of a benchmark spends its time: `make profile-step`, or `python -m benchmarks.profiling CASE`.

Runs the same work in this process for two rounds and prints the operations that take most of the time themselves."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import runpy
import sys
from unittest.mock import patch

from benchmarks.__main__ import CASES, HERE, OURS
from torch.profiler import ProfilerActivity, profile

ROUNDS, LINES = 2, 20


def table(name: str) -> str:
    """Operations of case ``name``, the one that takes most of the time itself first. Making the data is left out."""
    case, ours = CASES[name], CASES[name].contestants[OURS]
    given = {**case.numbers, "steps": ROUNDS * case.numbers["block"], **ours.changes}
    sys.path.insert(0, str(HERE))
    pace = importlib.import_module("pace")
    seen = profile(activities=[ProfilerActivity.CPU])

    def say(found: object) -> None:
        if found is None:  # the contestant is ready
            seen.start()

    arguments = [str(HERE / ours.script), json.dumps(given), *ours.arguments]
    told = io.StringIO("go\n" * ROUNDS)
    with contextlib.ExitStack() as stack:
        for place, attribute, value in ((pace, "say", say), (sys, "argv", arguments), (sys, "stdin", told)):
            stack.enter_context(patch.object(place, attribute, value))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        runpy.run_path(arguments[0])
    seen.stop()
    columns = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=LINES, max_name_column_width=50)
    return f"{case.title}\n{columns}"


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["step", "answers"]:
        print(table(chosen))
