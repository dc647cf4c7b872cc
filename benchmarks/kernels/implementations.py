"""Who is raced: the fused operators and what users would otherwise run, behind one interface.

Every implementation is called as the operator is: `f(**Problem.inputs(seed)) -> Tensor`. Rivals are no dependencies:
they are imported by name when they are asked for. What they do not fuse (FiLM, SiLU, the RMS norm, the sum of streams)
is plain torch, as it would have to be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from semantica.benchmarks.harness.process import resolve
from semantica.benchmarks.kernels.problems import Problem
from semantica.kernels import OPERATORS, cuda
from semantica.kernels.attention_columns.op import there
from semantica.kernels.attention_moments.op import normalised, valid
from semantica.kernels.cross_attention.op import RMS_EPS
from semantica.kernels.group_norm.cuda_plan import Problem as CudaProblem
from semantica.kernels.group_norm.op import per_channel

HALF = (torch.float16, torch.bfloat16)
# the rule of the tests, for the fused operators and the user's own
OWN_LEEWAY = 2.0
# of what others ship: more, since its error stands in the row and a rival that is left out proves nothing; in fp32
# eager adds up more exactly than most, and nobody calls a result with six right digits wrong
RIVAL_LEEWAY, RIVAL_LEAST = 4 * OWN_LEEWAY, 2.0**-17
# of products in 16 bits that round what becomes an exponent, as others write them: 3 % of the largest value in bf16
ROUNDED = 4
# operators whose rivals do so
IN_16_BITS = ("attention_moments", "attention_columns")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        load: imports what it needs and returns the function; `ImportError` says that it is not installed.
        serves: whether it can compute a problem at all.
        compiled: whether calling it under other global settings would compile it again.
        leeway, least, ulps: how many times eager's error it may have, of a tensor's largest value how much at least,
            and how many units in the last place of the problem's type.
    """

    name: str
    op: str
    load: Callable[[], Callable[..., Tensor]]
    serves: Callable[[Problem], bool] = lambda problem: True
    compiled: bool = False
    leeway: float = OWN_LEEWAY
    least: float = 0.0
    ulps: int = 1


def rival(name: str, op: str, load: Callable, *serves: Callable, compiled: bool = False) -> Implementation:
    """What others ship."""
    rule = {"leeway": RIVAL_LEEWAY, "least": RIVAL_LEAST, "ulps": ROUNDED if op in IN_16_BITS else 1}
    return Implementation(name, op, load, *serves, compiled=compiled, **rule)


def with_addend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For those that know no addend: a pass of its own before them."""

    def group_norm(x, *, addend=None, **arguments):
        return function(x if addend is None else x + per_channel(addend, x), **arguments)

    return group_norm


@with_addend
def group_norm_native(x, groups, weight, bias, scale, shift, activation) -> Tensor:
    """The reference without its copy to a contiguous layout: torch's own channels-last kernel."""
    return finish(F.group_norm(x, groups, weight, bias, 1e-5), scale, shift, activation)


def finish(y: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    if scale is not None:
        y = y * (1 + per_channel(scale, y)) + per_channel(shift, y)
    return F.silu(y) if activation == "silu" else y


def map_native(q: Tensor, k: Tensor, lse: Tensor, there: Tensor | None) -> Tensor:
    """The map stored whole, `[B, H, N, M]` in lse's type, of k `[B, H, M, D]`. The product is in q's type, at the full
    rate of what multiplies matrices in 16 bits, which rounds the logits; only then they are widened."""
    if there is not None:
        # an absent stream has a logarithm of -inf, and from infinite numbers no gradient comes back
        lse = torch.where(there.any(-1), lse, 0)
    logits = (q.transpose(1, 2) @ k.transpose(2, 3)).to(lse.dtype) * q.shape[-1] ** -0.5 - lse[..., None]
    return logits.exp() if there is None else logits.masked_fill(~there, -torch.inf).exp()


def moments_native(q, k, lse, features, lengths=None, q_weight=None) -> Tensor:
    """As most would write it, both products in q's type. The reference widens q and k, so that it multiplies in fp32
    whatever they are, and holds a chunk of the map at a time, which on a GPU is many small launches."""
    p = map_native(normalised(q, q_weight), k.transpose(1, 2), lse, valid(lengths, k.shape[1]))
    features = (features if features.ndim == 3 else features[None])[:, None].to(q.dtype)
    return (p.to(q.dtype).transpose(2, 3) @ features).to(lse.dtype)


def columns_native(q, k, lse, tokens, lengths=None, q_weight=None) -> Tensor:
    """As most would write it: the chosen keys and their products in q's type, where the reference widens both."""
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    index = tokens.clamp(0, k.shape[1] - 1).long().expand(k.shape[0], -1)[:, None, :, None]
    keys = k.transpose(1, 2).gather(2, index.expand(-1, k.shape[2], -1, k.shape[3]))
    return map_native(normalised(q, q_weight), keys, lse, there(tokens, lengths, k.shape[1])[:, None, None])


# PyTorch's operators as most would call them where the reference does otherwise: what torch.compile is given, too
NATIVE = {
    "group_norm": group_norm_native,
    "attention_moments": moments_native,
    "attention_columns": columns_native,
}


def liger() -> Callable:
    function = import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction

    def group_norm(x, groups, weight, bias, scale, shift, activation):
        y = function.apply(x, weight, bias, x.shape[1], groups, 1e-5)
        return finish(y, scale, shift, activation)

    return with_addend(group_norm)


def apex() -> Callable:
    module = import_module("apex.contrib.group_norm.group_norm")
    one_pass, two_passes = module.cuda_group_norm_nhwc_one_pass, module.cuda_group_norm_nhwc_two_pass

    def group_norm(x, groups, weight, bias, scale, shift, activation):
        # its own module chooses so
        run = one_pass if x.shape[2] * x.shape[3] <= 1024 else two_passes
        if scale is None:
            return run(x, groups, weight, bias, 1e-5, act="silu" if activation == "silu" else "")
        return finish(run(x, groups, weight, bias, 1e-5), scale, shift, activation)

    return with_addend(group_norm)


def per_stream(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable:
    """Several streams by one attention call `(q, k, v) -> o`, all `[B, N, H, D]`, per stream."""

    def cross_attention(q, k, v, sizes, lengths, gates, q_weight):
        assert lengths is None
        if q_weight is not None:
            q = F.rms_norm(q, q.shape[-1:], q_weight, RMS_EPS)
        out = None
        for s, (k_s, v_s) in enumerate(zip(k.split(list(sizes), 1), v.split(list(sizes), 1), strict=True)):
            o = attend(q, k_s, v_s)
            o = o if gates is None else o * gates[:, s, None, :, None]
            out = o if out is None else out + o
        return out

    return cross_attention


def flash_attn() -> Callable:
    return per_stream(import_module("flash_attn").flash_attn_func)


def xformers() -> Callable:
    return per_stream(import_module("xformers.ops").memory_efficient_attention)


def on_gpu(problem: Problem) -> bool:
    return problem.device == "cuda"


def half_on_gpu(problem: Problem) -> bool:
    return on_gpu(problem) and problem.dtype in HALF and problem.case.lengths is None


# what else computes an operator
RIVALS = [
    # of a contiguous tensor it is the reference
    rival("native", "group_norm", lambda: group_norm_native, lambda p: p.case.channels_last),
    rival("native", "attention_moments", lambda: moments_native),
    rival("native", "attention_columns", lambda: columns_native),
    rival("liger", "group_norm", liger, lambda p: on_gpu(p) and not p.case.channels_last),
    rival("apex", "group_norm", apex, lambda p: on_gpu(p) and p.case.channels_last and len(p.case.shape) == 4),
    rival("flash-attn", "cross_attention", flash_attn, half_on_gpu),
    rival("xformers", "cross_attention", xformers, lambda p: on_gpu(p) and p.case.lengths is None),
]


def by_kernels(module: str) -> Callable[..., Tensor]:
    """group_norm by the kernels of one module of its folder, whatever the table of choices says."""
    kernels = import_module(f"semantica.kernels.group_norm.{module}")
    backward = import_module(f"semantica.kernels.group_norm.{'backward' if module == 'forward' else module}").backward

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, groups, weight, bias, scale, shift, activation, addend):
            y, mean, rstd = kernels.forward(x, groups, weight, bias, scale, shift, activation, 1e-5, addend)
            ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, addend)
            ctx.settings = groups, activation
            return y

        @staticmethod
        def backward(ctx, dy):
            x, mean, rstd, weight, bias, scale, shift, addend = ctx.saved_tensors
            groups, activation = ctx.settings
            dx, dweight, dbias, *rest = backward(
                dy, x, mean, rstd, groups, weight, bias, scale, shift, activation, addend
            )
            dscale, dshift, daddend = (None if a is None else d for a, d in zip((scale, shift, addend), rest))
            return dx, None, dweight, dbias, dscale, dshift, None, daddend

    def group_norm(x, groups, weight, bias, scale, shift, activation, addend=None):
        return Function.apply(x, groups, weight, bias, scale, shift, activation, addend)

    return group_norm


def cuda_kernels() -> Callable[..., Tensor]:
    """Raises `ImportError` where `semantica._cuda` is not built, or has no code for the card."""
    if torch.cuda.is_available() and not (found := cuda.code(torch.device("cuda", 0)))[0]:
        raise ImportError(found[1])
    if cuda.module() is None:
        raise ImportError("semantica._cuda is not built")
    return by_kernels("cuda")


def in_cuda(problem: Problem) -> bool:
    """Whether CUDA kernels compute a problem, forward and backward; told from its sizes, before anything is drawn."""
    if problem.device != "cuda" or not cuda.code(torch.device("cuda", 0))[0]:
        return False
    found, sizes = import_module("semantica.kernels.group_norm.cuda"), sizes_in_cuda(problem)
    return None not in (found.planned(sizes, operands, torch.device("cuda", 0)) for operands in (1, 2))


def sizes_in_cuda(problem: Problem) -> CudaProblem:
    """A problem of group_norm as its CUDA kernels are planned by."""
    case = problem.case
    pixels = math.prod(case.shape[2:])
    return CudaProblem(*case.shape[:2], case.groups, pixels, problem.dtype.itemsize, case.channels_last)


def ours(op: str) -> list[Implementation]:
    """The fused operator, as its users get it; of group_norm also each kind of its kernels for GPUs by itself."""
    found = [Implementation("fused", op, lambda: OPERATORS[op].function)]
    if op == "group_norm":
        # without CUDA's the operator is Triton's, and one row is enough
        triton = partial(by_kernels, "forward")
        found += [
            Implementation("triton", op, triton, in_cuda),
            Implementation("cuda", op, cuda_kernels, in_cuda),
        ]
    return found


def implementations(op: str) -> list[Implementation]:
    """The fused operator, its reference, what PyTorch's compiler makes of its operators, and the rivals."""
    operator = OPERATORS[op]

    def compiled() -> Callable[..., Tensor]:
        return torch.compile(NATIVE.get(op, operator.reference), fullgraph=True, dynamic=False)

    return [
        *ours(op),
        rival("eager", op, lambda: operator.reference),
        rival("compile", op, compiled, compiled=True),
        *(other for other in RIVALS if other.op == op),
    ]


def available(ops: list[str], device: str, own: tuple[str, ...]) -> tuple[list[Implementation], dict[str, str]]:
    """Those that are installed, with the user's own "module:function"s for the one operator asked for, and why others
    are absent: `({...}, {name: reason})`.

    Raises:
        UserError: one of the user's own functions cannot be imported.
    """
    present, absent = [], {}
    for implementation in (one for op in OPERATORS if op in ops for one in implementations(op)):
        try:
            implementation.load()
            present.append(implementation)
        # a package built for another torch may raise anything when it is imported
        except Exception as error:
            absent[implementation.name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    for target in own:
        function = resolve(target)
        present.append(Implementation(target, ops[0], lambda function=function: function))
    return present, absent
