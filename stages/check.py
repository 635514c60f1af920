"""params.yaml as a whole: a name or number that does not hold is one line, before anything is started with it."""

import sys
from pathlib import Path

from featdiff.config.params import load_study
from featdiff.config.published import published
from featdiff.config.reading import ConfigError
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import say

try:
    published(load_study().report.paper_model)
except ConfigError as error:
    say(str(error))
    sys.exit(EXIT_BAD_INPUT)
Path(".params.checked").write_text("params.yaml holds\n", encoding="utf-8")
