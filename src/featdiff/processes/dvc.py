"""A process that has loaded dvc, and from which the dvc above a stage is forked (ours):
``python -m featdiff.processes.dvc <socket>``

The name is read: by it stages/run knows the process above it for a dvc, whose Python it takes.
"""

import sys

from featdiff.processes import warm

LIBRARIES = ("dvc.cli", "dvc.commands.repro")
"""What ``dvc repro`` imports before it has found out what there is to do."""

if __name__ == "__main__":
    warm.main(sys.argv[1], LIBRARIES, sweeps=False)  # what a killed dvc leaves is told of its end, and ends as it should
