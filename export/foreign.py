"""What a bundle of a diffusers pipeline has beside that of a run folder: its decoder, its tokenizers, its heads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from semantica import __version__
from semantica.engines import bundle
from semantica.engines.bundle import DECODE
from semantica.export import parity
from semantica.export.config import ExportConfig
from semantica.export.gate import LEAST_HEADROOM
from semantica.export.program import Captured, capture_decoder
from semantica.export.rebuild import describe_encoders, describe_scales
from semantica.export.reduced import Reduced, headroom
from semantica.files import sha256
from semantica.pipelines.unets import UNetPipeline, decode
from semantica.solvers import noise
from semantica.tokens import FILES


def describe(config: ExportConfig, pipeline: UNetPipeline, captured: Captured) -> dict[str, Any]:
    """What the manifest says about the model."""
    unet, encoders = pipeline.unet, pipeline.encoder.encoders
    heads = [[attn.heads, attn.inner_dim // attn.heads] for attn in unet.unet.crossings]
    channels, size, _ = unet.sample_shape
    numbers = {name: len(part.tokenizers) for name, part in encoders.items() if hasattr(part, "tokenizers")}
    return {
        "format": bundle.FORMAT,
        "version": bundle.VERSION,
        "semantica": __version__,
        "precision": config.precision,
        "streams": dict(zip(unet.stream_names, captured.sizes)),
        "shapes": {
            "image": next((part.image_size for part in encoders.values() if hasattr(part, "image_size")), 0),
            "latent": size,
            "channels": channels,
            "blocks": len(heads),
            # those of each block are in `attention`
            "heads": heads[0][0],
            "head_dim": heads[0][1],
            "emb": unet.unet.time_embedding.linear_2.out_features,
        },
        "attention": heads,
        "decode": size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1),
        "inputs": {name: list(part.input_shape) for name, part in encoders.items()},
        **({"tokenizers": {name: folders(count) for name, count in numbers.items()}} if numbers else {}),
        "model": {
            "unet": plain(unet.unet, "UNet2DConditionModel"),
            "encoder": describe_encoders(encoders),
            "vae": plain(pipeline.vae, type(pipeline.vae).__name__),
            "scheduler": unet.schedule.config,
            **describe_scales(unet.unet.crossings),
        },
        **additions(config),
    }


def additions(config: ExportConfig) -> dict[str, Any]:
    """Files whose weights went into those of the model, and how much each weighs: what a bundle's own do not tell."""
    given = {"ip_adapter": (config.ip_adapter, config.ip_scale), "lora": (config.lora, config.lora_scale)}
    found = {
        name: {"file": path.name, "sha256": sha256(path), "scale": scale}
        for name, (path, scale) in given.items()
        if path is not None
    }
    return {"additions": found} if found else {}


def plain(module: nn.Module, name: str) -> dict[str, Any]:
    """A configuration as JSON, with its class."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return {"class": name, **json.loads(json.dumps(config, default=str))}


def folders(count: int) -> list[str]:
    """Where tokenizers lie, in a pipeline's folder and in a bundle."""
    return ["tokenizer", "tokenizer_2"][:count]


def copy_tokenizers(config: ExportConfig, manifest: dict[str, Any], folder: Path) -> None:
    """The files of the tokenizers that a manifest names, into a bundle."""
    for names in manifest.get("tokenizers", {}).values():
        for name in names:
            (folder / name).mkdir()
            for file in FILES:
                if (config.model / name / file).is_file():
                    shutil.copyfile(config.model / name / file, folder / name / file)


def decoder(pipeline: UNetPipeline, precision: str) -> tuple[tuple[nn.Module, ExportedProgram], dict[str, Any]]:
    """The autoencoder and its decoder as a program, and what the manifest says of its precision.

    In fp16 it stays fp32 where its own configuration asks for that (`force_upcast`, as SDXL's), or where an activation
    on drawn latents comes too close to the largest number of fp16; a line says so.
    """
    vae, shape, why, record = pipeline.vae, pipeline.sample_shape, "", {}
    if precision == "fp16":
        if vae.config.force_upcast:
            why = "the autoencoder's configuration asks for it (force_upcast)"
        else:
            made = capture_decoder(vae, decode, shape, precision)
            record = decoder_headroom(made[1], shape)
            if record["headroom"] >= LEAST_HEADROOM:
                return made, {"precision": precision, "headroom": record}
            top = record["largest"][0]
            why = f"{top['module']} reaches {top['value']:.3g} of at most {record['type_max']:.3g} in fp16"
        print(f"{DECODE} stays fp32: {why}")
        precision = "fp32"
    return capture_decoder(vae, decode, shape, precision), {"precision": precision, **({"why": why} if why else {})}


@torch.no_grad()
def decoder_headroom(program: ExportedProgram, shape: tuple[int, ...]) -> dict[str, Any]:
    """See `semantica.export.reduced.headroom`: of latents of unit size, smooth ones and noise, one after the other."""
    channels, side, _ = shape
    smooth = parity.pictures(1, side, 4, channels)
    runner = Reduced(program, "fp16")
    for latents in (smooth / smooth.std(), torch.from_numpy(noise(5, (1, *shape)))):
        runner.run(latents)
    return headroom([runner])
