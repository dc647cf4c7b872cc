"""A trained pipeline as two exported programs, with the fused operators decomposed into their references."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from semantica.condition import Condition
from semantica.engines.network import DTYPES
from semantica.errors import UserError
from semantica.kernels.cross_attention.op import RMS_EPS, cross_attention_ref
from semantica.kernels.group_norm.op import group_norm_ref, statistics_like
from semantica.model.conditioner import encode, encoders_of

MAX_BATCH = 4096
# diffusers copies larger batches before it resizes them; the graph is the same, and runs any
FOREIGN_BATCH = 63


class Denoise(nn.Module):
    """`denoise.onnx`: keys and values come as attention reads them, `[B, H, M, D]`."""

    def __init__(self, unet: nn.Module, sizes: tuple[int, ...]):
        super().__init__()
        self.unet, self.sizes = unet, sizes

    def forward(self, z: Tensor, logsnr: Tensor, keys_values: list[tuple[Tensor, Tensor]], emb: Tensor) -> Tensor:
        keys, values = (tuple(pair[i].transpose(1, 2) for pair in keys_values) for i in (0, 1))
        return self.unet(z, logsnr, Condition(keys, values, emb, None, self.sizes))


class Decode(nn.Module):
    """`decode.onnx`: latents as they are sampled, `[B, C, S, S]`, to images `[B, 3, R, R]` around [-1, 1], both fp32.

    decode: `(vae, latents) -> images`.
    """

    def __init__(self, vae: nn.Module, decode: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.vae, self.decode = vae, decode

    def forward(self, latents: Tensor) -> Tensor:
        return self.decode(self.vae, latents)


class Encode(nn.Module):
    """`condition.onnx`: prepared inputs, one for each encoder, to keys, values and embedding of the denoiser."""

    def __init__(self, unet: nn.Module, encoder: nn.Module):
        super().__init__()
        self.unet, self.encoder = unet, encoder

    def condition(self, *inputs: Tensor) -> Condition:
        """Of prepared inputs in the order of `encoders_of`; pictures and other fractions in the network's precision."""
        cast = [array.to(self.unet.dtype) if array.is_floating_point() else array for array in inputs]
        named = dict(zip(encoders_of(self.encoder), cast, strict=True))
        return self.unet.condition(encode(self.encoder, self.unet.stream_names, named))

    def forward(self, *inputs: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        made = self.condition(*inputs)
        pairs = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(made.keys, made.values)]
        # without any condition there is one embedding for all
        return pairs, made.emb.expand(inputs[0].shape[0], -1)


@dataclass(frozen=True)
class Captured:
    """The programs of one precision, and what they were captured from.

    unet, encoder: in that precision. denoise, encode: programs over aten operators and nothing of this package.
    inputs: names of what the encoders take, in order. sizes: tokens of each stream.
    """

    precision: str
    unet: nn.Module | None
    encoder: nn.Module | None
    denoise: ExportedProgram | None
    encode: ExportedProgram | None
    inputs: tuple[str, ...]
    sizes: tuple[int, ...]

    def without_programs(self) -> "Captured":
        """What can still be said of them once their weights are let go."""
        return replace(self, unet=None, encoder=None, denoise=None, encode=None)


def in_precision(module: nn.Module, precision: str) -> nn.Module:
    """A frozen copy in evaluation mode; of a module that is in the precision, itself."""
    module = module.eval().requires_grad_(False)
    if all(weight.dtype == DTYPES[precision] for weight in module.parameters()):
        return module
    # a denoiser over another network knows what of it stays fp32
    if hasattr(module, "in_precision"):
        return module.in_precision(DTYPES[precision])
    # not the mixin's own `to`, which warns of modules that are kept in fp32 where there are none
    return nn.Module.to(copy.deepcopy(module), DTYPES[precision])


@torch.no_grad()
def capture(unet: nn.Module, encoder: nn.Module, precision: str) -> Captured:
    """Export both halves of a pipeline whose modules are fp32, or in the precision, and on the CPU.

    Raises:
        UserError: an encoder's streams have lengths of their own in each sample.
    """
    unet, encoder = in_precision(unet, precision), in_precision(encoder, precision)
    batch = {0: Dim("batch", min=1, max=FOREIGN_BATCH if hasattr(unet, "in_precision") else MAX_BATCH)}
    # two samples: a dimension of one would be taken for a constant
    inputs = examples(encoder, 2)
    half = Encode(unet, encoder)
    condition = half.condition(*inputs.values())
    if condition.lengths is not None:
        raise UserError("streams whose length differs from sample to sample cannot be exported: a bundle's are fixed")
    pairs, emb = half(*inputs.values())
    # as engines hand them over: what is compiled ahead of time reads inputs in the strides of its examples, unasked
    pairs = [tuple(array.contiguous() for array in pair) for pair in pairs]
    with quiet(), Decomposed():
        shapes = ((batch,) * len(inputs),)
        program = torch.export.export(half, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        sizes, z = condition.sizes, torch.zeros(2, *unet.sample_shape)
        denoise = torch.export.export(
            Denoise(unet, sizes),
            (z, torch.zeros(2), pairs, emb),
            dynamic_shapes=(batch, batch, [(batch, batch)] * len(pairs), batch),
            strict=False,
        )
    return Captured(precision, unet, encoder, denoise, program, tuple(inputs), sizes)


@torch.no_grad()
def capture_decoder(
    vae: nn.Module, decode: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...], precision: str
) -> tuple[nn.Module, ExportedProgram]:
    """An autoencoder in a precision, and its decoder as a program; shape: of one sample of latents."""
    narrow = in_precision(vae, precision)
    batch = {0: Dim("batch", min=1, max=FOREIGN_BATCH)}
    with quiet(), Decomposed():
        half = Decode(narrow, decode)
        return narrow, torch.export.export(half, (torch.zeros(2, *shape),), dynamic_shapes=(batch,), strict=False)


def examples(encoder: nn.Module, count: int) -> dict[str, Tensor]:
    """Prepared inputs of the right shapes and types: blank pictures, and what other encoders give as examples."""
    return {
        name: torch.zeros(count, *part.input_shape) if hasattr(part, "image_size") else part.examples(count)
        for name, part in encoders_of(encoder).items()
    }


def decompositions() -> dict:
    """Fused operator -> its reference; results that inference drops are left empty. And what lacks kernels."""

    def group_norm(x, groups, weight, bias, scale, shift, activation, eps, addend=None):
        y = group_norm_ref(x, groups, weight, bias, scale, shift, activation, eps, addend)
        return y, statistics_like(x, groups), statistics_like(x, groups)

    def cross_attention(q, k, v, sizes, lengths, gates, q_weight, return_lse=False):
        assert lengths is None and gates is None and not return_lse, "a bundle's streams are whole and fixed"
        # one attention node, because TensorRT-RTX 1.7 crashes on two parallel ones
        several = by_heads if len(set(sizes)) == 1 else by_length
        reference = several if len(sizes) > 1 else cross_attention_ref
        return reference(q, k, v, sizes, None, None, q_weight), q.new_empty((0,), dtype=torch.float32)

    ops = torch.ops.semantica
    fused = {ops.group_norm.default: group_norm, ops.cross_attention.default: cross_attention}
    return fused | {F.interpolate: interpolated, F.pixel_shuffle: shuffled}


def interpolated(x: Tensor, size=None, scale_factor: float | None = None, mode: str = "nearest", **options) -> Tensor:
    """`F.interpolate`; nearest by a whole factor `[B, C, H, W]` -> `[B, C, s H, s W]` as copies along new axes.

    The same bits without ONNX's Resize, for which ONNX Runtime has no bf16 kernel on CUDA.
    """
    if size is not None or mode != "nearest" or scale_factor != int(scale_factor):
        return F.interpolate(x, size, scale_factor, mode, **options)
    factor, (channels, height, width) = int(scale_factor), x.shape[1:]
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, factor, -1, factor)
    return x.reshape(-1, channels, height * factor, width * factor)


def shuffled(x: Tensor, factor: int) -> Tensor:
    """`F.pixel_shuffle`, `[B, r r C, H, W]` -> `[B, C, r H, r W]`, without ONNX's DepthToSpace: as `interpolated`."""
    channels, height, width = x.shape[1] // factor**2, *x.shape[2:]
    x = x.reshape(-1, channels, factor, factor, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(-1, channels, height * factor, width * factor)


class Decomposed(TorchFunctionMode):
    """Puts what `decompositions` has for a function in its place while a network is traced.

    What `ExportedProgram.run_decompositions` would do afterwards, without tracing everything once more.
    """

    def __init__(self):
        super().__init__()
        self.table = decompositions()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.table.get(func, func)(*args, **(kwargs or {}))


def by_heads(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], lengths: None, gates: None, q_weight: Tensor) -> Tensor:
    """The reference for streams of one size: a single attention in which each stream is a head more.

    `[B, H, S * M, D]` is `[B, H * S, M, D]` without a copy.
    """
    streams, size = len(sizes), sizes[0]
    q = normed(q, q_weight).transpose(1, 2)  # [B, H, N, D]
    batch, heads, queries, dim = q.shape
    q = q[:, :, None].expand(-1, -1, streams, -1, -1).reshape(batch, heads * streams, queries, dim)
    k, v = (a.transpose(1, 2).reshape(batch, heads * streams, size, dim) for a in (k, v))
    o = F.scaled_dot_product_attention(q, k, v).reshape(batch, heads, streams, queries, dim)
    return o.sum(2).transpose(1, 2)


def by_length(
    q: Tensor, k: Tensor, v: Tensor, sizes: list[int], lengths: None, gates: None, q_weight: Tensor | None
) -> Tensor:
    """The reference for streams of several sizes: attention to the longest, two products and a softmax for the others,
    whose scores are few (an IP-Adapter has 4 or 16 tokens)."""
    q, k, v = (a.transpose(1, 2) for a in (normed(q, q_weight), k, v))  # [B, H, length, D]
    longest, out = sizes.index(max(sizes)), None
    for i, (k_i, v_i) in enumerate(zip(k.split(list(sizes), 2), v.split(list(sizes), 2))):
        if i == longest:
            o = F.scaled_dot_product_attention(q, k_i, v_i)
        else:
            o = (q * q.shape[-1] ** -0.5 @ k_i.transpose(2, 3)).softmax(-1) @ v_i
        out = o if out is None else out + o
    return out.transpose(1, 2)


def normed(q: Tensor, weight: Tensor | None) -> Tensor:
    return q if weight is None else F.rms_norm(q, q.shape[-1:], weight.to(q.dtype), RMS_EPS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's remarks: packages that this model does not use, deprecations between its own parts."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
