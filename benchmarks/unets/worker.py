"""One implementation in a process of its own; the other side is `semantica.benchmarks.unets.suite`."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from semantica.benchmarks.harness.process import peak_memory, serve
from semantica.benchmarks.unets.contenders import Build, Call, builder_of
from semantica.benchmarks.unets.engines import ENGINES
from semantica.benchmarks.unets.models import Content


class Server:
    """Builds an implementation, then runs it as often as it is told to."""

    call: Call
    without: Call | None = None
    # before there was a second model
    peak: int | None = None
    # whether torch, or the system, knows its memory
    counted: bool = True

    def __init__(self, folder: Path):
        self.folder = folder

    def build(self, name: str, model: str, stage: str, adapter: str, device: str, bundle: str | None) -> dict:
        began = time.perf_counter()
        self.builder = builder_of(name)
        self.where = Build(Path(model), stage, adapter, device, bundle and Path(bundle))
        self.call, arithmetic = self.builder(self.where)
        # engines of GPUs take their memory past torch, whose figures then say nothing of it
        self.counted = name not in ENGINES or ENGINES[name].device != "cuda"
        return {"seconds": time.perf_counter() - began, "arithmetic": arithmetic}

    def content(self) -> Content:
        with np.load(self.folder / "content.npz") as file:
            return dict(file)

    def run(self, steps: int, guidance: float) -> dict:
        content = self.content()
        began = time.perf_counter()
        made = self.call(content, steps, guidance)
        seconds, peak = time.perf_counter() - began, self.peak or peak_memory()
        answer = {"seconds": [seconds], "peak_bytes": peak if self.counted else None}
        np.save(self.folder / "made.npy", made)
        return answer

    def run_without(self, steps: int, guidance: float) -> dict:
        """The same content and the same UNet, without its adapter; its first call builds that."""
        if self.without is None:
            self.peak = peak_memory()
            self.without, _ = self.builder(replace(self.where, adapter=""))
        content = {name: array for name, array in self.content().items() if "image" not in name}
        began = time.perf_counter()
        self.without(content, steps, guidance)
        return {"seconds": [time.perf_counter() - began]}


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]))
    serve({"build": server.build, "run": server.run, "run_without": server.run_without})
