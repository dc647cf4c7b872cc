"""Launches of the Triton kernels of `attention_moments`: all to be compiled; those of one call to be tuned."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from semantica.kernels.attention_moments.backward import plan_backward
from semantica.kernels.attention_moments.forward import plan_forward
from semantica.kernels.launch import Launch

EVERY = (True, True, True)


def specimens() -> Iterator[tuple[str, list[Launch]]]:
    """Labelled launches of every kernel, ladder row and kind of features, planned on the meta device."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # coordinates in fp32, activations in q's own type
    cases = [(dim, 77, bf16, 6, fp32, False) for dim in (40, 64, 128, 160)]
    cases += [(dim, 256, bf16, 320, bf16, True) for dim in (40, 64, 128, 160)]
    cases += [(64, 257, fp16, 6, fp16, False), (64, 77, fp32, 6, fp32, False), (160, 77, fp32, 320, fp32, True)]
    for dim, keys, dtype, features, of_features, ragged in cases:
        batch, queries, heads = 2, 4096, 8

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = new(batch, queries, heads, dim, dtype=dtype), new(batch, keys, heads, dim, dtype=dtype)
        lse = new(batch, heads, 2, queries)[:, :, 0]
        f = new(batch if ragged else 1, queries, features, dtype=of_features)
        lengths = new(batch, dtype=torch.int32) if ragged else None
        launches, (out,) = plan_forward(q, k, lse, f, lengths)
        launches += plan_backward(out, q, k, lse, f, lengths, EVERY)[0]
        names = [str(a).removeprefix("torch.") for a in (dtype, of_features)]
        yield f"D={dim} M={keys} F={features} {names[0]} of {names[1]}" + " lengths" * ragged, launches


def planners(q, k, lse, features, lengths, q_weight) -> list[Callable[[], list[Launch]]]:
    """What plans the forward, and what the backward, of one call."""
    features = features if features.ndim == 3 else features[None]
    dm = torch.randn((*lse.shape[:2], k.shape[1], features.shape[-1]), device=q.device)
    return [
        lambda: plan_forward(q, k, lse, features, lengths)[0],
        lambda: plan_backward(dm, q, k, lse, features, lengths, EVERY)[0],
    ]
