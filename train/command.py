"""`semantica train`, alone or in one of the processes that torchrun started."""

import atexit
import os
import sys

from semantica.errors import UserError
from semantica.options import parse
from semantica.train.preemption import Preemption


def run(arguments: list[str]) -> None:
    """Train with these options. Raises as `semantica.options.parse` and `semantica.train.loop.train`."""
    # before anything slow is imported: torchrun ends all processes when one has left, and what is wrong must be said
    with Preemption() as stop:
        from semantica.train.config import TrainConfig

        try:
            config = parse(TrainConfig, "train", arguments)
        except UserError:
            # of the processes that torchrun started on a node, one says it
            if os.environ.get("LOCAL_RANK", "0") != "0":
                sys.exit(2)
            raise

        from semantica.train.loop import train
        from semantica.train.processes import LostProcess, leave

        try:
            train(config, stop)
        except (LostProcess, SystemExit) as error:
            # once its line is printed
            atexit.register(leave, getattr(error, "code", 1))
            raise
