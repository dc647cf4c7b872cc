"""`accelerate` and `restore`: diffusers' models with their modules in the fused form, in place, and back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from semantica.errors import UserError
from semantica.fused.norms import AbsorbedSiLU, FusedGroupNorm, FusedGroupNormSiLU, FusedResnetBlock2D
from semantica.fused.processors import HEAD_DIMS, FusedAttnProcessor, FusedIPAdapterAttnProcessor, head_dim

T = TypeVar("T", bound=nn.Module | DiffusionPipeline)
# what each class became; going back is the same table read the other way
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
    """A norm, residual block or attention of a model. `why`: it stays as it is; empty where it is, or can be, fused."""

    name: str
    kind: str
    why: str = ""


def accelerate(target: T) -> T:
    """Run a diffusers pipeline, or one of its models, on the fused operators from now on; returns the same object.

    GroupNorms take the SiLU after them, and in residual blocks the time embedding; cross-attention to text and to the
    pictures of IP-Adapters is one pass where the fused operator serves device, dtype and head dim (elsewhere it stays
    PyTorch's). Modules change their class for a subclass, as `torch.distributed.fsdp.fully_shard` does: parameters,
    names, hooks and `isinstance` stay, so saving, LoRAs, offloading, slicing and tiling work before and after. Calling
    it again takes what came later, such as an IP-Adapter. `parts` tells what stays as it is, and why.

    Raises:
        UserError: nothing in it can be fused; the object is left as it was.
    """
    found = [(kind, change) for model in models_of(target).values() for kind, _, why, change in walk(model) if not why]
    if not found:
        raise UserError(f"{type(target).__name__} has no GroupNorm and no cross-attention that could be fused")
    for _, change in found:
        change()
    return target


def restore(target: T) -> T:
    """Undo `accelerate`; returns the same object. Nothing happens to what is not accelerated."""
    for model in models_of(target).values():
        for module in model.modules():
            processor = getattr(module, "processor", None)
            for changed in (module, processor):
                if type(changed) in ORIGINAL:
                    changed.__class__ = ORIGINAL[type(changed)]
    return target


def parts(target: nn.Module | DiffusionPipeline) -> list[Part]:
    """Everything that `accelerate` looks at, with the reason where something stays as it is."""
    several = models_of(target)
    return [
        Part(f"{prefix}.{name}" if len(several) > 1 else name, kind, why)
        for prefix, model in several.items()
        for kind, name, why, _ in walk(model)
    ]


def models_of(target: nn.Module | DiffusionPipeline) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"": target}
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UserError(f"{type(target).__name__} is neither a model nor a diffusers pipeline")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def walk(model: nn.Module) -> Iterator[tuple[str, str, str, Callable[[], None]]]:
    """`(kind, name, why it stays, what changes it)` of each part; who is inside a residual block goes with it."""
    taken = set()
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock2D):
            why = block_stays(module)
            if not why:
                taken.update((f"{name}.norm1", f"{name}.norm2"))
            yield "residual block", name, why, lambda module=module: fuse_block(module)
        elif isinstance(module, nn.GroupNorm) and name not in taken:
            yield "norm", name, norm_stays(module), lambda module=module, name=name: fuse_norm(model, module, name)
        elif isinstance(module, Attention) and module.is_cross_attention:
            why = attention_stays(module)
            yield "cross-attention", name, why, lambda module=module: reclass(module.processor, FORMS)


def reclass(thing: Any, forms: dict[type, type]) -> None:
    thing.__class__ = forms.get(type(thing), type(thing))


def stays(module: nn.Module, known: tuple[type, ...]) -> str:
    """Why a module's forward is not to be replaced; empty where it may."""
    if type(module) not in known:
        return f"{type(module).__name__} is another class"
    # a hook that replaced `forward` keeps the old one, and would go on calling it
    return "its forward was replaced by a hook" if "forward" in vars(module) else ""


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
    dim = head_dim(attention)
    return "" if dim in HEAD_DIMS else f"head dim {dim} is not one of {', '.join(map(str, HEAD_DIMS))}"


def fuse_block(block: ResnetBlock2D) -> None:
    reclass(block, FORMS)
    for norm in (block.norm1, block.norm2):
        norm.__class__ = FusedGroupNormSiLU


def fuse_norm(model: nn.Module, norm: nn.GroupNorm, name: str) -> None:
    """A norm by itself; where a `conv_act` SiLU follows `conv_norm_out`, as in every UNet and VAE, with it."""
    owner_name, _, own = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    activation = getattr(owner, "conv_act", None) if own == "conv_norm_out" else None
    if type(activation) in (nn.SiLU, AbsorbedSiLU):
        activation.__class__, norm.__class__ = AbsorbedSiLU, FusedGroupNormSiLU
    else:
        norm.__class__ = FusedGroupNorm
