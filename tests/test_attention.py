"""Self-attention backends: named ones run or are refused, "auto" says what it took and why."""

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from torch.nn.functional import scaled_dot_product_attention

from semantica import UserError, UViT, ViTEncoder
from semantica.model import attention, fast
from semantica.model.attention import Use, agree, attempt, backends, choose, probe, set_attention, uses
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
    assert [choose("cpu", [Use(tokens=n)])[0] for n in (64, 256)] == ["_native_math", "native"]


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
    assert probe("native", "cpu", [Use(dim=32), Use()]) is None
    assert "unknown" in probe("fastest", "cpu", [Use()]) and "native" in backends()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_that_round_otherwise_agree_in_half_precision(dtype):
    """Two of them, or one twice where its backward pass adds in another order, differ in the last place."""
    right = torch.linspace(0.5, 4, 100, dtype=torch.float64).to(dtype)
    assert agree(right.nextafter(torch.full_like(right, 9)), right)
    assert not agree(right * 1.1, right)


def right(query, key, value, **_):
    q, k, v = (a.transpose(1, 2) for a in (query, key, value))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


@torch.library.custom_op("semantica_test::forward_only", mutates_args=())
def forward_only(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return right(query, key, value).contiguous()


@forward_only.register_fake
def _(query, key, value):
    return torch.empty_like(query)


def breaks(query, key, value, **_):
    torch._dynamo.graph_break()
    return right(query, key, value)


def short(query, key, value, **_):
    assert query.shape[1] <= 64 and query.shape[2] == 1, "too long"
    return right(query, key, value)


def other_gradient(query, key, value, **_):
    return right(query, key, value) + (query - query.detach())


@pytest.mark.parametrize(
    ("function", "good", "bad", "words"),
    [
        (lambda query, key, value, **_: forward_only(query, key, value), dict(backward=False), {}, "autograd"),
        (breaks, {}, dict(compiled=True), "Unsupported"),
        (short, dict(tokens=64), dict(heads=3), "too long"),
        (other_gradient, dict(backward=False), {}, "its gradient differs"),
    ],
    ids=["no backward", "graph break", "shapes", "wrong gradient"],
)
def test_what_will_run_is_what_is_tried(function, good, bad, words, monkeypatch):
    """Under the name of flash-attention 3, which diffusers registers as an operator without a backward pass."""
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN_3", True)
    monkeypatch.setitem(registry._backends, dispatch.AttentionBackendName._FLASH_3, function)
    cpu, kind = torch.device("cpu"), dict(dtype=torch.float32, tokens=128)
    assert attempt("_flash_3", cpu, Use(**kind | good)) is None
    assert words in attempt("_flash_3", cpu, Use(**kind | bad))


def test_diffusers_flash_attention_3_has_no_backward_pass():
    """Why "auto" does not take it in training; were it otherwise, training should."""
    operator = torch.ops._diffusers_flash_attn_3._flash_attn_forward.default
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "AutogradCUDA")


def test_auto_on_a_gpu_downloads_nothing_and_needs_no_backward_pass_to_sample(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "probe", lambda name, device, wanted: asked.append(name))
    assert choose("cuda", [Use(backward=True)])[0] == "native" and not asked
    assert choose("cuda", [Use(backward=False)], deterministic=True)[0] == "native" and not asked
    assert choose("cuda", [Use(backward=False)])[0] == "_flash_3"
    monkeypatch.setattr(attention, "probe", lambda name, device, wanted: asked.append(name) or "not installed")
    name, reason = choose("cuda", [Use(backward=False)])
    assert name == "native" and "_flash_3: not installed" in reason
    assert not [name for name in asked if name.endswith("_hub")]


def test_each_kind_of_layer_is_tried_with_its_own_shape():
    encoder = ViTEncoder(image_size=16, patch_size=4, width=96, depth=2, heads=3)
    found = uses(torch.nn.ModuleList([model(), encoder]), torch.bfloat16, True, False)
    assert {(use.heads, use.dim) for use in found} == {(2, 32), (3, 32)} and len(found) == 2
    assert {use.heads: use.tokens for use in found}[2] == 16


def test_only_what_is_repeatable_goes_with_deterministic():
    with pytest.raises(UserError, match="'flash' may differ each time: with --deterministic use native"):
        set_attention(model(), "flash", "cpu", deterministic=True)
    assert set_attention(model(), "_native_math", "cpu", deterministic=True)[0] == "_native_math"


def test_sampling_on_a_gpu_takes_the_backend_that_was_set_or_chooses(monkeypatch):
    class OnGpu(UViT):
        device = torch.device("cuda")

    calls = []
    monkeypatch.setattr(attention, "set_attention", lambda net, name, *rest, **how: calls.append((name, *rest, how)))
    for name in (None, "_native_flash"):
        net = OnGpu(image_size=16, channels=(32,), depths=(1,), width=64, depth=2, heads=2, streams={"image": 16})
        if name:
            net.set_attention_backend(name)
        fast.rearrange(net, torch.bfloat16)
    how = (torch.device("cuda"), torch.bfloat16, dict(backward=False, compiled=True))
    assert calls == [("auto", *how), ("_native_flash", *how)]
