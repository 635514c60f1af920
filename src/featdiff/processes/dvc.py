"""A process that has loaded dvc, and from which the dvc above a stage is forked (ours):
``python -m featdiff.processes.dvc <socket>``

The name is read: by it stages/run knows the process above it for a dvc, whose Python it takes.
"""

import sys
from contextlib import suppress

from featdiff.processes import warm

LIBRARIES = (
    "dvc.cli.parser",
    "dvc.commands.repro",
    "dvc.cachemgr",
    "dvc.data_cloud",
    "dvc.lock",
    "dvc.parsing.interpolate",
    "dvc.repo",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.metrics",
    "dvc.repo.params",
    "dvc.repo.plots",
    "dvc.repo.stage",
    "dvc.rwlock",
    "dvc.scm",
    "dvc.stage.loader",
    "dvc.utils.strictyaml",
    "dulwich.ignore",
    "pyparsing",
    "ruamel.yaml",
    "scmrepo.git",
)
"""What ``dvc repro`` imports before it runs a stage."""


def read_lock_fast() -> None:
    """Let the dvc of this process read dvc.lock with libyaml before it changes its stage there. DVC reads for an update in pure
    Python, five times slower, to keep comments, of which a lock file has none. What is written is the same."""
    with suppress(ImportError):  # of another release: it stays as slow
        from dvc.utils.serialize import _yaml

        _yaml.parse_yaml_for_update = _yaml.parse_yaml


if __name__ == "__main__":
    read_lock_fast()
    warm.main(sys.argv[1], LIBRARIES, sweeps=False)  # what a killed dvc leaves is told of its end, and ends as it should
