"""Outputs of modules kept by hooks: with their graph, through gradient checkpointing, and never longer than asked."""

import pytest
import torch
from torch import nn

from semantica import UViT
from semantica.condition import Stream
from semantica.recorded import recorded


def network() -> UViT:
    torch.manual_seed(0)
    net = UViT(image_size=8, channels=(8,), depths=(1,), width=32, depth=2, heads=2, emb_dim=8, streams={"image": 6})
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.requires_grad_(False)


def features(net: UViT, checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """An inner output, and the gradient through it."""
    if checkpointing:
        net.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_()
    condition = net.condition({"image": Stream(torch.randn(2, 5, 6, generator=generator))})
    with recorded({"attn": net.transformer_blocks[-1].attn}) as found:
        net(z, torch.tensor([0.0, 1.0]), condition)
    (grad,) = torch.autograd.grad(found["attn"].square().sum(), z)
    return found["attn"], grad


def test_gradients_flow_through_what_is_kept_with_checkpointing_too():
    kept, grad = features(network(), False)
    again, regrad = features(network(), True)
    assert kept.shape == (2, 4, 32) and float(grad.abs().max()) > 1e-3
    assert torch.equal(kept, again) and torch.allclose(grad, regrad, rtol=1e-5, atol=1e-7)


def test_the_last_call_is_kept_and_hooks_go_whatever_happens():
    net, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    with recorded({"first": net[0], "other": nn.Linear(2, 2)}) as found:
        net(x)
        net(2 * x)
    assert list(found) == ["first"] and torch.equal(found["first"], net[0](2 * x))
    with pytest.raises(ZeroDivisionError), recorded({"first": net[0]}):
        _ = 1 / 0
    assert not net[0]._forward_hooks
