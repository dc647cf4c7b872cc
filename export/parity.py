"""The gate: an artifact exists only after it agreed with the fp32 network, at every noise level and over whole runs."""


from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantica import sampler, solvers
from semantica.condition import Condition
from semantica.engines import Engine

GUIDANCE = 1.5
# samples a call at the noise levels, and pictures of the sampling runs (guidance doubles them)
BATCHES = (1, 2)


class ParityError(FloatingPointError):
    """An artifact that does not compute what the network computes; nothing of it is kept."""


@dataclass(frozen=True)
class Bounds:
    """The largest errors that pass. v is of order 1, images are in [-1, 1].

    Keys, values and embedding: `condition`, the largest error of an array over its largest value. v: `maximum` and
    `mean` of the absolute error over all levels. `psnr`: of the images of whole runs, the worst one, in dB.
    """

    condition: float
    maximum: float
    mean: float
    psnr: float


# each about ten times what the decomposed program of trained and random tiny and small models gives in that type
BOUNDS = {
    "fp32": Bounds(condition=1e-4, maximum=2e-3, mean=5e-5, psnr=70.0),
    "fp16": Bounds(condition=2e-2, maximum=0.2, mean=5e-3, psnr=40.0),
    "bf16": Bounds(condition=1e-1, maximum=1.5, mean=4e-2, psnr=25.0),
}


@dataclass(frozen=True)
class Problem:
    """What artifacts are compared on, and what the fp32 network makes of it; all on the CPU.

    images: `[B, 3, S, S]` condition pictures; levels: log-SNRs; z: `[levels, 3, R, R]`; noise: `[B, 3, R, R]`.
    condition: of the images. v: `[levels, 3, R, R]`. made: `[B, 3, R, R]` images of a whole run.
    """

    images: Tensor
    levels: Tensor
    z: Tensor
    noise: Tensor
    plan: solvers.Plan
    condition: Condition
    v: Tensor
    made: Tensor


class Network:
    """The fp32 network as an engine's callables, so that reference and artifact go through the same loop."""

    array = "torch"

    def __init__(self, unet: nn.Module, encoder: nn.Module, sizes: tuple[int, ...]):
        self.unet, self.encoder, self.sizes = unet, encoder, sizes

    def condition(self, images: Tensor) -> Condition:
        stream = self.encoder(images)
        made = self.unet.condition(dict.fromkeys(self.unet.stream_names, stream))
        return made if len(made.emb) == len(images) else made.repeat(len(images))

    def null(self, batch: int) -> Condition:
        return self.unet.null_condition(batch).fill(self.sizes)

    def __call__(self, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
        return self.unet(z, logsnr, condition)


def pictures(count: int, size: int, seed: int) -> Tensor:
    """Smooth coloured fields `[count, 3, size, size]` in [-1, 1] that stand for photographs; a function of the seed."""
    coarse = torch.from_numpy(solvers.noise(seed, (count, 3, 6, 6)))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def make_problem(network: Network, schedule: solvers.Schedule, image: int, levels: int, steps: int) -> Problem:
    """Inputs that are a function of the sizes alone, and the network's answers to them.

    image: side of condition pictures. levels: noise levels, those that a run of so many steps visits.
    """
    count, size = max(BATCHES), schedule.image_size
    images = pictures(count, image, 0)
    logsnr = schedule.grid(levels)[1][:-1]
    alpha, sigma = (torch.from_numpy(a).float()[:, None, None, None] for a in solvers.alpha_sigma(logsnr))
    z = alpha * pictures(levels, size, 1) + sigma * torch.from_numpy(solvers.noise(2, (levels, 3, size, size)))
    noise = torch.from_numpy(solvers.noise(3, (count, 3, size, size)))
    plan = solvers.make_plan("dpmpp_2m", schedule.grid(steps)[1])
    condition = network.condition(images)
    levels_at = torch.from_numpy(logsnr.astype(np.float32))
    v = at_levels(network, z, levels_at, condition, count)
    made = whole_run(network, noise, condition, network.null(count), plan)
    return Problem(images, levels_at, z, noise, plan, condition, v, made)


def at_levels(denoiser, z: Tensor, levels: Tensor, condition: Condition, batch: int) -> Tensor:
    """v at every level, `batch` levels a call; sample i of a call has picture i."""
    parts = []
    for start in range(0, len(z), batch):
        part = z[start : start + batch]
        rows = condition.map(lambda a, n=len(part): a[:n])
        parts.append(call(denoiser, part, levels[start : start + batch], rows))
    return torch.cat(parts)


def whole_run(denoiser, noise: Tensor, condition: Condition, null: Condition, plan: solvers.Plan) -> Tensor:
    """Images of a guided run from given noise, clipped to [-1, 1]."""
    z = noise.numpy() if denoiser.array == "numpy" else noise
    return as_torch(sampler.sample(denoiser, z, condition, null, plan, GUIDANCE)).clamp(-1, 1)


def call(denoiser, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
    if denoiser.array == "numpy":
        return as_torch(denoiser(z.numpy(), logsnr.numpy(), condition))
    return as_torch(denoiser(z, logsnr, condition))


def as_torch(array: Any) -> Tensor:
    return (torch.from_numpy(array) if isinstance(array, np.ndarray) else array).float().cpu()


@torch.no_grad()
def compare(engine: Engine | Network, problem: Problem, arithmetic: str) -> dict[str, Any]:
    """Errors of an artifact against the fp32 network: a row for the manifest.

    arithmetic: what the artifact really computes in, in words.
    """
    images = problem.images.numpy() if engine.array == "numpy" else problem.images
    row: dict[str, Any] = {"arithmetic": arithmetic, "levels": len(problem.levels), "steps": len(problem.plan)}
    finite, worst_condition, maximum, total, worst_psnr = True, 0.0, 0.0, 0.0, float("inf")
    for batch in BATCHES:
        condition = engine.condition(images[:batch])
        for name, actual, expected in matching(condition, problem.condition.map(lambda a, n=batch: a[:n])):
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
            finite = finite and bool(actual.isfinite().all())
            worst_condition = max(worst_condition, float(error))
            del name
        # the reference's rows repeat with its own batch: picture i of each call
        z, levels, expected = problem.z, problem.levels, problem.v
        if batch != max(BATCHES):
            step = max(BATCHES)
            z, levels, expected = z[::step], levels[::step], expected[::step]
        error = (at_levels(engine, z, levels, condition, batch) - expected).abs()
        finite = finite and bool(error.isfinite().all())
        maximum, total = max(maximum, float(error.max())), max(total, float(error.mean()))
        made = whole_run(engine, problem.noise[:batch], condition, engine.null(batch), problem.plan)
        finite = finite and bool(made.isfinite().all())
        worst_psnr = min(worst_psnr, psnr(made, problem.made[:batch]))
    return row | {
        "batches": list(BATCHES), "finite": finite, "condition_error": worst_condition, "v_max_error": maximum,
        "v_mean_error": total, "psnr_db": worst_psnr,
    }  # fmt: skip


def matching(a: Condition, b: Condition) -> list[tuple[str, Tensor, Tensor]]:
    """The arrays of two conditions as fp32 tensors of one layout, `[B, M, H, D]`."""
    rows = [("emb", as_torch(a.emb), as_torch(b.emb))]
    for kind, left, right in (("k", a.keys, b.keys), ("v", a.values, b.values)):
        for i, (x, y) in enumerate(zip(left, right, strict=True)):
            x, y = (as_torch(t) for t in (x, y))
            rows.append((f"{kind}.{i}", x.transpose(1, 2) if a.axis == 2 else x, y.transpose(1, 2) if b.axis == 2 else y))
    return rows


def psnr(a: Tensor, b: Tensor) -> float:
    """Of the worst image of two batches in [-1, 1], in dB; 200 for equal ones."""
    mse = (a - b).double().square().flatten(1).mean(1).max().item()
    return round(min(200.0, 10 * np.log10(4 / max(mse, 1e-30))), 2) if np.isfinite(mse) else 0.0


def failures(row: dict[str, Any], bounds: Bounds) -> list[str]:
    """What of a row is over its bound, in words."""
    said = [] if row["finite"] else ["values that are not finite"]
    for key, bound, worse in (
        ("condition_error", bounds.condition, row["condition_error"] > bounds.condition),
        ("v_max_error", bounds.maximum, row["v_max_error"] > bounds.maximum),
        ("v_mean_error", bounds.mean, row["v_mean_error"] > bounds.mean),
        ("psnr_db", bounds.psnr, row["psnr_db"] < bounds.psnr),
    ):
        if worse:
            said.append(f"{key} {row[key]:.3g} (bound {bound:g})")
    return said


def bounds_record(precision: str) -> dict[str, float]:
    return asdict(BOUNDS[precision])


