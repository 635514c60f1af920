"""``accelerate launch`` that leaves it to the ranks to say why they ended: its own report and traceback would bury that.

Where there is one rank only, this process becomes it, with the environment that accelerate prepares for it: a second one
would spend two seconds on importing once more what is here already.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from argparse import Namespace

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """See the module; the arguments are those of ``accelerate launch``."""
    start = launch.simple_launcher

    def become_the_rank(arguments: Namespace) -> None:
        if arguments.num_processes != 1:
            return start(arguments)
        (_, *words), environment = launch.prepare_simple_launcher_cmd_env(arguments)
        os.environ.update(environment)
        sys.argv = words[arguments.module :]
        if arguments.module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return None

    launch.simple_launcher = become_the_rank
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch.main()
    except ChildFailedError:
        sys.exit(1)


if __name__ == "__main__":
    main()
