"""What is read from compiled CUDA kernels, against kernels whose figures are known; and the shipped ones."""

import json
from pathlib import Path

import pytest

from semantica import nvcc
from semantica.benchmarks.kernels import compile_cuda
from semantica.benchmarks.kernels.compile_cuda import built_as, demangled, inspect
from semantica.benchmarks.kernels.compile_only import LIMITS
from semantica.cli import main
from semantica.kernels.launch import AVAILABLE, INTERPRETED

pytestmark = pytest.mark.skipif(
    nvcc.find() is None or not AVAILABLE or INTERPRETED, reason="nvcc or Triton's disassembler is not at hand"
)
KERNELS = """
#include <cuda_bf16.h>
namespace {
template <class T, int N>
__global__ void __launch_bounds__(256) copy_kernel(const T* x, T* y, long n) {
    __shared__ float s[64];
    const long i = blockIdx.x * 256l + threadIdx.x;
    s[threadIdx.x % 64] = 1;
    __syncthreads();
    if (i < n) reinterpret_cast<uint4*>(y)[i] = reinterpret_cast<const uint4*>(x)[i];
    if (n == 77) y[0] = s[n % 64];
}
}
void use(const __nv_bfloat16* x, __nv_bfloat16* y) { copy_kernel<__nv_bfloat16, 8><<<1, 256>>>(x, y, 1); }
// 200 values that must all be there at once, in 64 registers
__global__ void __launch_bounds__(1024) spilling_kernel(const float* x, float* y) {
    float v[200];
#pragma unroll
    for (int i = 0; i < 200; ++i) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 200; ++i) sum += v[i];
#pragma unroll
    for (int i = 0; i < 200; ++i) y[i * 1024 + threadIdx.x] = v[i] / sum;
    atomicAdd(y, sum);
}
"""


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A folder of sources in place of the shipped ones."""
    monkeypatch.setattr(compile_cuda, "SOURCES", tmp_path)
    (tmp_path / "kernels.cu").write_text(KERNELS)
    return tmp_path


def test_figures_are_those_of_the_kernels(sources):
    rows = {row["kernel"]: row for row in inspect(sources / "kernels.cu", "sm_90", nvcc.compiler())}
    copy, spilling = rows["copy_kernel"], rows["spilling_kernel"]
    assert copy["constants"] == {"0": "__nv_bfloat16", "1": "8"} and copy["threads"] == 256 and copy["warps"] == 8
    assert copy["shared_bytes"] == 256 and copy["dynamic_bytes"] == 0
    assert copy["blocks_per_sm"] == 8 and copy["occupancy"] == 1
    assert copy["loads"] == {"128": 1} and copy["stores"] == {"128": 1, "16": 1} and copy["atomics"] == 0
    assert copy["spill_loads_bytes"] == copy["spill_stores_bytes"] == copy["stack_bytes"] == 0
    kept = 4 * (200 - 64)
    assert spilling["registers"] <= 64 and min(spilling["stack_bytes"], spilling["spill_stores_bytes"]) >= kept
    assert spilling["atomics"] == 1 and spilling["shared_bytes"] == 0 and spilling["bound"] == "threads"


def test_every_card_has_code_of_its_generation():
    code = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a", "sm_120": "sm_120a"}
    assert {arch: built_as(arch) for arch in LIMITS} == {"sm_80": "sm_80", **code}


def test_names_are_as_they_were_written(monkeypatch):
    names = ["_Z11copy_kernelI13__nv_bfloat16Li8EEvPKT_PS1_l"]
    assert demangled(names) == ["copy_kernel<__nv_bfloat16, 8>"] and demangled([]) == []
    monkeypatch.setattr(compile_cuda.shutil, "which", lambda name: None)
    assert demangled(names) == names


@pytest.mark.slow
def test_the_verb_lists_them_beside_tritons(sources, tmp_path, monkeypatch, capsys):
    (sources / "broken.cu").write_text("__global__ void f() { no_such_name(); }\n")
    options = ["--compile-only", "--arch", "sm_90", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", "kernels", *options, "--filter", ".cu"]) == 1
    found = [row["kernel"] for row in json.loads((tmp_path / "rows.json").read_text())["compiled"]]
    assert found[0] == "broken" and set(found[1:]) == {"copy_kernel", "spilling_kernel"}
    # a file that does not compile is named, and fails
    assert "broken.cu broken sm_90: " in (error := capsys.readouterr().err)
    assert 'identifier "no_such_name" is undefined' in error
    # no compiler: said, and Triton's kernels are compiled all the same
    monkeypatch.setattr(nvcc, "compiler", lambda: (_ for _ in ()).throw(nvcc.Unusable("no CUDA compiler is here")))
    words = "group_norm forward [8, 48, 16, 16] groups 16 contiguous float32"
    assert main(["bench", "kernels", *options, "--filter", words]) == 0
    out, error = capsys.readouterr()
    assert "resident_kernel" in out and "CUDA kernels are not compiled: no CUDA compiler is here" in error


@pytest.mark.slow
def test_the_shipped_kernels_compile_for_every_architecture():
    rows = sum(compile_cuda.run(["sm_80", "sm_90", "sm_100", "sm_120"], ["group_norm"], 2), [])
    assert [row["error"] for row in rows if "error" in row] == []
    norms = [row for row in rows if row["kernel"] in ("forward_kernel", "backward_kernel")]
    # three types, vectors or single elements, two layouts, on each architecture
    assert len(norms) == 2 * 3 * 2 * 2 * 4 and {row["ptx"] for row in rows} == {norms[0]["ptx"]}
    for row in norms:
        what, wide = (row["kernel"], row["arch"], row["constants"]), row["constants"]["1"] != "1"
        assert row["stack_bytes"] == row["spill_stores_bytes"] == row["spill_loads_bytes"] == 0, what
        # one block of 512 threads to a multiprocessor, whose shared memory it fills; smaller ones in its place
        assert row["registers"] <= 128, what
        # 16-byte accesses, and copies to shared memory that pass registers by
        assert not wide or row["loads"]["128"] >= 11 and row["stores"]["128"] >= 1, what
        # the barrier of the grid, and no other
        assert row["atomics"] == 1 and row["blocks_per_sm"] >= 1, what
        assert row["shared_bytes"] <= LIMITS[row["arch"]].shared_block, what
    assert {row["spill_stores_bytes"] for row in rows if row["kernel"] == "finish_kernel"} == {0}
