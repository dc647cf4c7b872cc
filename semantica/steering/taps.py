"""What a denoiser's cross-attention looks at, read while it runs: statistics of objects, no attention map is stored."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from semantica.errors import UserError
from semantica.fused.denoiser import UNetDenoiser
from semantica.kernels import attention_columns, attention_moments, cross_attention
from semantica.kernels.attention_moments.op import normalised
from semantica.kernels.cross_attention.op import HEAD_DIMS
from semantica.model.layers import CrossAttentionProcessor
from semantica.model.uvit import UViT
from semantica.recorded import recorded
from semantica.steering import energies
from semantica.steering.objects import Objects

# the statistics that can be asked for
MOMENTS, MAPS, APPEARANCE = "moments", "maps", "appearance"
# SDXL: layers of its decoder at the lowest resolution, whose maps are the cleanest
XL_LAYERS = tuple(f"up_blocks.0.attentions.1.transformer_blocks.{i}.attn2" for i in (1, 2, 3))


@dataclass(frozen=True)
class Taps:
    """Which parts of a denoiser are read.

    layers: names of cross-attentions, see `crossings`. By default all blocks of a `UViT`; of a UNet those in the middle
        and on the way up; of SDXL `XL_LAYERS`.
    activations: name of the module whose output appearance is gathered from. By default the last residual block but
        one on the way up.
    stream: whose tokens the objects are; by default the first one.
    """

    layers: tuple[str, ...] | None = None
    activations: str | None = None
    stream: str | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """Statistics of S objects in one call of a denoiser.

    moments: of each layer `[B, S, 3]`, the sums over its grid of A, A x, A y with centred x and y, see
        `energies.grid_features`. maps: of each layer A `[B, S, h, w]`. appearance: `[B, S, C]`. All of them fp32.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    appearance: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Seen":
        """Apply a function to every tensor."""
        moments, maps = ({name: function(a) for name, a in part.items()} for part in (self.moments, self.maps))
        return Seen(moments, maps, None if self.appearance is None else function(self.appearance))


def network(denoiser: Any) -> nn.Module:
    """The module inside a denoiser. Raises `UserError` for one whose attention cannot be read."""
    if isinstance(denoiser, UNetDenoiser):
        return denoiser.unet
    if isinstance(denoiser, UViT):
        return denoiser
    raise UserError(f"{type(denoiser).__name__} cannot be steered: its attention is not read; use a UViT or a UNet")


def crossings(denoiser: Any) -> dict[str, nn.Module]:
    """Its cross-attentions by name, in the order of computation."""
    module = network(denoiser)
    if isinstance(denoiser, UNetDenoiser):
        names = {part: name for name, part in module.named_modules()}
        found = {names[part]: part for part in module.crossings}
        # the middle is defined after the way up, and computed before
        order = ("down", "mid", "up")
        return dict(sorted(found.items(), key=lambda pair: order.index(pair[0].partition("_")[0])))
    blocks = enumerate(module.transformer_blocks)
    return {f"transformer_blocks.{i}.cross": block.cross for i, block in blocks if block.cross is not None}


def default_layers(denoiser: Any) -> tuple[str, ...]:
    found = crossings(denoiser)
    if isinstance(denoiser, UNetDenoiser):
        if set(XL_LAYERS) <= set(found):
            return XL_LAYERS
        return tuple(name for name in found if not name.startswith("down_blocks")) or tuple(found)
    return tuple(found)


def default_activations(denoiser: Any) -> str:
    module = network(denoiser)
    if isinstance(denoiser, UNetDenoiser):
        last = len(module.up_blocks) - 1
        names = [f"up_blocks.{last}.resnets.{i}" for i in range(len(module.up_blocks[last].resnets))]
    else:
        levels = [(i, len(blocks)) for i, blocks in enumerate(module.up_blocks)]
        names = [f"up_blocks.{i}.{j}" for i, count in reversed(levels) for j in range(count)]
    return names[-2:][0]


class Reader:
    """Reads statistics of objects in calls of one denoiser.

    Raises:
        UserError: a denoiser, layer, module or stream that is not there, or heads that no operator serves.
    """

    def __init__(self, denoiser: Any, taps: Taps, objects: Objects, wanted: Sequence[str]):
        found, parts = crossings(denoiser), dict(network(denoiser).named_modules())
        self.most, self.wanted = int(objects.index.max()), frozenset(wanted)
        self.objects = objects.to(denoiser.device)
        if not found:
            raise UserError("this model has no cross-attention to tokens: steering needs conditioning 'tokens'")
        self.layers = taps.layers or default_layers(denoiser)
        for name in self.layers:
            if name not in found:
                raise UserError(f"no cross-attention is called {name!r}: there are {', '.join(found)}")
        self.crossings = {name: found[name] for name in found if name in self.layers}
        self.activations = taps.activations or default_activations(denoiser)
        if self.activations not in parts:
            raise UserError(f"no module is called {self.activations!r}: see the model's named_modules()")
        self.psi = parts[self.activations]
        stream = taps.stream or denoiser.stream_names[0]
        if stream not in denoiser.stream_names:
            raise UserError(f"no stream is called {stream!r}: there are {', '.join(denoiser.stream_names)}")
        self.stream = denoiser.stream_names.index(stream)

    @contextmanager
    def watching(self, z: Tensor) -> Iterator[Callable[[], Seen]]:
        """While one call of the denoiser on z runs, and its gradient; yields what gives its statistics after it.

        Ask for them before the gradient: blocks that run again for it read again, as they must to make the same graph.
        """
        ratio = z.shape[-2] / z.shape[-1]
        moments: dict[str, Tensor] = {}
        maps: dict[str, Tensor] = {}

        def reading(name: str) -> Callable[..., Tensor]:
            def read(q, keys, values, sizes, lengths=None, q_weight=None):
                out, moments[name], maps[name] = self.attend(name, ratio, q, keys, values, sizes, lengths, q_weight)
                return out

            return read

        with ExitStack() as undo:
            for name, attn in self.crossings.items():
                undo.enter_context(tapped(attn, reading(name)))
            outputs = undo.enter_context(recorded({"psi": self.psi} if APPEARANCE in self.wanted else {}))

            def gather() -> Seen:
                found = None
                if APPEARANCE in self.wanted:
                    shapes = energies.shape(maps[tuple(self.crossings)[-1]])
                    found = energies.appearance(as_picture(outputs["psi"], ratio), shapes)
                given = ({n: a for n, a in part.items() if a is not None} for part in (moments, maps))
                return Seen(*given, found)

            yield gather

    def attend(self, name, ratio, q, keys, values, sizes, lengths, q_weight):
        """One attention: its result, and of the objects' tokens moments `[B, S, 3]` and maps `[B, S, h, w]`."""
        if q.shape[-1] not in HEAD_DIMS:
            raise UserError(f"{name} has heads of width {q.shape[-1]}: multiples of 8 from 16 to 160 can be steered")
        out, lse = cross_attention(q, keys, values, sizes, lengths, q_weight=q_weight, return_lse=True)
        start, count = sum(sizes[: self.stream]), sizes[self.stream]
        self.check(count, len(q))
        own, lse = keys[:, start : start + count], lse[:, :, self.stream]
        length = None if lengths is None else lengths[:, self.stream]
        q = normalised(q, q_weight)
        index, member = (a.expand(len(q), *a.shape[1:]) for a in (self.objects.index, self.objects.member))
        height, width = grid_of(q.shape[1], ratio)
        moments = maps = None
        if MOMENTS in self.wanted:
            features = energies.grid_features(height, width, q.device)
            rows = index[:, :, None, None].expand(-1, -1, *own.shape[2:])
            # keys of the objects alone; where some are missing, the operator has to know their places
            some = own.gather(1, rows) if length is None else own
            made = attention_moments(q, some, lse, features, length).mean(1)
            if length is not None:
                made = made.gather(1, index[:, :, None].expand(-1, -1, made.shape[-1]))
            moments = member.to(made.dtype).transpose(1, 2) @ made
        if MAPS in self.wanted or APPEARANCE in self.wanted:
            # one row for all samples as it is: expanded, each call would copy it and plan anew
            tokens = self.objects.index if len(self.objects.index) == len(q) else self.objects.index[0]
            columns = attention_columns(q, own, lse, tokens, length).mean(1)  # [B, N, T]
            maps = (columns @ member.to(columns.dtype)).transpose(1, 2).unflatten(2, (height, width))
        return out, moments, maps

    def check(self, tokens: int, batch: int) -> None:
        """Raises `UserError` where objects do not fit what is denoised."""
        own = len(self.objects.index)
        if own not in (1, batch):
            raise UserError(f"objects of {own} samples for a batch of {batch}: give one, or as many")
        if self.most >= tokens:
            raise UserError(f"an object has token {self.most}: the stream has tokens 0 to {tokens - 1}")


@contextmanager
def tapped(attn: nn.Module, read: Callable[..., Tensor]) -> Iterator[None]:
    """A cross-attention that is computed by `read(q, keys, values, sizes, lengths, q_weight)` for a while."""
    if isinstance(attn.processor, nn.Module):
        owner, name, other = attn.processor, "inner", read
    else:
        owner, name, other = attn, "processor", TappedProcessor(read)
    before = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, before)


class TappedProcessor(CrossAttentionProcessor):
    """Cross-attention of a `UViT` computed by a reader."""

    def __init__(self, read: Callable[..., Tensor]):
        self.read = read

    def __call__(self, attn, q, keys, values, sizes, lengths):
        return self.read(q, keys, values, sizes, lengths, attn.norm_q.weight)


def grid_of(count: int, ratio: float) -> tuple[int, int]:
    """Height and width of a grid of so many places and a ratio of its sides. Raises `UserError` where there is none."""
    height = round(math.sqrt(count * ratio))
    if not height or count % height:
        raise UserError(f"{count} places are no grid with sides in the ratio {ratio:.3g}: this layer cannot be read")
    return height, count // height


def as_picture(output: Any, ratio: float) -> Tensor:
    """A module's output as `[B, C, h, w]`, from that, `[B, N, C]`, or the first of several."""
    output = output[0] if isinstance(output, tuple) else output
    if output.ndim == 3:
        return output.transpose(1, 2).unflatten(2, grid_of(output.shape[1], ratio))
    return output
