"""Who is raced in sampling: how each implementation is built from a run folder, and from its exported bundle.

One more is one entry of `CONTENDERS`, or from outside `--impl module:function` with a function that is called as those
in the table are.

Every implementation is `(images, noise, steps, guidance) -> images`, float32 numpy arrays `[B, 3, S, S]` in and out,
so that encoding, copies between devices and waiting for the device are inside whatever is timed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file

from semantica.benchmarks.harness.process import resolve
from semantica.engines import Bundle, Engine, load_engine, open_bundle
from semantica.engines.base import GraphEngine
from semantica.engines.bundle import CONDITION, DECODE, DENOISE, NULL
from semantica.pixels import to_planes, to_uint8
from semantica.sampling.settings import Sampling
from semantica.solvers import Schedule

Call = Callable[[np.ndarray, np.ndarray, int, float], np.ndarray]


@dataclass(frozen=True)
class Build:
    """Where an implementation finds its model, and where it is to run.

    bundle: of the same model, in the precision that the implementation asks for; None where nothing was exported.
    """

    folder: Path
    device: str
    quick: bool
    bundle: Path | None = None


def load(build: Build):
    """The pipeline in fp32, on its device."""
    from semantica.pipelines.variations import SemanticaPipeline

    return SemanticaPipeline.from_pretrained(build.folder).to(build.device)


def reference(build: Build) -> tuple[Call, str]:
    """The public pipeline in fp32: what the others are compared with."""
    return through_pipeline(load(build)), "fp32"


def through_pipeline(pipeline) -> Call:
    import torch

    pipeline.set_progress_bar_config(disable=True)

    def run(images, noise, steps, guidance):
        out = pipeline(
            torch.from_numpy(images), num_inference_steps=steps, guidance_scale=guidance,
            latents=torch.from_numpy(noise), output_type="pt",
        )  # fmt: skip
        return out.images.cpu().numpy() * 2 - 1

    return run


def ladder(rung: str) -> Callable[[Build], tuple[Call, str]]:
    """A rung of the ladder."""

    def builder(build: Build) -> tuple[Call, str]:
        from semantica.benchmarks.sampling.stock import rungs, stock_sampler

        switches = rungs(build.device)[rung]
        return stock_sampler(load(build), switches), "bf16" if switches.bf16 else "fp32"

    return builder


def strong(build: Build) -> tuple[Call, str]:
    import dataclasses

    from semantica.benchmarks.sampling.stock import STRONG, stock_sampler

    return stock_sampler(load(build), dataclasses.replace(STRONG, autotune=not build.quick)), "bf16"


def fast(compile: str, graphs: bool = False, half: bool = True) -> Callable[[Build], tuple[Call, str]]:
    """Ours in PyTorch."""

    def builder(build: Build) -> tuple[Call, str]:
        import torch

        pipeline = load(build).accelerate(torch.bfloat16 if half else torch.float32, compile, graphs)
        return through_pipeline(pipeline), "bf16" if half else "fp32"

    return builder


def through(load: Callable[[Build], Engine]) -> Callable[[Build], tuple[Call, str]]:
    """Of a bundle's engine, both branches of guidance in one batch."""

    def builder(build: Build) -> tuple[Call, str]:
        from semantica.sampling.loop import sample

        engine = load(build)
        schedule, settings = sampling_of(engine.bundle)

        def run(images, noise, steps, guidance):
            if engine.array == "torch":
                import torch

                images, noise = (torch.from_numpy(a).to(engine.device) for a in (images, noise))
            made = sample(engine, noise, engine.condition(images), None, schedule, settings(steps, guidance))
            return np.asarray(made) if engine.array == "numpy" else made.cpu().numpy()

        return run, engine.arithmetic

    return builder


def engine(backend: str) -> Callable[[Build], tuple[Call, str]]:
    """Ours: the bundle in one of its backends."""
    return through(lambda build: load_engine(build.bundle, backend, build.device))


def one_file(build: Build) -> tuple[Call, str]:
    """Ours: the whole run as one ONNX model, whose pictures have 8 bits on both sides."""
    import onnxruntime

    from semantica.engines.ort_session import CPU, options
    from semantica.export.one_file import write

    bundle = open_bundle(build.bundle)
    with TemporaryDirectory() as place:
        solver = bundle.manifest["model"]["scheduler"]["solver"]
        path = write(bundle, Path(place, "sampler.onnx"), solver)
        session = onnxruntime.InferenceSession(path, options(), providers=[CPU])

    def run(images, noise, steps, guidance):
        numbers = {"steps": np.array(steps), "guidance": np.array(guidance, np.float32)}
        (made,) = session.run(["images"], {"image": to_uint8(images), "noise": noise, **numbers})
        return to_planes(made)

    return run, bundle.computed("fp32")


def openvino(hint: str) -> Callable[[Build], tuple[Call, str]]:
    """A peer: OpenVINO on the same graphs, its shapes fixed to the batch."""
    return through(lambda build: OpenVINOEngine(open_bundle(build.bundle), hint))


def openvino_settings(hint: str) -> dict[str, str]:
    """Of OpenVINO's plug-in for processors. By itself it takes every core: also where torch is kept to fewer."""
    kept = os.environ.get("OMP_NUM_THREADS", "")
    threads = {"INFERENCE_NUM_THREADS": kept} if kept.isdigit() else {}
    return {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", **threads}


class OpenVINOEngine(GraphEngine):
    """OpenVINO on the CPU; hint: what it computes in, by its own name."""

    backend, array = "openvino", "numpy"

    def __init__(self, bundle: Bundle, hint: str):
        super().__init__(bundle)
        self.arithmetic, self.null_arrays = {"f32": "fp32"}.get(hint, hint), load_file(bundle.folder / NULL)
        self.core, self.requests = import_module("openvino").Core(), {}
        self.settings = openvino_settings(hint)

    def infer(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch = len(next(iter(inputs.values())))
        if (name, batch) not in self.requests:
            model = self.core.read_model(self.bundle.folder / name)
            model.reshape({p.any_name: list(self.bundle.shape_of(p.any_name, batch)) for p in model.inputs})
            self.requests[name, batch] = self.core.compile_model(model, "CPU", self.settings).create_infer_request()
        made = self.requests[name, batch].infer(inputs, share_inputs=True)
        return {output.any_name: array.copy() for output, array in made.items()}

    def encoder(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.infer(CONDITION, inputs)

    def denoiser(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.infer(DENOISE, inputs)

    def decoder(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.infer(DECODE, inputs)


def sampling_of(bundle: Bundle) -> tuple[Schedule, Callable[[int, float], Sampling]]:
    """Schedule of a bundle, and its settings by number of steps and guidance."""
    config = bundle.manifest["model"]["scheduler"]
    return Schedule.of(config), lambda steps, guidance: Sampling.of(config, steps=steps, guidance=guidance)


@dataclass(frozen=True)
class Contender:
    """An implementation and what it needs.

    Attributes:
        build: returns the call and the name of its arithmetic.
        bundle: the precision of the bundle that it runs; empty where it runs the run folder.
        built: whether `semantica build` makes an engine of its name from the bundle first.
        packages: that may not be installed.
        device: the kind that alone runs it, "cpu" or "cuda"; empty where any does.
        outside: whether it takes a GPU's memory past torch, whose figures then say nothing of it.
        ours: whether its rows are stale when our code changes.
        raced: unless others are asked for.
    """

    build: Callable[[Build], tuple[Call, str]]
    bundle: str = ""
    built: bool = False
    packages: tuple[str, ...] = ()
    device: str = ""
    outside: bool = False
    ours: bool = False
    raced: bool = True

    def why_not(self, device: str) -> str:
        """Why it cannot run here; empty where it can."""
        if self.device and device != self.device:
            return f"runs on the {'CPU' if self.device == 'cpu' else 'GPU'} only"
        missing = [package for package in self.packages if find_spec(package) is None]
        return f"not installed: {', '.join(missing)}" if missing else ""


REARRANGED = "+ rearranged"
EXPORT = ("onnx", "onnxscript")
CONTENDERS = {
    "reference": Contender(reference, raced=False),
    "plain": Contender(ladder("plain")),
    "strong": Contender(strong),
    "torch-compile": Contender(fast("network", graphs=True), ours=True),
    "torch-blocks": Contender(fast("blocks", graphs=True), ours=True, raced=False),
    "torch-eager": Contender(fast("none"), ours=True, raced=False),
    "onnxruntime": Contender(engine("onnxruntime"), "fp32", packages=(*EXPORT, "onnxruntime"), device="cpu", ours=True),
    "one-file": Contender(one_file, "fp32", packages=(*EXPORT, "onnxruntime"), device="cpu", ours=True, raced=False),
    "inductor": Contender(engine("inductor"), "bf16", built=True, packages=EXPORT, device="cpu", ours=True),
    "onnxruntime-cuda": Contender(
        engine("onnxruntime"), "fp16", packages=(*EXPORT, "onnxruntime"), device="cuda", outside=True, ours=True
    ),
    "tensorrt": Contender(
        engine("tensorrt"), "fp16", built=True, packages=(*EXPORT, "tensorrt"), device="cuda", outside=True, ours=True
    ),
    "tensorrt-rtx": Contender(
        engine("tensorrt-rtx"), "fp16", True, (*EXPORT, "tensorrt_rtx"), device="cuda", outside=True, ours=True
    ),
    "openvino": Contender(openvino("f32"), "fp32", packages=(*EXPORT, "openvino"), device="cpu"),
    "openvino-bf16": Contender(openvino("bf16"), "fp32", packages=(*EXPORT, "openvino"), device="cpu"),
}


def ladder_names(device: str) -> list[str]:
    from semantica.benchmarks.sampling.stock import rungs

    return [*rungs(device), REARRANGED, *(["+ graph"] if device == "cuda" else [])]


def builder_of(name: str) -> Callable[[Build], tuple[Call, str]]:
    """By name: raced, a rung of the ladder, or "module:function" that is called as the builders here are.

    Raises:
        UserError: no such module or function.
    """
    if name in CONTENDERS:
        return CONTENDERS[name].build
    if name == REARRANGED:
        return fast("network")
    if name == "+ graph":
        return fast("network", graphs=True)
    if name.startswith("+"):
        return ladder(name)
    return resolve(name)
