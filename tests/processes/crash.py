"""Saves a checkpoint again and again, and ends each time at a later file operation, as a crash would.

Usage: crash.py ROOT SCRATCH. ROOT/checkpoints holds step 1; each attempt works on a copy of its own, SCRATCH/<n>, and
writes step 2 over it. An audit hook sees every operation on files that Python makes; safetensors' own writing falls
between two of them.
"""

import os
import shutil
import sys
from pathlib import Path

import torch

from semantica.train.run import checkpoint

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir"}
seen = {"left": None, "root": "", "names": []}


def hook(name: str, arguments: tuple) -> None:
    if seen["left"] is None or name not in OPERATIONS or seen["root"] not in str(arguments[0]):
        return
    seen["names"].append(name)
    seen["left"] -= 1
    if seen["left"] == 0:
        os._exit(9)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"{name}/x": torch.full((5,), value) for name in ("unet", "ema_unet", "optimizer")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.addaudithook(hook)
    root, scratch = map(Path, sys.argv[1:])
    checkpoint.save(root / "checkpoints", 1, tensors(1), {}, keep=1)
    for stop in range(1, 1000):
        place = scratch / f"{stop:03d}"
        shutil.copytree(root, place)
        child = os.fork()
        if child == 0:
            seen.update(left=stop, root=str(place), names=[])
            # what stood at step 2, damaged, is replaced in every other attempt
            checkpoint.save(place / "checkpoints", 2, tensors(2), {}, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
    print(stop)
