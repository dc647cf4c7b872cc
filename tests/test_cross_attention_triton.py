"""The Triton kernels of `cross_attention`: their values by the interpreter, their machine code by the compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from semantica.kernels import launch  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="compiles, and starts the interpreted tests itself")
TESTS = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
# shared memory of the smallest supported GPU of today (sm_86, sm_89, sm_120)
SHARED = 99 * 1024
# kernel, D, type, architecture: known spills, and the most loads and stores they may be
SPILLS = {
    ("dkv_kernel", 128, torch.bfloat16, 80): 12,
    ("dq_kernel", 64, torch.float32, 80): 24,
    ("dq_kernel", 64, torch.float32, 90): 24,
    ("dq_kernel", 128, torch.float32, 80): 24,
    ("dq_kernel", 128, torch.float32, 90): 24,
}


def interpreted(*arguments):
    """Run pytest where Triton interprets; a switch it reads when it is imported, hence a process of its own."""
    command = [str(Path(sys.executable).parent / "pytest"), "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and " passed" in summary and "skipped" not in summary, done.stdout[-5000:] + done.stderr


def test_interpreted_kernels_are_accurate_on_every_case():
    interpreted(str(TESTS / "test_kernels.py"), "-k", "cross_attention_and_gradients and not bfloat16")


def test_interpreted_kernels_stay_in_bounds_and_repeat():
    interpreted(str(TESTS / "interpreted" / "test_cross_attention.py"))


def build(planned, arch):
    """Compile one launch for an architecture, with the alignments its arguments have."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(planned.kernel.arg_names):
        value = planned.constants.get(name, planned.arguments.get(name))
        if name in planned.constants or value is None or isinstance(value, int) and value == 1:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(planned.kernel, signature, constants, attributes)
    options = {"num_warps": planned.warps, "num_stages": planned.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def instructions(kernel, folder):
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([TOOLS / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing, re.M)


def plans():
    if launch.INTERPRETED:
        return {}
    from semantica.kernels.cross_attention_triton_backward import specimens

    return dict(specimens())


def examine(planned, arch, folder):
    kernel = build(planned, arch)
    code = instructions(kernel, folder)
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
        # 16 x 16 values, the last keys of the narrow block of a head dim of 48 or 80, are fewer than two per thread
        single = sum(re.search(r"\.[US](8|16)\b", op) is not None for op in moves)
        assert single == 0 or planned.constants["D1"] == 16, f"{single} accesses of one value"


LABELS = list(plans())
# the rest, minutes of compiling, is slow
FAST = [("D=64 M=77+257 B=16 bfloat16 ragged", 90), ("D=128 M=2048 B=16 bfloat16", 80)]


@pytest.mark.parametrize("label, arch", FAST)
def test_machine_code_uses_tensor_cores_and_does_not_spill(label, arch, tmp_path):
    for planned in plans()["cross_attention " + label]:
        examine(planned, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("label", LABELS)
def test_every_specimen_uses_tensor_cores_and_does_not_spill(label, arch, tmp_path):
    for planned in plans()[label]:
        examine(planned, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [100, 120])
@pytest.mark.parametrize("label", LABELS)
def test_every_specimen_compiles_for_later_architectures(label, arch):
    for planned in plans()[label]:
        assert build(planned, arch).metadata.shared <= SHARED


def test_the_rest_of_a_stream_is_at_most_two_tiles_and_little_waste():
    from semantica.kernels.cross_attention_triton import stream_tiles, tail

    assert stream_tiles([257, 77, 64], 64) == ((0, 257, 16, 0, False), (257, 77, 16, 0, False), (334, 64, 0, 0, True))
    for rest in range(1, 128):
        high, low = tail(rest)
        assert rest <= high + low <= max(16, 1.5 * rest + 8) and low <= high
