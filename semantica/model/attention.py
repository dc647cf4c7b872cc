"""Which self-attention a model runs on: any backend of diffusers' dispatcher, or the best one that works here."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from semantica.errors import UserError
from semantica.model.layers import CrossAttention, CrossAttentionProcessor, SelfAttention, SelfAttentionProcessor

# "auto" tries these before PyTorch's own, and only where no gradient is needed: as diffusers calls flash-attention 3,
# it has no backward pass. PyTorch's own is flash-attention 2 or cuDNN's, so that a package of the former has nothing
# to add; the kernels of the hub are downloads, which only a name asks for
FASTER = ("_flash_3",)
NATIVE, MATH = "native", "_native_math"
# PyTorch's own: all compile, and their backward passes are repeatable where `use_deterministic_algorithms` asks for it
OWN = (NATIVE, MATH, "_native_flash", "_native_efficient")
# up to here PyTorch's unfused attention trains faster in bf16 on a CPU: the fused backward pass took 4 times as long
SHORT = 64
# by how much results and gradients of two backends may differ: some units in the last place, as kernels that sum in
# another order each time do by themselves
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Use:
    """What a model's self-attention has to do.

    heads, dim, tokens: of a layer; dim is that of a head.
    dtype: of its activations; flash-attention knows fp16 and bf16 only.
    backward: whether gradients are needed. compiled: whether it is part of a graph.
    """

    heads: int = 1
    dim: int = 64
    tokens: int = 256
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True
    compiled: bool = False


def uses(model: nn.Module, dtype: torch.dtype, backward: bool, compiled: bool) -> list[Use]:
    """Each kind of self-attention in a model once. Where its owner has no rotary grid the tokens are not known."""
    tokens: dict[SelfAttention, int] = {}
    for owner in model.modules():
        layers = [m for m in owner.modules() if isinstance(m, SelfAttention)] if hasattr(owner, "rope_cos") else []
        tokens |= dict.fromkeys(layers, len(owner.rope_cos) if layers else 0)
    found = [m for m in model.modules() if isinstance(m, SelfAttention)]
    kinds = {(m.heads, m.to_qkv.in_features // m.heads, tokens.get(m, SHORT + 1)) for m in found}
    return [Use(*kind, dtype, backward, compiled) for kind in sorted(kinds)] or [Use(1, 64, SHORT + 1, dtype, backward)]


def backends() -> list[str]:
    """The names that `--attention` and `model.set_attention_backend` take."""
    return sorted(name.value for name in AttentionBackendName)


def set_attention(
    model: nn.Module,
    name: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    backward: bool = True,
    compiled: bool = False,
    deterministic: bool = False,
) -> tuple[str, str]:
    """Make a model's self-attention run on a backend, after what it will have to do was tried on it.

    Args:
        model: any module that holds `SelfAttention` modules.
        name: a backend of diffusers' dispatcher, or "auto": PyTorch's scaled_dot_product_attention, or where no
            gradient is needed flash-attention 3 if that works. "auto" downloads nothing.
        device: where the model runs.
        dtype, backward, compiled: see `Use`.
        deterministic: take none whose backward pass adds in another order each time.

    Returns:
        (backend, reason).

    Raises:
        UserError: the name is unknown, or that backend cannot run here. There is no fallback for a named backend.
    """
    wanted = uses(model, dtype, backward, compiled)
    if deterministic and name not in ("auto", *OWN):
        raise UserError(f"attention backend {name!r} may differ each time: with --deterministic use {', '.join(OWN)}")
    name, reason = choose(device, wanted, deterministic) if name == "auto" else (name, "asked for")
    problem = probe(name, device, wanted)
    if problem:
        raise UserError(f"attention backend {name!r} cannot run on {device}: {problem}; use 'auto' or another backend")
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.set_attention_backend(name)
    return name, reason


def sampling_attention(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Where a model that only samples runs on a GPU: the backend that was set, else the best one, compiled or not.

    Raises:
        UserError: the backend that was set cannot run there.
    """
    if device.type == "cuda":
        layers = (m for m in model.modules() if isinstance(m, SelfAttention))
        chosen = {m.processor._attention_backend for m in layers} - {None}
        name = AttentionBackendName(chosen.pop()).value if chosen else "auto"
        set_attention(model, name, device, dtype, backward=False, compiled=True)


def choose(
    device: torch.device | str, wanted: Sequence[Use] = (Use(),), deterministic: bool = False
) -> tuple[str, str]:
    """The backend that "auto" means on a device, for what a model has to do: (name, reason)."""
    if torch.device(device).type != "cuda":
        why, tokens = "flash-attention needs a CUDA device", max(use.tokens for use in wanted)
        if tokens <= SHORT and wanted[0].dtype == torch.bfloat16:
            return MATH, f"PyTorch SDPA, unfused: {why}; faster than the fused one for {tokens} tokens in bf16 on a CPU"
        return NATIVE, f"PyTorch SDPA: {why}"
    if wanted[0].backward or deterministic:
        return NATIVE, "PyTorch SDPA: it has flash-attention and cuDNN's, with backward passes"
    problems = []
    for name in FASTER:
        problem = probe(name, device, wanted)
        if not problem:
            return name, "what this model does with it was tried and succeeded"
        problems.append(f"{name}: {problem}")
    return NATIVE, f"PyTorch SDPA ({'; '.join(problems)})"


def probe(name: str, device: torch.device | str, wanted: Sequence[Use]) -> str | None:
    """Try what a model will ask of a backend. Returns what is wrong in one line, or None.

    A stale or mismatching package fails in many ways, ImportError only one of them, so whatever it raises counts.
    """
    if name not in backends():
        return f"unknown; the names are {', '.join(backends())}"
    device = torch.device(device)
    cuda = device.type == "cuda"
    # which packages are tried must not decide how a network begins; on a CPU these draws are the same everywhere
    with torch.random.fork_rng(devices=[device] if cuda else [], enabled=cuda):
        # on a CPU, where all there is comes with PyTorch, a few tokens of each kind of head do
        for use in wanted if cuda else sorted({replace(u, heads=1, tokens=64) for u in wanted}, key=lambda u: u.dim):
            problem = attempt(name, device, use)
            if problem:
                return problem
    return None


def attempt(name: str, device: torch.device, use: Use) -> str | None:
    """One layer on a backend and on PyTorch's own: results, and gradients where they are needed."""
    width, given = use.heads * use.dim, {"device": device, "dtype": use.dtype}
    attn = SelfAttention(width, use.heads).to(**given)
    x = torch.randn(1, use.tokens, width, **given, requires_grad=use.backward)
    cos, sin = x.new_ones(use.tokens, use.dim // 2), x.new_zeros(use.tokens, use.dim // 2)
    with torch.set_grad_enabled(use.backward):
        expected = [attn(x, cos, sin)]
        if use.backward:
            expected += torch.autograd.grad(expected[0].sum(), x)
        try:
            with Quiet():
                # the model-level call checks that packages are there; the module-level one only takes the name
                check_requirements(name)
                attn.set_attention_backend(name)
                # tracing is what fails; generating code for it takes seconds and proves no more
                graph = use.compiled and name not in OWN
                run = torch.compile(attn, fullgraph=True, backend="aot_eager") if graph else attn
                actual = [run(x, cos, sin)]
                if use.backward:
                    actual += torch.autograd.grad(actual[0].sum(), x)
        except Exception as error:  # noqa: BLE001
            return first_line(error)
    for what, own, other in zip(("result", "gradient"), actual, expected):
        if not agree(own, other):
            return f"its {what} differs from PyTorch's by {(own - other).abs().max():.2g}"
    return None


def check_requirements(name: str) -> None:
    """Raise what diffusers raises where a backend's package is missing; fetch a hub kernel that was asked for."""
    from diffusers.models import attention_dispatch as dispatch

    backend = AttentionBackendName(name)
    dispatch._check_attention_backend_requirements(backend)
    dispatch._maybe_download_kernel_for_backend(backend)


def agree(actual: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCES[actual.dtype]
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
