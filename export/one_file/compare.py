"""The gate of one file: its images beside those of the bundle's own pipeline, over numbers of steps and scales."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from semantica.engines import load_engine
from semantica.engines.bundle import WEIGHTS, Bundle
from semantica.engines.ort_session import CPU, REFUSALS, options
from semantica.errors import ArtifactError, first_line
from semantica.export.one_file.compose import tokens_of
from semantica.inputs import SINGLE
from semantica.pipelines.bundle import BundlePipeline
from semantica.solvers import noise

# dB between images in 8 bits; of bf16, which CPUs do not run, the same numbers in fp32
BOUNDS = {"fp32": 60.0, "fp16": 40.0, "bf16": 60.0}
STEPS = (1, 4, 20, 50)
# bytes of weights above which a few short runs of one picture have to do
LARGE = 2**29
PROMPTS = ("two red bicycles", "")
SAME = 200.0


@dataclass(frozen=True)
class Runs:
    """Sampling runs: steps, guidance and batch of each; words: what they are."""

    settings: tuple[tuple[int, float, int], ...]
    bound: float
    words: str

    @property
    def described(self) -> dict[str, str]:
        """What the file says of them in its metadata."""
        return {"compared": json.dumps({"steps, guidance, batch": self.settings, "psnr_db_at_least": self.bound})}


def plan_of(bundle: Bundle, guidance: float) -> Runs:
    """What a file is compared on; guidance: the usual scale of the model."""
    bound, size = BOUNDS[bundle.precision], (bundle.folder / WEIGHTS).stat().st_size
    if size > LARGE:
        settings = ((1, 1.0, 1), (4, guidance, 1))
        return Runs(settings, bound, f"a quick set of {len(settings)} runs (weights of {size / 2**30:.1f} GiB)")
    scales = (1.0, guidance, 2 * guidance)
    settings = (*((steps, scale, 2) for steps in STEPS for scale in scales), (STEPS[1], guidance, 1))
    return Runs(settings, bound, f"{len(settings)} runs of {STEPS[0]} to {STEPS[-1]} steps")


def compare(bundle: Bundle, path: Path, solver: str, runs: Runs) -> float:
    """dB of the worst image, 200 where all are the same.

    Raises:
        ArtifactError: it is below the bound, or the file does not run.
    """
    # one after the other: each holds the weights
    expected = sampled(bundle, solver, runs)
    worst, at = SAME, runs.settings[0]
    try:
        session = onnxruntime.InferenceSession(path, options(severity=4), providers=[CPU])
        for setting, (given, images) in zip(runs.settings, expected, strict=True):
            steps, scale, _ = setting
            numbers = {"steps": np.array(steps, np.int64), "guidance": np.array(scale, np.float32)}
            (made,) = session.run(["images"], given | numbers)
            found = psnr(made, images)
            if found < worst:
                worst, at = found, setting
    except (*REFUSALS, RuntimeError) as error:
        raise ArtifactError(
            f"one file does not run in ONNX Runtime: {first_line(error)}; nothing was written"
        ) from error
    if worst < runs.bound:
        steps, scale, batch = at
        raise ArtifactError(
            f"one file ({solver}) differs from the pipeline: images {worst:.1f} dB (bound {runs.bound:g}) after "
            f"{steps} steps at guidance {scale:g}, batch {batch}; nothing was written"
        )
    return worst


def sampled(bundle: Bundle, solver: str, runs: Runs) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """For each run what the file is given, and the pipeline's images."""
    pipeline = BundlePipeline(load_engine(bundle, "onnxruntime", "cpu"))
    made = []
    for number, (steps, scale, batch) in enumerate(runs.settings):
        values, given = {}, {"noise": noise(number, (batch, *pipeline.sample_shape))}
        for name, shape in bundle.inputs.items():
            if name in bundle.tokenizers:
                values[name] = list(PROMPTS[:batch])
                token_name, _, (_, *rest) = tokens_of(name, shape)
                given[token_name] = pipeline.planes(name, values[name]).reshape(batch, *rest)
            else:
                given[name] = pictures(batch, shape[-1], number)
                values[name] = [Image.fromarray(picture) for picture in given[name]]
        images = pipeline(
            values if len(values) > 1 or SINGLE not in values else values[SINGLE],
            1, steps, scale, latents=given["noise"], solver=solver,
        ).images  # fmt: skip
        made.append((given, np.stack([np.asarray(image) for image in images])))
    return made


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """Smooth fields uint8 `[count, side, side, 3]` that stand for photographs; a function of the seed."""
    coarse = (127.5 + 60 * noise(seed, (count, 6, 6, 3), 1)).clip(0, 255).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse])


def psnr(made: np.ndarray, images: np.ndarray) -> float:
    """Of the worst of some images uint8 `[B, H, W, 3]`, in dB."""
    if made.shape != images.shape:
        return 0.0
    error = np.square(made.astype(np.float64) - images).mean((1, 2, 3)).max()
    return min(SAME, 10 * np.log10(255**2 / error)) if error else SAME
