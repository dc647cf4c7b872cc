"""Implementations in processes of their own: both ends of the pipe, and the ceilings that are timed between rounds.

Requests and answers are JSON, one a line, answers on what was standard output when the process started.
"""

import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


class Wrong(Exception):
    """An implementation that must not be timed; the message says why."""


def serve(handlers: dict[str, Callable[..., dict]]) -> None:
    """In the process: answer requests until there are no more."""
    # whatever libraries print goes to the log, not between the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = handlers[what](**arguments)
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


class Process:
    """An implementation in its own process. Whatever fails there is `Wrong` here.

    module: is run as a script, with a folder of its own as the only argument. name: of that folder, in `place`.
    """

    def __init__(self, module: str, name: str, place: Path):
        self.folder = place / re.sub("[^A-Za-z0-9_.-]", "-", name)
        self.folder.mkdir(parents=True)
        self.log = (self.folder / "log.txt").open("w")
        # -P: the root of a checkout must not be on sys.path
        command = [sys.executable, "-P", "-m", module, str(self.folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def ask(self, what: str, **arguments) -> dict:
        try:
            self.process.stdin.write(json.dumps([what, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Wrong(f"its process ended with code {self.process.wait()}: {last_line(self.log.name)}")
        answer = json.loads(line)
        if "error" in answer:
            raise Wrong(answer["error"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def last_line(path: str) -> str:
    lines = Path(path).read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


class Ceilings:
    """Rates of a copy and of matrix products, between the rounds."""

    def __init__(self, device: str):
        import torch

        from semantica.benchmarks.harness import race as timing

        self.clock = timing.clock(device)
        self.runners = {"copy": timing.copy_contender(device)}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            self.runners[name] = timing.matrix_contender(device, dtype)
        self.times: dict[str, list[float]] = {name: [] for name in self.runners}

    def measure(self) -> None:
        for name, (contender, _) in self.runners.items():
            call = contender(0)
            self.times[name] += [self.clock.time(call, 0)[0] for _ in range(3)]

    def rates(self) -> dict[str, float]:
        if not self.times["copy"]:
            return {}
        from semantica.benchmarks.harness import race as timing

        rate = {name: amount / timing.quantile(self.times[name], 0.5) for name, (_, amount) in self.runners.items()}
        return {
            "copy_gbps": rate["copy"] / 1e9,
            "matrix_tflops": rate["bf16"] / 1e12,
            "matrix_tflops_fp32": rate["fp32"] / 1e12,
        }
