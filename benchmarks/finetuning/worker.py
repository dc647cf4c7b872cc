"""One way to fine-tune in a process of its own; the other side is `semantica.benchmarks.finetuning.suite`."""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from semantica.benchmarks.finetuning.contenders import Problem, Tuner
from semantica.benchmarks.harness.process import peak_memory, serve
from semantica.train.run.measure import drained


class Server:
    """Builds a contender, then trains it as long as it is told to."""

    tuner: Tuner

    def __init__(self, folder: Path):
        self.folder = folder

    def build(self, contender: str, folder: str, **problem) -> dict:
        self.tuner = Tuner(contender, Problem(Path(folder), **problem))
        return {"arithmetic": {torch.bfloat16: "bf16"}.get(self.tuner.dtype, "fp32")}

    def examine(self) -> dict:
        """The first forward and backward pass, with compiling; what it made is a file."""
        began = time.perf_counter()
        found = self.tuner.examine()
        seconds = time.perf_counter() - began
        np.savez(self.folder / "made.npz", **found)
        return {"seconds": [seconds], "peak_bytes": peak_memory()}

    def steps(self, count: int) -> dict:
        """Seconds of each step on the wall, device included; its batch is there before."""
        seconds, losses = [], []
        for _ in range(count):
            given = self.tuner.batch()
            began = time.perf_counter()
            losses.append(float(self.tuner.step(given)))
            drained(self.tuner.device)
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds, "losses": losses, "peak_bytes": peak_memory()}


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]))
    serve({"build": server.build, "examine": server.examine, "steps": server.steps})
