"""The `semantica` command, whose second process a fault strikes in one training step.

Usage: struck.py FAULT STEP ARGUMENTS... (a `semantica` command). FAULT is
  save  SIGKILL while it writes its part of the checkpoint of that step, but not again when torchrun starts it again
  step  SIGKILL between the forward and the backward pass
  loss  its loss, and so every gradient, is not a number
  error an error that nobody foresaw
  hang  SIGSTOP between the forward and the backward pass
"""

import math
import os
import signal
import sys

from torch.nn.modules.module import register_module_forward_hook

from semantica.cli import main
from semantica.train.objective import Objective

fault, step, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
done = {"steps": 0}


def saving(name: str, details: tuple) -> None:
    part = f".step-{step:08d}.incomplete/unet.00002"
    if name == "open" and part in str(details[0]):
        os.kill(os.getpid(), signal.SIGKILL)


def stepping(module, inputs, outputs):
    if not isinstance(module, Objective) or not module.training:
        return None
    done["steps"] += 1
    if done["steps"] != step:
        return None
    if fault == "step":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "error":
        raise LookupError("by the fault")
    return (outputs[0] * math.nan, *outputs[1:])


if os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    if fault == "save":
        sys.addaudithook(saving)
    else:
        register_module_forward_hook(stepping)
sys.exit(main(arguments))
