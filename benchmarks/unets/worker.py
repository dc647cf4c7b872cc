"""One implementation in a process of its own; the other side is `semantica.benchmarks.unets.suite`."""

import sys
import time
from pathlib import Path

import numpy as np

from semantica.benchmarks.harness.process import peak_memory, serve
from semantica.benchmarks.unets.contenders import Build, Call, builder_of


class Server:
    """Builds an implementation, then runs it as often as it is told to."""

    call: Call

    def __init__(self, folder: Path):
        self.folder = folder

    def build(self, name: str, model: str, stage: str, adapter: str, device: str) -> dict:
        began = time.perf_counter()
        self.call, arithmetic = builder_of(name)(Build(Path(model), stage, adapter, device))
        return {"seconds": time.perf_counter() - began, "arithmetic": arithmetic}

    def run(self, steps: int, guidance: float) -> dict:
        with np.load(self.folder / "content.npz") as file:
            content = dict(file)
        began = time.perf_counter()
        made = self.call(content, steps, guidance)
        answer = {"seconds": [time.perf_counter() - began], "peak_bytes": peak_memory()}
        np.save(self.folder / "made.npy", made)
        return answer


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]))
    serve({"build": server.build, "run": server.run})
