"""One of several processes that torchrun starts: trains what a file lists, and writes down how each training ended.

Usage: ranks.py JOBS, a JSON list of {"config", "here": {rank: changes}, "stop": {rank: step}, "lose": {rank: folder},
"spoil": {rank: step}, "full": {rank: step}, "code": {rank: folder}}: what one process is told otherwise, when it is
asked to stop, data that it loses in its third step, a step in which its loss alone is infinite, one whose checkpoint
finds no space, and further sources of the package.
"""

import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_hook

import semantica.train
from semantica.errors import UserError
from semantica.train import loop
from semantica.train.config import TrainConfig
from semantica.train.objective import Objective, held_out_loss
from semantica.train.preemption import Stop

no_space = {"in": None}


def opening(name: str, details: tuple) -> None:
    if name == "open" and no_space["in"] and no_space["in"] in str(details[0]):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def settings(job: dict, rank: int) -> TrainConfig:
    given = {**job["config"], **job.get("here", {}).get(str(rank), {})}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return TrainConfig(**{**given, "out": Path(given["out"])})


def attempt(job: dict, rank: int) -> dict:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    calls = {"count": 0, "graphs": [], "held_out": []}
    kinds = ("stop", "lose", "spoil", "full", "code")
    stop, lose, spoil, full, code = (job.get(kind, {}).get(str(rank)) for kind in kinds)
    no_space["in"] = f".step-{full:08d}.incomplete" if full else None

    class Counting(Stop):
        def __call__(self) -> bool:
            # asked once in each step: how many graphs there are by then
            calls["graphs"].append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            calls["count"] += 1
            if calls["count"] == 3 and lose:
                shutil.rmtree(lose)
            return calls["count"] == stop

    def infinite(module, inputs, outputs):
        # its gradient is as it was: no other process can see it in the weights
        if isinstance(module, Objective) and module.training and calls["count"] == spoil:
            outputs = (outputs[0] + math.inf, *outputs[1:])
        return outputs

    def held_out(*arguments) -> dict[str, float]:
        calls["held_out"].append(held_out_loss(*arguments))
        return calls["held_out"][-1]

    path = [*semantica.train.__path__, *([code] if code else [])]
    hook = register_module_forward_hook(infinite) if spoil else None
    try:
        with patch.object(loop, "held_out_loss", held_out), patch.object(semantica.train, "__path__", path):
            loop.train(settings(job, rank), Counting())
    except (UserError, FloatingPointError) as error:
        return {"error": str(error), "kind": type(error).__name__}
    except SystemExit as left:
        return {"left": left.code}
    finally:
        if hook is not None:
            hook.remove()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"graphs": calls["graphs"], "breaks": breaks, "held_out": calls["held_out"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.addaudithook(opening)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    path = Path(sys.argv[1])
    ended = [attempt(job, rank) for job in json.loads(path.read_text())]
    path.with_suffix(f".{rank}").write_text(json.dumps(ended))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
