"""Any UNet of diffusers as a denoiser `(z, logsnr, condition) -> v` of `semantica.sampling.loop`."""

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from semantica.condition import Condition, Stream
from semantica.discrete import DiscreteSchedule
from semantica.errors import UserError
from semantica.fused.branches import once
from semantica.fused.conditioned import conditioned
from semantica.solvers import alpha_sigma, guide
from semantica.weak import Weak

# closer to a timestep of the table than what fp32 can tell apart: that timestep itself
EXACT = 1e-3


class UNetDenoiser(nn.Module):
    """v(z, logsnr, condition) by a UNet that predicts noise, or v, at timesteps.

    z = alpha x + sigma eps is what such a network reads too (diffusers' schedulers scale their samples to that form),
    so that only the level is translated: timestep t by its log-SNR, between two of them by linear interpolation.
    Keys and values of cross-attention are made once, by `condition`.

    Args:
        unet: shares its parameters with the denoiser and stays as it is; LoRAs and IP-Adapters are loaded before.
        schedule: of its training, see `DiscreteSchedule.from_scheduler`.
        null: the streams of the unconditional branch, of one sample: the empty prompt's; zeros where that is how the
            model was trained (SDXL, image variations). Without it `null` raises.
        stream_names: of the cross-attention's tokens and then of each IP-Adapter's pictures; by default "text" (or
            as given by `null`), then "image", or "image_0", "image_1", ... of several.

    Raises:
        UserError: a UNet with conditions that are not known here, or names that do not fit.
    """

    array, max_batch, joins = "torch", None, True
    refuses: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        unet: UNet2DConditionModel,
        schedule: DiscreteSchedule,
        null: Mapping[str, Stream] | None = None,
        stream_names: tuple[str, ...] | None = None,
    ):
        super().__init__()
        self.unet, self.schedule, self.blank = conditioned(unet), schedule, null
        count = len(self.unet.adapters)
        names = ("text", *(["image"] if count == 1 else [f"image_{i}" for i in range(count)]))
        self.stream_names = tuple(stream_names or (null and tuple(null)) or names)
        if len(self.stream_names) != count + 1:
            raise UserError(
                f"streams {self.stream_names}: this UNet takes its tokens and {count} IP-Adapters' pictures"
            )
        # from clean to noise, so that log-SNR falls; fp32 whatever the network computes in
        levels = torch.from_numpy(schedule.levels).float()
        self.register_buffer("levels", levels.to(self.unet.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Of what is sampled, `(channels, S, S)`."""
        return self.unet.config.in_channels, self.schedule.image_size, self.schedule.image_size

    @property
    def module(self) -> nn.Module:
        """What guiders may change."""
        return self.unet

    def condition(self, streams: Mapping[str, Stream], time_ids: Tensor | None = None) -> Condition:
        """Keys and values of every cross-attention, and SDXL's added embedding.

        Args:
            streams: tokens `[B, M, C]` of each of `stream_names`; pooled `[B, P]` of the first one for SDXL. Pictures
                of an IP-Adapter as its image encoder gives them: projected vectors, one token for each picture, or for
                "plus" adapters the tokens of one picture.
            time_ids: SDXL's `[B, 6]`: original height and width, crop top and left, target height and width, in
                pixels; by default the size that the UNet was made for, whole.

        Raises:
            UserError: a stream is missing, unknown, of another width or with lengths, or has no pooled vector of the
                width that the UNet was made for; or `time_ids` of another shape.
        """
        tokens, *pictures = self.checked(streams)
        batch, config = tokens.tokens.shape[0], self.unet.config
        if config.addition_embed_type == "text_time":
            # six numbers and the pooled vector make the rest of what is embedded
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            found = None if tokens.pooled is None else tuple(tokens.pooled.shape)
            if found != (batch, width):
                raise UserError(f"stream {self.stream_names[0]!r} has a pooled vector {found}: expected {batch, width}")
            if time_ids is None:
                # a latent pixel is eight of the picture
                side = 8.0 * self.schedule.image_size
                sizes = tokens.tokens.new_tensor([side, side, 0, 0, side, side], dtype=torch.float32)
                time_ids = sizes.expand(batch, 6)
            if tuple(time_ids.shape) != (batch, 6):
                raise UserError(f"time_ids have shape {tuple(time_ids.shape)}: expected {batch, 6}")
        added = self.unet.added(tokens.pooled, time_ids, batch)
        return self.unet.project(tokens.tokens, [picture.tokens for picture in pictures], added)

    def checked(self, streams: Mapping[str, Stream]) -> list[Stream]:
        if set(streams) != set(self.stream_names):
            raise UserError(f"condition streams are {sorted(streams)}: expected {sorted(self.stream_names)}")
        for name, stream in streams.items():
            if stream is None:
                raise UserError(f"stream {name!r} is absent, and this UNet needs it: give its value")
        found = [streams[name].map(lambda a: a.to(self.device, self.dtype)) for name in self.stream_names]
        attn = self.unet.crossings[0]
        width = self.unet.config.encoder_hid_dim or attn.cross_attention_dim
        for name, stream in zip(self.stream_names, found):
            shape = tuple(stream.tokens.shape)
            if len(shape) != 3 or stream.lengths is not None or (name == self.stream_names[0] and shape[2] != width):
                raise UserError(f"stream {name!r} has tokens {shape}: expected [B, M, {width}], all of them there")
        return found

    def null(self, batch: int) -> Condition:
        """The unconditional branch `[batch, ...]`. Raises `UserError` where the denoiser was made without."""
        if self.blank is None:
            raise UserError("guidance needs the empty prompt's streams: UNetDenoiser(..., null={'text': ...})")
        return self.condition(self.blank).repeat(batch)

    def embedding(self, logsnr: Tensor) -> Tensor:
        """Embeddings `[N, E]` of noise levels `[N]`, to which SDXL's of sizes and pooled text is added."""
        times = self.timesteps(logsnr)
        return self.unet.time_embedding(self.unet.time_proj(times).to(self.dtype))

    def timesteps(self, logsnr: Tensor) -> Tensor:
        """Timesteps, fp32 and mostly whole, of log-SNRs `[...]`; those outside the table are its first or last."""
        levels, wanted = self.levels, logsnr.to(self.levels.dtype).clamp(self.levels[-1], self.levels[0])
        # how many levels lie above: exports to every format, as a search would not
        above = (levels > wanted[..., None]).sum(-1).clamp(1, len(levels) - 1)
        upper, lower = levels[above - 1], levels[above]
        t = above - 1 + (upper - wanted) / (upper - lower)
        return torch.where((t - t.round()).abs() < EXACT, t.round(), t)

    def velocity(self, predicted: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """v of what the network predicts: as it is, or (eps - sigma z) / alpha; in fp32."""
        if self.schedule.prediction == "v_prediction":
            return predicted
        return (predicted - sigma * z) / alpha

    def forward(self, z: Tensor, logsnr: Tensor, condition: Condition) -> Tensor:
        """v `[B, C, S, S]` in z's dtype from z `[B, C, S, S]`, maybe wider than the network, and levels `[B]`."""
        wide = torch.promote_types(z.dtype, torch.float32)
        predicted = self.unet(z.to(self.dtype), self.timesteps(logsnr), condition, return_dict=False)[0]
        alpha, sigma = alpha_sigma(logsnr.to(wide)[:, None, None, None])
        return self.velocity(predicted.to(wide), z.to(wide), alpha, sigma).to(z.dtype)

    @property
    def joined(self) -> "UNetDenoiser":
        """The same denoiser for a batch of both branches of guidance, whose halves have the same z and levels.

        What does not depend on the condition is computed once for both, see `semantica.fused.branches.once`.
        """
        return self.over(once(self.unet))

    def over(self, unet: nn.Module) -> "UNetDenoiser":
        """The same denoiser over another network."""
        made = copy.copy(self)
        made._buffers, made._modules = dict(self._buffers), {"unet": unet}
        return made

    def in_precision(self, dtype: torch.dtype) -> "UNetDenoiser":
        """A frozen copy whose network computes in a type; levels stay fp32."""
        return self.over(nn.Module.to(copy.deepcopy(self.unet), dtype).requires_grad_(False).eval())

    def fast(self, dtype: torch.dtype) -> "FastUNet":
        """The form that `semantica.sampling.compiled.CompiledDenoiser` runs."""
        return FastUNet(self, dtype)


class FastUNet(nn.Module):
    """A `UNetDenoiser` for sampling, as `semantica.model.fast.FastDenoiser`: v of both branches, joined by guidance.

    Args:
        denoiser: where sampling happens; is copied, into channels-last. dtype: of weights and activations.
    """

    def __init__(self, denoiser: UNetDenoiser, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.net = dtype, denoiser.in_precision(dtype)
        self.net.unet.to(memory_format=torch.channels_last)
        self.joined = self.net.joined

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled one by one."""
        own, both = self.net.unet, self.joined.unet
        parts = [*own.down_blocks, own.mid_block, *own.up_blocks, *both.down_blocks]
        return list(dict.fromkeys(part for part in parts if part is not None))

    def branches(self, condition: Condition, weak: Weak | None) -> Callable[[int], tuple[Condition, bool]]:
        """By number of step, both branches as one batch, in the network's type, and whether they begin alike; one
        branch without `weak`."""

        def both(other: Condition | None = None) -> tuple[Condition, bool]:
            joined = condition if other is None else condition.join(other)
            return joined.map(lambda array: array.to(self.dtype)), other is not None and weak.shift is None

        if weak is None:
            made = both()
            return lambda step: made
        return weak.each(both)

    def modulations(self, logsnr: Tensor, condition: Condition, weak: Weak | None) -> Tensor:
        """Timestep, alpha and sigma of each step, fp32 `[steps, 3]`."""
        return torch.stack((self.net.timesteps(logsnr), *alpha_sigma(logsnr)), 1)

    def forward(self, z: Tensor, modulation: Tensor, scales: Tensor, branches: tuple[Condition, bool]) -> Tensor:
        """v `[B, C, S, S]` in fp32; z: fp32 `[B, C, S, S]`; modulation: of this step; scales[2]: the guidance scale."""
        t, alpha, sigma = modulation
        both, alike = branches
        count = len(both.emb) // len(z)
        x, net = z.to(self.dtype), self.joined if alike else self.net
        predicted = net.unet(torch.cat((x,) * count), t.expand(count * len(z)), both, return_dict=False)[0].float()
        if count == 2:
            predicted = guide(*predicted.chunk(2), scales[2])
        return self.net.velocity(predicted, z, alpha, sigma)
