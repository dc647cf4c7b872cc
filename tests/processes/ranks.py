"""One of several processes that torchrun starts: trains what a file lists, and writes down how each training ended.

Usage: ranks.py JOBS, a JSON list of {"config", "here": {rank: changes}, "stop": {rank: step}, "lose": {rank: folder}}:
what one process is told otherwise, when it is asked to stop, and data that it loses in its third step.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from semantica.errors import UserError
from semantica.train.config import TrainConfig
from semantica.train.loop import train


def settings(job: dict, rank: int) -> TrainConfig:
    given = {**job["config"], **job.get("here", {}).get(str(rank), {})}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return TrainConfig(**{**given, "out": Path(given["out"])})


def attempt(job: dict, rank: int) -> dict:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    calls = {"count": 0, "graphs": []}

    def graphs() -> bool:
        # asked once in each step: how many graphs there are by then
        calls["graphs"].append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        calls["count"] += 1
        if calls["count"] == 3 and str(rank) in job.get("lose", {}):
            shutil.rmtree(job["lose"][str(rank)])
        return calls["count"] == job.get("stop", {}).get(str(rank))

    try:
        train(settings(job, rank), graphs)
    except UserError as error:
        return {"error": str(error)}
    except SystemExit as left:
        return {"left": left.code}
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"graphs": calls["graphs"], "breaks": breaks}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    path = Path(sys.argv[1])
    ended = [attempt(job, rank) for job in json.loads(path.read_text())]
    path.with_suffix(f".{rank}").write_text(json.dumps(ended))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
