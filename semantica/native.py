"""`semantica._C` and `semantica._cuda`, the compiled parts, or the reason why one is not there or does not run.

Everything works without them, more slowly.
"""

import functools
import importlib
import importlib.machinery
import os
import shlex
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

from semantica import nvcc

AGAIN = "then install semantica again"


@functools.cache
def load(name: str = "_C") -> tuple[ModuleType | None, str]:
    """`(semantica._C, "")`, or `(None, what is missing and what to do)`; of `_cuda` as well. Never raises."""
    try:
        return importlib.import_module(f"semantica.{name}"), ""
    except ImportError as error:
        return None, explain(error, name)


def explain(error: ImportError, name: str = "_C") -> str:
    """Why a compiled part cannot be imported here and now, and what to do about it, in one line."""
    folder = Path(__file__).parent
    built = sorted(path.name for path in folder.glob(f"{name}.*") if path.suffix in (".so", ".pyd"))
    loadable = {f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    if loadable.intersection(built):
        return f"it is there but does not load ({error}): install semantica again"
    if built:
        return f"it was built for another Python ({built[0]}): install semantica again with this one"
    return why_no_cuda() if name == "_cuda" else why_no_c()


def why_no_c() -> str:
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"not built, and there is no C++ compiler ({compiler!r} is not found): install g++ or clang++, {AGAIN}"
    if missing := no_headers():
        return f"not built, and {missing}, {AGAIN}"
    return f"not built when semantica was installed, though {compiler!r} is here now: install semantica again"


def no_headers() -> str | None:
    headers = Path(sysconfig.get_path("include"))
    if (headers / "Python.h").is_file():
        return None
    return f"Python.h is not in {headers}: install Python's headers (python3-dev)"


def no_triton() -> str | None:
    """What Triton lacks here to launch a kernel: it builds the launcher in C, at first use."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "there is no C compiler: install gcc or clang, or set CC"
    return no_headers()


def why_no_cuda() -> str:
    cards = nvcc.cards()
    if not cards:
        return "not built, since no NVIDIA GPU is here: to build it for a GPU elsewhere, pip install -C cuda=all"
    if max(cards) < (8, 0):
        return f"not built, since the GPU here is of compute capability {'.'.join(map(str, max(cards)))}: 8.0 is needed"
    try:
        path = nvcc.find()
        found = nvcc.version(path) if path else None
    except nvcc.Unusable as error:
        return f"not built: {error}"
    if path is None:
        return "not built, and no CUDA compiler is here: pip install -C cuda-compiler=packages fetches one to build it"
    release, needed = (".".join(map(str, numbers)) for numbers in (found, nvcc.NEEDED))
    if found < nvcc.NEEDED:
        return f"not built: nvcc {needed} is needed, {path} is {release}: install a newer toolkit, {AGAIN}"
    return f"not built when semantica was installed, though nvcc {release} is here now: pip install -v says why"
