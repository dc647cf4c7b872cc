"""Builds programs of CUDA C++ with an ordinary compiler, on the bench of this folder, and runs them.

What is built is kept in a folder of the user's under the system's temporary one, named by a hash of all it is made of.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

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
# wide red zones: who is past the end by a row of an array must not land in the next one
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "ASAN_OPTIONS": "detect_leaks=0:redzone=2048:max_redzone=2048",
}
# exit code of a program that the bench has stopped
FAULT = 99


@cache
def folder() -> Path:
    made = Path(tempfile.gettempdir()) / f"semantica-cuda-host-{os.getuid()}"
    made.mkdir(mode=0o700, exist_ok=True)
    state = made.lstat()
    # programs of this folder are run: nobody else may write there
    if made.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"{made} belongs to somebody else; remove it or set TMPDIR")
    return made


@cache
def prefix(flavour: str) -> list[str]:
    """What a program of a flavour is started with; skips the test where a flavour has no runtime."""
    if COMPILER is None:
        pytest.skip("needs g++")
    if flavour == "plain":
        return []
    program = folder() / f"probe-{flavour}-{os.getpid()}"
    flags = FLAVOURS[flavour][0]
    source = "int main() {}"
    built = subprocess.run(
        [COMPILER, *flags, "-x", "c++", "-", "-o", program], input=source, capture_output=True, text=True
    )
    try:
        if built.returncode:
            pytest.skip(f"{COMPILER} has no runtime for {flags[0]}: {last_line(built.stderr)}")
        said = ""
        # its shadow memory needs a layout that too much randomisation of addresses denies it
        for start in [], ["setarch", platform.machine(), "-R"]:
            done = subprocess.run([*start, program], capture_output=True, text=True)
            if done.returncode == 0:
                return start
            said = said or done.stderr
        pytest.skip(f"programs with {flags[0]} do not run here: {last_line(said)}")
    finally:
        program.unlink(missing_ok=True)


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1] if said.strip() else "it says nothing"


@cache
def digest(*suffixes: str) -> str:
    """Of the compiler, and of the files with these suffixes in the bench and among the kernels."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True).stdout
    files = sorted(path for path in (*HERE.iterdir(), *CUDA.iterdir()) if path.suffix in suffixes)
    contents = b"".join(path.name.encode() + path.read_bytes() for path in files)
    return hashlib.sha256(version + repr((WARNINGS, FLAVOURS)).encode() + contents).hexdigest()[:16]


@cache
def build(source: str, *flavours: str) -> dict[str, Path]:
    """A program from one file beside this one, in those of the flavours that there are."""
    for flavour in flavours:
        prefix(flavour)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(flavours, pool.map(lambda flavour: build_one(source, flavour), flavours)))


def build_one(source: str, flavour: str) -> Path:
    flags, macro = FLAVOURS[flavour]
    own = ["-O2", f"-D{macro}", "-shared", "-fPIC"]
    runtime = compile_(f"{digest('.cpp', '.h')}-runtime-{flavour}.so", *sorted(HERE.glob("*.cpp")), *own)
    includes = [f"-D{macro}", "-DSEMANTICA_CUDA_HOST", f"-I{HERE}", f"-I{CUDA}"]
    program = f"{digest('.cpp', '.h', '.cu', '.cuh')}-{Path(source).stem}-{flavour}"
    return compile_(program, "-x", "c++", HERE / source, "-x", "none", runtime, *flags, *includes)


def compile_(name: str, *arguments) -> Path:
    """One call of the compiler, unless it has been made before."""
    made = folder() / name
    if not made.exists():
        aside = made.with_name(f"{os.getpid()}-{name}")
        done = subprocess.run(
            [COMPILER, *WARNINGS, *map(str, arguments), "-o", str(aside)], capture_output=True, text=True
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"{name} does not compile: {errors[0] if errors else last_line(done.stderr)}")
        aside.replace(made)
    return made


def run(program: Path, *arguments, limit: float = 120, **options) -> subprocess.CompletedProcess:
    """The program's exit code and what it said; a hang is an error of the bench."""
    command = [*prefix(program.name.rsplit("-", 1)[1]), program, *map(str, arguments)]
    options = {"text": True} | options
    return subprocess.run(command, capture_output=True, timeout=limit, env=os.environ | ENVIRONMENT, **options)
