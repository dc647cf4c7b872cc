"""Bundles of public UNets for engines: python -m semantica.benchmarks.unets.bundles REQUEST.json.

What `semantica export --model FOLDER` writes, over encoders that hand on the tokens they are given: a race compares
what all its implementations compute from the same tokens. A process of its own, whose memory is gone afterwards.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from semantica.benchmarks.harness.process import Wrong
from semantica.benchmarks.unets.models import Content, contents, load_unet, scheduler_of
from semantica.condition import Stream
from semantica.discrete import DiscreteSchedule
from semantica.engines import Bundle
from semantica.engines.bundle import MANIFEST, REFERENCE
from semantica.errors import ArtifactError, UserError
from semantica.export import rebuild
from semantica.export.build import build
from semantica.export.config import BuildConfig, ExportConfig
from semantica.export.write import write
from semantica.fused.accelerate import accelerate
from semantica.fused.denoiser import UNetDenoiser
from semantica.model.conditioner import Conditioner
from semantica.pipelines.unets import UNetPipeline, part_of

# of the comparison that lets a bundle exist; the race makes one more, with many more steps if it is asked to
LEVELS, STEPS = 2, 2


class Given(nn.Module):
    """An encoder's stream as it is: a row of numbers `[B, M * C + P]`, tokens `[M, C]` and then what is pooled."""

    input_dtype, trainable = torch.float32, False

    def __init__(self, example: np.ndarray, tokens: tuple[int, int]):
        """example: rows to be compared on, at least two. tokens: how many of which width."""
        super().__init__()
        self.example, self.tokens = torch.from_numpy(example), tokens

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.example.shape[1],)

    def examples(self, count: int) -> Tensor:
        return self.example[:count]

    def forward(self, rows: Tensor) -> Stream:
        count = self.tokens[0] * self.tokens[1]
        pooled = rows[:, count:] if rows.shape[1] > count else None
        return Stream(rows[:, :count].unflatten(1, self.tokens), pooled)


def rows_of(content: Content) -> dict[str, np.ndarray]:
    """The conditions of a content as a bundle of this module takes them, `[B, M * C + P]` for each stream."""
    streams = {"text": ("text", "pooled"), "image": ("image",)}
    return {
        name: np.concatenate([content[part].reshape(len(content[part]), -1) for part in parts if part in content], 1)
        for name, parts in streams.items()
        if name in content
    }


def schedule_of(folder: Path, side: int) -> DiscreteSchedule:
    """Of the races: DDIM."""
    return DiscreteSchedule.from_scheduler(scheduler_of(folder), side, "ddim")


def pipeline_of(folder: Path, name: str, adapter: str) -> UNetPipeline:
    """A folder's UNet and autoencoder in fp32 between tokens and pictures; name: of the model, for its contents."""
    vae, unet, content = part_of(folder, "vae"), load_unet(folder, adapter), contents(name, "unet", 0, 0, 2)
    rows = rows_of(content)
    encoders = {part: Given(rows[part], content[part].shape[1:]) for part in rows}
    null = {
        part: Stream(*(torch.from_numpy(content[n]) for n in (f"null_{part}", "null_pooled")[: 1 + pooled]))
        for part in rows
        for pooled in [part == "text" and "pooled" in content]
    }
    schedule = schedule_of(folder, unet.config.sample_size)
    denoiser = UNetDenoiser(accelerate(unet), schedule, null).eval().requires_grad_(False)
    return UNetPipeline(denoiser, Conditioner(encoders).eval(), accelerate(vae))


def given_again(settings: Mapping, bundle: Bundle, name: str) -> Given:
    """From a manifest, and from what the bundle was compared on."""
    return Given(load_file(bundle.folder / REFERENCE)[f"input.{name}"], tuple(settings["tokens"]))


# so that what is compiled from such a bundle is built as from any other
rebuild.ENCODERS[Given.__name__] = rebuild.Encoder(lambda given: {"tokens": list(given.tokens)}, given_again)


def make(request: Mapping) -> None:
    """Write what is asked for and not there: the bundle `out` in a `precision`, and an engine of a `backend` in it.

    request: also the `folder` of the model, its `name` and `adapter`, and `batches` for engines that are built.
    """
    folder, out, backend = Path(request["folder"]), Path(request["out"]), request["backend"]
    if not out.exists():
        config = ExportConfig(folder, out, request["precision"], levels=LEVELS, steps=STEPS).check()
        write(config, pipeline_of(folder, request["name"], request["adapter"]))
    if backend and not any((out / "engines").glob(f"{backend}-*")):
        build(BuildConfig(out, backend, batches=tuple(request["batches"])))


def made(place: Path, **request) -> Path:
    """A bundle with its engine, made in another process if it is not there; place: where it is kept.

    Raises:
        Wrong: it could not be made.
    """
    adapter = request["adapter"] and f"+{request['adapter']}"
    out = place / f"{Path(request['folder']).name}{adapter}-{request['precision']}"
    engines = out / "engines"
    if (out / MANIFEST).exists() and (not request["backend"] or any(engines.glob(f"{request['backend']}-*"))):
        return out
    asked = out.with_name(f"{out.name}.json")
    asked.write_text(json.dumps(request | {"out": str(out)}))
    command = [sys.executable, "-P", "-m", "semantica.benchmarks.unets.bundles", str(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise Wrong(f"no bundle: {lines[-1][:300]}")
    return out


if __name__ == "__main__":
    try:
        make(json.loads(Path(sys.argv[1]).read_text()))
    except (UserError, ArtifactError) as error:
        sys.exit(str(error))
