"""Who runs the cells: processes of this machine, or tasks of Ray that start them on nodes with a shared folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from semantica.benchmarks.harness.process import last_line
from semantica.errors import UserError, first_line

MODULE = "semantica.benchmarks.quality.sweep.cell"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# a sweep may be started by what starts processes of one training
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Running(Protocol):
    """A cell that was started."""

    def poll(self) -> str | None:
        """None while it runs; then "" where all went well, or what went wrong."""

    def stop(self) -> None:
        """Ask it to save and leave; `poll` tells when it has."""

    def kill(self) -> None:
        """End it at once."""


class Runner(Protocol):
    """Starts cells, `room` of them at most at a time."""

    room: int

    def start(self, place: Path) -> Running:
        """Start the process of a cell whose folder holds cell.json."""

    def close(self) -> None:
        """No cell of it runs any more."""


class Process:
    """A cell's process. It stops by itself once nobody holds the other end of its standard input."""

    def __init__(self, place: Path, threads: int, more: dict[str, str] | None = None, folder: str | None = None):
        self.log = place / "log.txt"
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        # -P: the root of a checkout must not be on sys.path
        command = [sys.executable, "-P", "-m", MODULE, str(place)]
        with self.log.open("w") as log:
            # a session of its own: Ctrl-C reaches the sweep, which asks each cell once
            self.process = subprocess.Popen(
                command,
                env=inherited | dict.fromkeys(THREADS, str(threads)) | (more or {}),
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> str | None:
        return None if self.process.poll() is None else self.answer()

    def answer(self) -> str:
        """After its end: what went wrong."""
        code, said = self.process.wait(), last_line(str(self.log))
        self.stop()
        if code == 0:
            return ""
        ours = said.startswith("semantica: ")
        return said.removeprefix("semantica: ") if ours else f"its process ended with code {code}: {said}"

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()


class Local:
    """Processes of this machine, which share its threads; each has one of its GPUs, in turn."""

    def __init__(self, jobs: int, gpus: Callable[[], list[str]] | None = None):
        self.room, self.threads = jobs, max(1, threads_here() // jobs)
        # one process alone takes what it finds
        self.gpus = (gpus or visible_gpus)() if jobs > 1 else []
        self.turns: list[Process | None] = [None] * jobs

    def start(self, place: Path) -> Process:
        turn = next(i for i, process in enumerate(self.turns) if process is None or process.process.poll() is not None)
        card = {"CUDA_VISIBLE_DEVICES": self.gpus[turn % len(self.gpus)]} if self.gpus else {}
        self.turns[turn] = Process(place, self.threads, card)
        return self.turns[turn]

    def close(self) -> None:
        pass


def threads_here() -> int:
    """Threads that this process may compute with: OMP_NUM_THREADS, or the processors that it may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The names of this machine's GPUs in CUDA_VISIBLE_DEVICES."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if given is None else given.split(",")
    return [name for name in names if name.strip()]


class Ray:
    """Tasks of the cluster that RAY_ADDRESS names or this node belongs to, or of this machine alone; one for each cell.

    Args:
        cpus: threads of a cell, which Ray reserves for it. cuda: whether cells take a GPU each, where there are any.

    Raises:
        UserError: Ray is not installed or does not start, or no node has so many processors.
    """

    def __init__(self, cpus: int, cuda: bool, cells: int):
        try:
            import ray
        except ImportError as error:
            raise UserError("--ray needs Ray: install semantica-diffusion[ray]") from error
        self.ray, self.ours, self.room, self.cpus = ray, not ray.is_initialized(), cells, cpus
        try:
            if self.ours:
                ray.init(include_dashboard=False, logging_level="WARNING", log_to_driver=False)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # of a node that does not come up Ray says so in an exception of no kind
        except Exception as error:
            self.close()
            raise UserError(f"Ray does not start or answer here ({first_line(error)}): see its log") from error
        # Ray would wait for such a node for ever
        if (most := max((node.get("CPU", 0) for node in nodes), default=0)) < cpus:
            self.close()
            raise UserError(f"--ray-cpus {cpus}: the largest node of Ray's cluster has {most:g}; give no more")
        gpus = int(cuda and any(node.get("GPU", 0) >= 1 for node in nodes))
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus)(on_node)

    def start(self, place: Path) -> "Task":
        return Task(self.ray, self.task.remote(str(place), self.cpus, os.getcwd()))

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()


class Task:
    """A cell that Ray was given. A node that is lost costs its cells nothing but time: Ray starts the task again."""

    def __init__(self, ray: Any, reference: Any):
        self.ray, self.reference = ray, reference

    def poll(self) -> str | None:
        done, _ = self.ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return self.ray.get(self.reference)
        # an error of the task is of its own kind too
        except Exception as error:
            return first_line(error)

    def stop(self) -> None:
        self.ray.cancel(self.reference)

    def kill(self) -> None:
        self.ray.cancel(self.reference, force=True)


def on_node(place: str, threads: int, folder: str) -> str:
    """On whichever node Ray chose: a cell's process, from the folder that the sweep's paths are relative to."""
    if not Path(place, "cell.json").exists():
        return f"a node does not see {place}: --out must lie on storage that all nodes share"
    process = Process(Path(place), threads, folder=folder)
    try:
        process.process.wait()
    finally:
        # where the task is cancelled too
        process.stop()
        process.process.wait()
    return process.answer()
