"""The processes of a run: how they come together, agree with each other, and part.

One process alone has no process group, and every exchange here is then nothing.
"""

import hashlib
import importlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.rendezvous import rendezvous

import semantica
from semantica.errors import ArtifactError, UserError, first_line
from semantica.train.config import TrainConfig

LAUNCH = "torchrun --nproc-per-node N --no-python semantica train ..."
# each process may have these of its own
LOCAL = {"data", "val", "tokens", "workers", "device"}
# seconds of the longest timeout: ten years
LONGEST = 10 * 365 * 86400


class Vote(IntEnum):
    """How a step ends; of all processes' votes the largest holds."""

    CONTINUE, STOP, SAVE_FAILED, DATA_FAILED = range(4)


class LostProcess(ArtifactError):
    """Another process of the run ended or hangs: this one cannot go on."""


class World:
    """The processes of a run, of which this is one.

    Args:
        mode: "ddp", "fsdp" or "hsdp", or None for one process.
        backend: of the process group: gloo moves CPU tensors, nccl those on CUDA.
        timeout: seconds that any exchange may take.

    Raises:
        LostProcess: not all processes came together within the timeout. On others than the first `SystemExit` with
            code 1.
    """

    def __init__(self, mode: str | None = None, backend: str = "gloo", timeout: float = 600.0):
        self.mode, self.rank, self.size = mode, 0, 1
        self.local_rank, self.local_size = 0, 1
        self.control = self.saving = None
        self.own = mode is not None and not dist.is_initialized()
        if mode is None:
            return
        # an exchange that may take for ever, as far as clocks of 64 bits go
        limit = timedelta(seconds=min(timeout, LONGEST))
        try:
            if self.own:
                store, rank, size = fresh_rendezvous(limit)
                dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
            # groups of their own for votes and for checkpoints: those are exchanged while gradients are
            self.control, self.saving = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        except (dist.DistError, RuntimeError) as error:
            if self.own and dist.is_initialized():
                dist.destroy_process_group()
            if os.environ.get("RANK", "0") != "0":
                raise SystemExit(1) from error
            problem = f"the processes did not come together within {timeout:g} s: {first_line(error)}"
            raise LostProcess(problem) from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes what there is one of."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the groups. Whoever exits within one may be aborted by the threads that serve it."""
        for group in (self.control, self.saving) if self.mode else ():
            dist.destroy_process_group(group)
        if self.own:
            dist.destroy_process_group()

    def all_gather_object(self, value: Any) -> list:
        """A JSON value of every process, on every process. (`torch.distributed` has one that reads pickles.)"""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self.control)
        texts = [torch.zeros(max(size.item() for size in sizes), dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, nn.functional.pad(text, (0, len(texts[0]) - len(text))), group=self.control)
        return [json.loads(bytes(t[: size.item()].tolist())) for t, size in zip(texts, sizes)]

    def on_this_machine(self, value: Any) -> list:
        """A JSON value of every process of this machine, whose ranks follow one another."""
        first = self.rank - self.local_rank
        return self.all_gather_object(value)[first : first + self.local_size]

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """All processes come to the end of what is within, or none: a mistake on one ends all of them.

        Raises:
            UserError: on the main process, where any raised one.
            SystemExit: with code 2, on the others.
        """
        problem = None
        try:
            yield
        except UserError as error:
            if self.size == 1:
                raise
            problem = str(error)
        problems = self.all_gather_object(problem)
        if not any(problems):
            return
        if not self.is_main:
            raise SystemExit(2)
        if problems[0]:
            raise UserError(problems[0])
        rank = next(rank for rank, said in enumerate(problems) if said)
        raise UserError(f"process {rank} of {self.size}: {problems[rank]}")

    def from_main(self, work: Callable[[], Any]) -> Any:
        """What the main process finds, a JSON value, on every process; errors as in `consensus`."""
        found = None
        with self.consensus():
            if self.is_main:
                found = work()
        return self.all_gather_object(found)[0]

    def require_same(self, facts: dict[str, Any], advice: str = "give all the same command, package and data") -> None:
        """Make sure that all processes were told the same, run the same code and see the same data.

        Args:
            facts: JSON values, by the name that a message calls them. advice: what to do where they differ.

        Raises:
            UserError: they do not; as in `consensus`.
        """
        everyone = self.all_gather_object(facts)
        with self.consensus():
            for rank, other in enumerate(everyone):
                for name, value in everyone[0].items():
                    if other.get(name) != value:
                        raise UserError(
                            f"the processes disagree on {name}: {value} on process 0, {other.get(name)} on process "
                            f"{rank}: {advice}"
                        )

    def vote(self, own: Vote) -> Callable[[], Vote]:
        """Start a vote on how this step ends, while the network computes; called, what is returned waits for it."""
        if self.size == 1:
            return lambda: own
        value = torch.tensor([own])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> Vote:
            work.wait()
            return Vote(value.item())

        return result

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, of a tensor on the training device."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value


def fresh_rendezvous(limit: timedelta) -> tuple[dist.Store, int, int]:
    """A store that only the processes of this start share, and this process' rank and their number.

    torchrun keeps one store when it starts processes again, with the addresses of those that are gone still in it
    (pytorch/pytorch issue 135712), and its count of restarts may differ between nodes. So the first process answers
    what each of the others says newly, until all have heard it.
    """
    store, rank, world = next(rendezvous("env://", timeout=limit))
    greeting = secrets.token_hex(8)
    if rank:
        store.set(f"semantica/hello/{rank}", greeting)
        name = store.get(f"semantica/answer/{greeting}").decode()
        store.set(f"semantica/heard/{name}/{rank}", "")
    else:
        name, missing, deadline = greeting, set(range(1, world)), time.monotonic() + limit.total_seconds()
        while missing:
            for other in sorted(missing):
                if store.check([f"semantica/hello/{other}"]):
                    store.set(f"semantica/answer/{store.get(f'semantica/hello/{other}').decode()}", name)
            missing = {other for other in missing if not store.check([f"semantica/heard/{name}/{other}"])}
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"process {min(missing)} of {world} did not come")
            time.sleep(0.02)
    return dist.PrefixStore(f"semantica/{name}", store), rank, world


@contextmanager
def joined(config: TrainConfig) -> Iterator[World]:
    """The other processes that torchrun started, joined and left again; one process alone is not distributed.

    Raises:
        UserError: a mode was asked for without torchrun, or only a part of what torchrun says is there.
        LostProcess: the others did not come, or one of them ended or did not answer, within the timeout.
        SystemExit: with code 1, on others than the main process, instead of `LostProcess` and `FloatingPointError`.
    """
    mode = parallel_mode(config)
    cuda = torch.cuda.is_available() and config.device != "cpu"
    timeout = config.timeout if config.timeout > 0 else TrainConfig.timeout
    world = World(mode, "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout)
    try:
        yield world
    except (UserError, FloatingPointError, SystemExit) as error:
        # all processes agreed on it: none is within an exchange
        world.close()
        if isinstance(error, FloatingPointError) and not world.is_main:
            raise SystemExit(1) from error
        raise
    except (RuntimeError, CheckpointException) as error:
        if world.size == 1 or not lost(error):
            raise
        if not world.is_main:
            raise SystemExit(1) from error
        raise LostProcess(
            f"another of the {world.size} processes ended, or did not answer within {config.timeout:g} s "
            f"({first_line(error)}): the same command continues from the newest complete checkpoint"
        ) from error
    world.close()


def parallel_mode(config: TrainConfig) -> str | None:
    """How several processes share the work; None for one that is not distributed. Raises `UserError`, see `joined`."""
    launched = dist.is_initialized() or {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if not launched and config.parallel != "auto":
        raise UserError(f"--parallel {config.parallel} needs several processes: start them with '{LAUNCH}'")
    alone = not launched or (not dist.is_initialized() and os.environ["WORLD_SIZE"] == "1")
    if config.parallel == "auto" and alone:
        return None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise UserError(f"RANK and WORLD_SIZE are set and {missing[0]} is not: start with '{LAUNCH}', or unset them")
    return "ddp" if config.parallel == "auto" else config.parallel


def local_device(name: str, world: World) -> str:
    """The name of this process' device: each process of a node has a GPU of its own."""
    if world.mode is None or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} is one device, and there are {world.size} processes: leave it out")
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{world.local_size} processes on a node with {count} GPUs: give --nproc-per-node {count}")
    torch.cuda.set_device(place)
    return f"cuda:{place}"


def identity(config: TrainConfig, world: World) -> dict[str, Any]:
    """What must be the same everywhere, by the name that a message calls it."""
    options = {f"--{k.replace('_', '-')}": v for k, v in config.record().items() if k not in LOCAL}
    if world.mode == "hsdp":
        options["--nproc-per-node"] = world.local_size
    return {**options, "versions": versions(), "the package's code": code_digest()}


def versions() -> str:
    return f"semantica {semantica.__version__}, torch {torch.__version__}"


def code_digest() -> str:
    """SHA-256 of the sources that training runs, sub-packages included."""
    sources = {}
    for name in ("semantica", "semantica.kernels", "semantica.train"):
        for folder in map(Path, importlib.import_module(name).__path__):
            for path in folder.rglob("*.py"):
                sources[f"{name.replace('.', '/')}/{path.relative_to(folder).as_posix()}"] = path
    digest = hashlib.sha256()
    for name, path in sorted(sources.items()):
        # an installed package has these within it
        if not name.startswith(("semantica/export/", "semantica/benchmarks/")):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def lost(error: BaseException) -> bool:
    """Whether an error says that another process ended, or did not answer in time."""
    words = str(error)
    # of several exchanges under way gloo times out in one, and says this, without its name, of the others
    named = any(name in words for name in ("gloo", "NCCL", "caused pair closure"))
    return named or isinstance(error, dist.DistError | LostProcess)
