"""Who is raced in fine-tuning a public UNet: the step of diffusers' own scripts, on its modules and on the fused ones.

The step is that of `examples/text_to_image/train_text_to_image.py` and `train_text_to_image_lora.py` of diffusers:
noise at a drawn timestep, the squared error of what the network predicts, gradients clipped to 1, AdamW. In bf16 it is
autocast; LoRA there keeps the frozen weights in bf16 and its own in fp32.
"""

import contextlib
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from semantica.benchmarks.kernels.public import on_meta
from semantica.benchmarks.unets.models import BETAS, contents, load_unet
from semantica.device import pick_precision
from semantica.files import read_json
from semantica.fused.accelerate import accelerate
from semantica.pipelines.unets import SCHEDULER
from semantica.solvers import noise

WAYS = ("lora", "full")
# as the scripts have them by default
RANK, TARGETS, RATE, DECAY, CLIP = 4, ["to_k", "to_q", "to_v", "to_out.0"], 1e-4, 1e-2, 1.0
# of a gradient so many numbers at most are compared, evenly spread
SAMPLE = 4096
# the size of a gradient, beside the median of all, below which its error is no share of itself
NOTHING = 1e-3


@dataclass(frozen=True)
class Switches:
    channels_last: bool = False
    half: bool = False
    """bf16, where the processor has instructions for it."""
    fused_optimizer: bool = False
    compile: bool = False
    checkpointing: bool = False
    """Activations of each block computed again: less memory, more time."""
    fused: bool = False
    """`semantica.accelerate`."""


HALF = Switches(channels_last=True, half=True, fused_optimizer=True)
STRONG = replace(HALF, compile=True)
CONTENDERS = {
    "plain": Switches(),
    "accelerate-fp32": Switches(fused=True),
    "plain-half": HALF,
    "accelerate": replace(HALF, fused=True),
    "strong": STRONG,
    "accelerate-compile": replace(STRONG, fused=True),
    "strong-checkpointed": replace(STRONG, checkpointing=True),
    "accelerate-checkpointed": replace(STRONG, checkpointing=True, fused=True),
}


@dataclass(frozen=True)
class Problem:
    """What is trained: a model's folder (and its name, for its contents), in which way, on latents of which side."""

    folder: Path
    name: str
    way: str
    side: int
    batch: int
    device: str


def trained(unet: UNet2DConditionModel, way: str, dtype: torch.dtype) -> list[nn.Parameter]:
    """Make a UNet ready for a way of training; returns what is trained, in fp32.

    dtype: of weights that stay as they are.
    """
    if way == "full":
        unet.train().requires_grad_(True)
        return list(unet.parameters())
    from peft import LoraConfig

    nn.Module.to(unet.requires_grad_(False), dtype=dtype)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    for name, weight in unet.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
            # which starts at zero, and then tells the other half nothing
            if "lora_B" in name and weight.device.type != "meta":
                weight.data.copy_(torch.randn(weight.shape, generator=generator) / 50)
    return [weight for weight in unet.train().parameters() if weight.requires_grad]


@functools.cache
def operations(name: str, way: str, side: int, batch: int) -> int:
    """Of a step, forward and backward, nothing computed twice."""
    from torch.utils.flop_counter import FlopCounterMode

    unet = on_meta(name, "unet")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        trained(unet, way, torch.float32)
        given = {key: value.to("meta") for key, value in drawn(name, side, batch, 0, unet.config.in_channels).items()}
        unet(given["latents"], given["t"], given["text"], **added(given, unet)).sample.sum().backward()
    return counter.get_total_flops()


def drawn(name: str, side: int, batch: int, step: int, channels: int = 4) -> dict[str, Tensor]:
    """A batch of a step, the same for all: latents and noise `[B, C, S, S]`, timesteps `[B]`, and the condition."""
    content = contents(name, "unet", 0, step, batch)
    given = {key: torch.from_numpy(content[key]) for key in ("text", "pooled") if key in content}
    shape = (batch, channels, side, side)
    given |= {key: torch.from_numpy(noise(2 * step + i, shape)) for i, key in enumerate(("latents", "noise"))}
    return given | {"t": torch.from_numpy(np.random.default_rng(step).integers(0, 1000, batch))}


def added(given: dict[str, Tensor], unet: UNet2DConditionModel) -> dict[str, Any]:
    """SDXL's further conditions, as its script passes them."""
    if "pooled" not in given:
        return {}
    side = 8.0 * unet.config.sample_size
    sizes = given["pooled"].new_tensor([[side, side, 0, 0, side, side]] * len(given["pooled"]))
    return {"added_cond_kwargs": {"text_embeds": given["pooled"], "time_ids": sizes}}


class Tuner:
    """A UNet that is being trained."""

    def __init__(self, name: str, problem: Problem):
        switches, self.problem, self.count = CONTENDERS[name], problem, 0
        self.device = torch.device(problem.device)
        self.dtype = pick_precision("auto", self.device) if switches.half else torch.float32
        unet = load_unet(problem.folder, "")
        self.parameters = trained(unet, problem.way, self.dtype)
        nn.Module.to(unet, self.device)
        if switches.channels_last:
            unet.to(memory_format=torch.channels_last)
        if switches.checkpointing:
            unet.enable_gradient_checkpointing()
        self.unet = accelerate(unet) if switches.fused else unet
        if switches.compile:
            unet.compile(dynamic=False)
        self.layout = torch.channels_last if switches.channels_last else torch.contiguous_format
        fused = switches.fused_optimizer or None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=DECAY, fused=fused)
        config = BETAS | read_json(problem.folder / SCHEDULER)
        self.scheduler = DDPMScheduler.from_config({key: config[key] for key in (*BETAS, "prediction_type")})

    def autocast(self) -> contextlib.AbstractContextManager:
        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if half else contextlib.nullcontext()

    def batch(self) -> dict[str, Tensor]:
        """Of the next step, on the host, where a loader would have it ready."""
        problem, channels = self.problem, self.unet.config.in_channels
        return drawn(problem.name, problem.side, problem.batch, self.count, channels)

    def loss(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what the network predicts."""
        unet = self.unet
        given = {key: value.to(self.device) for key, value in given.items()}
        noisy = self.scheduler.add_noise(given["latents"], given["noise"], given["t"])
        target = given["noise"]
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(given["latents"], given["noise"], given["t"])
        noisy = noisy.to(self.dtype).contiguous(memory_format=self.layout)
        given |= {key: given[key].to(self.dtype) for key in ("text", "pooled") if key in given}
        with self.autocast():
            made = unet(noisy, given["t"], given["text"], **added(given, unet), return_dict=False)[0]
        return F.mse_loss(made.float(), target), made

    def examine(self) -> dict[str, np.ndarray]:
        """Of the first batch: the loss, the prediction, and some numbers of the gradient of each parameter."""
        loss, made = self.loss(self.batch())
        loss.backward()
        found = {"loss": loss.detach().cpu().numpy(), "prediction": made.detach().float().cpu().numpy()}
        names = {id(weight): name for name, weight in self.unet.named_parameters()}
        for weight in self.parameters:
            if weight.grad is not None:
                flat = weight.grad.reshape(-1)
                found[names[id(weight)]] = flat[:: -(-len(flat) // SAMPLE)].float().cpu().numpy()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def step(self, given: dict[str, Tensor]) -> Tensor:
        """Train on the next batch; returns its loss, still on the device."""
        loss, _ = self.loss(given)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        return loss.detach()


Errors = dict[str, float]


def errors(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> Errors:
    """Relative errors of the loss, of the prediction and of the gradient: of each parameter's, their root mean square.

    Each parameter counts alike, so that a wrong one shows however small it is, unless its gradient is nothing beside
    the others'. Infinite where some have no gradient, or something is not finite.
    """
    if set(found) != set(truth) or not all(np.isfinite(array).all() for array in found.values()):
        return dict.fromkeys(("loss", "prediction", "gradient"), np.inf)

    def size(array: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(array.astype(np.float64)))))

    def relative(key: str, least: float = 0.0) -> float:
        return size(found[key] - truth[key]) / max(size(truth[key]), least)

    parameters = [key for key in truth if key not in ("loss", "prediction")]
    least = NOTHING * float(np.median([size(truth[key]) for key in parameters]))
    each = [relative(key, least) for key in parameters]
    return {
        "loss": relative("loss"),
        "prediction": relative("prediction"),
        "gradient": float(np.sqrt(np.mean(np.square(each)))),
    }
