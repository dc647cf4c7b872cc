"""What a bundle of a diffusers pipeline has beside that of a run folder: its decoder, its tokenizers, its heads."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from semantica import __version__
from semantica.engines import bundle
from semantica.export.config import ExportConfig
from semantica.export.program import Captured, capture_decoder
from semantica.pipelines.unets import UNetPipeline, decode
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
            "encoder": {
                "class": "Conditioner",
                "parts": {name: type(part).__name__ for name, part in encoders.items()},
            },
            "vae": plain(pipeline.vae, type(pipeline.vae).__name__),
            "scheduler": unet.schedule.config,
        },
    }


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


def decoder(pipeline: UNetPipeline, precision: str) -> tuple[nn.Module, Any]:
    """The autoencoder in its precision, and its decoder as a program."""
    return capture_decoder(pipeline.vae, decode, pipeline.sample_shape, precision)
