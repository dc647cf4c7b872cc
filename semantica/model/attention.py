"""Which self-attention a model runs on: any backend of diffusers' dispatcher, or the best one that works here."""

import functools
import logging

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import is_kernels_available
from torch import Tensor, nn

from semantica.errors import UserError
from semantica.model.layers import CrossAttention, CrossAttentionProcessor, SelfAttention, SelfAttentionProcessor

# best first: flash-attn 4, 3, 2, from the hub's prebuilt kernels or as installed packages
FLASH = ("flash_4_hub", "_flash_3_hub", "_flash_3", "flash_hub", "flash")
NATIVE, MATH = "native", "_native_math"
# up to here PyTorch's unfused attention trains faster in bf16 on a CPU: the fused backward pass took 4 times as long
SHORT = 64


def backends() -> list[str]:
    """The names that `--attention` and `model.set_attention_backend` take."""
    return sorted(name.value for name in AttentionBackendName)


def set_attention(
    model: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """Make a model's self-attention run on a backend, after a tiny forward and backward pass on it succeeded.

    Args:
        model: any module that holds `SelfAttention` modules.
        name: a backend of diffusers' dispatcher, or "auto": the first flash-attention that works, else "native"
            (PyTorch's scaled_dot_product_attention).
        device: where the model runs.
        dtype: of its activations; flash-attention knows fp16 and bf16 only.

    Returns:
        (backend, reason).

    Raises:
        UserError: the name is unknown, or that backend cannot run here. There is no fallback for a named backend.
    """
    dims = {m.to_qkv.in_features // m.heads for m in model.modules() if isinstance(m, SelfAttention)} or {64}
    tokens = max((m.rope_cos.shape[0] for m in model.modules() if hasattr(m, "rope_cos")), default=SHORT + 1)
    name, reason = choose(device, tuple(dims), tokens, dtype) if name == "auto" else (name, "asked for")
    problem = probe(name, device, tuple(dims), dtype)
    if problem:
        raise UserError(f"attention backend {name!r} cannot run on {device}: {problem}; use 'auto' or another backend")
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.set_attention_backend(name)
    return name, reason


def choose(
    device: torch.device | str,
    head_dims: tuple[int, ...] = (64,),
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[str, str]:
    """The backend that "auto" means on a device, for some head dims and a number of tokens: (name, reason)."""
    if torch.device(device).type != "cuda":
        why = "flash-attention needs a CUDA device"
        if tokens <= SHORT and dtype == torch.bfloat16:
            return MATH, f"PyTorch SDPA, unfused: {why}; faster than the fused one for {tokens} tokens in bf16 on a CPU"
        return NATIVE, f"PyTorch SDPA: {why}"
    problems = []
    for name in FLASH:
        if name.endswith("_hub") and not is_kernels_available():
            continue
        problem = probe(name, device, head_dims, dtype)
        if not problem:
            return name, "a tiny forward and backward pass succeeded"
        problems.append(f"{name}: {problem}")
    return NATIVE, "PyTorch SDPA: no flash-attention works here (" + "; ".join(problems) + ")"


def probe(name: str, device: torch.device | str, head_dims: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Try a backend on a few tokens. Returns what is wrong in one line, or None.

    A stale or mismatching package fails in many ways, ImportError only one of them, so whatever it raises counts.
    """
    if name not in backends():
        return f"unknown; the names are {', '.join(backends())}"
    for dim in head_dims:
        attn = SelfAttention(dim, 1).to(device, dtype)
        x = torch.randn(1, 64, dim, device=device, dtype=dtype, requires_grad=True)
        cos, sin = x.new_ones(64, dim // 2), x.new_zeros(64, dim // 2)
        expected = attn(x, cos, sin)
        try:
            with Quiet():
                # the model-level call checks that packages are there; the module-level one only takes the name
                check_requirements(name)
                attn.set_attention_backend(name)
                actual = attn(x, cos, sin)
                actual.sum().backward()
        except Exception as error:  # noqa: BLE001
            return first_line(error)
        if not agree(actual, expected):
            return f"its result differs from PyTorch's by {(actual - expected).abs().max():.2g}"
    return None


def check_requirements(name: str) -> None:
    """Raise what diffusers raises where a backend's package is missing; fetch a hub kernel that was asked for."""
    from diffusers.models import attention_dispatch as dispatch

    backend = AttentionBackendName(name)
    dispatch._check_attention_backend_requirements(backend)
    dispatch._maybe_download_kernel_for_backend(backend)


def agree(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 2e-2 if actual.dtype == torch.bfloat16 else 1e-5
    return torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for `[B, N, H, D]` as two matrix products.

    For CPUs: PyTorch's fused bf16 attention runs at an eighth of their matrix rate where there is no AMX.
    """
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float().softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


class SelfAttentionProducts(SelfAttentionProcessor):
    """Self-attention as two matrix products."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return products(q, k, v)


class CrossAttentionProducts(CrossAttentionProcessor):
    """Cross-attention as two matrix products for each stream; streams with lengths go to the fused operator."""

    def __call__(self, attn: CrossAttention, q, keys, values, sizes, lengths):
        if lengths is not None:
            return super().__call__(attn, q, keys, values, sizes, lengths)
        q = attn.norm_q(q)
        parts = [products(q, k, v) for k, v in zip(keys.split(sizes, 1), values.split(sizes, 1))]
        return functools.reduce(torch.add, parts)


def attend_by_products(model: nn.Module) -> None:
    """Make all attention of a model run as matrix products."""
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.set_processor(SelfAttentionProducts())
        elif isinstance(module, CrossAttention):
            module.processor = CrossAttentionProducts()


class Quiet:
    """Silence diffusers' and the packages' log lines during a probe."""

    def __enter__(self):
        self.previous = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_):
        logging.disable(self.previous)
