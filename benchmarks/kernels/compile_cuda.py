"""What nvcc makes of every CUDA kernel in `csrc/cuda`, without a GPU: the figures that `compile_only` has of Triton's.

Registers, stack and static shared memory are ptxas's own report; accesses and spills are counted in the machine code.
"""

import functools
import itertools
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from semantica import nvcc
from semantica.benchmarks.kernels.compile_only import LIMITS, blocks_per_sm, count, disassemble
from semantica.kernels.group_norm import cuda_plan

# of the checkout; a wheel has no sources
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
USED = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
ENTRY = re.compile(r"\.entry (\w+)\([^)]*\)\s*((?:\.\w+ [^\n]*\n)*)")
TYPES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}


def sources() -> list[Path]:
    """Files with kernels; none outside a checkout."""
    return sorted(SOURCES.glob("*.cu"))


def built_as(arch: str) -> str:
    """The architecture whose machine code a card of `arch` ("sm_86") runs: "sm_80"."""
    number = arch.removeprefix("sm_")
    return nvcc.runs_on((int(number[:-1]), int(number[-1])), nvcc.ARCHITECTURES)


def demangled(names: list[str]) -> list[str]:
    """As C++ writes them, without arguments; as they are where the tool of the host compiler is missing."""
    if not names or shutil.which("c++filt") is None:
        return names
    said = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |\(anonymous namespace\)::", "", name) for name in said]


def sections(text: str) -> dict[str, str]:
    """Machine code by kernel."""
    parts = re.split(r"^\s*Function : (\w+)\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


@functools.cache
def planned(arch: str) -> dict[tuple[str, ...], tuple[int, int]]:
    """The most dynamic shared memory that any plan of group_norm asks of a kernel, with the threads of such a block: by
    the kernel's name, its type, its vector width and its layout."""
    # needs Triton, as all of this does
    from semantica.kernels.group_norm.specimens import SHAPES

    found: dict[tuple[str, ...], tuple[int, int]] = {}
    drawn = itertools.product(SHAPES, TYPES.items(), (True, False), ((1, "forward"), (2, "backward")))
    for ((samples, channels, *spatial), groups), (name, itemsize), last, (operands, direction) in drawn:
        problem = cuda_plan.Problem(samples, channels, groups, math.prod(spatial), itemsize, last)
        if (plan := cuda_plan.plan(problem, operands, cuda_plan.CARDS[arch])) is not None:
            key = f"{direction}_kernel", name, str(plan.vector), str(last).lower()
            shared, threads = max((plan.shared, plan.threads), found.get(key, (0, 0))[::-1])
            found[key] = threads, shared
    return found


def inspect(source: Path, arch: str, compiler: nvcc.Compiler) -> list[dict]:
    """A row for each kernel of a file; one with `error` where it does not compile.

    Dynamic shared memory is what the plan that asks for most takes; of a kernel without plans there is none.
    """
    row = {"name": source.name, "kernel": source.stem, "arch": arch, "warps": "", "stages": "", "constants": {}}
    row["compiler"] = f"nvcc {compiler.version[0]}.{compiler.version[1]}"
    code = built_as(arch)
    virtual = f"compute_{code.removeprefix('sm_')}"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.fatbin"
        generate = f"-gencode=arch={virtual},code=[{virtual},{code}]"
        done = compiler.run("-fatbin", *nvcc.FLAGS, "-Xptxas=-v", generate, source, "-o", made)
        if done.returncode:
            return [{**row, "error": nvcc.complaint(done)}]
        image = made.read_bytes()
    ptx, sass = disassemble(image, "--dump-ptx"), sections(disassemble(image, "--dump-sass"))
    bounds = {name: re.search(r"\.(?:reqntid|maxntid) (\d+)", text) for name, text in ENTRY.findall(ptx)}
    found = [match.groupdict() for match in USED.finditer(done.stderr + done.stdout)]
    version = re.search(r"^\.version\s+(\S+)", ptx, re.MULTILINE)[1]
    rows = []
    for used, name in zip(found, demangled([used["name"] for used in found])):
        # without a bound the compiler reckons with the most that there can be
        threads = int(bounds[used["name"]][1]) if bounds.get(used["name"]) else 1024
        kernel, _, arguments = name.partition("<")
        kernel = kernel.partition("(")[0].rpartition("::")[2]
        given = arguments.rpartition(">")[0].split(", ") if arguments else []
        threads, dynamic = planned(arch).get((kernel, *given), (threads, 0))
        registers, shared = int(used["registers"]), int(used["shared"] or 0) + dynamic
        blocks, bound = blocks_per_sm(LIMITS[arch], threads, registers, shared)
        rows.append(
            {
                **row,
                "kernel": kernel,
                "constants": {str(i): value for i, value in enumerate(given)},
                "warps": threads // 32,
                "ptx": version,
                "threads": threads,
                "registers": registers,
                "stack_bytes": int(used["stack"]),
                "shared_bytes": shared,
                "dynamic_bytes": dynamic,
                "blocks_per_sm": blocks,
                "bound": bound,
                "occupancy": blocks * threads / 32 / LIMITS[arch].warps,
                **count(sass[used["name"]]),
            }  # fmt: skip
        )
    return rows


def run(archs: list[str], words: list[str], workers: int) -> Iterator[list[dict]]:
    """Rows of each file on each architecture whose kernels have all words in their names.

    Raises:
        nvcc.Unusable: there is no compiler that will do.
    """
    compiler, todo = nvcc.compiler(), [(source, arch) for source in sources() for arch in archs]
    # nvcc is a process of its own: threads are enough to wait for several
    with ThreadPoolExecutor(workers) as pool:
        for rows in pool.map(lambda job: inspect(*job, compiler), todo):
            yield [row for row in rows if all(word in f"{row['name']} {row['kernel']}" for word in words)]
