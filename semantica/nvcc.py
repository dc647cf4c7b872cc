"""The CUDA compiler: where it is, whether it will do, and for which architectures it compiles `csrc/cuda`.

Used by `setup.py`, which loads this file by its path before there is a package: the standard library alone.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# what there are kernels for; a is for instructions of that very architecture, which no other runs
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
# where toolkits are installed
USUAL = Path("/usr/local/cuda/bin/nvcc")
# the first that knows sm_100a and sm_120a
NEEDED = (12, 8)
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
PROBE = "#include <cooperative_groups.h>\n#include <cuda_bf16.h>\n__global__ void probe(float* x) { *x = 1; }\n"


class Unusable(Exception):
    """No compiler that will do; one line says why, and what would."""


@dataclass(frozen=True)
class Compiler:
    """An nvcc that compiles for all of `ARCHITECTURES` here."""

    path: Path
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]} ({self.path})"

    def run(self, *arguments: str | Path, **options) -> subprocess.CompletedProcess:
        """Run it with its output as text; raises nothing."""
        return subprocess.run([str(self.path), *map(str, arguments)], capture_output=True, text=True, **options)


def find() -> Path | None:
    """Of a toolkit (CUDA_HOME or CUDA_PATH, as every tool of CUDA reads them, then PATH), of the packages of the index,
    or in the place where toolkits are installed."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    places = [home / "bin" / "nvcc" for home in homes] + ([Path(on_path)] if on_path else [])
    places += [*packaged(), USUAL]
    return next((path for path in places if os.access(path, os.X_OK) and path.is_file()), None)


def packaged() -> list[Path]:
    """The compilers that packages of the index have put beside this Python's other packages, newest first."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return []
    folders = spec.submodule_search_locations or () if spec else ()
    return sorted((path for folder in folders for path in Path(folder).glob("cu*/bin/nvcc")), reverse=True)


def version(path: Path) -> tuple[int, int]:
    """Raises `Unusable` where it does not run or does not say."""
    try:
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unusable(f"{path} does not run ({error})") from error
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise Unusable(f"{path} is no CUDA compiler: it does not say its release")
    return int(release[1]), int(release[2])


def compiler(path: Path | None = None) -> Compiler:
    """The compiler at a path, or the one that is found.

    Raises:
        Unusable: there is none, it is too old, or it cannot compile the smallest kernel: its host compiler is missing
            or not one that it takes, or its parts are of different releases.
    """
    if sys.platform != "linux":
        raise Unusable(f"CUDA kernels are built on Linux alone, this is {sys.platform}")
    path = path or find()
    if path is None:
        raise Unusable("no CUDA compiler is here: install a toolkit, or let pip fetch one, -C cuda-compiler=packages")
    release = version(path)
    if release < NEEDED:
        raise Unusable(
            f"{path} is too old: {NEEDED[0]}.{NEEDED[1]} is needed, {release[0]}.{release[1]} was found; "
            "set CUDA_HOME to a newer toolkit"
        )
    found = Compiler(path, release)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE)
        done = found.run("-c", *FLAGS, "-arch=sm_90a", source, "-o", source.with_suffix(".o"))
    if done.returncode:
        what = complaint(done)
        # pip lets a newer compiler stand beside the runtime that a build of torch pins
        mixed = "headers are incompatible" in what
        hint = "; pip install 'cuda-toolkit[nvcc,cccl]' brings parts of one release" if mixed else ""
        raise Unusable(f"{found} compiles nothing here: {what}{hint}")
    return found


def complaint(done: subprocess.CompletedProcess) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "unsupported" in line.lower()]
    return (telling or lines or [f"exit code {done.returncode}"])[0][:300]


@functools.cache
def cards() -> tuple[tuple[int, int], ...]:
    """Compute capabilities of the NVIDIA GPUs here, lowest first, by the driver's own tool; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    # with no driver it says so in words
    found = re.findall(r"^(\d+)\.(\d+)\s*$", said.stdout, re.MULTILINE) if said.returncode == 0 else ()
    return tuple(sorted({(int(major), int(minor)) for major, minor in found}))


def runs_on(capability: tuple[int, int], built: Iterable[str]) -> str | None:
    """Which of the built architectures a card runs; "compute_80" where the driver compiles that for it, else None.

    Machine code runs on later cards of the same major number, unless it is for one architecture alone (a).
    """
    built = set(built)
    exact = "sm_{}{}a".format(*capability)
    if exact in built:
        return exact
    if capability[0] == 8 and "sm_80" in built:
        return "sm_80"
    return "compute_80" if capability >= (8, 0) and "compute_80" in built else None


def wanted(asked: str, capabilities: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """Architectures to compile for.

    Args:
        asked: "no", "auto" (the given cards'), "all", or architectures separated by commas.
        capabilities: of the cards here.

    Raises:
        ValueError: none of these.
    """
    if asked == "no":
        return ()
    if asked == "all":
        return (*ARCHITECTURES, "compute_80")
    if asked == "auto":
        able = [c for c in capabilities if c >= (8, 0)]
        found = {runs_on(c, (*ARCHITECTURES, "compute_80")) for c in able}
        return tuple(arch for arch in (*ARCHITECTURES, "compute_80") if arch in found)
    names = [name.strip() for name in asked.split(",")]
    unknown = [name for name in names if name not in (*ARCHITECTURES, "compute_80")]
    if unknown:
        choices = ", ".join(("auto", "no", "all", *ARCHITECTURES, "compute_80"))
        raise ValueError(f"cuda={asked}: choose from {choices}")
    return tuple(dict.fromkeys(names))


def digest(paths: Iterable[str | Path]) -> str:
    """Of names and contents: what was compiled says what it was compiled from."""
    found = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def sources(folder: Path) -> list[Path]:
    """What `semantica._cuda` is compiled from, in `csrc/cuda` of a checkout; none where there is no such folder."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))


def gencode(architectures: Iterable[str]) -> list[str]:
    """The compiler's options for some architectures; "compute_" is what a driver compiles for cards not listed."""
    return [f"-gencode=arch=compute_{arch.split('_')[1]},code={arch}" for arch in architectures]
