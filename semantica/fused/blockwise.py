"""Attention of many tokens in bf16 on a CPU, a block of queries at a time, by PyTorch's own matrix products."""

import torch
from torch import Tensor, nn

from semantica.kernels import dispatch

# logits that are there at a time: they stay in the cache between the two products, and each product is large
LOGITS = 1 << 20
# below so many keys PyTorch's fused attention is not slower
FEWEST = 256
ABLE = torch.cpu.get_capabilities()
# PyTorch's fused kernel multiplies bf16 by AMX alone; with AVX-512's instructions it runs at an eighth of their rate
SLOW = bool(ABLE.get("avx512_bf16")) and not ABLE.get("amx_bf16")


def serves(attn: nn.Module, hidden: Tensor, keys: int) -> bool:
    """Whether `attention_in_blocks` is the faster one for an attention of activations like these.

    It has no gradient of either mode: neither what comes in nor a parameter, such as a LoRA's, may want one. Nor may it
    stand in an exported program, which other machines run, and other runtimes.
    """
    here = SLOW and hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and keys >= FEWEST
    if not here or torch.compiler.is_exporting() or dispatch.transformed():
        return False
    return not dispatch.differentiable((hidden, *attn.parameters()))


@torch.library.custom_op("semantica::attention_in_blocks", mutates_args=(), device_types="cpu")
def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v; logits and weights are rounded to the inputs' type, sums are fp32.

    q `[B, N, H, D]`; k, v `[B, M, H, D]`. Returns `[B, N, H, D]`, contiguous.
    """
    batch, queries, heads, dim = q.shape
    q, k, v = (a.transpose(1, 2).flatten(0, 1) for a in (q * dim**-0.5, k, v))
    together = min(len(q), torch.get_num_threads())
    rows = min(queries, max(1, LOGITS // (together * k.shape[1])))
    out, logits = torch.empty_like(q), q.new_empty(together, rows, k.shape[1])
    for head in range(0, len(q), together):
        some = slice(head, head + together)
        keys, values = k[some].transpose(1, 2), v[some]
        for row in range(0, queries, rows):
            block = q[some, row : row + rows]
            part = logits[: len(block), : block.shape[1]]
            torch.bmm(block, keys, out=part)
            torch.softmax(part, -1, out=part)
            torch.bmm(part, values, out=out[some, row : row + rows])
    return out.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


@attention_in_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)
