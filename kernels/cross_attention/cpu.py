"""`cross_attention` on the CPU through `semantica._C`: all streams in one pass, the map of a few queries at a time."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from semantica import _C
from semantica.kernels.cross_attention.op import outputs_like

TARGETS = _C.cross_attention_targets()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    lengths: Tensor | None,
    gates: Tensor | None,
    q_weight: Tensor | None,
    return_lse: bool = False,
    target: str = TARGETS[0],
) -> tuple[Tensor, Tensor]:
    o, lse = outputs_like(q, sizes, return_lse)
    q, k, v = (a if a.stride(-1) == 1 else a.contiguous() for a in (q, k, v))
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    gates = None if gates is None else gates.to(torch.float32).contiguous()
    if q_weight is not None:
        # plain torch rounds it too
        q_weight = q_weight.to(q.dtype).to(torch.float32).contiguous()
    strides = (a.stride()[:3] for a in (q, k, v))
    described = shape(q.shape, tuple(sizes), *strides, q.dtype == torch.bfloat16, torch.get_num_threads(), target)
    given = q, k, v, o, lse if return_lse else None, lengths, gates, q_weight
    _C.cross_attention_forward(described, *(0 if a is None else a.data_ptr() for a in given))
    return o, lse


@functools.lru_cache(maxsize=1024)
def shape(
    size: torch.Size,
    sizes: tuple[int, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    bfloat16: bool,
    threads: int,
    target: str,
) -> _C.CrossAttentionShape:
    batch, queries, heads, dim = size
    return _C.CrossAttentionShape(
        batch=batch,
        queries=queries,
        heads=heads,
        dim=dim,
        sizes=sizes,
        q=q,
        k=k,
        v=v,
        bfloat16=bfloat16,
        threads=threads,
        target=target,
    )
