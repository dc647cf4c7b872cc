"""What is read from compiled kernels, against ptxas, NVIDIA's own occupancy header and kernels made to misbehave."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semantica.benchmarks.kernels import compile_only
from semantica.benchmarks.kernels.compile_only import LIMITS, blocks_per_sm, compile_launch, count, inspect, width
from semantica.cli import main
from semantica.errors import UserError
from semantica.kernels import launch as launching
from semantica.kernels.launch import AVAILABLE, INTERPRETED, Launch

needs_compiler = pytest.mark.skipif(not AVAILABLE or INTERPRETED, reason="Triton's compiler is not at hand")
if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(x_ptr, y_ptr, n, step, shift, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i * step, mask=i < n)
        tl.store(y_ptr + i, x + shift if shift is not None else x, mask=i < n)

    @triton.jit
    def centre_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i)
        # all of x must be kept until its sum is known
        tl.store(y_ptr + i, x - tl.sum(x))

    @triton.jit
    def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)).to(tl.bfloat16))

    @triton.jit
    def sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))

    @triton.jit
    def broken_kernel(x_ptr, BLOCK: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK + 1,), tl.float32))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


def copy(n=4096, step=1, shift=None, dtype=torch.float32, x=None) -> Launch:
    x = meta(n * 4, dtype=dtype) if x is None else x
    arguments = {"x_ptr": x, "y_ptr": meta(n, dtype=dtype), "n": n, "step": step, "shift": shift}
    return Launch(copy_kernel, (4,), arguments, {"BLOCK": 1024}, warps=4)


def spilling() -> Launch:
    return Launch(centre_kernel, (1,), {"x_ptr": meta(1 << 14), "y_ptr": meta(1 << 14)}, {"BLOCK": 1 << 14}, warps=1)


def specimens():
    # the second is the same machine code as the first
    yield "copy fp32", [copy(), copy(n=8192), copy(step=3)]
    tile = meta(64, 64, dtype=torch.bfloat16)
    yield "dot", [Launch(dot_kernel, (1,), {"a_ptr": tile, "b_ptr": tile, "c_ptr": tile}, {"N": 64}, warps=4)]


@needs_compiler
def test_arguments_are_specialised_as_a_launch_would():
    source = compile_launch(copy(n=4096), "sm_90").src
    names = [p.name for p in copy_kernel.params]
    divisible = {names[path[0]] for path, attributes in source.attrs.items() if attributes}
    assert divisible == {"x_ptr", "y_ptr", "n"}
    assert source.signature == {
        "x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "step": "constexpr", "shift": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    assert {names[path[0]]: value for path, value in source.constants.items()} == {
        "step": 1, "shift": None, "BLOCK": 1024,
    }  # fmt: skip
    source = compile_launch(copy(n=4097, step=1 << 40, shift=2.5, dtype=torch.bfloat16), "sm_90").src
    assert list(source.signature.values()) == ["*bf16", "*bf16", "i32", "i64", "fp32", "constexpr"]


@needs_compiler
def test_access_widths_follow_stride_and_alignment():
    assert inspect("", copy(), "sm_90")["loads"] == {"128": 2}
    # a length that 16 does not divide cuts the mask into single elements
    assert set(inspect("", copy(n=4097), "sm_90")["stores"]) == {"32"}
    strided = inspect("", copy(step=3, dtype=torch.bfloat16), "sm_90")
    assert set(strided["loads"]) == {"16"} and set(strided["stores"]) == {"128"}


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_registers_and_spills_are_what_ptxas_says(arch, tmp_path, monkeypatch, capfd):
    # its report is printed when it runs, so it must not find an earlier result
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    for launch in (spilling(), copy()):
        row = inspect("", launch, arch)
        said = capfd.readouterr().out
        assert row["registers"] == int(re.search(r"Used (\d+) registers", said)[1])
        frame = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        stack, stores, loads = map(int, re.search(frame, said).groups())
        assert (row["stack_bytes"], row["spill_stores_bytes"], row["spill_loads_bytes"]) == (stack, stores, loads)
        assert (stores > 0) == (launch.kernel is centre_kernel)


@needs_compiler
def test_tensor_cores_and_atomics_are_seen():
    (launch,) = list(specimens())[1][1]
    found = {arch: inspect("dot", launch, arch) for arch in ("sm_80", "sm_90", "sm_100")}
    assert [list(row["tensor"]) for row in found.values()] == [["HMMA"], ["HGMMA"], ["UTCHMMA"]]
    assert all(row["atomics"] == 0 for row in found.values())
    assert found["sm_100"]["bound"] == "tensor memory"
    adds = Launch(sum_kernel, (1,), {"x_ptr": meta(128), "y_ptr": meta(1)}, {"BLOCK": 128}, warps=4)
    assert inspect("sum", adds, "sm_90")["atomics"] == 1


def test_machine_code_is_counted_by_what_it_says():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;      /* 0x0000df00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/             @!UP1 UTMALDG.2D [UR8], [UR4] ;
        /*0040*/               @P1 LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R2.64] ;
        /*0050*/                   STL.64 [R1], R4 ;
        /*0060*/                   LDL R4, [R1+0x8] ;
        /*0070*/                   LDS.128 R4, [R3] ;
        /*0080*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0090*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*10b0*/                   FMNMX R3, R3, R4, !PT ;
    """
    assert count(sass) == {
        "tensor": {"HGMMA": 1}, "loads": {"128": 2, "16": 1, "TMA": 1}, "stores": {"32": 1}, "atomics": 1,
        "spill_loads_bytes": 4, "spill_stores_bytes": 8,
    }  # fmt: skip
    assert [width(o) for o in ("LDG.E", "LDG.E.64", "LDG.E.ENL2.256", "STG.E.U8", "LDG.E.S16")] == [32, 64, 256, 8, 16]


OCCUPANCY = """
#include <cstddef>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int major, minor, warps, threads, registers;
    size_t shared, per_block, per_sm;
    while (std::scanf("%d %d %d %zu %zu %d %d %zu", &major, &minor, &warps, &per_sm, &per_block, &threads, &registers,
                      &shared) == 8) {
        cudaOccDeviceProp device;
        device.computeMajor = major; device.computeMinor = minor;
        device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = warps * 32;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536; device.warpSize = 32; device.numSms = 1;
        device.sharedMemPerBlock = 48 << 10; device.sharedMemPerMultiprocessor = per_sm;
        device.sharedMemPerBlockOptin = per_block; device.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes function;
        function.maxThreadsPerBlock = 1024; function.numRegs = registers; function.sharedSizeBytes = 0;
        function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; function.maxDynamicSharedSizeBytes = per_block;
        cudaOccDeviceState state; cudaOccResult result;
        int failed = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, shared);
        std::printf("%d\\n", failed ? -1 : result.activeBlocksPerMultiprocessor);
    }
}
"""


@needs_compiler
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_occupancy_is_what_nvidias_header_computes(tmp_path):
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = ["c++", "-I", str(include), str(tmp_path / "occupancy.cpp"), "-o", str(tmp_path / "occupancy")]
    subprocess.run(command, check=True, capture_output=True)
    asked, ours = [], []
    for arch, limits in LIMITS.items():
        major, minor = divmod(int(arch[3:]), 10)
        for threads in (32, 64, 128, 256, 512, 1024):
            for registers in (16, 25, 40, 64, 71, 96, 128, 168, 255):
                for shared in (0, 100, 8192, 16392, 50000, 100 << 10, 160 << 10, 228 << 10):
                    if shared <= limits.shared_block:
                        fields = (major, minor, limits.warps, limits.shared, limits.shared_block)
                        asked.append(" ".join(map(str, (*fields, threads, registers, shared))))
                        ours.append(blocks_per_sm(limits, threads, registers, shared)[0])
                    else:
                        assert blocks_per_sm(limits, threads, registers, shared)[0] == 0
    done = subprocess.run([str(tmp_path / "occupancy")], input="\n".join(asked), capture_output=True, text=True)
    theirs = list(map(int, done.stdout.split()))
    assert len(theirs) == len(ours) > 1500
    assert [(a, t, o) for a, t, o in zip(asked, theirs, ours) if t != o] == []


@needs_compiler
def test_the_verb_writes_table_json_and_page_alike_with_one_process_and_two(tmp_path, monkeypatch, capsys):
    shutil.copy(__file__, tmp_path / "own_kernels.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    # a spawned process gets the path of its parent
    found = []
    for workers in ("1", "2"):
        options = ["--impl", "own_kernels:specimens", "--arch", "sm_90", "--workers", workers]
        paths = [str(tmp_path / f"{workers}.{kind}") for kind in ("json", "html")]
        assert main(["bench", "kernels", "--compile-only", *options, "--json", paths[0], "--html", paths[1]]) == 0
        found.append(json.loads(Path(paths[0]).read_text())["compiled"])
    assert found[0] == found[1] and [row["name"] for row in found[0]] == ["copy fp32 +1", "copy fp32", "dot"]
    assert "HGMMA:4" in capsys.readouterr().out and "HGMMA:4" in Path(paths[1]).read_text()
    assert main(["bench", "kernels", "--compile-only", "--impl", "own_kernels:specimens", "--filter", "no such"]) == 2
    assert "no kernel has 'no such'" in capsys.readouterr().err


@needs_compiler
def test_a_kernel_that_does_not_compile_or_fit_is_named_and_fails(tmp_path, monkeypatch, capsys):
    launches = [Launch(broken_kernel, (1,), {"x_ptr": meta(128)}, {"BLOCK": 128}, warps=4), copy()]
    monkeypatch.setattr(compile_only, "specimens", lambda sources, arch: [("mixed", launch) for launch in launches])
    assert main(["bench", "kernels", "--compile-only", "--arch", "sm_90"]) == 1
    out, error = capsys.readouterr()
    assert "copy_kernel" in out and "mixed broken_kernel sm_90" in error and len(error.strip().splitlines()) == 1


def test_it_refuses_what_it_cannot_do_in_one_line(monkeypatch, capsys):
    assert main(["bench", "kernels", "--compile-only", "--arch", "sm_90,sm_12"]) == 2
    assert main(["bench", "kernels", "--compile-only", "--impl", "no_such_module:f"]) == 2
    assert main(["bench", "kernels", "--compile-only", "--impl", "json:no_such_function"]) == 2
    monkeypatch.setattr(compile_only, "AVAILABLE", False)
    assert main(["bench", "kernels", "--compile-only"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    words = ("sm_90,sm_12", "no_such_module", "no_such_function", "not installed: pip install triton")
    assert len(lines) == 4 and all(word in line for word, line in zip(words, lines))
    with pytest.raises(UserError, match="not a function"):
        compile_only.resolve("json:__name__")


def test_under_the_interpreter_there_is_nothing_to_compile(tmp_path):
    command = [sys.executable, "-P", "-m", "semantica.cli", "bench", "kernels", "--compile-only"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"TRITON_INTERPRET": "1", "PATH": ""}, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stderr.startswith("semantica: ") and len(done.stderr.strip().splitlines()) == 1
    assert "TRITON_INTERPRET=1" in done.stderr or not AVAILABLE


@needs_compiler
def test_an_architectures_own_launch_settings_are_what_is_compiled():
    content = json.loads(json.dumps(launching.table("group_norm")))
    content["resident"]["sm_90"] = [{**row, "warps": 16} for row in content["resident"]["default"]]
    warps = {}
    with launching.trial("group_norm", content):
        assert (compile_only.ladders_of("sm_90"), compile_only.ladders_of("sm_80")) == ("sm_90", "default")
        for arch in ("sm_90", "default"):
            compile_only.specimens.cache_clear()
            chosen = compile_only.specimens((compile_only.SHIPPED,), arch)
            warps[arch] = {launch.warps for _, launch in chosen if launch.kernel.__name__ == "resident_kernel"}
    compile_only.specimens.cache_clear()
    assert warps == {"sm_90": {16}, "default": {1, 2, 4, 8, 16}}


def test_own_functions_are_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "mine_in_the_folder.py").write_text("def kernels():\n    return []\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert compile_only.resolve("mine_in_the_folder:kernels")() == [] and sys.path == before
