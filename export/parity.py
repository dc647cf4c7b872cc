"""The gate: an artifact exists only after it agreed with the fp32 network, at every noise level and over whole runs."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from semantica import solvers
from semantica.condition import Condition
from semantica.discrete import DiscreteSchedule, schedule_of
from semantica.engines.bundle import REFERENCE, Bundle
from semantica.inputs import part_of, samples_in
from semantica.model.conditioner import encode, encoders_of
from semantica.sampling.loop import sample
from semantica.sampling.settings import Sampling

AnySchedule = solvers.Schedule | DiscreteSchedule
GUIDANCE = 1.5
# samples a call at the noise levels, and pictures of the sampling runs (guidance doubles them)
BATCHES = (1, 2)


@dataclass(frozen=True)
class Bounds:
    """The largest errors that pass. v is of order 1, images are in [-1, 1].

    Keys, values, embedding and decoded latents: `condition`, the largest error of an array over its largest value.
    v: `maximum` and `mean` of the absolute error over all levels. `psnr`: of the images of whole runs, the worst one,
    in dB.
    """

    condition: float
    maximum: float
    mean: float
    psnr: float


# each about ten times what the decomposed program of trained and random tiny and small models gives in that type
BOUNDS = {
    "fp32": Bounds(condition=2e-5, maximum=5e-4, mean=2e-5, psnr=80.0),
    "fp16": Bounds(condition=2e-2, maximum=0.2, mean=5e-3, psnr=40.0),
    "bf16": Bounds(condition=1e-1, maximum=1.5, mean=4e-2, psnr=25.0),
}


# of v and images; conditions are held to the bound of the type that was quantised. About three times what a trained
# tiny model gives with layers chosen for 45 dB (0.31, 7.2e-3, 33.3 dB): ten times would not tell it from a broken one.
# the inputs are drawn, far from what it was trained on; on 32 held-out pictures its worst image has 40.1 dB
QUANTISED = {
    "int8": Bounds(condition=0.0, maximum=1.0, mean=2e-2, psnr=24.0),
}


def bounds_of(bundle: Bundle) -> Bounds:
    """What a bundle, or an engine built from it, is held to."""
    bounds = BOUNDS[bundle.precision]
    return replace(QUANTISED[bundle.quantised], condition=bounds.condition) if bundle.quantised else bounds


@dataclass(frozen=True)
class Problem:
    """What artifacts are compared on, and what the fp32 network makes of it; all on the CPU.

    inputs: by name, prepared condition pictures `[B, 3, S, S]` and what else the encoders take. levels: log-SNRs;
    z: `[levels, 3, R, R]`; noise: `[B, 3, R, R]`. condition: of the inputs. v: `[levels, 3, R, R]`.
    made: `[B, 3, R, R]` images of a whole run. images: where that made latents, what the decoder makes of them, brought
    to unit size.
    """

    inputs: dict[str, Tensor]
    levels: Tensor
    z: Tensor
    noise: Tensor
    settings: Sampling
    schedule: AnySchedule
    condition: Condition
    v: Tensor
    made: Tensor
    images: Tensor | None = None


class Network:
    """The fp32 network as an engine's callables, so that reference and artifact go through the same loop."""

    array = "torch"

    def __init__(self, unet: nn.Module, encoder: nn.Module, sizes: tuple[int, ...]):
        self.unet, self.encoder, self.sizes = unet, encoder, sizes

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def condition(self, inputs: dict[str, Tensor]) -> Condition:
        made = self.unet.condition(encode(self.encoder, self.unet.stream_names, inputs))
        return made if self.unet.stream_names else made.repeat(samples_in(inputs))

    def null(self, batch: int) -> Condition:
        return self.unet.null(batch).fill(self.sizes)

    def __call__(self, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
        return self.unet(z, logsnr, condition)


class Apart:
    """An engine whose branches of guidance are called one after the other: of one that takes no batch of both."""

    joins = False

    def __init__(self, engine: Any):
        self.array, self.device, self.null, self.bind = engine.array, engine.device, engine.null, engine.bind


def pictures(count: int, size: int, seed: int, channels: int = 3) -> Tensor:
    """Smooth fields `[count, channels, size, size]` in [-1, 1] that stand for photographs; a function of the seed."""
    coarse = torch.from_numpy(solvers.noise(seed, (count, channels, 6, 6)))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)


def condition_inputs(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the encoders are given: pictures for each shape of a value, where it is not among the others."""
    count = max(BATCHES)
    return {
        name: others[name] if name in others else pictures(count, shape[-1], 10 * i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def given_fields(schedule: AnySchedule, levels: int, steps: int, channels: int) -> dict[str, Any]:
    """The fields of a `Problem` that are a function of the sizes alone.

    levels: noise levels, those that a run of so many steps visits.
    """
    count, size = max(BATCHES), schedule.image_size
    # latents have no bounds
    bounded = "none" if isinstance(schedule, DiscreteSchedule) else "clip"
    logsnr = schedule.grid(levels)[1][:-1]
    alpha, sigma = (torch.from_numpy(a).float()[:, None, None, None] for a in solvers.alpha_sigma(logsnr))
    return {
        "levels": torch.from_numpy(logsnr.astype(np.float32)),
        "z": alpha * pictures(levels, size, 1, channels)
        + sigma * torch.from_numpy(solvers.noise(2, (levels, channels, size, size))),
        "noise": torch.from_numpy(solvers.noise(3, (count, channels, size, size))),
        "settings": Sampling(steps, guidance=GUIDANCE, thresholding=bounded),
    }


@torch.no_grad()
def make_problem(
    network: Network,
    schedule: AnySchedule,
    levels: int,
    steps: int,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Problem:
    """The inputs, and what the network makes of them; decode: of one that samples latents, from these to images."""
    given, count = given_fields(schedule, levels, steps, network.unet.sample_shape[0]), max(BATCHES)
    encoders = encoders_of(network.encoder)
    others = {name: part.examples(count) for name, part in encoders.items() if not hasattr(part, "image_size")}
    inputs = condition_inputs({name: part.input_shape for name, part in encoders.items()}, others)
    condition = network.condition(inputs)
    v = at_levels(network, given["z"], given["levels"], condition, count)
    made = whole_run(network, given["noise"], condition, schedule, given["settings"])
    images = None if decode is None else decode(of_unit_size(made))
    return Problem(inputs, **given, schedule=schedule, condition=condition, v=v, made=made, images=images)


def of_unit_size(latents: Tensor) -> Tensor:
    """As runs of trained networks end with."""
    return latents / latents.std()


def save_problem(problem: Problem, path: Path) -> None:
    """Keep the network's answers, so that engines built later are compared with the same fp32 network."""
    condition = problem.condition
    arrays = {"v": problem.v, "made": problem.made, "emb": condition.emb}
    arrays |= {} if problem.images is None else {"images": problem.images}
    for kind, kept in (("k", condition.keys), ("v", condition.values)):
        arrays |= {f"{kind}.{i}": array for i, array in enumerate(kept)}
    # pictures are drawn again
    arrays |= {f"input.{name}": array for name, array in problem.inputs.items() if array.ndim != 4}
    save_file({name: array.detach().contiguous() for name, array in arrays.items()}, path)


def load_problem(bundle: Bundle) -> Problem:
    """What `save_problem` kept beside a bundle's graphs, with the inputs that it belongs to."""
    arrays, row = load_file(bundle.folder / REFERENCE), bundle.manifest["parity"]["onnxruntime"]
    schedule = schedule_of(bundle.manifest["model"]["scheduler"])
    given = given_fields(schedule, row["levels"], row["steps"], bundle.shapes["channels"])
    others = {name.removeprefix("input."): array for name, array in arrays.items() if name.startswith("input.")}
    inputs = condition_inputs(bundle.inputs, others)
    blocks = range(bundle.shapes["blocks"])
    keys, values = (tuple(arrays[f"{kind}.{i}"] for i in blocks) for kind in "kv")
    condition = Condition(keys, values, arrays["emb"], None, bundle.sizes)
    answers = {name: arrays.get(name) for name in ("v", "made", "images")}
    return Problem(inputs, **given, schedule=schedule, condition=condition, **answers)


def at_levels(denoiser, z: Tensor, levels: Tensor, condition: Condition, batch: int) -> Tensor:
    """v at every level, `batch` levels a call; sample i of a call has picture i."""
    parts = []
    for start in range(0, len(z), batch):
        part = z[start : start + batch]
        count = len(part)
        rows = condition.map(lambda a, n=count: a[:n])
        level = levels[start : start + batch]
        parts.append(as_torch(denoiser(given_to(denoiser, part), given_to(denoiser, level), rows)))
    return torch.cat(parts)


def whole_run(denoiser, noise: Tensor, condition: Condition, schedule: AnySchedule, settings: Sampling) -> Tensor:
    """Images of a guided run from given noise, clipped to [-1, 1]; or latents as they are."""
    most = getattr(denoiser, "max_batch", None)
    if most is not None and most < 2 * len(noise):
        denoiser = Apart(denoiser)
    made = sample(denoiser, given_to(denoiser, noise), condition, None, schedule, settings)
    return as_torch(made) if settings.thresholding == "none" else as_torch(made).clamp(-1, 1)


def given_to(denoiser, array: Tensor) -> Any:
    """An array of the host as the denoiser takes it, where it computes."""
    return array.numpy() if denoiser.array == "numpy" else array.to(denoiser.device)


def as_torch(array: Any) -> Tensor:
    return (torch.from_numpy(array) if isinstance(array, np.ndarray) else array).float().cpu()


@torch.no_grad()
def compare(engine: Any, problem: Problem, arithmetic: str) -> dict[str, Any]:
    """Errors of an artifact against the fp32 network: a row for the manifest.

    engine: `semantica.engines.Engine`, or anything with its `array`, `device`, `condition`, `null` and call.
    arithmetic: what the artifact really computes in, in words.
    """
    inputs = {name: given_to(engine, array) for name, array in problem.inputs.items()}
    most = getattr(engine, "max_batch", None)
    batches = [batch for batch in BATCHES if most is None or batch <= most]
    worst = {"condition_error": 0.0, "v_max_error": 0.0, "v_mean_error": 0.0, "psnr_db": 200.0}
    finite, worst_level = True, 0
    for batch in batches:
        condition = engine.condition(part_of(inputs, 0, batch))
        for actual, expected in matching(condition, problem.condition.map(lambda a, n=batch: a[:n])):
            finite = finite and bool(actual.isfinite().all())
            error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            worst["condition_error"] = max(worst["condition_error"], error)
        # row i of the reference has picture i modulo its batch: a single picture is compared with every other row
        each = slice(None, None, max(BATCHES) // batch)
        v = at_levels(engine, problem.z[each], problem.levels[each], condition, batch)
        error = (v - problem.v[each]).abs()
        if problem.settings.thresholding == "none":
            # v of a network that predicts noise, of any size where that is nothing like the noise in z
            error = error / problem.v[each].abs().flatten(1).amax(1).clamp(min=1)[:, None, None, None]
        per_level = error.flatten(1).amax(1).nan_to_num(torch.inf, posinf=torch.inf)
        if float(per_level.max()) > worst["v_max_error"]:
            worst["v_max_error"], worst_level = float(per_level.max()), int(per_level.argmax()) * (each.step or 1)
        worst["v_mean_error"] = max(worst["v_mean_error"], float(error.mean()))
        made = whole_run(engine, problem.noise[:batch], condition, problem.schedule, problem.settings)
        finite = finite and bool(v.isfinite().all()) and bool(made.isfinite().all())
        worst["psnr_db"] = min(worst["psnr_db"], psnr(made, problem.made[:batch]))
    if problem.images is not None and getattr(engine, "decoder", None) is not None:
        worst["decode_error"] = decode_error(engine, problem)
    return {
        "arithmetic": arithmetic,
        "batches": batches,
        "levels": len(problem.levels),
        "steps": problem.settings.steps,
        "finite": finite,
        **worst,
        "worst_logsnr": float(problem.levels[worst_level]),
    }


def decode_error(engine: Any, problem: Problem) -> float:
    """Largest error of decoded latents over the largest value; infinite where something is not finite."""
    latents = given_to(engine, of_unit_size(problem.made))
    made = torch.cat([as_torch(engine.decode(latents[i : i + 1])) for i in range(len(latents))])
    error = (made - problem.images).abs().max() / problem.images.abs().max()
    return float(error.nan_to_num(torch.inf, posinf=torch.inf))


def matching(a: Condition, b: Condition) -> Iterator[tuple[Tensor, ...]]:
    """The arrays of two conditions in pairs, as fp32 tensors."""
    for pair in zip((a.emb, *a.keys, *a.values), (b.emb, *b.keys, *b.values), strict=True):
        yield tuple(map(as_torch, pair))


def psnr(a: Tensor, b: Tensor) -> float:
    """Of the worst image of two batches, in dB; b in [-1, 1], or latents, of any range; 200 for equal ones."""
    peak = 4 * max(1.0, float(b.abs().max())) ** 2
    mse = (a - b).double().square().flatten(1).mean(1).max().item()
    return round(min(200.0, 10 * np.log10(peak / max(mse, 1e-30))), 2) if np.isfinite(mse) else 0.0


def failures(row: dict[str, Any], bounds: Bounds) -> list[str]:
    """What of a row is over its bound, in words."""
    said = [] if row["finite"] else ["values that are not finite"]
    for key, bound, worse in (
        ("condition_error", bounds.condition, row["condition_error"] > bounds.condition),
        ("v_max_error", bounds.maximum, row["v_max_error"] > bounds.maximum),
        ("v_mean_error", bounds.mean, row["v_mean_error"] > bounds.mean),
        ("psnr_db", bounds.psnr, row["psnr_db"] < bounds.psnr),
        ("decode_error", bounds.condition, row.get("decode_error", 0.0) > bounds.condition),
    ):
        if worse:
            said.append(f"{key} {row[key]:.3g} (bound {bound:g})")
    return said
