"""One implementation of sampling in a process of its own; the other side is `semantica.benchmarks.sampling.race`.

Arrays are files in the folder that both know.
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from semantica import ranges
from semantica.benchmarks.harness.process import peak_memory, serve
from semantica.benchmarks.sampling.contenders import CONTENDERS, Build, Call, builder_of


class Server:
    """Builds an implementation, then runs it as often as it is told to."""

    call: Call
    # whether torch knows its memory
    counted: bool

    def __init__(self, folder: Path):
        self.folder, self.ranges = folder, ExitStack()

    def build(self, name: str, model: str, device: str, quick: bool, bundle: str | None, nvtx: bool) -> dict:
        if nvtx:
            self.ranges.enter_context(ranges.marked(ranges.nvtx()))
        began = time.perf_counter()
        builder = builder_of(name)
        self.counted = name not in CONTENDERS or not CONTENDERS[name].outside
        self.call, arithmetic = builder(Build(Path(model), device, quick, bundle and Path(bundle)))
        return {"seconds": time.perf_counter() - began, "arithmetic": arithmetic}

    def sample(self, steps: int, guidance: float) -> dict:
        images, noise = (np.load(self.folder / f"{name}.npy") for name in ("images", "noise"))
        began = time.perf_counter()
        with ranges.span("call"):
            made = self.call(images, noise, steps, guidance)
        answer = {"seconds": [time.perf_counter() - began], "peak_bytes": peak_memory() if self.counted else None}
        np.save(self.folder / "made.npy", np.asarray(made))
        return answer


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]))
    serve({"build": server.build, "sample": server.sample})
