"""Launches of the Triton kernels of `attention_columns`: all to be compiled; those of one call to be tuned."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from semantica.kernels.attention_columns.backward import plan_backward
from semantica.kernels.attention_columns.forward import plan_forward
from semantica.kernels.launch import Launch

EVERY = (True, True)


def specimens() -> Iterator[tuple[str, list[Launch]]]:
    """Labelled launches of every kernel and ladder row, planned on the meta device."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(dim, bf16, 2) for dim in (40, 64, 128, 160)] + [(64, bf16, 64), (160, bf16, 64), (64, fp16, 2)]
    for dim, dtype, count in [*cases, (64, fp32, 2), (160, fp32, 64)]:
        batch, queries, keys, heads = 2, 4096, 256, 8

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = new(batch, queries, heads, dim, dtype=dtype), new(batch, keys, heads, dim, dtype=dtype)
        lse, tokens = new(batch, heads, 2, queries)[:, :, 0], new(1, count, dtype=torch.int64)
        lengths = new(batch, dtype=torch.int32) if count > 16 else None
        launches, (out,) = plan_forward(q, k, lse, tokens, lengths)
        launches += plan_backward(out, q, k, lse, tokens, lengths, EVERY)[0]
        yield f"D={dim} T={count} {str(dtype).removeprefix('torch.')}", launches


def planners(q, k, lse, tokens, lengths, q_weight) -> list[Callable[[], list[Launch]]]:
    """What plans the forward, and what the backward, of one call."""
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    dc = torch.randn((*lse.shape, tokens.shape[1]), device=q.device)
    return [
        lambda: plan_forward(q, k, lse, tokens, lengths)[0],
        lambda: plan_backward(dc, q, k, lse, tokens, lengths, EVERY)[0],
    ]
