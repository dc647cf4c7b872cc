"""Public UNets and autoencoders with their weights: folders of diffusers' pipelines, or drawn ones written once."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from semantica.benchmarks.kernels.public import configuration, given, on_meta, split, tokens_of
from semantica.files import read_json, write_json
from semantica.fused import published
from semantica.pipelines.unets import SCHEDULER, part_of
from semantica.solvers import noise

# of published models: betas of their training (Stable Diffusion's `v1-inference.yaml`; SDXL's table of sigmas agrees)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
# one step of this starts from noise alone, where what the network predicts counts most
RUN = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
# whatever the model, a picture of these is conditioned by one of so many texts
TEXTS = 3

Content = dict[str, np.ndarray]


def folder_of(name: str, place: Path) -> Path:
    """The folder of a model: the user's own, or one with drawn weights, written into `place` where it is not there."""
    base, _ = split(name)
    if base not in published.MODELS:
        return Path(base)
    folder = place / base
    if not folder.exists():
        published.unet(base).save_pretrained(folder / "unet")
        published.vae(base).save_pretrained(folder / "vae")
        (folder / "scheduler").mkdir()
        write_json(folder / SCHEDULER, BETAS | {"prediction_type": published.MODELS[base].prediction})
    return folder


def scheduler_of(folder: Path) -> dict[str, Any]:
    """The configuration of the runs: as trained, and the timesteps of a race."""
    return read_json(folder / SCHEDULER) | RUN


def load_unet(folder: Path, adapter: str) -> nn.Module:
    """fp32, on the CPU; an IP-Adapter's weights are drawn."""
    unet = part_of(folder, "unet")
    if adapter:
        unet._load_ip_adapter_weights([published.adapter_weights(unet, published.ADAPTERS[adapter])])
        unet.eval().requires_grad_(False)
    return unet


def contents(name: str, stage: str, seed: int, text: int, batch: int) -> Content:
    """What a run computes: noise that no call had before, one of `TEXTS` conditions, and the unconditional one.

    Arrays float32: z `[B, C, S, S]`; of the UNet also text `[B, M, C]` and, where it has them, pooled `[B, P]` and
    image `[B, 1 or M, C]`, each with its `null_` of one sample.
    """
    config, (_, adapter) = configuration(split(name)[0], "unet"), split(name)
    side = config["sample_size"]
    found = {"z": noise(1000 + seed, (batch, config.get("in_channels", 4), side, side))}
    if stage == "decoder":
        return found
    shapes = {"text": (tokens_of(name), config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        sizes = 6 * config["addition_time_embed_dim"]
        shapes["pooled"] = (config["projection_class_embeddings_input_dim"] - sizes,)
    if adapter:
        kind = published.ADAPTERS[adapter]
        shapes["image"] = (kind.seen, kind.width)
    for i, (part, shape) in enumerate(shapes.items()):
        found[part] = noise(10 * text + i, (batch, *shape))
        found[f"null_{part}"] = noise(10 * TEXTS + i, (1, *shape))
    return found


@functools.cache
def operations(name: str, stage: str, batch: int) -> int:
    """Of one guided evaluation, both branches whole, or of one decoding."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if stage == "decoder":
            vae, side = on_meta(name, "vae"), configuration(split(name)[0], "unet")["sample_size"]
            vae.decode(torch.empty(batch, vae.config.latent_channels, side, side, device="meta"))
        else:
            unet = on_meta(name, "unet")
            unet(**given(unet, 2 * batch, tokens_of(name)))
    return counter.get_total_flops()


def parameters(name: str, stage: str) -> int:
    model = on_meta(name, "unet" if stage == "unet" else "vae")
    return sum(weight.numel() for weight in model.parameters())


def size_of(name: str) -> int:
    """Side of the latents."""
    config: Mapping[str, Any] = configuration(split(name)[0], "unet")
    return config["sample_size"]
