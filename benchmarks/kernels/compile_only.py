"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, access widths, occupancy.

Limits of the architectures: CUDA programming guide, "Features and Technical Specifications"; the arithmetic is that of
NVIDIA's cuda_occupancy.h.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from semantica.benchmarks.harness.process import resolve
from semantica.errors import UserError
from semantica.kernels.launch import AVAILABLE, INTERPRETED, LADDERS, Launch, table, target

SHIPPED = "semantica.kernels:specimens"


@dataclass(frozen=True)
class Limits:
    """One multiprocessor: resident warps and blocks, shared memory in bytes of all blocks and of one."""

    warps: int
    blocks: int
    shared: int
    shared_block: int
    registers: int = 65536
    tensor_columns: int = 0


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10, 163 << 10),
    "sm_86": Limits(48, 16, 100 << 10, 99 << 10),
    "sm_89": Limits(48, 24, 100 << 10, 99 << 10),
    "sm_90": Limits(64, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(64, 32, 228 << 10, 227 << 10, tensor_columns=512),
    "sm_120": Limits(48, 24, 100 << 10, 99 << 10),
}
# since sm_80 the system keeps this much shared memory of every block, and rounds what the block uses
RESERVED, SHARED_UNIT, REGISTER_UNIT, PARTITIONS = 1024, 128, 256, 4
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
TENSOR_CORE = re.compile(r"[A-Z]G?MMA|UTC[A-Z]*MMA")
ATOMIC = ("ATOM", "ATOMG", "RED", "REDG", "UREDGR")
# the bulk copies of the tensor memory accelerator
BULK = {"UTMALDG": "loads", "UBLKCP": "loads", "UTMASTG": "stores", "UTMAREDG": "stores"}
ACCESS = {"LDG": "loads", "LDGSTS": "loads", "STG": "stores", "LDL": "spill_loads", "STL": "spill_stores"}


def blocks_per_sm(limits: Limits, threads: int, registers: int, shared: int, columns: int = 0) -> tuple[int, str]:
    """How many blocks fit on a multiprocessor, and what bounds them; 0 when not even one fits.

    Args:
        threads: of one block; registers: of one thread; shared: bytes of one block; columns: tensor memory of one.
    """
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    # each quarter of the multiprocessor has registers of its own
    resident = limits.registers // PARTITIONS // per_warp * PARTITIONS
    bounds = {
        "threads": limits.warps // warps if threads <= 1024 else 0,
        "registers": resident // warps,
        "shared memory": limits.shared // (-(-(shared + RESERVED) // SHARED_UNIT) * SHARED_UNIT)
        if shared <= limits.shared_block
        else 0,
        "blocks": limits.blocks,
    }
    if columns and limits.tensor_columns:
        bounds["tensor memory"] = limits.tensor_columns // columns
    bound = min(bounds, key=bounds.get)
    return bounds[bound], bound


def specialise(launch: Launch, arch: str):
    """`(source, target, options)` of a `Launch`, of meta tensors too, as Triton would make them where that GPU is."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    kernel, backend = launch.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**launch.arguments, **launch.constants, **launch.options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, specialization, None)
    return ASTSource(kernel, signature, constants, attributes), target, vars(parsed)


def compile_launch(launch: Launch, arch: str):
    """Triton's `CompiledKernel`, which holds PTX and machine code."""
    import triton

    return triton.compile(*specialise(launch, arch))


def variant(launch: Launch) -> tuple:
    """Equal for launches that are one and the same machine code."""
    source, _, _ = specialise(launch, "sm_90")
    found = launch.kernel.__name__, source.signature, source.constants, source.attrs, launch.warps, launch.stages
    return tuple(map(str, found))


def disassemble(cubin: bytes, *flags: str) -> str:
    """Output of the cuobjdump that Triton ships."""
    from triton import knobs

    # the tool reads files only
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *flags, file.name]
        # it finds nvdisasm on the path only
        path = os.pathsep.join([os.path.dirname(knobs.nvidia.nvdisasm.path), os.environ.get("PATH", "")])
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}
        ).stdout


def width(opcode: str) -> int:
    """Bits that one thread reads or writes: `LDG.E.128.CONSTANT` -> 128."""
    for part in opcode.split(".")[1:]:
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def count(sass: str) -> dict:
    """What stands in machine code: tensor-core instructions, global accesses by width, bytes spilled, atomics."""
    tensor, atomics = Counter(), 0
    found = {kind: Counter() for kind in ("loads", "stores", "spill_loads", "spill_stores")}
    for opcode in INSTRUCTION.findall(sass):
        base = opcode.split(".")[0]
        if TENSOR_CORE.fullmatch(base):
            tensor[base] += 1
        elif base in ACCESS:
            found[ACCESS[base]][width(opcode)] += 1
        elif base in BULK:
            found[BULK[base]]["TMA"] += 1
        atomics += base in ATOMIC
    spilled = {
        kind: sum(bits // 8 * n for bits, n in found.pop(kind).items()) for kind in ("spill_loads", "spill_stores")
    }
    widths = {kind: {str(bits): n for bits, n in sorted(c.items(), key=str)} for kind, c in found.items()}
    return {"tensor": dict(tensor), **widths, **{f"{kind}_bytes": n for kind, n in spilled.items()}, "atomics": atomics}


def inspect(name: str, launch: Launch, arch: str) -> dict:
    """One row of the table: a launch compiled for one architecture. `error` where the compiler refused it."""
    import triton

    row = {
        "name": name, "kernel": launch.kernel.__name__, "arch": arch, "warps": launch.warps, "stages": launch.stages,
        "constants": {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in launch.constants.items()},
        "triton": triton.__version__,
    }  # fmt: skip
    try:
        compiled = compile_launch(launch, arch)
    # the compiler raises whatever its passes raise; one kernel's failure must not hide the others
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, stack = map(
        int, re.search(r"REG:(\d+) STACK:(\d+)", disassemble(cubin, "--dump-resource-usage")).groups()
    )
    # warp specialisation starts more threads than num_warps says
    threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)[1])
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    blocks, bound = blocks_per_sm(LIMITS[arch], threads, registers, shared, columns)
    return {
        **row,
        "ptx": re.search(r"^\.version\s+(\S+)", ptx, re.MULTILINE)[1],
        "threads": threads, "registers": registers, "stack_bytes": stack, "shared_bytes": shared,
        "blocks_per_sm": blocks, "bound": bound, "occupancy": blocks * threads / 32 / LIMITS[arch].warps,
        **count(disassemble(cubin, "--dump-sass")),
    }  # fmt: skip


def architectures(text: str) -> list[str]:
    """ "sm_80,sm_90" as a list.

    Raises:
        UserError: an architecture whose limits are not known here.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in LIMITS]
    if unknown or not names:
        raise UserError(f"--arch {text!r}: give some of {','.join(LIMITS)}")
    return names


@functools.cache
def specimens(sources: tuple[str, ...], arch: str) -> list[tuple[str, Launch]]:
    """Every different launch that the given "module:function"s plan for an architecture, with its own launch settings;
    named after the first specimen that has it.

    Called again in each worker, since kernels do not pickle.
    """
    found: dict[tuple, tuple[list[str], Launch]] = {}
    with target(arch):
        for source in sources:
            for name, launches in resolve(source)():
                for launch in launches:
                    names, _ = found.setdefault(variant(launch), ([], launch))
                    names.append(name)
    return [(names[0] + f" +{len(names) - 1}" * (len(names) > 1), launch) for names, launch in found.values()]


def ladders_of(arch: str) -> str:
    """The architecture where it has ladders of its own, else "default", which is planned once for all others."""
    tables = map(table, LADDERS)
    return arch if any(arch in ladders for content in tables for ladders in content.values()) else "default"


def job(sources: tuple[str, ...], index: int, arch: str) -> dict:
    return inspect(*specimens(sources, ladders_of(arch))[index], arch)


def jobs(sources: tuple[str, ...], archs: list[str], words: list[str]) -> list[tuple[tuple[str, ...], int, str]]:
    """What to compile: every launch whose name has all words, for every architecture.

    Raises:
        UserError: no Triton, or Triton's interpreter is on.
    """
    if not AVAILABLE:
        raise UserError("--compile-only needs Triton, which is not installed: pip install triton")
    if INTERPRETED:
        raise UserError("--compile-only cannot work under TRITON_INTERPRET=1, which replaces the compiler: unset it")
    try:
        names = [
            (i, arch, f"{name} {launch.kernel.__name__}")
            for arch in archs
            for i, (name, launch) in enumerate(specimens(sources, ladders_of(arch)))
        ]
    except ImportError as error:
        raise UserError(f"the kernels to compile cannot be imported: {error}") from error
    return [(sources, i, arch) for i, arch, name in names if all(word in name for word in words)]


def run(todo: list[tuple[tuple[str, ...], int, str]], workers: int) -> Iterator[dict]:
    """Rows in order, as they are done."""
    if workers == 1 or not todo:
        yield from (job(*arguments) for arguments in todo)
        return
    # spawned, not forked: a fork of a process with threads may hang
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(job, *zip(*todo))
