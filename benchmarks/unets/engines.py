"""Engines in the races of public UNets and decoders: the exported graphs, by whoever runs them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from semantica.benchmarks.sampling.contenders import EXPORT, Contender, OpenVINOEngine
from semantica.benchmarks.unets.bundles import rows_of, schedule_of
from semantica.benchmarks.unets.models import Content
from semantica.engines import Bundle, Engine, load_engine, open_bundle
from semantica.engines.base import Array
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling

Call = Callable[[Content, int, float], np.ndarray]
Load = Callable[[Bundle, str], Engine]


def through(load: Load) -> Callable:
    """Of a bundle's engine: a run of DDIM with both branches of guidance in one batch, or pictures of latents."""

    def builder(where) -> tuple[Call, str]:
        engine = load(open_bundle(where.bundle), where.device)
        stage = {"unet": sampled, "decoder": decoded}[where.stage](engine, where.folder)
        arithmetic = engine.arithmetic
        if where.stage == "decoder" and engine.bundle.precision_of("decode.onnx") != engine.bundle.precision:
            arithmetic = "fp32"
        return stage, arithmetic

    return builder


def sampled(engine: Engine, folder: Path) -> Call:
    schedule = schedule_of(folder, engine.bundle.shapes["latent"])

    def run(content: Content, steps: int, guidance: float) -> np.ndarray:
        condition = engine.condition({name: given_to(engine, rows) for name, rows in rows_of(content).items()})
        settings = Sampling.of(schedule.config, steps=steps, guidance=guidance, solver="ddim")
        return on_host(sample(engine, given_to(engine, content["z"]), condition, None, schedule, settings))

    return run


def decoded(engine: Engine, folder: Path) -> Call:
    return lambda content, steps, guidance: on_host(engine.decode(given_to(engine, content["z"])))


def given_to(engine: Engine, array: np.ndarray) -> Array:
    return array if engine.array == "numpy" else torch.from_numpy(array).to(engine.device)


def on_host(made: Array) -> np.ndarray:
    return np.asarray(made) if isinstance(made, np.ndarray) else made.float().cpu().numpy()


def of_backend(name: str) -> Callable:
    return through(lambda bundle, device: load_engine(bundle, name, device))


def openvino(hint: str) -> Callable:
    return through(lambda bundle, device: OpenVINOEngine(bundle, hint))


ORT, CPU, GPU = (*EXPORT, "onnxruntime"), "cpu", "cuda"
ENGINES = {
    "onnxruntime": Contender(of_backend("onnxruntime"), "fp32", packages=ORT, device=CPU, ours=True),
    "openvino": Contender(openvino("f32"), "fp32", packages=(*ORT, "openvino"), device=CPU),
    "openvino-bf16": Contender(openvino("bf16"), "fp32", packages=(*ORT, "openvino"), device=CPU),
    "inductor": Contender(of_backend("inductor"), "bf16", built=True, packages=ORT, device=CPU, ours=True),
    "onnxruntime-cuda": Contender(of_backend("onnxruntime"), "fp16", packages=ORT, device=GPU, ours=True),
    "tensorrt": Contender(
        of_backend("tensorrt"), "fp16", built=True, packages=(*ORT, "tensorrt"), device=GPU, ours=True
    ),
    "tensorrt-rtx": Contender(
        of_backend("tensorrt-rtx"), "fp16", built=True, packages=(*ORT, "tensorrt_rtx"), device=GPU, ours=True
    ),
}
