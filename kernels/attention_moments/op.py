"""Moments of an attention map over its queries: M_mf = sum_n P_nm F_nf with P = exp(q . k^T / sqrt(D) - lse).

The map P is never stored. Its moments are what training-free steering reads: mass, centroid and spread of a token
with features (1, x, y, x^2, y^2, xy), its pooled appearance with activations (Epstein et al., arXiv 2306.00986).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from semantica.kernels import dispatch
from semantica.kernels.checks import check_dtype, check_tensors
from semantica.kernels.cross_attention.op import HEAD_DIMS, RMS_EPS, chunks, fused, widen


def normalised(q: Tensor, weight: Tensor | None) -> Tensor:
    """RMS norm over D in fp32, rounded once to q's type: as `cross_attention` does it on the same device."""
    if weight is None:
        return q
    wide = widen(q)
    # plain torch rounds the weight too: with the logarithms of other queries no map sums to 1
    weight = weight if fused(q) else weight.to(q.dtype)
    return F.rms_norm(wide, q.shape[-1:], weight.to(wide.dtype), RMS_EPS).to(q.dtype)


def valid(lengths: Tensor | None, keys: int) -> Tensor | None:
    """Boolean `[B, 1, 1, M]`: which keys are there."""
    if lengths is None:
        return None
    return (torch.arange(keys, device=lengths.device) < lengths[:, None])[:, None, None, :]


def heads_first(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled q `[B, H, N, D]` and k `[B, H, M, D]`, wide and dense: products of a chunk copy nothing."""
    q, k = (widen(a).transpose(1, 2) for a in (q, k))
    return q * q.shape[-1] ** -0.5, k.contiguous()


def attention_map(q: Tensor, k: Tensor, lse: Tensor, there: Tensor | None) -> Tensor:
    """P `[B, H, n, M]` of n queries; 0 for keys that are not there, whose logits may be anything."""
    logits = q @ k.transpose(2, 3) - lse[..., None]
    return logits.exp() if there is None else logits.masked_fill(~there, -torch.inf).exp()


def attention_moments_ref(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    features: Tensor,
    lengths: Tensor | None = None,
    q_weight: Tensor | None = None,
) -> Tensor:
    """Plain torch, a chunk of queries at a time; what the operator means."""
    features = features if features.ndim == 3 else features[None]
    return moments_plain(normalised(q, q_weight), k, lse, features, lengths)


def moments_plain(q: Tensor, k: Tensor, lse: Tensor, features: Tensor, lengths: Tensor | None) -> Tensor:
    there = valid(lengths, k.shape[1])
    q, k = heads_first(q, k)
    batch, heads, queries, _ = q.shape
    features = widen(features)[:, None].to(q.dtype)
    out = q.new_zeros(batch, heads, k.shape[2], features.shape[-1])
    for part in chunks(queries, batch * heads * k.shape[2]):
        if there is not None:
            # an absent stream has a logarithm of -inf, and from infinite numbers no gradient comes back
            given = torch.where(there.any(-1), lse[:, :, part], 0)
        else:
            given = lse[:, :, part]
        p = attention_map(q[:, :, part], k, given, there)
        out = out + p.transpose(2, 3) @ features[:, :, part]
    return out


def forward_plain(q: Tensor, k: Tensor, lse: Tensor, features: Tensor, lengths: Tensor | None) -> Tensor:
    # the type of the result is q's own, widened, whatever an enclosing autocast would prefer
    with torch.autocast(q.device.type, enabled=False):
        return moments_plain(q, k, lse, features, lengths)


op = torch.library.custom_op("semantica::attention_moments", forward_plain, mutates_args=())


@op.register_fake
def _(q, k, lse, features, lengths):
    return lse.new_empty((*lse.shape[:2], k.shape[1], features.shape[-1]))


def backward_plain(
    dm: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    features: Tensor,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of q and lse, of k, and of the features, each where `needs` says so, else empty.

    With dP = F dM^T: dS = P * dP, dq = dS k / sqrt(D), dk = dS^T q / sqrt(D), dlse = -row sums of dS, dF = P dM, the
    last summed over what shares the features.
    """
    with torch.autocast(q.device.type, enabled=False):
        return backward_ref(dm, q, k, lse, features, lengths, needs)


def backward_ref(dm, q, k, lse, features, lengths, needs):
    there = valid(lengths, k.shape[1])
    scaled, keys = heads_first(q, k)
    batch, heads, queries, dim = scaled.shape
    wide, dm = widen(features)[:, None].to(scaled.dtype), dm.to(scaled.dtype)
    dq, dk = (torch.zeros_like(a) if need else None for a, need in zip((scaled, keys), needs))
    dlse = torch.zeros_like(lse) if needs[0] else None
    df = scaled.new_zeros(batch, queries, features.shape[-1]) if needs[2] else None
    for part in chunks(queries, batch * heads * keys.shape[2]):
        p = attention_map(scaled[:, :, part], keys, lse[:, :, part], there)
        if needs[2]:
            df[:, part] = (p @ dm).sum(1)
        if needs[0] or needs[1]:
            ds = p * (wide[:, :, part] @ dm.transpose(2, 3))
        if needs[0]:
            dq[:, :, part] = ds @ keys
            dlse[:, :, part] = -ds.sum(-1)
        if needs[1]:
            dk += ds.transpose(2, 3) @ scaled[:, :, part]
    none = q.new_empty(0)
    if needs[0]:
        dq = (dq * dim**-0.5).to(q.dtype).transpose(1, 2).contiguous()
    if needs[1]:
        dk = dk.to(k.dtype).transpose(1, 2).contiguous()
    if needs[2]:
        df = (df if features.shape[0] == batch else df.sum(0, keepdim=True)).to(features.dtype)
    # what is not asked for must not share memory with another
    return [none.clone() if a is None else a for a in (dq, dlse, dk, df)]


op_backward = torch.library.custom_op("semantica::attention_moments_backward", backward_plain, mutates_args=())


@op_backward.register_fake
def _(dm, q, k, lse, features, lengths, needs):
    given = (q, needs[0]), (lse, needs[0]), (k, needs[1]), (features, needs[2])
    return [a.new_empty(a.shape) if need else q.new_empty(0) for a, need in given]


def save(ctx, inputs, output):
    """What both readers of an attention map keep."""
    ctx.save_for_backward(*inputs)


def backward(ctx, dm):
    # past the dispatcher the kernel comes first
    q, k, lse, features = ctx.needs_input_grad[-5:-1]
    needs = [q or lse, k, features]
    dq, dlse, dk, df = dispatch.call(op_backward, dm, *ctx.saved_tensors, needs)
    return dq if q else None, dk if k else None, dlse if lse else None, df if features else None, None


run = dispatch.with_gradient(op, save, backward)


dispatch.register_triton(
    "attention_moments",
    fused,
    {
        "semantica.kernels.attention_moments.forward:forward": (op, forward_plain),
        "semantica.kernels.attention_moments.backward:backward": (op_backward, backward_plain),
    },
)


def attention_moments(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    features: Tensor,
    lengths: Tensor | None = None,
    q_weight: Tensor | None = None,
) -> Tensor:
    """P^T F over the queries, for the map P = exp(q . k^T / sqrt(D) - lse) of one stream; P is not stored.

    `lse` is an input like the others. Taken from `cross_attention(..., return_lse=True)` of the same q and k, P is that
    attention's softmax, and autograd, adding what this operator and `cross_attention` send back, gives the gradient
    through the softmax: here dS = P * F dM^T and dlse = -D with D_n = F_n . (P dM)_n, there P * dlse; together
    P * (F dM^T - D). With `lse.detach()` it is the gradient at a fixed normalisation. The parts are rounded to q's
    type before they are added: in 16 bits, features of a small mean (a centred grid) lose the fewest digits.

    Args:
        q: `[B, N, H, D]`, any strides, D a multiple of 8 from 16 to 160.
        k: `[B, M, H, D]`: the keys of one stream; of several, `k.split(sizes, 1)[s]` beside `lse[:, :, s]`.
        lse: `[B, H, N]` in fp32 (fp64 for fp64): natural logarithm of each query's sum of exp(logit).
        features: `[N, F]`, or `[B, N, F]` for each sample its own, in q's dtype or fp32. In 16 bits products take them
            in 16 bits; beside 16-bit queries, fp32 features are multiplied in TF32.
        lengths: integer `[B]`: valid keys of a sample; the others have moments of exactly 0. Not read by the host.
        q_weight: `[D]`: weight of an RMS norm of q over D (eps 1e-6), as in `cross_attention`, or None for no norm.

    Returns:
        `[B, H, M, F]` in fp32 (fp64 for fp64), contiguous. Differentiable once in q, k, lse, features and q_weight.

    Raises:
        ValueError: an argument has the wrong rank, shape, dtype or device.
    """
    check(q, k, lse, lengths, q_weight)
    shapes = [list(q.shape[1:2]), [q.shape[0], q.shape[1]]]
    if features.ndim not in (2, 3) or list(features.shape[:-1]) not in shapes or features.shape[-1] < 1:
        raise ValueError(
            f"features has shape {tuple(features.shape)}: expected [N, F] or [B, N, F] for q {tuple(q.shape)}"
        )
    check_tensors("q", q, {"features": (features, tuple(features.shape), (q.dtype, torch.float32))})
    if dispatch.transformed():
        with torch.autocast(q.device.type, enabled=False):
            return attention_moments_ref(q, k, lse, features, lengths, q_weight)
    return run(normalised(q, q_weight), k, lse, features if features.ndim == 3 else features[None], lengths)


def check(q, k, lse, lengths, q_weight):
    """What both readers of an attention map refuse."""
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected [B, N, H, D]")
    batch, queries, heads, dim = q.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"q {tuple(q.shape)} has head dim {dim}: expected a multiple of 8 from 16 to 160")
    check_dtype("q", q)
    if k.ndim != 4 or k.shape[1] < 1:
        raise ValueError(f"k has shape {tuple(k.shape)}: expected [B, M, H, D] with at least one key")
    wide = torch.promote_types(q.dtype, torch.float32)
    expected = {
        "k": (k, (batch, k.shape[1], heads, dim), (q.dtype,)),
        "lse": (lse, (batch, heads, queries), (wide,)),
        "lengths": (lengths, (batch,), (torch.int32, torch.int64)),
        "q_weight": (q_weight, (dim,), (q.dtype, torch.float32)),
    }
    check_tensors("q", q, expected)
