"""Which model is evaluated: our runs, or others' pipelines from local folders; how it samples, and what it was."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semantica.benchmarks.quality.evaluate_options import EvaluateConfig
from semantica.errors import UserError
from semantica.files import read_json, sha256
from semantica.inputs import TEXT
from semantica.pipelines.kinds import INDEX, foreign
from semantica.progress import phase

if TYPE_CHECKING:
    from semantica.pipelines.networks import NetworkPipeline
    from semantica.sampling.settings import Sampling
    from semantica.train.data.source import Source


def judged(model: Path, device: str) -> "NetworkPipeline":
    """The pipeline of a run that pictures alone condition. Raises `UserError` for a bundle, and for other models."""
    from semantica.engines.bundle import is_bundle
    from semantica.model.conditioner import Conditioner
    from semantica.pipelines.sample import load_pipeline

    if is_bundle(model):
        raise UserError(f"{model} is a bundle: give the run folder that it was exported from")
    pipeline = load_pipeline(model, device)
    if isinstance(pipeline.encoder, Conditioner):
        read = " and ".join(pipeline.encoder.encoders)
        raise UserError(f"{model} reads {read} by encoders of their own: runs that pictures alone condition are judged")
    return pipeline


def evaluated(config: EvaluateConfig) -> "NetworkPipeline":
    """What `--model` names: a run as `judged`, or a pipeline of diffusers that reads pictures.

    Raises:
        UserError: as `judged` and `semantica.pipelines.unets.UNetPipeline.load`; or a pipeline of text alone, before
            its weights are read.
    """
    if not foreign(config.model):
        if config.ip_adapter is not None:
            raise UserError(f"--ip-adapter goes with the folder of a diffusers pipeline, {config.model} is none")
        return judged(config.model, config.device)
    from semantica.pipelines.sample import load_pipeline
    from semantica.pipelines.unets import KINDS, check_folder

    kind = check_folder(config.model)["_class_name"]
    if config.ip_adapter is None and "image_encoder" not in KINDS[kind]:
        raise UserError(
            f"{config.model} ({kind}) reads text alone, and a condition is a picture: give --ip-adapter; or caption "
            "the conditions, make its pictures of the captions, and give them by --images with conditions.csv"
        )
    return load_pipeline(config.model, config.device, ip_adapter=config.ip_adapter, ip_scale=config.ip_scale)


def record(config: EvaluateConfig, pipeline: "NetworkPipeline", size: int) -> dict[str, Any]:
    """What was evaluated: folder, class, SHA-256 of every file of weights that was read, and how it sampled.

    size: side at which its pictures are judged; `sampled` is the side at which it makes them.
    """
    from semantica.model.hub import located
    from semantica.pipelines.runfolder import PATTERNS

    folder, settings = located(config.model, PATTERNS), settings_of(config)
    kind = read_json(folder / INDEX)["_class_name"]
    parts, adapter = ("unet", "encoder"), {}
    if foreign(folder):
        from semantica.pipelines.unets import KINDS

        # an IP-Adapter's encoder of pictures is one of the folder's parts, or beside the adapter
        parts = (*KINDS[kind], "image_encoder")
    files = {f"{part}/{path.name}": path for part in parts for path in weights(folder / part)}
    if config.ip_adapter is not None:
        beside = {f"image_encoder/{path.name}": path for path in weights(config.ip_adapter.parent / "image_encoder")}
        files = beside | files | {config.ip_adapter.name: config.ip_adapter}
        adapter = {"ip_adapter": str(config.ip_adapter), "ip_scale": config.ip_scale}
    return {
        "folder": str(config.model), "class": kind, **adapter,
        "weights": {name: sha256(path) for name, path in files.items()},
        "steps": settings.steps, "guidance": settings.guidance, "solver": settings.solver, "seed": settings.seed,
        "sampled": pipeline.side, "judged": size,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }  # fmt: skip


def weights(folder: Path) -> list[Path]:
    """Safetensors of a part of a pipeline's folder."""
    return sorted(folder.rglob("*.safetensors"))


def settings_of(config: EvaluateConfig) -> "Sampling":
    """One solver for all that are evaluated, so that figures of as many steps are of as much work."""
    from semantica.sampling.settings import Sampling

    return Sampling(config.steps, guidance=config.guidance, seed=config.seed)


def sampled(
    pipeline: "NetworkPipeline", config: EvaluateConfig, data: "Source", refs: list
) -> tuple[np.ndarray, np.ndarray]:
    """Variations of the conditions, and as many samples of the model without any condition."""
    from semantica.pipelines.sample import failures_of_the_gpu, given, unconditional, variations

    opened, count, settings = [data.load(ref, None) for ref in refs], len(refs) * config.n, settings_of(config)
    # what reads text beside the picture is told nothing
    inputs = given(pipeline, opened, [""] * len(opened) if TEXT in pipeline.inputs else ())
    name = f"evaluate: {len(refs)} conditions, {config.n} variations of each"
    with failures_of_the_gpu():
        with phase(name, count * config.steps) as shown:
            made = variations(pipeline, inputs, config.n, settings, on_step=shown.update)
        with phase(f"evaluate: {count} without a condition", count * config.steps) as shown:
            settings = dataclasses.replace(settings, seed=config.seed + 1)
            ignoring = unconditional(pipeline, count, settings, on_step=shown.update)
    return made.reshape(-1, *made.shape[2:]), ignoring


def losses(pipeline: "NetworkPipeline", config: EvaluateConfig, data: "Source", device) -> dict[str, float]:
    """Denoising loss of a run with the right condition and with one of another group."""
    from contextlib import nullcontext

    from semantica.model.image_encoder import sight_of
    from semantica.train.data.heldout import held_out_batches
    from semantica.train.objective import Objective, held_out_loss

    unet, encoder = pipeline.unet, pipeline.encoder
    sizes = encoder.image_size, unet.config.image_size
    batches = held_out_batches(data, config.seed, *sizes, device, sight=sight_of(encoder))
    found = held_out_loss(Objective(unet, encoder), batches, pipeline.scheduler.schedule, nullcontext)
    return {**found, "right_below_shuffled": 1 - found["right"] / found["shuffled"]}
