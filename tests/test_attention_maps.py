"""`attention_moments` and `attention_columns`: gradients through the softmax, memory, bad input, and machine code."""

import subprocess
import sys

import pytest
import torch

from semantica.kernels import attention_columns, attention_moments, cross_attention, launch
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
import resource, torch
from semantica.kernels import attention_moments
torch.set_num_threads(1)
n, m = 4096, 2048
g = torch.Generator().manual_seed(0)
q, k = (torch.randn(1, a, 4, 32, generator=g, requires_grad=True) for a in (n, m))
lse, features = torch.full((1, 4, n), 8.0, requires_grad=True), torch.randn(n, 6, generator=g)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
attention_moments(q[:, :64], k[:, :64], lse[..., :64], features[:64]).sum().backward()
before = peak()
attention_moments(q, k, lse, features).square().sum().backward()
print(peak() - before, n * m * 4 * 4)
"""


def test_memory_does_not_grow_with_the_map():
    """Forward and backward at N = 4096, M = 2048 in the chunked form: a fraction of the map's 134 MB."""
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
    interpreted("test_kernels.py", "-k", f"accurate and attention_{name} and not bfloat16", "-m", "not gpu")


@pytest.mark.slow
def test_interpreted_kernels_stay_in_bounds_and_repeat(interpreted):
    interpreted("interpreted/attention_maps.py")


def launches(sources, words):
    for source in sources:
        for label, planned in source():
            if all(word in label for word in words):
                yield from planned


# bytes that kernels in full fp32, of heads of 160 and hundreds of features, move to and fro: no model asks for these
FULL_SPILLS = {"moments_dq_kernel": 2900}


def examine(words, arch):
    from semantica.benchmarks.kernels.compile_only import inspect
    from semantica.kernels.attention_columns.specimens import specimens as columns
    from semantica.kernels.attention_moments.specimens import specimens

    found = list(launches((specimens, columns), words))
    assert found, words
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


@compiler
def test_machine_code_uses_tensor_cores_and_does_not_spill():
    examine(("D=64 M=77",), "sm_90")


@compiler
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "words"), [("sm_80", ("D=160",)), ("sm_90", ())], ids=["sm_80", "sm_90"])
def test_every_specimen_uses_tensor_cores_and_does_not_spill(arch, words):
    examine(words, arch)


def test_a_map_far_apart_in_memory_is_read_where_it_lies():
    """Rows more than 2^31 values apart: pages that nothing touches take no memory."""
    case = AttentionMomentsCase(2, 5, 1, 16, 3)
    inputs = case.inputs(torch.float32)
    far = torch.empty(2**31 + 4096)
    q = far.as_strided(inputs["q"].shape, (2**31, 16, 16, 1)).copy_(inputs["q"])
    assert torch.equal(attention_moments(**{**inputs, "q": q}), attention_moments(**inputs))
