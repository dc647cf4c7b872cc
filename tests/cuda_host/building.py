"""Builds programs of CUDA C++ with an ordinary compiler, on the bench of this folder, and runs them."""

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
# what the program is compiled with, and what the runtime under it is told
FLAVOURS = {
    "plain": ([], "CUDA_HOST_PLAIN"),
    "asan": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "CUDA_HOST_ASAN"),
    "tsan": (["-fsanitize=thread"], "CUDA_HOST_TSAN"),
}
COMPILER = shutil.which("g++")
WARNINGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
ENVIRONMENT = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
FAULT = 99


@cache
def folder() -> Path:
    """Where everything is built, once for all tests of a process; gone when it ends."""
    made = tempfile.TemporaryDirectory(prefix="cuda-host-")
    folder.keep = made
    return Path(made.name)


@cache
def build(source: str, *flavours: str) -> dict[str, Path]:
    """A program from one file beside this one, in each flavour."""

    def one(flavour: str) -> Path:
        flags, macro = FLAVOURS[flavour]
        program = folder() / f"{Path(source).stem}-{flavour}"
        runtime = program.with_suffix(".so")
        compile_(*sorted(HERE.glob("*.cpp")), "-O2", f"-D{macro}", "-shared", "-fPIC", "-o", runtime)
        includes = [f"-D{macro}", "-DSEMANTICA_CUDA_HOST", f"-I{HERE}", f"-I{CUDA}"]
        compile_("-x", "c++", HERE / source, "-x", "none", runtime, *flags, *includes, "-o", str(program))
        return program

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(flavours, pool.map(one, flavours)))


def compile_(*arguments) -> None:
    done = subprocess.run([COMPILER, *WARNINGS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(program: Path, *arguments, limit: float = 120) -> subprocess.CompletedProcess:
    """The program's exit code and what it said; a hang is an error of the bench."""
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=limit, env=os.environ | ENVIRONMENT
    )
