"""`attention_moments` and `attention_columns`: gradients through the softmax, memory, bad input, and machine code."""

import subprocess
import sys

import pytest
import torch

from semantica.kernels import attention_columns, attention_moments, cross_attention, launch
from semantica.kernels.attention_columns import op as columns
from semantica.kernels.attention_columns.cases import CASES as COLUMNS
from semantica.kernels.attention_moments import op as moments
from semantica.kernels.attention_moments.cases import CASES as MOMENTS
from semantica.kernels.attention_moments.cases import AttentionMomentsCase

compiler = pytest.mark.skipif(not launch.AVAILABLE or launch.INTERPRETED, reason="Triton's compiler is not at hand")
# the fewest of the shared memory of supported GPUs (sm_86, sm_89, sm_120)
SHARED = 99 * 1024


def stored_map(q, k, lengths=None):
    """The softmax `[B, H, N, M]`, in memory."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    if lengths is not None:
        there = torch.arange(k.shape[1]) < lengths[:, None]
        logits = logits.masked_fill(~there[:, None, None], -torch.inf)
    return logits.softmax(-1)


@pytest.mark.parametrize("lengths", [None, (9, 4)])
def test_with_the_lse_of_cross_attention_gradients_are_those_through_the_softmax(lengths):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=g, dtype=torch.float64, requires_grad=True) for n in (12, 9, 9))
    features = torch.randn(12, 4, generator=g, dtype=torch.float64, requires_grad=True)
    lengths = None if lengths is None else torch.tensor(lengths)
    leaves = q, k, v, features
    given = None if lengths is None else lengths[:, None]
    o, lse = cross_attention(q, k, v, (9,), given, return_lse=True)
    found = attention_moments(q, k, lse[:, :, 0], features, lengths)
    columns = attention_columns(q, k, lse[:, :, 0], (2, 0), lengths)
    p = stored_map(q, k, lengths)
    expected = p.transpose(2, 3) @ features, p[..., [2, 0]], torch.einsum("bhnm,bmhd->bnhd", p, v)
    for a, b in zip((found, columns, o), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    weights = [torch.randn(a.shape, generator=g, dtype=torch.float64) for a in expected]
    ours, plain = (
        torch.autograd.grad(sum((a.square() * w).sum() for a, w in zip(outs, weights)), leaves)
        for outs in ((found, columns, o), expected)
    )
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_weight_in_fp32_the_map_still_sums_to_1(dtype):
    """As under autocast: queries in 16 bits, the weight of their norm in fp32."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).to(dtype) for n in (20, 9, 9))
    weight = 6 + torch.randn(64, generator=g)
    _, lse = cross_attention(q, k, v, (9,), q_weight=weight, return_lse=True)
    columns = attention_columns(q, k, lse[:, :, 0], range(9), q_weight=weight)
    torch.testing.assert_close(columns.sum(-1), torch.ones(1, 2, 20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cases, function", [(MOMENTS, attention_moments), (COLUMNS, attention_columns)])
@pytest.mark.parametrize("name", ["tiny", "absent", "views"])
def test_opcheck_and_gradcheck(cases, function, name):
    case = cases[name]
    given = case.inputs(torch.float64).values()
    arguments = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in given]
    q, k, lse, fourth, lengths, _ = arguments
    shared = fourth.ndim == (1 if function is attention_columns else 2)
    op = getattr(torch.ops.semantica, function.__name__).default
    torch.library.opcheck(op, (q, k, lse, fourth.detach()[None] if shared else fourth, lengths))
    # beside an lse of -inf, of a sample without keys, there are no finite differences
    if lse.isfinite().all():
        assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    inputs, seen = MOMENTS["tiny"].inputs(torch.float32), []
    plain = moments.backward_ref
    monkeypatch.setattr(moments, "backward_ref", lambda *given: seen.append(given[-1]) or plain(*given))
    for names, needs in (({"q"}, [True, False, False]), ({"lse", "k"}, [True, True, False]),
                         ({"features"}, [False, False, True])):  # fmt: skip
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        attention_moments(**{**inputs, **leaves}).sum().backward()
        assert list(seen.pop()) == needs and all(a.grad is not None for a in leaves.values())


def test_compiled_whole_with_gradients():
    inputs = MOMENTS["words"].inputs(torch.float32)

    def both(q):
        found = attention_moments(**{**inputs, "q": q})
        columns = attention_columns(q, inputs["k"], inputs["lse"], torch.tensor([1, 5]))
        return found.square().sum() + columns.square().sum()

    q = inputs["q"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(both(q), q)
    (actual,) = torch.autograd.grad(torch.compile(both, fullgraph=True, backend="aot_eager")(q), q)
    torch.testing.assert_close(actual, expected)


MEMORY = """
import torch
from semantica.kernels import attention_moments, cross_attention
from semantica.memory import peak_resident
torch.set_num_threads(1)
n, m = 16384, 2048
g = torch.Generator().manual_seed(0)
q, k = (torch.randn(1, a, 4, 32, generator=g, requires_grad=True) for a in (n, m))
features = torch.randn(n, 6, generator=g)
def run(q, k, features):
    out, lse = cross_attention(q, k, k, (k.shape[1],), return_lse=True)
    (attention_moments(q, k, lse[:, :, 0], features).square().sum() + out.square().sum()).backward()
run(q[:, :64], k[:, :64], features[:64])
before = peak_resident()
run(q, k, features)
print(peak_resident() - before, n * m * 4 * 4)
"""


def test_memory_does_not_grow_with_the_map():
    """Forward and backward of both at N = 16384, M = 2048 in the chunked form: a fraction of the map's 537 MB."""
    done = subprocess.run([sys.executable, "-P", "-c", MEMORY], capture_output=True, text=True, check=True)
    grown, of_map = map(int, done.stdout.split())
    assert grown < of_map / 4, f"{grown >> 20} MiB, the map is {of_map >> 20} MiB"


def test_wrong_arguments_are_named():
    given = MOMENTS["tiny"].inputs(torch.float32)
    features, rest = given["features"], {k: v for k, v in given.items() if k != "features"}
    for function, arguments, message in (
        (attention_moments, {**given, "q": given["q"][0]}, "q has shape"),
        (attention_moments, {**given, "k": given["k"][:1]}, "k has shape"),
        (attention_moments, {**given, "k": given["k"][:, :0]}, "at least one key"),
        (attention_moments, {**given, "lse": given["lse"][:, :, None]}, "lse has shape"),
        (attention_moments, {**given, "lse": given["lse"].half()}, "lse has dtype"),
        (attention_moments, {**given, "features": features[:5]}, "features has shape"),
        (attention_moments, {**given, "features": features.half()}, "features has dtype"),
        (attention_moments, {**given, "lengths": torch.ones(2)}, "lengths has dtype"),
        (attention_columns, {**rest, "tokens": (3, 20)}, r"tokens has 20: k .* has tokens 0 to 19"),
        (attention_columns, {**rest, "tokens": ()}, "at least one whole number"),
        (attention_columns, {**rest, "tokens": torch.ones(3)}, "tokens has dtype"),
        (attention_columns, {**rest, "tokens": torch.ones(3, 2, dtype=torch.int64)}, "tokens has shape"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            function(**arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["moments", "columns"])
@pytest.mark.slow
def test_interpreted_kernels_are_accurate_on_every_case(interpreted, name):
    assert interpreted("test_kernels.py", "-k", f"accurate and attention_{name} and not bfloat16", "-m", "not gpu") > 0


@pytest.mark.slow
def test_interpreted_kernels_stay_in_bounds_and_repeat(interpreted):
    assert interpreted("interpreted/attention_maps.py") > 0


def launches(sources, words):
    for source in sources:
        for label, planned in source():
            if all(word in label for word in words):
                yield from planned


# bytes that kernels in full fp32, of heads of 160 and hundreds of features, move to and fro: no model asks for these
FULL_SPILLS = {"moments_dq_kernel": 2900}


def examine(words, arch):
    """How many launches with these words in their labels were compiled and are as they should be."""
    from semantica.benchmarks.kernels.compile_only import inspect
    from semantica.kernels.attention_columns.specimens import specimens as columns
    from semantica.kernels.attention_moments.specimens import specimens

    found = list(launches((specimens, columns), words))
    for planned in found:
        row = inspect("", planned, arch)
        name = f"{row['kernel']} {planned.constants}"
        assert "error" not in row and row["shared_bytes"] <= SHARED and row["atomics"] == 0, (name, row.get("error"))
        queries = planned.arguments.get("q_ptr")
        full = queries is not None and queries.dtype == torch.float32 and queries.shape[-1] == 160
        most = FULL_SPILLS.get(row["kernel"], 64) if full else 64
        assert row["spill_loads_bytes"] + row["spill_stores_bytes"] <= most, name
        if queries is not None and queries.dtype == torch.bfloat16:
            assert row["tensor"] and "128" in row["loads"], name
    return len(found)


@compiler
def test_machine_code_uses_tensor_cores_and_does_not_spill():
    assert examine(("D=64 M=77",), "sm_90") > 0


@compiler
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "words"), [("sm_80", ("D=160",)), ("sm_90", ())], ids=["sm_80", "sm_90"])
def test_every_specimen_uses_tensor_cores_and_does_not_spill(arch, words):
    assert examine(words, arch) > 0


def test_a_map_far_apart_in_memory_is_read_where_it_lies():
    """Rows more than 2^31 values apart: pages that nothing touches take no memory."""
    case = AttentionMomentsCase(2, 5, 1, 16, 3)
    inputs = case.inputs(torch.float32)
    far = torch.empty(2**31 + 4096)
    q = far.as_strided(inputs["q"].shape, (2**31, 16, 16, 1)).copy_(inputs["q"])
    assert torch.equal(attention_moments(**{**inputs, "q": q}), attention_moments(**inputs))


@pytest.mark.skipif(not launch.AVAILABLE, reason="Triton is not installed")
def test_heads_that_lie_far_apart_are_brought_together():
    """Kernels count heads in 32 bits; heads first, 40 of them with a million queries of 64 values are beyond that."""
    from semantica.kernels.attention_columns import backward as columns_backward
    from semantica.kernels.attention_columns import forward as columns_forward
    from semantica.kernels.attention_moments import backward, forward

    with torch.device("meta"):
        q = torch.empty_strided((1, 1 << 20, 40, 64), (40 << 26, 64, 1 << 26, 1), dtype=torch.float16)
        k = torch.empty_strided((1, 77, 40, 64), (40 << 26, 64, 1 << 26, 1), dtype=torch.float16)
        lse, features = torch.empty(1, 40, 1 << 20), torch.empty(1, 1 << 20, 6, dtype=torch.float16)
        tokens, dm, dc = torch.empty(1, 2, dtype=torch.int64), torch.empty(1, 40, 77, 6), torch.empty(1, 40, 1 << 20, 2)
        plans = [
            forward.plan_forward(q, k, lse, features, None),
            backward.plan_backward(dm, q, k, lse, features, None, (True, True, True)),
            columns_forward.plan_forward(q, k, lse, tokens, None),
            columns_backward.plan_backward(dc, q, k, lse, tokens, None, (True, True)),
        ]
    for launches, _ in plans:
        for planned in (each for each in launches if "stride_qh" in each.arguments):
            assert 40 * max(planned.arguments["stride_qh"], planned.arguments["stride_kh"]) < 2**31
            assert not {id(q), id(k)} & {id(a) for a in planned.arguments.values()}


def test_a_list_of_tokens_does_not_wait_for_the_device(cuda):
    inputs = COLUMNS[next(iter(COLUMNS))].inputs(torch.float32)
    with cuda.mode():
        q, k = (inputs[name].to("cuda:1") for name in ("q", "k"))
        began = len(cuda.waits)
        tokens = columns.checked_tokens([1, 0], q, k)
    assert cuda.waits[began:] == [] and tokens.device == q.device and tokens.inner.tolist() == [1, 0]
