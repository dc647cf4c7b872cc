"""The Triton kernels of `cross_attention`: their values by the interpreter, their machine code by the compiler."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from semantica.benchmarks.kernels.compile_only import INSTRUCTION, compile_launch, disassemble  # noqa: E402
from semantica.kernels import launch  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="compiles, and starts the interpreted tests itself")
# shared memory of the smallest supported GPU of today (sm_86, sm_89, sm_120)
SHARED = 99 * 1024
# kernel, D, type, architecture: known spills, and the most loads and stores they may be
SPILLS = {
    ("dkv_kernel", 128, torch.bfloat16, 80): 12,
    ("dq_kernel", 64, torch.float32, 80): 24,
    ("dq_kernel", 64, torch.float32, 90): 24,
    ("dq_kernel", 128, torch.float32, 80): 24,
    ("dq_kernel", 128, torch.float32, 90): 24,
    ("dq_kernel", 160, torch.float32, 80): 132,
    ("dq_kernel", 160, torch.float32, 90): 155,
}


def test_interpreted_kernels_are_accurate_on_every_case(interpreted):
    assert interpreted("test_kernels.py", "-k", "accurate and cross_attention and not bfloat16", "-m", "not gpu") > 0


def test_interpreted_kernels_stay_in_bounds_and_repeat(interpreted):
    assert interpreted("interpreted/cross_attention.py") > 0


def plans():
    if launch.INTERPRETED:
        return {}
    from semantica.kernels.cross_attention.specimens import specimens

    return dict(specimens())


def examine(planned, arch):
    kernel = compile_launch(planned, f"sm_{arch}")
    code = INSTRUCTION.findall(disassemble(kernel.asm["cubin"], "--dump-sass"))
    assert kernel.metadata.shared <= SHARED
    name, dim = planned.kernel.__name__, planned.constants.get("D0", 0) + planned.constants.get("D1", 0)
    inputs = next(a.dtype for a in planned.arguments.values() if a is not None)
    spills = sum(op.startswith(("LDL", "STL")) for op in code)
    assert spills <= SPILLS.get((name, dim, inputs, arch), 0), f"{spills} spills"
    if dim and inputs == torch.bfloat16:
        assert sum(op.startswith("HGMMA" if arch == 90 else "HMMA") for op in code) > 0
        moves = [op for op in code if op.startswith(("LDG", "STG"))]
        assert any(".128" in op for op in moves if op.startswith("LDG"))
        assert any(".128" in op for op in moves if op.startswith("STG"))
        # 16 x 16 values, the last keys of the narrow block of a head dim of 40, 48 or 80, are fewer than two per thread
        single = sum(re.search(r"\.[US](8|16)\b", op) is not None for op in moves)
        assert single == 0 or planned.constants["D1"] in (8, 16), f"{single} accesses of one value"


LABELS = list(plans())
# the rest, minutes of compiling, is slow
FAST = [("D=64 M=77+257 B=16 bfloat16 ragged", 90), ("D=128 M=2048 B=16 bfloat16", 80)]
FAST += [("D=40 M=77 B=2 bfloat16 lse", 90)]


@pytest.mark.parametrize("label, arch", FAST)
def test_machine_code_uses_tensor_cores_and_does_not_spill(label, arch):
    for planned in plans()[label]:
        examine(planned, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("label", LABELS)
def test_every_specimen_uses_tensor_cores_and_does_not_spill(label, arch):
    for planned in plans()[label]:
        examine(planned, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("label", LABELS[::3])
def test_every_specimen_compiles_for_later_architectures(label, arch):
    for planned in plans()[label]:
        assert compile_launch(planned, f"sm_{arch}").metadata.shared <= SHARED


def test_the_rest_of_a_stream_is_at_most_two_tiles_and_little_waste():
    from semantica.kernels.cross_attention.tiles import stream_tiles, tail

    assert stream_tiles([257, 77, 64], 64) == ((0, 257, 16, 0, False), (257, 77, 16, 0, False), (334, 64, 0, 0, True))
    for rest in range(1, 128):
        high, low = tail(rest)
        assert rest <= high + low <= max(16, 1.5 * rest + 8) and low <= high
