"""One cell of a sweep in a process of its own: trained, then evaluated at each guidance, as far as that is not done.

python -m semantica.benchmarks.quality.sweep.cell FOLDER, whose cell.json says what is asked. It ends by itself, a
training after saving, once its standard input is closed: whoever started it is gone.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from semantica.benchmarks.quality.sweep.kept import (
    evaluated,
    evaluation_at,
    evaluation_key,
    files_of,
    steps_of,
    trained,
)
from semantica.benchmarks.quality.sweep.typed import built
from semantica.cli import answered
from semantica.errors import UserError
from semantica.files import read_json, write_json
from semantica.lock import held

# seconds that a process of the same cell, whose sweep was killed, may take to save and leave
PATIENCE = 120.0
INTERRUPTED = 130


def run(place: Path) -> int:
    """Do what is left of a cell; 130 where it was asked to stop before its training was done.

    Raises:
        UserError: what `semantica.train.loop.train` and `semantica.benchmarks.quality.evaluate.evaluate` raise; another
            process trains this run.
    """
    request = read_json(place / "cell.json")
    files = trained(place, request)
    if files is None:
        if not train_one(place, request):
            return INTERRUPTED
        files = files_of(Path(request["train"]["out"]))
    for guidance in request["guidance"]:
        if evaluated(place, request, guidance, files) is None:
            evaluate_one(place, request, guidance, files)
    return 0


def train_one(place: Path, request: dict) -> bool:
    """Train, or continue; whether all steps are done."""
    from semantica.train.config import TrainConfig
    from semantica.train.preemption import Preemption

    with Preemption() as stop:
        import torch

        from semantica.memory import keep_freed_memory
        from semantica.train.loop import train

        config = built(TrainConfig, request["train"])
        if config.device == "cpu" or not torch.cuda.is_available():
            keep_freed_memory()
        settle(config.out)
        began, first = time.perf_counter(), steps_of(config.out)
        train(config, stop)
        if stop.asked:
            return False
    took = {"steps": config.steps - first, "seconds": time.perf_counter() - began}
    known = {"train": request["train"], "inputs": request["inputs"], "files": files_of(config.out)}
    write_json(place / "trained.json", known | took)
    return True


def settle(run: Path) -> None:
    """Wait until the process of a sweep that was killed has saved and left. Raises `UserError` where it does not."""
    began = time.monotonic()
    while held(run / ".lock"):
        if time.monotonic() - began > PATIENCE:
            raise UserError(f"another training writes into {run}: wait for it, or end it")
        time.sleep(0.2)


def evaluate_one(place: Path, request: dict, guidance: float, files: dict[str, str]) -> None:
    """Evaluate, and keep the figures with what they are of."""
    from semantica.benchmarks.quality.evaluate import EvaluateConfig, evaluate

    path = evaluation_at(place, guidance)
    options = {**request["evaluate"], "model": request["train"]["out"], "guidance": guidance, "out": str(path)}
    began = time.perf_counter()
    evaluate(built(EvaluateConfig, options))
    made = {"of": evaluation_key(request, guidance, files), "seconds": time.perf_counter() - began}
    # what is there without it is not trusted
    write_json(path, {**read_json(path), "sweep": made})


def leave_with_parent() -> None:
    # not through sys.stdin, whose lock the interpreter would wait for at its end
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=leave_with_parent, daemon=True).start()
    sys.exit(answered(lambda: run(Path(sys.argv[1]))))
