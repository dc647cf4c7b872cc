"""One implementation in a process of its own: it builds, runs what it is told to, and says how long that took.

The other side is `semantica.benchmarks.sample_race`. Requests and answers are JSON, one a line, answers on what was
standard output when the process started; arrays are files in the folder that both know.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np


def serve(folder: Path) -> None:
    # whatever libraries print goes to the log, not between the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                from semantica.benchmarks.samplers import Build, builder_of

                began = time.perf_counter()
                model, bundle = Path(request["model"]), request["bundle"]
                build = Build(model, request["device"], request["quick"], bundle and Path(bundle))
                call, arithmetic = builder_of(request["name"])(build)
                answer = {"seconds": time.perf_counter() - began, "arithmetic": arithmetic}
            else:
                images, noise = (np.load(folder / f"{name}.npy") for name in ("images", "noise"))
                began = time.perf_counter()
                made = call(images, noise, request["steps"], request["guidance"])
                answer = {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory()}
                np.save(folder / "made.npy", np.asarray(made))
        # whatever an implementation raises is its own failure: the race goes on without it
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


def peak_memory() -> int:
    """Bytes: the allocator's peak where CUDA was used, else the largest resident size of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
