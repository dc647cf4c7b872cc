"""Self-guidance as notebooks do it, every attention map stored whole: what tests and benchmarks compare ours with."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

# properties of the objects of one call: a list of `[B, S, ...]`, by layer, for each name
Properties = dict[str, list[Tensor]]


class StoringProcessor(AttnProcessor):
    """diffusers' attention without a fused kernel; its probabilities are kept, `[B, H, N, M]` of each call."""

    def __init__(self, kept: list[Tensor]):
        self.kept = kept

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        heads = [a.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for a in (
            attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        )]  # fmt: skip
        query, key, value = heads
        probabilities = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
        self.kept.append(probabilities)
        out = (probabilities @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def norm(x: Tensor) -> Tensor:
    low, high = x.flatten(2).min(2).values[..., None, None], x.flatten(2).max(2).values[..., None, None]
    return (x - low) / (high - low + 1e-4)


def properties(maps: Sequence[Tensor], psi: Tensor, sets: Sequence[Sequence[int]]) -> Properties:
    """The paper's equations on stored maps `[B, H, N, M]` and activations `[B, C, h, w]`, for sets of tokens."""
    found: Properties = {"position": [], "size": [], "shape": []}
    for stored in maps:
        side = round(stored.shape[2] ** 0.5)
        mean = torch.stack([stored.mean(1)[..., list(tokens)].mean(-1) for tokens in sets], 1)
        a = mean.unflatten(2, (side, side))  # [B, S, h, w]
        places = (torch.arange(side, device=a.device) + 0.5) / side
        mass = a.sum((2, 3)) + 1e-4
        x, y = (a.sum(2) * places).sum(2) / mass, (a.sum(3) * places).sum(2) / mass
        soft = norm(torch.sigmoid(10 * (norm(a) - 0.5)))
        for name, value in (("position", torch.stack((x, y), -1)), ("size", soft.mean((2, 3))), ("shape", soft)):
            found[name].append(value)
    hard = (F.interpolate(soft.detach(), psi.shape[-2:], mode="bilinear") > 0.5).to(psi.dtype)[:, :, None]
    found["appearance"] = [(hard * psi[:, None]).sum((3, 4)) / (hard.sum((3, 4)) + 1e-4)]
    return found


def gradient(
    run: Callable[[Tensor], Properties], z: Tensor, weights: Mapping[str, float], targets: Mapping[str, Sequence]
) -> Tensor:
    """dE/dz of the weighted mean L1 distances to targets, of each property one for every layer; shapes cut at 1/2."""
    leaf = z.detach().clone().requires_grad_()
    found, total = run(leaf), 0.0
    for what, weight in weights.items():
        goals = [(a > 0.5).to(a.dtype) if what == "shape" else a for a in targets[what]]
        parts = [(a - b).abs().flatten(1).mean(1) for a, b in zip(found[what], goals, strict=True)]
        total = total + weight * (sum(parts) / len(parts)).sum()
    return torch.autograd.grad(total, leaf)[0]


def storing(
    unet: UNet2DConditionModel, sets: Sequence[Sequence[int]], layers: Sequence[str], activations: str
) -> Callable[..., Properties]:
    """`(z, t, tokens, ...) -> properties` by a UNet of diffusers, which it changes.

    layers: names of its cross-attentions whose maps are stored. activations: name of a module.
    """
    maps: list[Tensor] = []
    psi: list[Tensor] = []
    parts = dict(unet.named_modules())
    for name in layers:
        parts[name].set_processor(StoringProcessor(maps))
    parts[activations].register_forward_hook(lambda module, inputs, output: psi.append(output))

    def run(*arguments, **named) -> Properties:
        maps.clear()
        psi.clear()
        unet(*arguments, **named)
        return properties(maps, psi[0], sets)

    return run
