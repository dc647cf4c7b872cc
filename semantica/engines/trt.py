"""TensorRT and TensorRT-RTX: one API in two packages. Not yet run on a GPU."""

import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from semantica import cache
from semantica.condition import Condition
from semantica.device import current, pick_device
from semantica.engines import BACKENDS
from semantica.engines.base import GraphEngine
from semantica.engines.built import open_built
from semantica.engines.bundle import CONDITION, DECODE, DENOISE, NULL, Bundle
from semantica.engines.trt_context import Plan, Pool, Session
from semantica.errors import ArtifactError, UserError, first_line
from semantica.kernels.launch import architecture
from semantica.sampling.graphs import CudaGraph, GraphCache, Replays, flatten
from semantica.weak import Weak

logger = logging.getLogger(__name__)
GRAPHS = {"encode": CONDITION, "denoise": DENOISE, "decode": DECODE}
FILES = {name: graph.replace(".onnx", ".engine") for name, graph in GRAPHS.items()}
# runs that are launched at the same time, and recorded ones that are kept: each has contexts, so memory, of its own
SESSIONS, KEPT = 2, 4


def load(bundle: Bundle, backend: str, device: str) -> "TensorRTEngine":
    """Raises `UserError` without a GPU, for an engine of another one, and as `open_built`."""
    if device == "cpu" or not torch.cuda.is_available():
        raise UserError(f"engine {backend!r} needs an NVIDIA GPU and a CUDA build of torch: use another --engine")
    place = pick_device("cuda" if device == "auto" else device)
    version = module_of(backend).__version__
    folder, manifest = open_built(bundle, backend, architecture(place), version)
    here = torch.cuda.get_device_name(place)
    if manifest.get("card", here) != here:
        # of one architecture, so that it runs, with kernels that were the fastest on the other card
        logger.warning("%s was built on %s, here is %s: build it again for speed", folder, manifest["card"], here)
    return TensorRTEngine(bundle, folder, manifest, place)


def module_of(backend: str) -> ModuleType:
    """TensorRT's package. Raises `UserError` where it is installed and does not load."""
    name = BACKENDS[backend].packages[0]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(f"{name} does not load here ({first_line(error)}): {BACKENDS[backend].install}") from error


class TensorRTEngine(GraphEngine):
    """A deserialised engine of each graph; everything stays on the device. Safe with several threads.

    A run takes one session of execution contexts for all its steps. A run that is all arithmetic is recorded as one
    CUDA graph with contexts of its own, and replayed where that is faster.

    device: with its number, which is made current for every call.
    """

    array = "torch"

    def __init__(self, bundle: Bundle, folder: Path, manifest: dict[str, Any], device: torch.device):
        super().__init__(bundle)
        self.backend, self.place, self.device = manifest["backend"], device, str(device)
        self.arithmetic = bundle.computed(f"{bundle.precision}, as typed in the graph")
        self.trt = trt = module_of(self.backend)
        self.max_batch = manifest["profile"]["max"]
        self.logger = trt.Logger(trt.Logger.WARNING)
        with current(device):
            self.runtime, self.plans = trt.Runtime(self.logger), {}
            for name, file in FILES.items():
                if GRAPHS[name] not in bundle.graphs:
                    continue
                kept = self.depends(manifest["files"][file]["sha256"]) if hasattr(trt, "IRuntimeCache") else None
                self.plans[name] = Plan(trt, self.runtime, folder / file, device, kept)
        # conditions are made one after the other, and so are pictures
        most = {"encode": 1, "denoise": SESSIONS, "decode": 1}
        self.pools = {name: Pool(lambda plan=plan: Session(plan), most[name]) for name, plan in self.plans.items()}
        self.graphs = self.replays = None
        if device.type == "cuda":
            self.replays, self.graphs = Replays(device), GraphCache(self.record, limit=KEPT)
        # the session of a run, in the thread that runs it
        self.local = threading.local()
        self.null_arrays = {name: array.to(device) for name, array in load_file(bundle.folder / NULL).items()}

    def depends(self, engine: str) -> dict[str, str]:
        """What kernels that are compiled here depend on."""
        return {**cache.card(self.place), "library": f"{self.backend} {self.trt.__version__}", "engine": engine}

    def encoder(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.once("encode", inputs)

    def decoder(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.once("decode", inputs)

    def once(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A graph that runs before the first step, or after the last one."""
        with self.pools[name].lease() as session:
            made = session(inputs)
            session.rest()
        return made

    def inputs(self, condition: Condition) -> dict[str, Tensor]:
        with current(self.place):
            return {name: self.plans["denoise"].ready(name, a) for name, a in super().inputs(condition).items()}

    def predict(self, z: Tensor, logsnr: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        own = getattr(self.local, "session", None)
        if own is not None:
            return own({"z": z, "logsnr": logsnr}, inputs)["v"]
        with self.session() as session:
            return session({"z": z, "logsnr": logsnr}, inputs)["v"]

    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(
        self, run: Callable, z: Tensor, levels: Tensor, condition: Condition, weak: Weak | None, key: tuple | None
    ) -> Tensor:
        """As `CompiledDenoiser.execute`: `run(z, levels, condition, weak)`, one session for all steps, or its graph.

        Raises `UserError` where z is on another device.
        """
        if z.device != self.place:
            raise UserError(f"z is on {z.device}, this {self.backend} engine computes on {self.device}: move it there")
        with current(self.place), self.session():
            if key is None or self.graphs is None:
                return run(z, levels, condition, weak)
            tensors, rebuild = flatten(condition, weak)

            def function(z: Tensor, levels: Tensor, *rest: Tensor) -> Tensor:
                return run(z, levels, *rebuild(rest))

            return self.graphs((*key, condition.sizes, weak and weak.kind), function, z, levels, *tensors)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session from the pool, for this thread."""
        with self.pools["denoise"].lease() as session, self.using(session):
            yield session
            session.rest()

    @contextmanager
    def using(self, session: Session) -> Iterator[None]:
        before = getattr(self.local, "session", None)
        self.local.session = session
        try:
            yield
        finally:
            self.local.session = before

    def record(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> CudaGraph:
        """A run as one graph. Its kernels work in the memory of contexts that nobody else gets."""
        session = Session(self.plans["denoise"], own=False)
        with self.using(session):
            made = self.replays.record(function, inputs)
        made.session = session
        return made

    def refit(self, bundle: Bundle) -> None:
        """Put the weights of another bundle of the same network into the engines, as to swap a LoRA merged into them.

        Takes seconds instead of a build. No other thread may use the engine meanwhile. Whether the result agrees with
        the network that the bundle was exported from says `semantica.export.parity.compare`; for a bundle that is to
        stay, `semantica build --like` does all of it.

        Raises:
            UserError: the engines were not built for it (`semantica build --refittable`), or the bundle holds another
                kind of network.
            ArtifactError: TensorRT did not take all of the weights; load the engine again.
        """
        if kind_of(bundle) != kind_of(self.bundle):
            raise UserError(f"{bundle.folder} holds another kind of network: refit takes other weights of the same")
        if not all(plan.engine.refittable for plan in self.plans.values()):
            raise UserError(f"this {self.backend} engine takes no other weights: build it with --refittable")
        with current(self.place):
            if self.graphs is not None:
                # no work may be pending, and what was recorded may hold weights
                torch.cuda.synchronize(self.place)
                self.graphs.clear()
            for name, plan in self.plans.items():
                refitter = self.trt.Refitter(plan.engine, self.logger)
                parser = self.trt.OnnxParserRefitter(refitter, self.logger)
                place = bundle.folder / GRAPHS[name]
                if not (parser.refit_from_file(str(place.resolve())) and refitter.refit_cuda_engine()):
                    said = [str(parser.get_error(i)) for i in range(parser.num_errors)] + refitter.get_missing_weights()
                    raise ArtifactError(f"TensorRT does not take the weights of {place}: {'; '.join(said)[:200]}")
        self.bundle = bundle
        self.null_arrays = {name: array.to(self.place) for name, array in load_file(bundle.folder / NULL).items()}

    def serialized(self) -> dict[str, bytes]:
        """The engines with the weights that they have now, as refittable as they were."""
        made = {}
        with current(self.place):
            for name, plan in self.plans.items():
                config = plan.engine.create_serialization_config()
                config.set_flag(self.trt.SerializationFlag.INCLUDE_REFIT)
                made[name] = bytes(plan.engine.serialize_with_config(config))
        return made


def kind_of(bundle: Bundle) -> dict[str, Any]:
    """What two bundles have in common whose engines differ in weights alone."""
    names = ("precision", "opset", "streams", "shapes")
    nodes = {name: graph["nodes"] for name, graph in bundle.manifest.get("graphs", {}).items()}
    more = {name: bundle.manifest.get(name) for name in ("attention", "decode")}
    return {name: bundle.manifest[name] for name in names} | more | {"nodes": nodes, "inputs": bundle.inputs}
