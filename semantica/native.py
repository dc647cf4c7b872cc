"""`semantica._C`, the compiled part, or the reason why it is not there. Everything works without it, more slowly."""

import functools
import importlib
import importlib.machinery
import os
import shlex
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

AGAIN = "then install semantica again"


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """`(semantica._C, "")`, or `(None, what is missing and what to do)`. Never raises."""
    try:
        return importlib.import_module("semantica._C"), ""
    except ImportError as error:
        return None, explain(error)


def explain(error: ImportError) -> str:
    """Why `semantica._C` cannot be imported here and now, and what to do about it, in one line."""
    folder = Path(__file__).parent
    built = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    loadable = {f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    if loadable.intersection(built):
        return f"it is there but does not load ({error}): install semantica again"
    if built:
        return f"it was built for another Python ({built[0]}): install semantica again with this one"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"not built, and there is no C++ compiler ({compiler!r} is not found): install g++ or clang++, {AGAIN}"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"not built, and Python.h is not in {headers}: install Python's headers (python3-dev), {AGAIN}"
    return f"not built when semantica was installed, though {compiler!r} is here now: install semantica again"
