"""Columns of an attention map: P_nt = exp(q_n . k_t / sqrt(D) - lse_n) for a few chosen tokens t.

What shape and size energies of self-guidance need (Epstein et al., arXiv 2306.00986, eqs. 6 and 7): the map itself, of
these tokens only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from semantica.kernels import dispatch
from semantica.kernels.attention_moments.op import attention_map, check, normalised, save
from semantica.kernels.cross_attention.op import fused, widen


def there(tokens: Tensor, lengths: Tensor | None, keys: int) -> Tensor:
    """Boolean `[B or 1, T]`: which of the chosen tokens are there."""
    found = (tokens >= 0) & (tokens < keys)
    return found if lengths is None else found & (tokens < lengths[:, None])


def chosen(k: Tensor, tokens: Tensor) -> Tensor:
    """Rows of k `[B, H, T, D]`; of tokens that are not there any."""
    k, batch = widen(k).transpose(1, 2), k.shape[0]
    index = tokens.clamp(0, k.shape[2] - 1).long().expand(batch, -1)[:, None, :, None]
    return k.gather(2, index.expand(-1, k.shape[1], -1, k.shape[3]))


def attention_columns_ref(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    tokens: Tensor,
    lengths: Tensor | None = None,
    q_weight: Tensor | None = None,
) -> Tensor:
    """Plain torch; what the operator means."""
    return columns_plain(normalised(q, q_weight), k, lse, tokens if tokens.ndim == 2 else tokens[None], lengths)


def columns_plain(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    found = there(tokens, lengths, k.shape[1])[:, None, None, :]
    q = widen(q).transpose(1, 2) * q.shape[-1] ** -0.5
    # an absent stream has a logarithm of -inf, and from infinite numbers no gradient comes back
    lse = lse if lengths is None else torch.where((lengths > 0)[:, None, None], lse, 0)
    return attention_map(q, chosen(k, tokens), lse, found)


def forward_plain(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    # the type of the result is q's own, widened, whatever an enclosing autocast would prefer
    with torch.autocast(q.device.type, enabled=False):
        return columns_plain(q, k, lse, tokens, lengths)


op = torch.library.custom_op("semantica::attention_columns", forward_plain, mutates_args=())


@op.register_fake
def _(q, k, lse, tokens, lengths):
    return lse.new_empty((*lse.shape, tokens.shape[-1]))


def backward_plain(
    dc: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    tokens: Tensor,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of q and lse, and of k, each where `needs` says so, else empty.

    With dS = P * dC: dq = dS k_t / sqrt(D), dlse = -row sums of dS, dk = dS^T q / sqrt(D), added up by token.
    """
    with torch.autocast(q.device.type, enabled=False):
        return backward_ref(dc, q, k, lse, tokens, lengths, needs)


def backward_ref(dc, q, k, lse, tokens, lengths, needs):
    factor = q.shape[-1] ** -0.5
    ds = columns_plain(q, k, lse, tokens, lengths) * dc
    dq, dlse, dk = (q.new_empty(0) for _ in range(3))
    if needs[0]:
        dq = (ds @ chosen(k, tokens) * factor).to(q.dtype).transpose(1, 2).contiguous()
        dlse = -ds.sum(-1)
    if needs[1]:
        part = ds.transpose(2, 3) @ widen(q).transpose(1, 2) * factor
        # a product, whose order of sums is fixed: a token may be chosen twice
        places = torch.arange(k.shape[1], device=k.device)[:, None] == tokens[:, None, None, :]
        dk = (places.to(part.dtype) @ part).to(k.dtype).transpose(1, 2).contiguous()
    return [dq, dlse, dk]


op_backward = torch.library.custom_op("semantica::attention_columns_backward", backward_plain, mutates_args=())


@op_backward.register_fake
def _(dc, q, k, lse, tokens, lengths, needs):
    given = (q, needs[0]), (lse, needs[0]), (k, needs[1])
    return [a.new_empty(a.shape) if need else q.new_empty(0) for a, need in given]


def backward(ctx, dc):
    # past the dispatcher the kernel comes first
    q, k, lse = ctx.needs_input_grad[-5:-2]
    dq, dlse, dk = dispatch.call(op_backward, dc, *ctx.saved_tensors, [q or lse, k])
    return dq if q else None, dk if k else None, dlse if lse else None, None, None


run = dispatch.with_gradient(op, save, backward)


dispatch.register_triton(
    "attention_columns",
    fused,
    {
        "semantica.kernels.attention_columns.forward:forward": (op, forward_plain),
        "semantica.kernels.attention_columns.backward:backward": (op_backward, backward_plain),
    },
)


def attention_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    tokens: Tensor | Sequence[int],
    lengths: Tensor | None = None,
    q_weight: Tensor | None = None,
) -> Tensor:
    """Columns of the map P = exp(q . k^T / sqrt(D) - lse) of one stream, of the chosen tokens only.

    `lse` is an input like the others, and autograd gives the gradient through the softmax where it comes from
    `cross_attention`: see `attention_moments`. So a column costs its own token's products, not those of all keys.

    Args:
        q, k, lse, lengths, q_weight: as for `attention_moments`.
        tokens: whole numbers from 0 to M - 1, which may repeat; or an integer tensor `[T]`, or `[B, T]` for each sample
            its own, which stays on the device and is not read by the host: its entries outside 0 to M - 1, such as -1
            to fill up with, have columns of exactly 0, and so have tokens beyond a sample's length.

    Returns:
        `[B, H, N, T]` in fp32 (fp64 for fp64), contiguous. Differentiable once in q, k, lse and q_weight.

    Raises:
        ValueError: an argument has the wrong rank, shape, dtype or device, or there is no such token.
    """
    check(q, k, lse, lengths, q_weight)
    tokens = checked_tokens(tokens, q, k)
    if dispatch.transformed():
        with torch.autocast(q.device.type, enabled=False):
            return attention_columns_ref(q, k, lse, tokens, lengths, q_weight)
    return run(normalised(q, q_weight), k, lse, tokens if tokens.ndim == 2 else tokens[None], lengths)


def checked_tokens(tokens: Tensor | Sequence[int], q: Tensor, k: Tensor) -> Tensor:
    if isinstance(tokens, Tensor):
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens has dtype {tokens.dtype}: expected torch.int32 or torch.int64")
        if tokens.ndim not in (1, 2) or not tokens.shape[-1] or tokens.ndim == 2 and tokens.shape[0] != q.shape[0]:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected [T] or [B, T] for q {tuple(q.shape)}")
        if tokens.device != q.device:
            raise ValueError(f"tokens is on {tokens.device}: expected {q.device}, where q is")
        return tokens
    if not isinstance(tokens, Sequence) or not tokens or not all(isinstance(t, int) for t in tokens):
        raise ValueError(f"tokens={tokens!r}: expected at least one whole number, or an integer tensor")
    wrong = [t for t in tokens if not 0 <= t < k.shape[1]]
    if wrong:
        raise ValueError(f"tokens has {wrong[0]}: k {tuple(k.shape)} has tokens 0 to {k.shape[1] - 1}")
    host = torch.tensor(tokens)
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return host.to(q.device)
    # from pageable memory the copy would wait for what the device still has to do
    return host.pin_memory().to(q.device, non_blocking=True)
