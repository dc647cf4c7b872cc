"""Self-attention backends: named ones run or are refused, "auto" says what it took and why."""

import pytest
import torch

from semantica import UserError, UViT
from semantica.model.attention import agree, backends, choose, probe, set_attention
from semantica.model.layers import SelfAttention


def model():
    return UViT(image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, streams={"image": 16})


def in_use(net):
    return {m.processor._attention_backend.value for m in net.modules() if isinstance(m, SelfAttention)}


def test_auto_on_a_cpu_is_sdpa_and_says_why():
    net = model()
    name, reason = set_attention(net, "auto", "cpu")
    assert name == "native" and "CUDA" in reason and in_use(net) == {name}
    # unfused for few tokens in bf16 only
    assert [choose("cpu", (64,), n, torch.bfloat16)[0] for n in (64, 256)] == ["_native_math", "native"]


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash"])
def test_a_backend_asked_for_by_name_is_used_and_agrees(name):
    net = model().double()
    attn = net.transformer_blocks[0].attn
    x, cos, sin = torch.randn(2, 16, 64, dtype=torch.float64), net.rope_cos, net.rope_sin
    expected = attn(x, cos, sin)
    set_attention(net, name, "cpu")
    assert in_use(net) == {name}
    torch.testing.assert_close(attn(x, cos, sin), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["flash", "_flash_3", "sage", "xformers", "_native_cudnn", "flash_hub", "fastest"])
def test_a_named_backend_that_cannot_run_is_an_error_and_changes_nothing(name):
    net = model()
    set_attention(net, "native", "cpu")
    with pytest.raises(UserError, match=f"attention backend '{name}' cannot run on cpu") as caught:
        set_attention(net, name, "cpu")
    assert "\n" not in str(caught.value) and in_use(net) == {"native"}


def test_diffusers_own_switch_reaches_the_layers():
    net = model()
    net.set_attention_backend("_native_math")
    assert in_use(net) == {"_native_math"}
    net.set_attention_backend("native")
    with pytest.raises(ValueError, match="must be one of"):
        net.set_attention_backend("fastest")


def test_a_backend_with_wrong_results_does_not_pass():
    right = torch.randn(4, 4)
    assert agree(right, right + 1e-6) and not agree(right, right + 1e-3)
    assert probe("native", "cpu", (32, 64), torch.bfloat16) is None
    assert "unknown" in probe("fastest", "cpu", (32,), torch.float32) and "native" in backends()
