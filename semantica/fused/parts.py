"""What of a diffusers model can be fused: its parts by name, how each changes, and why some stay as they are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from semantica.errors import UserError
from semantica.fused.norms import AbsorbedSiLU, FusedGroupNorm, FusedGroupNormSiLU, FusedResnetBlock2D
from semantica.fused.processors import HEAD_DIMS, FusedAttnProcessor, FusedIPAdapterAttnProcessor, head_dim

# what each class becomes; going back is the same table read the other way
FORMS = {
    ResnetBlock2D: FusedResnetBlock2D,
    AttnProcessor2_0: FusedAttnProcessor,
    IPAdapterAttnProcessor2_0: FusedIPAdapterAttnProcessor,
}
ORIGINAL = {form: original for original, form in FORMS.items()} | {
    FusedGroupNorm: nn.GroupNorm,
    FusedGroupNormSiLU: nn.GroupNorm,
    AbsorbedSiLU: nn.SiLU,
}


@dataclass(frozen=True)
class Part:
    """A norm, residual block or attention of a model.

    Attributes:
        name: of the module, with the pipeline's component before it.
        kind: "norm", "residual block" (its two norms included), "cross-attention" or "self-attention".
        why: it stays as it is; empty where it is, or can be, fused.
        fused: whether it is already.
        change: fuses it.
    """

    name: str
    kind: str
    why: str = ""
    fused: bool = False
    change: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)


def parts(target: nn.Module | DiffusionPipeline) -> list[Part]:
    """Everything that `accelerate` looks at, with the reason where something stays as it is."""
    several = models_of(target)
    return [part for prefix, model in several.items() for part in walk(model, f"{prefix}." if len(several) > 1 else "")]


def models_of(target: nn.Module | DiffusionPipeline) -> dict[str, nn.Module]:
    """Raises `UserError` for what is neither a model nor a pipeline."""
    if isinstance(target, nn.Module):
        return {"": target}
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UserError(f"{type(target).__name__} is neither a model nor a diffusers pipeline")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def walk(model: nn.Module, prefix: str = "") -> Iterator[Part]:
    """Each part once: the norms of a residual block go with it."""
    taken = set()
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D):
            why = block_stays(module)
            if not why:
                taken.update((f"{name}.norm1", f"{name}.norm2"))
            kind, done = "residual block", type(module) is FusedResnetBlock2D
            change = lambda module=module: fuse_block(module)  # noqa: E731
        elif isinstance(module, nn.GroupNorm) and name not in taken:
            kind, why, done = "norm", norm_stays(module), isinstance(module, FusedGroupNorm)
            change = lambda module=module, name=name: fuse_norm(model, module, name)  # noqa: E731
        elif isinstance(module, Attention):
            kind = "cross-attention" if module.is_cross_attention else "self-attention"
            why, done = attention_stays(module), type(module.processor) in ORIGINAL
            change = lambda module=module: fuse_processor(module)  # noqa: E731
        else:
            continue
        yield Part(prefix + name, kind, why, done, change)


def become(thing: Any, form: type) -> None:
    """Change the class of a module or processor, not what it holds."""
    # what a hook that was removed put back: the method of the class it had
    vars(thing).pop("forward", None)
    thing.__class__ = form


def hooked(thing: Any) -> bool:
    """Whether a hook replaced `forward`: it keeps the old one, and would go on calling it."""
    own = vars(thing).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(thing).forward


def stays(module: nn.Module, known: tuple[type, ...]) -> str:
    """Why a module's forward is not to be replaced; empty where it may."""
    if type(module) not in known:
        return f"{type(module).__name__} is another class"
    # once it is fused nothing is replaced any more
    return "its forward was replaced by a hook" if hooked(module) and type(module) not in ORIGINAL else ""


def norm_stays(norm: nn.GroupNorm) -> str:
    why = stays(norm, (nn.GroupNorm, FusedGroupNorm, FusedGroupNormSiLU))
    return why or ("" if norm.affine else "it has no weight")


def block_stays(block: ResnetBlock2D) -> str:
    why = stays(block, (ResnetBlock2D, FusedResnetBlock2D)) or norm_stays(block.norm1) or norm_stays(block.norm2)
    activation = type(block.nonlinearity)
    return why or ("" if activation is nn.SiLU else f"its activation is {activation.__name__}, not SiLU")


def attention_stays(attention: Attention) -> str:
    processor = type(attention.processor)
    if processor not in FORMS and processor not in ORIGINAL:
        return f"its processor is {processor.__name__}"
    if not attention.is_cross_attention:
        return ""
    dim, low, high = head_dim(attention), HEAD_DIMS[0], HEAD_DIMS[-1]
    return "" if dim in HEAD_DIMS else f"head dim {dim} is no multiple of {HEAD_DIMS.step} from {low} to {high}"


def fuse_block(block: ResnetBlock2D) -> None:
    become(block, FusedResnetBlock2D)
    for norm in (block.norm1, block.norm2):
        become(norm, FusedGroupNormSiLU)


def fuse_processor(attention: Attention) -> None:
    kind = type(attention.processor)
    become(attention.processor, FORMS.get(kind, kind))


def fuse_norm(model: nn.Module, norm: nn.GroupNorm, name: str) -> None:
    """A norm by itself; where a `conv_act` SiLU follows `conv_norm_out`, as in every UNet and VAE, with it."""
    owner_name, _, own = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    activation = getattr(owner, "conv_act", None) if own == "conv_norm_out" else None
    if type(activation) in (nn.SiLU, AbsorbedSiLU):
        become(activation, AbsorbedSiLU)
        become(norm, FusedGroupNormSiLU)
    else:
        become(norm, FusedGroupNorm)
