"""Parallel-stream cross-attention: o = sum_s gate_s * softmax(rms(q) * w . k_s^T / sqrt(D)) v_s.

Each stream (one encoder) has a softmax of its own, so that adding a stream never takes probability from another:
the decoupled form of IP-Adapter (Ye et al., arXiv 2308.06721, eq. 5) and Imagine yourself (arXiv 2409.13346).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from semantica.kernels import dispatch, launch
from semantica.kernels.checks import check_dtype, check_tensors

# of which a row of 16-bit values is whole transactions of 16 bytes
HEAD_DIMS = range(16, 161, 8)
RMS_EPS = 1e-6
# values of an attention map that plain torch holds at a time, however long queries and keys are
CHUNK = 1 << 18


def chunks(queries: int, width: int) -> list[slice]:
    """The queries in stretches of which a map, so many values wide, has at most `CHUNK` values, or one row."""
    step = max(1, CHUNK // max(1, width))
    return [slice(start, min(start + step, queries)) for start in range(0, max(1, queries), step)]


def cross_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    lengths: Tensor | None,
    gates: Tensor | None,
    q_weight: Tensor | None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch; what the operator means, and what an exporter decomposes it into."""
    if q_weight is not None:
        q = F.rms_norm(q, q.shape[-1:], q_weight.to(q.dtype), RMS_EPS)
    # [B, H, length, D] before the streams part, so that an exported graph reads keys of this layout as they are
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    whole = len(sizes) == 1
    out, lse = None, []
    for s, (k_s, v_s) in enumerate([(k, v)] if whole else zip(k.split(list(sizes), 2), v.split(list(sizes), 2))):
        mask = None
        if lengths is not None:
            # expanded to the queries: some runtimes refuse a mask that broadcasts over them
            mask = valid(lengths, s, sizes[s]).expand(-1, 1, q.shape[2], -1)
        o = F.scaled_dot_product_attention(q, k_s, v_s, mask)
        if return_lse:
            scores = widen(q) @ widen(k_s).transpose(2, 3) * q.shape[-1] ** -0.5
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            lse.append(scores.logsumexp(-1))
        if lengths is not None:
            # a softmax over nothing differs between backends: an absent stream adds exactly 0
            o = torch.where((lengths[:, s] > 0)[:, None, None, None], o, torch.zeros_like(o))
        if gates is not None:
            o = o * gates[:, s, :, None, None].to(o.dtype)
        out = o if out is None else out + o
    return (out.transpose(1, 2), torch.stack(lse, 2)) if return_lse else out.transpose(1, 2)


def valid(lengths: Tensor, stream: int, size: int) -> Tensor:
    """Boolean `[B, 1, 1, size]`: which tokens of a stream are there."""
    return (torch.arange(size, device=lengths.device) < lengths[:, stream, None])[:, None, None, :]


def widen(a: Tensor) -> Tensor:
    return a.to(torch.promote_types(a.dtype, torch.float32))


def fused(q: Tensor) -> bool:
    """Whether the Triton kernels compute this: a rule on device and type alone."""
    # Triton's interpreter multiplies bf16 matrices bit pattern by bit pattern
    unfit = (torch.float64, torch.bfloat16) if launch.INTERPRETED else (torch.float64,)
    return q.device.type == launch.DEVICE and q.dtype not in unfit


def cpp_types() -> tuple[torch.dtype, ...]:
    """What the C++ loops compute on this CPU. PyTorch multiplies bf16 by AMX where there is one, and they do not."""
    if launch.DEVICE == "cpu" or not dispatch.cpp_instructions("cross_attention"):
        return ()
    return (torch.float32,) if torch.cpu.get_capabilities().get("amx_bf16") else (torch.float32, torch.bfloat16)


CPP_TYPES = cpp_types()


def cpp(q: Tensor) -> bool:
    """Whether the C++ loops compute this; their gradient is plain torch."""
    return q.device.type == "cpu" and q.dtype in CPP_TYPES and q.numel() > 0


def outputs_like(q: Tensor, sizes: Sequence[int], return_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised `o [B, N, H, D]`, and `lse [B, H, S, N]` where it is asked for or the fused backward reuses it."""
    batch, queries, heads, _ = q.shape
    shape = (batch, heads, len(sizes), queries) if return_lse or fused(q) else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def forward_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    lengths: Tensor | None,
    gates: Tensor | None,
    q_weight: Tensor | None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    outputs = outputs_like(q, sizes, return_lse)
    if q.numel():
        # the dtype of the result is q's, whatever an enclosing autocast would prefer
        with torch.autocast(q.device.type, enabled=False):
            outputs[0].copy_(cross_attention_ref(q, k, v, sizes, lengths, gates, q_weight))
            if return_lse:
                log_sums(outputs[1], q, k, sizes, lengths, q_weight)
    return outputs


def log_sums(lse: Tensor, q: Tensor, k: Tensor, sizes: Sequence[int], lengths: Tensor | None, q_weight: Tensor | None):
    """Fills `lse [B, H, S, N]`, a chunk of queries at a time; chunks that were kept would break the memory up."""
    if q_weight is not None:
        q = F.rms_norm(q, q.shape[-1:], q_weight.to(q.dtype), RMS_EPS)
    q, k = widen(q).transpose(1, 2), widen(k).transpose(1, 2).contiguous()
    for s, k_s in enumerate(k.split(list(sizes), 2)):
        there = None if lengths is None else valid(lengths, s, sizes[s])
        for part in chunks(q.shape[2], q.shape[0] * q.shape[1] * sizes[s]):
            scores = q[:, :, part] @ k_s.transpose(2, 3) * q.shape[-1] ** -0.5
            lse[:, :, s, part] = (scores if there is None else scores.masked_fill(~there, -torch.inf)).logsumexp(-1)


op = torch.library.custom_op("semantica::cross_attention", forward_plain, mutates_args=())


@op.register_fake
def _(q, k, v, sizes, lengths, gates, q_weight, return_lse=False):
    return outputs_like(q, sizes, return_lse)


def backward_plain(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor,
    dlse: Tensor | None,
    sizes: Sequence[int],
    lengths: Tensor | None,
    gates: Tensor | None,
    q_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gates, q_weight, accumulated in fp32 (fp64 for fp64 input); absent ones are empty.

    `o` and `lse` are what the forward gave, for kernels that reuse them; here they are computed again.
    """
    with torch.autocast(q.device.type, enabled=False):
        return backward_ref(do, q, k, v, dlse, sizes, lengths, gates, q_weight)


def backward_ref(do, q, k, v, dlse, sizes, lengths, gates, q_weight):
    dim = q.shape[-1]
    # [B, H, length, D] from here on
    do, qs, ks, vs = (widen(a).transpose(1, 2) for a in (do, q, k, v))
    wide = qs.dtype
    inverse_rms, weight, unit = None, None, qs
    if q_weight is not None:
        weight = q_weight.to(wide)
        inverse_rms = torch.rsqrt(qs.square().mean(-1, keepdim=True) + RMS_EPS)
        unit = qs * inverse_rms
        qs = unit * weight
    dq, dks, dvs, dgates = torch.zeros_like(qs), [], [], []
    for s, (k_s, v_s) in enumerate(zip(ks.split(list(sizes), 2), vs.split(list(sizes), 2), strict=True)):
        mask = None if lengths is None else valid(lengths, s, sizes[s])
        gate = 1 if gates is None else gates[:, s, :, None, None].to(wide)
        sums: list[Tensor] = []
        parts = [slice(None)]
        if dlse is not None:
            # whoever reads the map asks for its logarithms, and for memory that does not grow with it
            parts = chunks(qs.shape[2], qs.shape[0] * qs.shape[1] * sizes[s])
        for part in parts:
            scores = qs[:, :, part] @ k_s.transpose(2, 3) * dim**-0.5
            if mask is None:
                p = scores.softmax(-1)
            else:
                # a row with no token at all must become zeros, not NaN
                p = scores.masked_fill(~mask, -torch.finfo(wide).max).softmax(-1) * mask
            given = do[:, :, part]
            dp = given @ v_s.transpose(2, 3)
            rows = (p * dp).sum(-1, keepdim=True)
            ds = p * (dp - rows) * (gate * dim**-0.5)
            if dlse is not None:
                through_lse = p * (dlse[:, :, s, part, None] * dim**-0.5)
                # the gradient of log 0 may be anything; nothing depends on it
                ds = ds + (through_lse if mask is None else through_lse.masked_fill(~mask, 0))
            dq[:, :, part] += ds @ k_s
            # sum over d of do . o equals the row sums of p * dp
            found = ds.transpose(2, 3) @ qs[:, :, part], p.transpose(2, 3) @ given, rows.sum((2, 3))
            sums = [a + b for a, b in zip(sums, found)] if sums else list(found)
        dks.append(sums[0])
        dvs.append(sums[1] * gate)
        if gates is not None:
            dgates.append(sums[2])
    dgates = q.new_empty(0) if gates is None else torch.stack(dgates, 1).to(gates.dtype)
    dweight = q.new_empty(0)
    if q_weight is not None:
        dweight = (dq * unit).sum((0, 1, 2)).to(q_weight.dtype)
        dq = dq * weight
        dq = inverse_rms * (dq - unit * (dq * unit).mean(-1, keepdim=True))
    dq, dk, dv = (a.to(q.dtype).transpose(1, 2).contiguous() for a in (dq, torch.cat(dks, 2), torch.cat(dvs, 2)))
    return dq, dk, dv, dgates, dweight


op_backward = torch.library.custom_op("semantica::cross_attention_backward", backward_plain, mutates_args=())


@op_backward.register_fake
def _(do, q, k, v, o, lse, dlse, sizes, lengths, gates, q_weight):
    rest = [q.new_empty(0) if a is None else a.new_empty(a.shape) for a in (gates, q_weight)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *rest


def save(ctx, inputs, output):
    q, k, v, sizes, lengths, gates, q_weight, return_lse = inputs
    o, lse = output
    ctx.set_materialize_grads(False)
    if not return_lse:
        ctx.mark_non_differentiable(lse)
    # with one stream and no gate the row sums of p * dp are those of do * o; otherwise o is of no use
    o = o if fused(q) and len(sizes) == 1 and gates is None else None
    ctx.save_for_backward(q, k, v, o, lse, lengths, gates, q_weight)
    ctx.sizes = sizes


def backward(ctx, do, dlse):
    q, k, v, o, lse, lengths, gates, q_weight = ctx.saved_tensors
    do = torch.zeros_like(q) if do is None else do
    inputs = do, q, k, v, o, lse, dlse, ctx.sizes, lengths, gates, q_weight
    dq, dk, dv, dgates, dweight = dispatch.call(op_backward, *inputs)
    dgates, dweight = dgates if gates is not None else None, dweight if q_weight is not None else None
    return dq, dk, dv, None, None, dgates, dweight, None


run = dispatch.with_gradient(op, save, backward)


dispatch.register_triton(
    "cross_attention",
    fused,
    {
        "semantica.kernels.cross_attention.forward:forward": (op, forward_plain),
        "semantica.kernels.cross_attention.backward:backward": (op_backward, backward_plain),
    },
)

if CPP_TYPES:
    rest = "fp16, fp64 and gradients" if torch.bfloat16 in CPP_TYPES else "bf16 (by AMX), fp16, fp64 and gradients"
    status = ("C++", f"semantica._C with {dispatch.cpp_instructions('cross_attention')[0]}; {rest} in plain torch")
    kernels = {"semantica.kernels.cross_attention.cpu:forward": (op, forward_plain)}
    dispatch.register_kernels("cross_attention", "cpu", cpp, kernels, status)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    lengths: Tensor | None = None,
    gates: Tensor | None = None,
    q_weight: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention from the queries to several streams of tokens, each with its own softmax, summed.

    Args:
        q: `[B, N, H, D]`, any strides, D a multiple of 8 from 16 to 160.
        k, v: `[B, M, H, D]`: the streams one after the other along M. Keys come normalised already.
        sizes: the static size of each stream; they sum to M.
        lengths: integer `[B, S]`: valid tokens per sample and stream; 0 = stream absent, adds exactly 0. The values
            live on the device and are not read by the host: entries above a stream's size count as the size.
        gates: `[B, S, H]`: factor of each stream, or None for 1.
        q_weight: `[D]`: weight of a fused RMS norm of q over D (eps 1e-6), or None for no norm.
        return_lse: also return `lse [B, H, S, N]` in fp32 (fp64 for fp64): the natural logarithm of the sum over a
            stream's valid tokens of exp(logit), -inf for an absent stream. With it any statistic of the attention
            map exp(logit - lse) can be taken later without the map having been stored. Gradients flow through it.

    Returns:
        `o [B, N, H, D]`, contiguous, in q's dtype; or `(o, lse)`. Under transforms of `torch.func` and in forward mode
        plain torch computes it.

    Raises:
        ValueError: an argument has the wrong rank, shape, dtype or device, or the sizes do not sum to M.
    """
    check(q, k, v, sizes, lengths, gates, q_weight)
    arguments = q, k, v, list(sizes), lengths, gates, q_weight, return_lse
    if dispatch.transformed():
        # the one of torch's kernels that has a derivative in every mode
        with torch.autocast(q.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            return cross_attention_ref(*arguments)
    o, lse = run(*arguments)
    return (o, lse) if return_lse else o


def check(q, k, v, sizes, lengths, gates, q_weight):
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}: expected [B, N, H, D]")
    batch, _, heads, dim = q.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"q {tuple(q.shape)} has head dim {dim}: expected a multiple of 8 from 16 to 160")
    check_dtype("q", q)
    if not isinstance(sizes, Sequence) or not all(isinstance(size, int | torch.SymInt) for size in sizes):
        raise ValueError(f"sizes={sizes!r}: expected a whole number for each stream")
    if not sizes or any(size < 1 for size in sizes) or k.ndim != 4 or sum(sizes) != k.shape[1]:
        raise ValueError(f"sizes={list(sizes)} must be positive and sum to M of k {tuple(k.shape)} = [B, M, H, D]")
    streams = len(sizes)
    keys = (batch, k.shape[1], heads, dim)
    expected = {
        "k": (k, keys, (q.dtype,)),
        "v": (v, keys, (q.dtype,)),
        "lengths": (lengths, (batch, streams), (torch.int32, torch.int64)),
        "gates": (gates, (batch, streams, heads), (q.dtype, torch.float32)),
        "q_weight": (q_weight, (dim,), (q.dtype, torch.float32)),
    }
    check_tensors("q", q, expected)
