"""Attention of many tokens in bf16 on a CPU, a block of queries at a time, by PyTorch's own matrix products."""

import torch
from torch import Tensor, nn

from semantica.kernels import dispatch

# logits that are there at a time: they stay in the cache between the two products, and each product is large
LOGITS = 1 << 20
# products are fast whose inner size is a multiple of
ALIGNED = 16
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
    """softmax(q k^T / sqrt(D)) v, with sums in fp32.

    PyTorch's products round logits to bf16, and a large logit to few digits. So they are made twice: the first time for
    each query's largest, the second time less that, within the product: then those that weigh are small.

    q `[B, N, H, D]`; k, v `[B, M, H, D]`. Returns `[B, N, H, D]`, contiguous.
    """
    if not q.numel():
        return q.new_empty(q.shape)
    batch, queries, heads, dim = q.shape
    tokens, width = k.shape[1], dim + ALIGNED - dim % ALIGNED
    # one more column: what is taken off the logits of a query, times 1
    wide_q, wide_k = (q.new_zeros(batch * heads, count, width) for count in (queries, tokens))
    for wide, given in ((wide_q, q), (wide_k, k)):
        wide.unflatten(0, (batch, heads))[..., :dim] = given.transpose(1, 2)
    wide_k[..., dim] = 1
    v = v.transpose(1, 2).flatten(0, 1)
    together = min(len(v), torch.get_num_threads())
    rows = min(queries, max(1, LOGITS // (together * tokens)))
    out, logits = v.new_empty(batch * heads, queries, dim), v.new_empty(together, rows, tokens)
    for head in range(0, len(v), together):
        some = slice(head, head + together)
        keys, values = wide_k[some].transpose(1, 2), v[some]
        for row in range(0, queries, rows):
            block = wide_q[some, row : row + rows]
            part = logits[: len(block), : block.shape[1]]
            torch.bmm(block, keys, out=part)
            block[..., dim] = -part.amax(-1)
            # nothing is read of what beta multiplies where it is 0
            torch.baddbmm(part, block, keys, beta=0, alpha=dim**-0.5, out=part)
            torch.softmax(part, -1, out=part)
            torch.bmm(part, values, out=out[some, row : row + rows])
    return out.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()


@attention_in_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)
