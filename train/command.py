"""`semantica train`: what the verb does to its process, which a call of `semantica.train.loop.train` does not."""

import atexit
import os
import sys

from semantica.errors import UserError
from semantica.options import parse
from semantica.train.preemption import Preemption, leave


def run(arguments: list[str]) -> None:
    """Train with these options. Raises as `semantica.train.loop.train`, and `UserError` for options there are not."""
    # from the start: torchrun ends all processes when one has left, and what is wrong must still be said
    with Preemption() as stop:
        from semantica.train.config import TrainConfig

        try:
            config = parse(TrainConfig, "train", arguments)
        except UserError:
            # of the processes that torchrun started on a node, one says it
            if os.environ.get("LOCAL_RANK", "0") != "0":
                sys.exit(2)
            raise

        import torch

        from semantica.memory import keep_freed_memory
        from semantica.train.loop import train
        from semantica.train.processes import LostProcess

        if config.device == "cpu" or not torch.cuda.is_available():
            keep_freed_memory()
        try:
            train(config, stop)
        except (LostProcess, SystemExit) as error:
            # once its line is printed
            atexit.register(leave, getattr(error, "code", 1))
            raise
        except (UserError, FloatingPointError, KeyboardInterrupt):
            raise
        except BaseException:
            # once its traceback is printed: the groups were not left
            if torch.distributed.is_initialized():
                atexit.register(leave, 1)
            raise
