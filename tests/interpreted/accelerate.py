"""Cross-attention of diffusers through the Triton kernels in Triton's interpreter, run by tests/test_accelerate.py."""

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0

import semantica
from semantica.errors import warn_once
from semantica.fused.parts import FORMS
from semantica.kernels.cross_attention import forward

TEXT = 24
# of UNets, added to logits: tokens that are there, and those that are not
HERE, GONE = -0.0, -10000.0


@pytest.fixture
def launches(monkeypatch):
    """How often the fused kernel was planned or replayed."""
    counted, run = [], forward.replay.run
    monkeypatch.setattr(forward.replay, "run", lambda *a: counted.append(a) or run(*a))
    return counted


def both(attn: Attention, processor, *arguments, **named) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' processor and its fused form give."""
    stock = processor(attn, *arguments, **named)
    processor.__class__ = FORMS[type(processor)]
    return stock, processor(attn, *arguments, **named)


def attention(dim: int = 40, heads: int = 3) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=dim * heads, cross_attention_dim=TEXT, heads=heads, dim_head=dim).eval()


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("dim", [40, 80, 160])
def test_every_head_dim_of_stable_diffusion(dim, launches):
    attn = attention(dim)
    stock, fused = both(attn, AttnProcessor2_0(), torch.randn(2, 33, 3 * dim), torch.randn(2, 77, TEXT))
    assert near(fused, stock) and len(launches) == 1


@torch.no_grad()
def test_masks_of_keys_become_lengths(launches):
    attn, hidden, tokens = attention(), torch.randn(4, 20, 120), torch.randn(4, 9, TEXT)
    mask = torch.full((4, 1, 9), HERE)
    # a prefix, holes, nothing left, and all
    mask[0, :, 5:], mask[1, :, [0, 3, 8]], mask[2] = GONE, GONE, GONE
    stock, fused = both(attn, AttnProcessor2_0(), hidden, tokens, mask)
    # logits that were all lowered by 10,000 have lost their digits in stock: its own answer without a mask is exact
    stock[2] = AttnProcessor2_0()(attn, hidden[2:3], tokens[2:3])[0]
    assert near(fused, stock) and len(launches) == 1
    # one for each query is no mask of keys
    stock, fused = both(attn, AttnProcessor2_0(), hidden, tokens, mask.expand(4, 20, 9).contiguous())
    assert torch.equal(fused, stock) and len(launches) == 1


@torch.no_grad()
@pytest.mark.parametrize("scale", [[0.7, 0.2], [0.0, 1.0]])
def test_adapters_are_streams_with_their_scale_as_gate(scale, launches):
    attn, hidden = attention(), torch.randn(2, 20, 120)
    given = torch.randn(2, 9, TEXT), [torch.randn(2, 1, 4, TEXT), torch.randn(2, 2, 3, TEXT)]
    # diffusers takes the several pictures of an adapter where there are masks; without, one of them
    given[1][1] = given[1][1][:, :1]
    mask = torch.full((2, 1, 9), HERE)
    mask[0, :, 4:] = GONE
    for masked in (None, mask):
        processor = IPAdapterAttnProcessor2_0(120, TEXT, num_tokens=(4, 3), scale=list(scale)).eval()
        stock, fused = both(attn, processor, hidden, given, masked)
        assert near(fused, stock)
    assert len(launches) == 2 and len(launches[0][1][3]) == 1 + sum(factor != 0 for factor in scale)


@torch.no_grad()
def test_masks_of_pictures_fall_back_and_it_is_said_once(launches, caplog):
    warn_once.cache_clear()
    attn, hidden = attention(), torch.randn(2, 16, 120)
    given = torch.randn(2, 9, TEXT), [torch.randn(2, 1, 4, TEXT)]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            processor = IPAdapterAttnProcessor2_0(120, TEXT, num_tokens=(4,), scale=[0.5]).eval()
            stock, fused = both(attn, processor, hidden, given, ip_adapter_masks=[mask])
            assert torch.equal(fused, stock)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["masks of IP-Adapters: cross-attention to its pictures stays with diffusers' own processor"]
    assert not launches


def test_a_unet_with_a_mask_gives_the_numbers_and_gradients_of_stock(launches):
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=TEXT, sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2),
    )  # fmt: skip
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    given = torch.randn(2, 4, 4, 4), 7, torch.randn(2, 7, TEXT)
    found = []
    for change in (lambda m: m, semantica.accelerate):
        change(model).zero_grad()
        out = model(*given, encoder_attention_mask=mask, return_dict=False)[0]
        out.square().mean().backward()
        found.append((out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert near(found[1][0], found[0][0])
    assert (found[1][1] - found[0][1]).norm() <= 1e-5 * found[0][1].norm()
    assert launches
