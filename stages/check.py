"""params.yaml as a whole: a name or number that does not hold is one line, before anything is started with it. Then what lies
where it names files and folders that DVC does not track."""

import sys

from featdiff.artifacts.artifact import ContractError
from featdiff.config.params import load_study
from featdiff.config.published import published
from featdiff.config.reading import ConfigError
from featdiff.pipeline.outside import record
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import say

try:
    study = load_study()
    published(study.report.paper_model)
    record(study)
except (ConfigError, ContractError) as error:
    say(str(error))
    sys.exit(EXIT_BAD_INPUT)
