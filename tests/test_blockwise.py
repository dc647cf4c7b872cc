"""Self-attention by blocks of queries: its numbers, its bounds, and where it serves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from semantica.fused import blockwise
from semantica.fused.blockwise import attention_in_blocks
from semantica.fused.processors import FusedAttnProcessor


def drawn(batch, tokens, heads, dim, count=3):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, dim, generator=g).bfloat16() for _ in range(count)]


@pytest.mark.parametrize("factor", [1, 12])
@pytest.mark.parametrize("tokens, heads, dim", [(257, 3, 40), (1100, 2, 80), (300, 5, 64)])
def test_it_is_as_accurate_as_pytorchs_kernel(tokens, heads, dim, factor, monkeypatch):
    """Also where logits are large: bf16 has no digits for what is behind their point."""
    # several blocks, the last one shorter
    monkeypatch.setattr(blockwise, "LOGITS", 1 << 16)
    q, k, v = drawn(2, tokens, heads, dim)
    q = (q * factor).contiguous()
    given = [a.transpose(1, 2) for a in (q, k, v)]
    exact = F.scaled_dot_product_attention(*(a.double() for a in given)).transpose(1, 2)
    stock = F.scaled_dot_product_attention(*given).transpose(1, 2)
    made = attention_in_blocks(q, k, v)
    assert made.shape == q.shape and made.is_contiguous() and torch.equal(made, attention_in_blocks(q, k, v))
    error, allowed = (made.double() - exact).abs(), (stock.double() - exact).abs()
    assert error.max() <= 3 * allowed.max() and error.mean() <= 2 * allowed.mean()


@pytest.mark.parametrize("shape", [(0, 8, 2, 16), (1, 0, 2, 16)])
def test_nothing_gives_nothing(shape):
    nothing = torch.zeros(shape, dtype=torch.bfloat16)
    assert attention_in_blocks(nothing, nothing, nothing).shape == shape


def test_the_operator_is_one():
    q, k, v = drawn(1, 300, 2, 16)
    torch.library.opcheck(attention_in_blocks, (q, k, v))


@pytest.mark.parametrize("layout", ["tokens", "pictures"])
@torch.no_grad()
def test_a_processor_gives_what_diffusers_does(layout, monkeypatch):
    monkeypatch.setattr(blockwise, "SLOW", True)
    torch.manual_seed(0)
    # as in autoencoders, and as in transformer blocks
    others = {"residual_connection": True, "norm_num_groups": 8, "rescale_output_factor": 2}
    attn = Attention(64, heads=2, dim_head=168, bias=True, **(others if layout == "pictures" else {})).bfloat16()
    x = torch.randn((2, 64, 16, 18) if layout == "pictures" else (2, 288, 64)).bfloat16()
    short = x[..., :2].contiguous() if layout == "pictures" else x[:, :32]
    attn.set_processor(FusedAttnProcessor())
    calls = []
    monkeypatch.setattr(blockwise, "attention_in_blocks", lambda *a: calls.append(a) or attention_in_blocks(*a))
    made, few = attn(x), attn(short)
    assert len(calls) == 1
    attn.set_processor(AttnProcessor2_0())
    stock, wide = attn(x), copy.deepcopy(attn).double()(x.double())
    assert (made.double() - wide).abs().max() <= 2 * (stock.double() - wide).abs().max()
    assert torch.equal(few, attn(short))


def test_it_serves_no_other_type_device_or_transform(monkeypatch):
    monkeypatch.setattr(blockwise, "SLOW", True)
    attn, hidden = Attention(8).requires_grad_(False), torch.zeros(1, 300, 8, dtype=torch.bfloat16)
    assert blockwise.serves(attn, hidden, 300) and not blockwise.serves(attn, hidden, 64)
    assert not blockwise.serves(attn, hidden.float(), 300) and not blockwise.serves(attn, hidden.to("meta"), 300)
    assert not torch.func.vmap(lambda a: a + blockwise.serves(attn, a, 300))(hidden).any()
    with torch.autograd.forward_ad.dual_level():
        assert not blockwise.serves(attn, hidden, 300)


@pytest.mark.parametrize("which", ["activations", "a parameter"])
def test_what_has_a_gradient_stays_with_pytorch(which, monkeypatch):
    monkeypatch.setattr(blockwise, "SLOW", True)
    attn = Attention(8, heads=2, dim_head=8).bfloat16().requires_grad_(False)
    attn.set_processor(FusedAttnProcessor())
    x = torch.randn(1, 300, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    (x if which == "activations" else attn.to_q.weight).requires_grad_()
    attn(x).float().square().sum().backward()
    grad = x.grad if which == "activations" else attn.to_q.weight.grad
    assert grad.isfinite().all() and grad.any()
    with torch.no_grad():
        assert blockwise.serves(attn, x, 300)


@torch.no_grad()
def test_an_exported_program_is_of_pytorchs_operators(monkeypatch):
    monkeypatch.setattr(blockwise, "SLOW", True)
    attn, x = Attention(8, heads=2, dim_head=8).bfloat16(), torch.zeros(1, 300, 8, dtype=torch.bfloat16)
    attn.set_processor(FusedAttnProcessor())
    targets = {str(node.target) for node in torch.export.export(attn, (x,)).graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in targets and not any("semantica" in name for name in targets)
