"""CUDA devices that are not there, for tests: tensors that say they are on cuda:N and keep their numbers on the host.

What a GPU would refuse, wait for or get wrong is refused, counted or got wrong here too:

- operators on tensors of two devices raise; a copy between host and device, or a value that is read back, counts as a
  wait unless it is asynchronous and from pinned memory;
- streams keep vector clocks: what one stream reads or writes of another without having waited for it is a race;
- a graph records what the current stream of the tensors' own device is given while that stream captures, and leaves NaN
  behind; a replay runs what was recorded, which is nothing if another device was current.

`torch.cuda`'s own functions are replaced for the time of a test; the code under test is not.
"""

import itertools
import random
import threading
import time
import weakref
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CROSSING = (aten._to_copy.default, aten.copy_.default)
ALLOCATE = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
SHAPES_ALONE = ("aten::empty_like", "aten::full_like", "aten::zeros_like", "aten::ones_like", "aten::new_full")
# operators whose result the host has to read
READ_BACK = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


class Elsewhere(Tensor):
    """A tensor of a pretended device; inner: its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device, cuda: "PretendedCuda"):
        # as torch's own fake tensors are made: a meta tensor with a device of its own
        meta = torch.device("meta")
        shape = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device=meta)
        made = Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=meta)
        made.inner, made.place, made.cuda_of = inner, device, cuda
        return made

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cuda(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    # the bindings of these methods ask for a device guard, which a build without CUDA has not

    def item(self):
        return self.cuda_of.call(aten._local_scalar_dense.default, (self,), {})

    def __float__(self) -> float:
        return float(self.item())

    def __getitem__(self, index) -> "Elsewhere":
        return Elsewhere(self.inner[index], self.place, self.cuda_of)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return self.cuda_of.call(aten.copy_.default, (self, source, non_blocking), {})

    def __deepcopy__(self, memo: dict) -> Tensor:
        made = self.detach().clone()
        memo[id(self)] = made = torch.nn.Parameter(made, self.requires_grad) if hasattr(self, "_is_param") else made
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        (cuda,) = {t.cuda_of for t in tree_flatten((args, kwargs))[0] if isinstance(t, Elsewhere)}
        return cuda.call(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Makes and moves tensors to pretended devices in the thread that enters it."""

    def __init__(self, cuda: "PretendedCuda"):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.cuda.call(func, args, kwargs or {})


class Stream:
    """In order by itself; `clock`: how far of each stream it has waited for."""

    numbers = itertools.count(1)

    def __init__(self, cuda: "PretendedCuda", device: torch.device, default: bool = False):
        self.cuda, self.device, self.graph = cuda, device, None
        self.cuda_stream = 0 if default else next(self.numbers)
        if not default:
            cuda.streams.append(self)
        self.clock: dict[Stream, int] = {}

    def tick(self) -> int:
        self.join(self.cuda.local.clock)
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def join(self, clock: dict) -> None:
        # a copy, since other threads go on
        for stream, number in dict(clock).items():
            self.clock[stream] = max(number, self.clock.get(stream, 0))

    def wait_stream(self, other: "Stream") -> None:
        self.join(other.clock)

    def record_event(self, event=None):
        event = event or Event(self.cuda)
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def synchronize(self) -> None:
        self.cuda.wait("stream.synchronize", self.clock)


class Event:
    def __init__(self, cuda: "PretendedCuda"):
        self.cuda, self.clock = cuda, {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self.cuda.current_stream()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.cuda.current_stream()).join(self.clock)

    def synchronize(self) -> None:
        self.cuda.wait("event.synchronize", self.clock)


class Graph:
    """A list of operators and what they were given."""

    def __init__(self, cuda: "PretendedCuda"):
        self.cuda, self.log, self.ended = cuda, [], False
        cuda.recorded.append(weakref.ref(self))

    def capture_begin(self, pool=None, capture_error_mode="global", **_) -> None:
        pool = pool or object()
        if self.cuda.pools.get(pool) == 0:
            raise RuntimeError("INTERNAL ASSERT FAILED: it->second->use_count > 0")
        if pool in self.cuda.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.cuda.pools[pool] = self.cuda.pools.get(pool, 0) + 1
        self.cuda.recording.append(pool)
        self.pool, self.stream, self.mode = pool, self.cuda.current_stream(), capture_error_mode
        self.stream.graph = self

    def capture_end(self) -> None:
        self.stream.graph = None
        # the allocator goes on then, and the pool is not given back
        if getattr(self, "broken", False):
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.end(self.pool)
        self.ended = True

    def __del__(self):
        if self.ended:
            self.cuda.release(self.pool)

    def replay(self) -> None:
        self.cuda.replays += 1
        for func, args, kwargs, outs, device in self.log:
            self.cuda.pause()
            made = func(*args, **kwargs)
            with self.cuda.lock:
                self.cuda.access(self.cuda.current_stream(device), func, (args, kwargs), outs)
            for out, new in zip(outs, tree_flatten(made)[0]):
                if isinstance(out, Tensor) and out is not new and out.data_ptr() != new.data_ptr():
                    out.copy_(new)


class Launched:
    """Work that other libraries launch: what it does, and the addresses that it reads and writes."""

    def __init__(self, function, reads: set[int], writes: set[int]):
        self.function, self.reads, self.writes = function, reads, writes

    def __call__(self):
        self.function()


class Local(threading.local):
    """What a thread has of its own: the current device, its streams, and what the host has waited for."""

    def __init__(self):
        self.device, self.streams, self.clock = 0, {}, {}


class PretendedCuda:
    """`count` devices. waits: what the host waited for. races: accesses that nothing orders. replays: of graphs."""

    def __init__(self, count: int = 2):
        self.count, self.local, self.lock = count, Local(), threading.RLock()
        self.defaults = {i: Stream(self, torch.device("cuda", i), True) for i in range(count)}
        self.waits, self.races, self.replays, self.recorded, self.streams = [], [], 0, [], []
        # operators of a device that was not the current one: theirs are guarded, kernels from elsewhere may not be
        self.astray: list[str] = []
        # how many graphs use a pool of memory
        self.pools: dict[object, int] = {}
        # those that torch's allocator takes memory from for a capture that goes on
        self.recording: list[object] = []
        self.accesses: dict[int, list] = {}
        self.pinned: dict[int, Tensor] = {}
        self.yields, self.full = False, False

    def install(self, monkeypatch) -> "PretendedCuda":
        """In place of `torch.cuda`'s functions, until the test ends."""
        ready = dict.fromkeys(("_lazy_init", "empty_cache", "init"), lambda: None)
        replaced = {
            "is_available": lambda: True, "device_count": lambda: self.count, "device": self.device,
            "current_device": lambda: self.local.device, "current_stream": self.current_stream,
            "default_stream": lambda device=None: self.defaults[self.index(device)],
            "Stream": self.kind(Stream, lambda device=None, **_: (torch.device("cuda", self.index(device)),)),
            "Event": self.kind(Event, lambda **_: ()), "CUDAGraph": self.kind(Graph, lambda **_: ()),
            "stream": self.on,
            "graph_pool_handle": object, "synchronize": self.synchronize,
            "is_current_stream_capturing": lambda: self.current_stream().graph is not None,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "Pretended Card",
            # what is drawn comes from the host's generator
            "get_rng_state": lambda device=None: torch.zeros(1), "set_rng_state": lambda state, device=None: None,
        }  # fmt: skip
        for name, function in {**ready, **replaced}.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.end(pool))
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.release(pool))
        return self

    def end(self, pool: object) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, pool: object) -> None:
        self.pools[pool] -= 1
        assert self.pools[pool] >= 0, "a pool is given back more often than it was taken"

    def pin(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "only memory of the host can be pinned"
        made = tensor.clone()
        self.pinned[made.untyped_storage().data_ptr()] = made
        return made

    def mode(self) -> Mode:
        return Mode(self)

    @property
    def graphs(self) -> list[Graph]:
        """Those that are there and hold anything."""
        return [graph for place in self.recorded if (graph := place()) is not None and graph.log]

    def kind(self, base: type, arguments) -> type:
        """A class of this pretence that is made with the arguments of torch's own."""

        def init(made, *given, **named):
            base.__init__(made, self, *arguments(*given, **named))

        return type(base.__name__, (base,), {"__init__": init})

    def index(self, device=None) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.local.device if index is None else index

    def device(self, device):
        return Current(self, self.index(device), None)

    def on(self, stream: Stream | None):
        return Current(self, self.local.device if stream is None else stream.device.index, stream)

    def current_stream(self, device=None) -> Stream:
        index = self.index(device)
        return self.local.streams.get(index, self.defaults[index])

    def synchronize(self, device=None) -> None:
        clock = SimpleNamespace(clock={})
        for stream in [*self.defaults.values(), *self.local.streams.values()]:
            Stream.join(clock, stream.clock)
        self.wait("synchronize", clock.clock)

    def wait(self, what: str, clock: dict) -> None:
        self.waits.append(what)
        Stream.join(self.local, clock)

    def pause(self) -> None:
        if self.yields:
            time.sleep(random.random() * 1e-4)

    def place(self, device) -> torch.device:
        device = torch.device(device)
        return torch.device("cuda", self.index(device)) if device.type == "cuda" else device

    def call(self, func, args, kwargs):
        """An operator, on the current stream of the device of its tensors."""
        if func is torch.ops.prim.device.default:
            return args[0].device
        flat, spec = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        places = {t.device for t in tensors if t.device.type == "cuda"}
        crossing = func in CROSSING
        if not crossing and (len(places) > 1 or places and any(t.device.type == "cpu" and t.dim() for t in tensors)):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}, {[t.device for t in tensors]}")
        target = args[0].device if func is aten.copy_.default else next(iter(places), torch.device("cpu"))
        if kwargs.get("device") is not None:
            target = self.place(kwargs["device"])
        flat = [t.inner if isinstance(t, Elsewhere) else torch.device("cpu") if isinstance(t, torch.device) else t
                for t in flat]  # fmt: skip
        inner, options = tree_unflatten(flat, spec)
        options = {k: v for k, v in options.items() if k != "pin_memory"}
        stream = self.current_stream(target if target.type == "cuda" else next(iter(places))) if (
            target.type == "cuda" or places) else None  # fmt: skip
        if stream is None:
            return func(*inner, **options)
        if stream.device.index != self.local.device:
            self.astray.append(str(func))
        if crossing:
            self.cross(func, args, kwargs, target, stream)
        elif func in READ_BACK:
            self.wait(str(func), stream.clock)
        self.pause()
        with self.lock:
            made = self.record(func, inner, options, stream) if stream.graph else func(*inner, **options)
            if not stream.graph:
                # memory of the host is no stream's, also where a device's tensor had the address before
                for t in tensors:
                    if t.device.type == "cpu":
                        self.accesses.pop(t.untyped_storage().data_ptr(), None)
                self.access(stream, func, (inner, options), tree_flatten(made)[0])
        given = {id(t.inner): t for t in tensors if isinstance(t, Elsewhere)}

        def wrap(t):
            if not isinstance(t, Tensor) or target.type == "cpu":
                return t
            return given.get(id(t)) if id(t) in given else Elsewhere(t, target, self)

        return tree_map(wrap, made)

    def launch(self, number: int, function, reads: set[int], writes: set[int]) -> None:
        """What another library launches on the stream of a number."""
        work = Launched(function, reads, writes)
        stream = next(s for s in [*self.streams, *self.defaults.values()] if s.cuda_stream == number)
        if stream.device.index != self.local.device:
            raise RuntimeError(f"a stream of {stream.device} while cuda:{self.local.device} is current")
        self.pause()
        with self.lock:
            if stream.graph:
                stream.graph.log.append((work, (), {}, [], stream.device))
            else:
                work()
                self.access(stream, work, (), [])

    def cross(self, func, args, kwargs, target: torch.device, stream: Stream) -> None:
        source = args[1] if func is aten.copy_.default else args[0]
        if source.device.type == target.type:
            return
        lazy = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
        if source.device.type == "cpu" and source.dim() == 0 and func is aten.copy_.default:
            return
        if not lazy or (source.device.type == "cpu" and source.untyped_storage().data_ptr() not in self.pinned):
            self.wait(f"{func} {source.device} -> {target}", stream.clock)

    def record(self, func, args, kwargs, stream: Stream):
        if self.full:
            stream.graph.broken = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        storages = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        if func._schema.is_mutable:
            made, outs = args[0], []
        else:
            made = func(*args, **kwargs)
            outs = tree_flatten(made)[0]
            for t in outs:
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in storages and t.is_floating_point():
                    t.fill_(torch.nan)
        stream.graph.log.append((func, args, kwargs, outs, stream.device))
        return made

    def access(self, stream: Stream, func, given, made) -> None:
        """Vector clocks: every earlier write, and for a write every earlier read, must be known to this stream."""
        number = stream.tick()
        if isinstance(func, Launched):
            read, fresh, written = func.reads, set(), func.writes
        else:
            inputs = [t for t in tree_flatten(given)[0] if isinstance(t, Tensor)]
            read = {t.untyped_storage().data_ptr() for t in inputs}
            fresh = {t.untyped_storage().data_ptr() for t in made if isinstance(t, Tensor)} - read
            written = {inputs[0].untyped_storage().data_ptr()} if func._schema.is_mutable and inputs else set()
            # they take the shape alone, and write nothing where they only allocate
            if func._schema.name in SHAPES_ALONE:
                read = set()
            if func._schema.name in ALLOCATE:
                for place in fresh:
                    self.accesses.pop(place, None)
                return
        for place in read | written:
            for other, then, wrote in self.accesses.get(place, ()):
                if (wrote or place in written) and stream.clock.get(other, 0) < then:
                    self.races.append(f"{func} on stream {stream.cuda_stream} does not wait for {other.cuda_stream}")
            kept = [] if place in written else self.accesses.get(place, [])
            self.accesses[place] = [*kept, (stream, number, place in written)]
        for place in fresh:
            self.accesses[place] = [(stream, number, True)]


class Current:
    """A current device, or a current stream with its device, for one thread."""

    def __init__(self, cuda: PretendedCuda, index: int, stream: Stream | None):
        self.cuda, self.index, self.stream = cuda, index, stream

    def __enter__(self):
        local = self.cuda.local
        self.before = local.device, dict(local.streams)
        local.device = self.index
        if self.stream is not None:
            local.streams[self.index] = self.stream
        return self

    def __exit__(self, *_):
        self.cuda.local.device, self.cuda.local.streams = self.before
