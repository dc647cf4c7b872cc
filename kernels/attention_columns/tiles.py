"""The Triton functions that the kernels of `attention_columns` share."""

import triton
import triton.language as tl

from semantica.kernels.cross_attention.tiles import padded


@triton.jit
def load_tokens(tokens_ptr, lengths_ptr, b, at, count, keys, WIDTH: tl.constexpr):
    """WIDTH of the chosen tokens, and which of them are there."""
    lanes = at + tl.arange(0, WIDTH)
    tokens = tl.load(tokens_ptr + lanes, mask=lanes < count, other=-1)
    length = keys
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b), keys).to(tl.int32)
    return tokens.to(tl.int64), (tokens >= 0) & (tokens < length)


@triton.jit
def load_chosen(ptr, stride, tokens, there, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of the given tokens, in two blocks as `load_rows` has them; zeros where there is none."""
    start, there = tokens[:, None] * stride, there[:, None]
    a = tl.load(ptr + start + tl.arange(0, D0)[None, :], mask=there, other=0.0)
    b = a
    if D1 > 0:
        columns = tl.arange(0, padded(D1))[None, :]
        b = tl.load(ptr + D0 + start + columns, mask=there & (columns < D1), other=0.0)
    return a, b
