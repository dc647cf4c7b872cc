"""Launches of the Triton kernels of `cross_attention`: all to be compiled; those of one call to be tuned."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from semantica.kernels.cross_attention.backward import plan_backward
from semantica.kernels.cross_attention.forward import forward, plan_forward
from semantica.kernels.launch import Launch

# those of the presets; 40 and 160 are Stable Diffusion 1's, which has 80 too
HEAD_DIMS = (32, 48, 64, 80, 96, 128, 40, 160)


def specimens() -> Iterator[tuple[str, list[Launch]]]:
    """Labelled launches of every kernel, head dim and ladder row, planned on the meta device, to be compiled."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = {"257": (257,), "256": (256,), "2048": (2048,)}
    cases = [(dim, name, bf16, 16, {}) for dim, name in zip(HEAD_DIMS, 3 * list(shapes))]
    cases += [(dim, "77+257", bf16, 16, {"ragged"}) for dim in HEAD_DIMS]
    cases += [(64, "77+257", bf16, 16, set()), (64, "257", bf16, 1, {"lse"}), (128, "257", bf16, 1, {"lse"})]
    cases += [(64, "257", fp16, 16, {}), (64, "257", fp32, 16, {}), (128, "77+257", fp32, 16, {"ragged"})]
    cases += [(dim, "77", dtype, 2, {"lse"}) for dim in (40, 160) for dtype in (bf16, fp32)]
    for dim, name, dtype, batch, extra in cases:
        heads, queries, sizes = 12, 256, [int(size) for size in name.split("+")]

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q = new(batch, queries, heads, dim, dtype=dtype)
        k, v = new(batch, sum(sizes), 2, heads, dim, dtype=dtype).unbind(2)
        ragged = "ragged" in extra
        lengths = new(batch, len(sizes), dtype=torch.int32) if ragged else None
        gates = new(batch, len(sizes), heads) if ragged else None
        weight = None if "lse" in extra else new(dim)
        launches, (o, lse) = plan_forward(q, k, v, sizes, lengths, gates, weight)
        dlse = lse if "lse" in extra else None
        launches += plan_backward(o, q, k, v, o, lse, dlse, sizes, lengths, gates, weight)[0]
        label = " ".join([f"D={dim} M={name} B={batch}", str(dtype).removeprefix("torch."), *extra])
        yield label, launches


def planners(q, k, v, sizes, lengths, gates, q_weight) -> list[Callable[[], list[Launch]]]:
    """What plans the forward, and what the backward, of one call."""
    rest = list(sizes), lengths, gates, q_weight
    o, lse = forward(q, k, v, *rest)
    do = torch.randn_like(o)
    return [lambda: plan_forward(q, k, v, *rest)[0], lambda: plan_backward(do, q, k, v, o, lse, None, *rest)[0]]
