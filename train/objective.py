"""The loss of one batch, as a module that can be compiled in place."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.diffusion import add_noise, loss_weight, multiscale_loss, noise_levels, v_target
from semantica.inputs import Prepared
from semantica.model.conditioner import encodings, fill, picture_input
from semantica.model.uvit import UViT
from semantica.train.heads import PairHead, RepaHead, last_patches, patch_tokens


class Objective(nn.Module):
    """Weighted squared error of v on pairs: E || v(z_t, t, y) - v_t ||^2, y the encoding of the other image.

    arXiv 2405.14857 with the v-parametrisation and losses of simple diffusion (arXiv 2301.11093).

    Args:
        unet: the denoiser.
        encoder: turns condition images into the stream of every name, or a `Conditioner`: an encoder for each stream.
            A frozen encoder without gradients runs inside all the same.
        loss: weight of the noise levels, see `semantica.diffusion.loss_weight`.
        scales: sides of the multi-scale loss; empty for the full size only.
        head: gives the contrastive loss too, for an encoder that is trained along.
        repa: gives the alignment loss too.
        repa_encoder: the frozen encoder that it aligns to; it does not run where targets' tokens are stored.
    """

    def __init__(
        self,
        unet: UViT,
        encoder: nn.Module,
        loss: str = "x",
        scales: tuple[int, ...] = (),
        head: PairHead | None = None,
        repa: RepaHead | None = None,
        repa_encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.unet, self.encoder, self.head = unet, encoder, head
        self.repa, self.repa_encoder = repa, repa_encoder
        self.loss, self.scales = loss, scales or (unet.config.image_size,)
        # -3 at 512 pixels (SiD2), moved with the resolution as the noise schedule is
        self.bias = -3 + 2 * math.log(512 / unet.config.image_size)

    def forward(
        self,
        condition: Prepared | Mapping[str, Prepared],
        target: Tensor,
        noise: Tensor,
        logsnr: Tensor,
        drop: Tensor,
        target_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Denoising loss `[B]`, contrastive loss `[B]` where there is a head, alignment loss `[B]` where there is repa.

        Images are `[B, 3, S, S]`, conditions also `[B, K, 3, S, S]` or a stream that was encoded before, and
        `{stream name: prepared values}` for a `Conditioner`; noise levels `[B]`; `drop` `[B]` says which samples get no
        condition, or `[B, S]` which of the streams; `target_tokens` `[B, M, D]` are the stored tokens of the targets.
        """
        # stored as fp16
        named = isinstance(condition, Mapping)
        condition = {name: widened(value) for name, value in condition.items()} if named else widened(condition)
        made = encodings(self.encoder, condition)
        values = self.unet.condition(fill(self.unet.stream_names, made), drop)
        z, aligned = add_noise(target, noise, logsnr), None
        if self.repa is None:
            v = self.unet(z, logsnr, values)
        else:
            v, states = self.unet(z, logsnr, values, self.repa.depth)
            aligned = self.repa(states, self.tokens_of(target, target_tokens))
        weight = loss_weight(logsnr, self.loss, self.bias)
        losses = multiscale_loss(v.float(), v_target(target, noise, logsnr), weight, self.scales)
        pairing = None
        if self.head is not None:
            name, pictures = picture_input(self.encoder)
            pairing = self.head(made[name].pooled, pictures(target).pooled)
        return losses, pairing, aligned

    def tokens_of(self, target: Tensor, stored: Tensor | None) -> Tensor:
        """What hidden states are aligned to: patch tokens `[B, M, D]` of the targets, computed unless stored."""
        if stored is not None:
            return last_patches(self.repa_encoder, stored)
        return patch_tokens(self.repa_encoder, target)


def widened(value: Prepared) -> Prepared:
    """A stream in fp32; anything else as it is."""
    if not isinstance(value, Stream):
        return value
    return value.map(lambda array: array.float() if array.is_floating_point() else array)


@torch.no_grad()
def held_out_loss(
    objective: Objective, batches: list[dict], schedule, autocast, most: int | None = None
) -> dict[str, float]:
    """Loss with the right condition and with one of another group, on the same targets, noise levels and noise.

    Args:
        batches: as `semantica.train.data.batch.finish`, with `other`, the index in the batch of a sample of another
            group; on any device.
        most: samples of one call; whole batches by default.
    """
    sums, count = {"right": 0.0, "shuffled": 0.0}, 0
    device = objective.unet.device
    for batch in batches:
        logsnr = noise_levels(batch["u"], schedule)
        keep = torch.zeros_like(batch["drop"])
        for name in sums:
            condition = batch["condition"] if name == "right" else take(batch["condition"], batch["other"])
            for rows in stretches(len(logsnr), most):
                given = (a[rows] for a in (batch["target"], batch["noise"], logsnr, keep))
                with autocast():
                    losses, *_ = objective(*(moved(a, device) for a in (take(condition, rows), *given)))
                sums[name] += losses.double().sum().item()
        count += len(logsnr)
    return {name: total / count for name, total in sums.items()}


def stretches(count: int, most: int | None) -> list[slice]:
    """All of so many samples, at most some at a time."""
    step = most or max(1, count)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def moved(value: Any, device: torch.device | str) -> Any:
    """A tensor, a stream, or several by name, on a device; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, Stream):
        return value.map(lambda array: array.to(device))
    return value.to(device) if isinstance(value, Tensor) else value


def take(condition: Prepared | Mapping[str, Prepared], index: Tensor | slice) -> Prepared | dict[str, Prepared]:
    """Some samples of a batch of conditions."""
    if isinstance(condition, Mapping):
        return {name: take(value, index) for name, value in condition.items()}
    if isinstance(condition, Stream):
        return condition.map(lambda array: array[index])
    return condition[index]
