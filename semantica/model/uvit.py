"""U-ViT denoiser: convolutions with U-Net skips at high resolutions, a transformer at the lowest one.

simple diffusion (Hoogeboom et al., arXiv 2301.11093) with cross-attention to encoder tokens (arXiv 2405.14857).
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from semantica.condition import Condition, Stream
from semantica.errors import UserError
from semantica.model.layers import (
    GroupNormAct,
    NoiseEmbedding,
    ResBlock,
    TransformerBlock,
    block_runner,
    rotary_grid,
    zero,
)
from semantica.solvers import alpha_sigma

# below this noise the prediction fades into z itself, so that v stays of order 1
SIGMA_MIN = 0.1
CONDITIONING = ("tokens", "global", "both", "none")
FUSIONS = ("parallel", "concatenated")

# known to torch's pytrees, so that conditions pass through export, compile and distributed wrappers
torch.export.register_dataclass(Stream)
torch.export.register_dataclass(Condition)


class UViT(ModelMixin, ConfigMixin):
    """Denoiser v(z, logsnr, condition).

    The last layer estimates the image x, and v = (alpha z - x) / sigma follows from it: networks whose patches have
    more pixels than they have channels learn images, not noise (Li & He, arXiv 2511.13720).

    Args:
        image_size: side of the square image in pixels; divisible by `patch_size * 2 ** len(channels)`.
        patch_size: side of the patches that the first convolution folds into channels.
        channels: width of each convolutional level, from the highest resolution down.
        depths: residual blocks of each convolutional level, on the way down and again on the way up.
        width, depth, heads: of the transformer at the lowest resolution.
        emb_dim: width of the noise-level embedding.
        streams: name and token width of each condition stream, `{"image": 384}`.
        conditioning: "tokens" (cross-attention), "global" (pooled vector added to the embedding), "both" or "none".
        dropout: in the transformer and in the lowest convolutional level.
        fusion: of several streams' tokens: "parallel", a softmax for each (arXiv 2409.13346), or "concatenated", one
            over all of them, which is there to be compared with.

    Raises:
        UserError: sizes that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock", "ResBlock"]
    # as a `semantica.sampling.loop.Denoiser`; branches of guidance apart, for half the memory
    array, max_batch, joins, refuses = "torch", None, False, {}

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 2,
        channels: tuple[int, ...] = (64,),
        depths: tuple[int, ...] = (2,),
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        emb_dim: int = 256,
        streams: Mapping[str, int] | None = None,
        conditioning: str = "tokens",
        dropout: float = 0.0,
        in_channels: int = 3,
        fusion: str = "parallel",
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise UserError(f"fusion={fusion!r}: expected one of {', '.join(FUSIONS)}")
        self.gradient_checkpointing = False
        channels, depths, streams = tuple(channels), tuple(depths), dict(streams or {})
        check(image_size, patch_size, channels, depths, width, heads, streams, conditioning)
        self.stream_names = tuple(streams) if conditioning != "none" else ()
        self.use_tokens = conditioning in ("tokens", "both")
        self.use_global = conditioning in ("global", "both")
        token_dims = tuple(streams.values()) if self.use_tokens else ()

        # encoders differ in scale: each stream is normalised, then has a learned token that stands for its absence
        self.null_tokens = nn.ParameterDict(
            {n: nn.Parameter(0.02 * torch.randn(streams[n])) for n in self.stream_names}
        )
        self.norm_tokens = nn.ModuleDict({n: nn.LayerNorm(streams[n]) for n in self.stream_names})
        self.pooled = nn.ModuleDict()
        if self.use_global:
            for name in self.stream_names:
                net = nn.Sequential(nn.Linear(streams[name], emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
                self.pooled[name] = net

        self.embed_noise = NoiseEmbedding(emb_dim)
        kernel = (patch_size, patch_size) if patch_size > 1 else (3, 3)
        self.conv_in = nn.Conv2d(
            in_channels, channels[0], kernel, stride=patch_size, padding=0 if patch_size > 1 else 1
        )
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, (here, below) in enumerate(zip(channels, (*channels[1:], width), strict=True)):
            drop = dropout if level == len(channels) - 1 else 0.0
            self.down_blocks.append(nn.ModuleList(ResBlock(here, here, emb_dim, drop) for _ in range(depths[level])))
            self.downsamplers.append(nn.Conv2d(here, below, 3, padding=1))
            self.upsamplers.append(nn.Conv2d(below, here, 3, padding=1))
            self.up_blocks.append(nn.ModuleList(ResBlock(2 * here, here, emb_dim, drop) for _ in range(depths[level])))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, emb_dim, token_dims, dropout) for _ in range(depth)
        )
        side = image_size // patch_size // 2 ** len(channels)
        angles = rotary_grid(side, side, width // heads)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.norm_out = GroupNormAct(channels[0])
        self.conv_out = zero(nn.Conv2d(channels[0], in_channels * patch_size**2, 3, padding=1))

    def condition(self, streams: Mapping[str, Stream | None], drop: Tensor | None = None) -> Condition:
        """Keys, values and embedding of the condition, for all blocks at once.

        Args:
            streams: one `Stream` per configured name; tokens `[B, M, C]`. None stands for one that is absent: its null
                token is there instead.
            drop: samples whose condition is replaced by the null tokens (condition dropout): boolean `[B]` for all
                streams alike, or `[B, S]` for each of `stream_names`.

        Raises:
            UserError: a stream is missing, unknown or has another width than configured, or all are absent.
        """
        streams, drops = self._present(streams, drop)
        self._check_streams(streams)
        prepared = [streams[name] for name in self.stream_names]
        tokens = [self._tokens(name, stream.tokens, drops[name]) for name, stream in zip(self.stream_names, prepared)]
        emb = None
        for name in self.pooled:
            if streams[name].pooled is None:
                raise UserError(
                    f"stream {name!r} has no pooled vector: conditioning {self.config.conditioning!r} needs one"
                )
            term = self.pooled[name](self._tokens(name, streams[name].pooled, drops[name]))
            emb = term if emb is None else emb + term
        if emb is None:
            batch = tokens[0].shape[0] if tokens else 1
            emb = self.conv_in.weight.new_zeros(batch, self.config.emb_dim)
        lengths = [stream.lengths for stream in prepared]
        if not self.use_tokens or all(length is None for length in lengths):
            lengths = None
        else:
            full = [torch.full_like(prepared[0].tokens[:, 0, 0], t.shape[1], dtype=torch.int64) for t in tokens]
            lengths = torch.stack([f if n is None else n.to(f) for f, n in zip(full, lengths)], 1)
            if drop is not None:
                # the null token stands for the stream at every place, present before or not
                lengths = torch.where(drop if drop.ndim == 2 else drop[:, None], torch.stack(full, 1), lengths)
        made = self._project(tokens if self.use_tokens else [], emb, lengths)
        if self.config.fusion == "parallel" or not made.sizes:
            return made
        # copies of a null token would weigh by their number, and `null` has one
        absent = [made.emb.new_zeros(len(made.emb), dtype=torch.bool) if d is None else d for d in drops.values()]
        return concatenated(made, torch.stack(absent, 1))

    def null(self, batch: int) -> Condition:
        """The unconditional branch `[batch, ...]`: one null token per stream, the same softmax as M copies of it."""
        like = self.conv_in.weight
        streams = {}
        for name in self.stream_names:
            blank = like.new_zeros(batch, 1, self.config.streams[name])
            streams[name] = Stream(blank, blank[:, 0])
        if not streams:
            return Condition((), (), like.new_zeros(batch, self.config.emb_dim), None, ())
        return self.condition(streams, torch.ones(batch, dtype=torch.bool, device=like.device))

    def forward(
        self, z: Tensor, logsnr: Tensor, condition: Condition, hidden: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict v = alpha * eps - sigma * x.

        Args:
            z: `[B, 3, S, S]` noised image.
            logsnr: `[B]` log signal-to-noise ratio.
            condition: from `condition()` or `null()`; its embedding may be one for each block, `[B, blocks, E]`.
            hidden: return hidden states too, those after so many transformer blocks (at least one).

        Returns:
            `[B, 3, S, S]` in z's dtype: fp32 latents keep their digits in front of a network of lower precision. With
            `hidden` also the hidden states `[B, N, C]` of the transformer's grid, row by row.
        """
        noise = self.embed_noise(logsnr)
        if condition.emb.ndim == 3:
            embs = iter(F.silu(noise[:, None] + condition.emb).unbind(1))
        else:
            embs = repeat(F.silu(noise + condition.emb))
        keys_values = (
            zip(condition.keys, condition.values) if self.use_tokens else [None] * len(self.transformer_blocks)
        )
        # latents may stay fp32 in front of a network of half precision; under autocast this changes nothing
        x = self.conv_in(z.to(self.conv_in.weight.dtype))
        x, states = self.walk(x, embs, keys_values, condition.sizes, condition.lengths, hidden)
        # a narrow network cannot carry the noise of a patch through to v, but the image it can name
        wide = torch.promote_types(z.dtype, torch.float32)
        alpha, sigma = alpha_sigma(logsnr.to(wide)[:, None, None, None])
        v = ((alpha * z.to(wide) - x.to(wide)) / sigma.clamp(min=SIGMA_MIN)).to(z.dtype)
        return v if hidden is None else (v, states)

    def walk(
        self,
        x: Tensor,
        embs: Iterator[Tensor],
        keys_values: Iterable[tuple[Tensor, ...] | None],
        sizes: tuple[int, ...],
        lengths: Tensor | None,
        hidden: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Down, through the transformer, and up again: from what `conv_in` gives to an estimate of the image.

        Args:
            x: `[B, C, S / patch, S / patch]`.
            embs: for each block, in the order of computation, what its forward takes: an activated embedding
                `[B, E]`, or the modulation itself where its projection was taken out.
            keys_values: for each transformer block, what its cross-attention takes.
            sizes, lengths: as in `Condition`. hidden: as in `forward`.

        Returns:
            The image `[B, 3, S, S]`, and the hidden states that were asked for.
        """
        run, skips, states = block_runner(self), [], None
        for blocks, down in zip(self.down_blocks, self.downsamplers):
            for block in blocks:
                x = run(block, x, next(embs))
                skips.append(x)
            x = down(F.avg_pool2d(x, 2))

        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
        rope = (self.rope_cos, self.rope_sin)
        for number, (block, pair) in enumerate(zip(self.transformer_blocks, keys_values, strict=True), 1):
            x = run(block, x, next(embs), rope, pair, sizes, lengths)
            if number == hidden:
                states = x
        x = x.transpose(1, 2).unflatten(2, (height, width))

        for blocks, up in zip(reversed(self.up_blocks), reversed(self.upsamplers)):
            x = F.interpolate(up(x), scale_factor=2.0, mode="nearest")
            for block in blocks:
                x = run(block, block.join(x, skips.pop()), next(embs))
        return F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.config.patch_size), states

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Of what is sampled, `(channels, S, S)`."""
        return self.config.in_channels, self.config.image_size, self.config.image_size

    @property
    def blocks(self) -> tuple[list[ResBlock], list[TransformerBlock], list[ResBlock]]:
        """All repeated blocks in the order of computation: on the way down, in the transformer, on the way up."""
        down, up = (
            [block for level in levels for block in level] for levels in (self.down_blocks, reversed(self.up_blocks))
        )
        return down, [*self.transformer_blocks], up

    def embedding(self, logsnr: Tensor) -> Tensor:
        """Embeddings `[N, E]` of noise levels `[N]`, to which a condition's is added."""
        return self.embed_noise(logsnr)

    def first_blocks(self, count: int) -> tuple[bool, ...]:
        """Of all blocks in the order of computation, which are among the first of their part (way down, transformer,
        way up)."""
        return tuple(i < count for part in self.blocks for i in range(len(part)))

    def _present(
        self, streams: Mapping[str, Stream | None], drop: Tensor | None
    ) -> tuple[dict[str, Stream], dict[str, Tensor | None]]:
        """All streams, blank ones in the place of absent ones, and for each the samples that get its null token."""
        there = [stream for stream in streams.values() if stream is not None]
        if streams and not there:
            raise UserError(f"all of {', '.join(streams)} are absent: give one, or take the null condition")
        each = dict(zip(self.stream_names, drop.unbind(1))) if drop is not None and drop.ndim == 2 else {}
        drops, made = {name: each.get(name, drop) for name in self.stream_names}, {}
        for name, stream in streams.items():
            if stream is None and name in drops:
                blank = self.conv_in.weight.new_zeros(len(there[0].tokens), 1, self.config.streams[name])
                stream, drops[name] = Stream(blank, blank[:, 0]), blank.new_ones(len(blank), dtype=torch.bool)
            made[name] = stream
        return made, drops

    def _tokens(self, name: str, tokens: Tensor, drop: Tensor | None) -> Tensor:
        tokens = self.norm_tokens[name](tokens)
        if drop is None:
            return tokens
        return torch.where(drop.view(-1, *[1] * (tokens.ndim - 1)), self.null_tokens[name].to(tokens.dtype), tokens)

    def _project(self, tokens: list[Tensor], emb: Tensor, lengths: Tensor | None) -> Condition:
        if not tokens:
            return Condition((), (), emb, None, ())
        pairs = [block.cross.keys_values(tokens) for block in self.transformer_blocks]
        keys, values = zip(*pairs)
        return Condition(keys, values, emb, lengths, tuple(t.shape[1] for t in tokens))

    def _check_streams(self, streams: Mapping[str, Stream]) -> None:
        if set(streams) != set(self.stream_names):
            raise UserError(f"condition streams are {sorted(streams)}: expected {sorted(self.stream_names)}")
        for name, stream in streams.items():
            if stream.tokens.ndim != 3 or stream.tokens.shape[-1] != self.config.streams[name]:
                shape = tuple(stream.tokens.shape)
                raise UserError(f"stream {name!r} has tokens {shape}: expected [B, M, {self.config.streams[name]}]")


def concatenated(condition: Condition, absent: Tensor) -> Condition:
    """All streams as one, under one softmax: of an absent stream one token, and what is there before what is not.

    absent: boolean `[B, S]`.
    """
    full = torch.tensor(condition.sizes, device=absent.device).expand(absent.shape)
    lengths = torch.where(absent, 1, full if condition.lengths is None else condition.lengths)
    places = [torch.arange(size, device=absent.device) for size in condition.sizes]
    there = torch.cat([place < lengths[:, s, None] for s, place in enumerate(places)], 1)
    order = (~there).to(torch.uint8).argsort(dim=1, stable=True)[..., None, None]
    keys, values = (
        tuple(torch.take_along_dim(array, order, 1) for array in arrays)
        for arrays in (condition.keys, condition.values)
    )
    return Condition(keys, values, condition.emb, there.sum(1, keepdim=True), (sum(condition.sizes),))


def check(image_size, patch_size, channels, depths, width, heads, streams, conditioning):
    step = patch_size * 2 ** len(channels)
    if image_size < step or image_size % step:
        raise UserError(f"image_size={image_size} is not divisible by {step} (patch size times down-sampling)")
    if len(channels) != len(depths) or not channels:
        raise UserError(f"channels={list(channels)} and depths={list(depths)} must have the same length, at least 1")
    if width % heads or width // heads % 4:
        raise UserError(f"width={width} must split into {heads} heads whose dimension is a multiple of 4")
    if conditioning not in CONDITIONING:
        raise UserError(f"conditioning={conditioning!r}: expected one of {', '.join(CONDITIONING)}")
    if conditioning != "none" and not streams:
        raise UserError(f"conditioning={conditioning!r} needs at least one stream, such as streams={{'image': 384}}")
