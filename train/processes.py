"""Many processes: what they agree on, and DDP or FSDP2 put around the model from outside.

One process has no process group, and every method here is then nothing.
"""

import functools
import hashlib
import importlib
import inspect
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

import semantica
from semantica.condition import Stream
from semantica.errors import ArtifactError, UserError
from semantica.model.layers import CrossAttention
from semantica.train.config import TrainConfig
from semantica.train.objective import Objective, repeated

LAUNCH = "torchrun --nproc-per-node N --no-python semantica train ..."
# each process may have these of its own
LOCAL = {"data", "val", "tokens", "workers", "device"}
Result = TypeVar("Result")


class Word(IntEnum):
    """How a step ends; of all processes' words the largest holds."""

    GO, STOP, SAVE_FAILED, BROKEN = range(4)


class LostProcess(ArtifactError):
    """Another process of the run ended or hangs: this one cannot go on."""


class Ranks:
    """The processes of a run, of which this is one.

    Args:
        mode: "ddp", "fsdp" or "hsdp", or None for one process.
        backend: of the process group: gloo moves CPU tensors, nccl those on CUDA.
        timeout: seconds that any exchange may take.

    Raises:
        LostProcess: not all processes came together within the timeout.
    """

    def __init__(self, mode: str | None = None, backend: str = "gloo", timeout: float = 600.0):
        self.mode, self.rank, self.world, self.local_world = mode, 0, 1, 1
        self.control = self.saving = None
        self.own = mode is not None and not dist.is_initialized()
        if mode is None:
            return
        limit = timedelta(seconds=timeout)
        try:
            if self.own:
                store, rank, world = meet(limit)
                dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
            # groups of their own for words and for checkpoints: those are exchanged while gradients are
            self.control, self.saving = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
        except (dist.DistError, RuntimeError) as error:
            if self.own and dist.is_initialized():
                dist.destroy_process_group()
            if os.environ.get("RANK", "0") != "0":
                raise SystemExit(1) from error
            problem = f"the processes did not come together within {timeout:g} s: {first_line(error)}"
            raise LostProcess(problem) from error
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.pending: tuple[Tensor, dist.Work] | None = None

    @property
    def lead(self) -> bool:
        """Whether this process prints, logs and writes what there is one of."""
        return self.rank == 0

    @property
    def splits(self) -> bool:
        """Whether weights are split among the processes."""
        return self.mode in ("fsdp", "hsdp")

    def close(self) -> None:
        """Leave the groups. Whoever exits within one may be aborted by the threads that serve it."""
        for group in (self.control, self.saving) if self.mode else ():
            dist.destroy_process_group(group)
        if self.own:
            dist.destroy_process_group()

    def gather(self, value: Any) -> list:
        """A JSON value of every process, on every process."""
        if self.world == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self.control)
        texts = [torch.zeros(max(size.item() for size in sizes), dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, nn.functional.pad(text, (0, len(texts[0]) - len(text))), group=self.control)
        return [json.loads(bytes(t[: size.item()].tolist())) for t, size in zip(texts, sizes)]

    def settle(self, work: Callable[[], Result]) -> Result:
        """Do something on every process; what goes wrong on one goes wrong on all.

        Raises:
            UserError: on the first process, where any raised one.
            SystemExit: with code 2, on the others.
        """
        if self.world == 1:
            return work()
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        problems = self.gather(problem)
        if not any(problems):
            return result
        if not self.lead:
            raise SystemExit(2)
        if problems[0]:
            raise UserError(problems[0])
        rank = next(rank for rank, said in enumerate(problems) if said)
        raise UserError(f"process {rank} of {self.world}: {problems[rank]}")

    def ask_lead(self, work: Callable[[], Any]) -> Any:
        """What the first process finds, a JSON value, on every process; errors as in `settle`."""
        return self.gather(self.settle(lambda: work() if self.lead else None))[0]

    def same(self, facts: dict[str, Any]) -> None:
        """Make sure that all processes were told the same, run the same code and see the same data.

        Raises:
            UserError: they do not.
        """

        def compare() -> None:
            for rank, other in enumerate(everyone):
                for name, value in everyone[0].items():
                    if other.get(name) != value:
                        raise UserError(
                            f"the processes disagree on {name}: {value} on process 0, {other.get(name)} on process "
                            f"{rank}: give all the same command, package and data"
                        )

        everyone = self.gather(facts)
        self.settle(compare)

    def say_word(self, word: Word) -> None:
        """Start to exchange a word about this step; the network computes meanwhile."""
        value = torch.tensor([word])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control, async_op=True) if self.world > 1 else None
        self.pending = value, work

    def hear_word(self) -> Word:
        """The largest word of all processes."""
        value, work = self.pending
        if work is not None:
            work.wait()
        return Word(value.item())

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, of a tensor on the training device."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def shard(self, dtype: torch.dtype, device: torch.device) -> Callable[[nn.Module], None] | None:
        """A function that shards a module in place for FSDP2; None where nothing is sharded.

        Each repeated block is a group that is gathered for its own forward and backward pass; all keys' and values'
        projections are one more, since `UViT.condition` uses them at once; the rest is the root's.

        With bf16, weights are gathered in bf16 and gradients summed in fp32. Norm weights are rounded as well, a
        relative 2^-9, since to gather them apart would cost a collective each; their statistics are fp32 in the
        operators whatever the weights are. Inputs are not cast: noise levels and latents stay fp32, and autocast
        decides for each operation as it does in one process.
        """
        if not self.splits:
            return None
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        types = {} if dtype == torch.float32 else {"param_dtype": dtype, "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**types, cast_forward_inputs=False)
        within = self.local_world if self.mode == "hsdp" else self.world
        options = {"mesh": mesh(device.type, self.world, within), "mp_policy": policy}

        def shard(module: nn.Module) -> None:
            # FSDP2 knows contiguous parameters only; activations keep channels last, see `place`
            module.to(memory_format=torch.contiguous_format)
            crossing = [m for m in module.modules() if isinstance(m, CrossAttention)]
            projections = [part for m in crossing for part in (*m.to_kv, *m.norm_k)]
            if projections:
                fully_shard(projections, **options)
            for block in repeated(module):
                fully_shard(block, **options)
            # in training the root stays gathered until its gradients are there; averages have none, and must be
            # gathered again after they have changed
            frozen = not any(p.requires_grad for p in module.parameters())
            fully_shard(module, **options, reshard_after_forward=True if frozen else None)
            for name in ("condition", "null"):
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)

        return shard

    def wrap(self, objective: Objective, device: torch.device) -> nn.Module:
        """The objective that is called in training."""
        if self.mode != "ddp":
            return objective
        from torch.nn.parallel import DistributedDataParallel

        # nothing in the model changes its buffers; the option has another name from PyTorch 2.13 on
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(
            objective,
            device_ids=[device] if device.type == "cuda" else None,
            **{buffers: False},
            gradient_as_bucket_view=True,
            # an encoder that is trained along, but conditions nothing
            find_unused_parameters=not objective.unet.stream_names and objective.head is None,
        )

    def reducing(self, objective: nn.Module, last: bool):
        """A context for one micro-batch: gradients are summed over the processes after the last one only."""
        if self.splits:
            from torch.distributed.fsdp import FSDPModule

            for module in objective.children():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(last)
        return objective.no_sync() if self.mode == "ddp" and not last else nullcontext()

    def place(self, images: Tensor | Stream) -> Tensor | Stream:
        """Images `[B, 3, S, S]` as the first convolution should see them; a stream as it is.

        Elsewhere the weights' own channels-last layout decides the layout of what follows.
        """
        flat = isinstance(images, Tensor) and images.ndim == 4
        return images.to(memory_format=torch.channels_last) if self.splits and flat else images

    def whole(self, module: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
        """A sharded module's whole twin on the CPU of the first process, None on the others; others as they are."""
        if not any(is_sharded(p) for p in module.parameters()):
            return module
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.lead:
            return None
        twin = kind.from_config(module.config)
        twin.load_state_dict(weights)
        return twin.eval()


def meet(limit: timedelta) -> tuple[dist.Store, int, int]:
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


def start(config: TrainConfig) -> Ranks:
    """Join the other processes that torchrun started; one process alone is not distributed.

    Raises:
        UserError: a mode was asked for without torchrun, or only a part of what torchrun says is there.
        LostProcess: the others did not come within the timeout.
    """
    launched = dist.is_initialized() or {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if not launched:
        if config.parallel != "auto":
            raise UserError(f"--parallel {config.parallel} needs several processes: start them with '{LAUNCH}'")
        return Ranks()
    alone = not dist.is_initialized() and os.environ["WORLD_SIZE"] == "1"
    if config.parallel == "auto" and alone:
        return Ranks()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise UserError(f"RANK and WORLD_SIZE are set and {missing[0]} is not: start with '{LAUNCH}', or unset them")
    cuda = torch.cuda.is_available() and config.device != "cpu"
    timeout = config.timeout if config.timeout > 0 else TrainConfig.timeout
    mode = "ddp" if config.parallel == "auto" else config.parallel
    return Ranks(mode, "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout)


def leave(code: int) -> None:
    """End this process here and now: of an exchange that another process broke off, threads may still be at work, and
    whatever tensors they let go of while the interpreter ends abort it (pytorch/pytorch pull request 179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def local_device(name: str, ranks: Ranks) -> str:
    """The name of this process' device: each process of a node has a GPU of its own."""
    if ranks.mode is None or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} is one device, and there are {ranks.world} processes: leave it out")
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"{ranks.local_world} processes on a node with {count} GPUs: give --nproc-per-node {count}")
    torch.cuda.set_device(place)
    return f"cuda:{place}"


def facts(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """What must be the same everywhere, by the name that a message calls it."""
    options = {f"--{k.replace('_', '-')}": v for k, v in config.record().items() if k not in LOCAL}
    if ranks.mode == "hsdp":
        options["--nproc-per-node"] = ranks.local_world
    return {**options, "versions": versions(), "the package's code": code_digest()}


def versions() -> str:
    return f"semantica {semantica.__version__}, torch {torch.__version__}"


def code_digest() -> str:
    """SHA-256 of the sources that training runs."""
    digest = hashlib.sha256()
    for name in ("semantica", "semantica.kernels", "semantica.train"):
        for folder in importlib.import_module(name).__path__:
            for path in sorted(Path(folder).glob("*.py")):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def mesh(device: str, world: int, within: int):
    """All processes, or, where weights are split within so many of them, rows of copies and columns of parts."""
    from torch.distributed.device_mesh import init_device_mesh

    if within == world:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (world // within, within), mesh_dim_names=("copy", "part"))


def is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def lost(error: BaseException) -> bool:
    """Whether an error says that another process ended, or did not answer in time."""
    words = str(error)
    return isinstance(error, dist.DistError | LostProcess) or "gloo" in words or "NCCL" in words


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
