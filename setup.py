"""Builds semantica._C from csrc/ with pybind11 and a plain C++17 compiler; everything else is in pyproject.toml."""

import hashlib
import os
import sys
import tempfile
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError

# (compile flags, link flags)
OPENMP = {
    "win32": (["/openmp"], []),
    "darwin": (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
}.get(sys.platform, (["-fopenmp"], ["-fopenmp"]))
# what every source in csrc/ needs: the headers of python and a c++17 library
PROBE = '#include <Python.h>\n#include <string_view>\n{header}\nextern "C" int probe() {{ return {value}; }}\n'


class OptionalBuild(build_ext):
    """With no working C++ compiler the package is installed without `_C`; with one, an error in csrc/ is an error."""

    def build_extension(self, ext):
        if self.compiler.compiler_type != "msvc":
            ext.extra_compile_args.append("-O3")
        complaint = self.probe(ext, "", "0", [], [])
        # an optional extension may be missing, but its errors are hidden too: decide before compiling
        ext.optional = complaint is not None
        if ext.optional:
            self.warn(f"semantica is installed without semantica._C: no C++17 program can be built here ({complaint})")
            self.remove_older(ext)
            return
        if self.probe(ext, "#include <omp.h>", "omp_get_max_threads()", *OPENMP) is None:
            ext.extra_compile_args += OPENMP[0]
            ext.extra_link_args += OPENMP[1]
        else:
            self.warn("semantica._C will use one thread: the compiler has no OpenMP")
        super().build_extension(ext)

    def probe(self, ext, header, value, compile_args, link_args):
        """None when a small shared library can be built, else the compiler's complaint."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as file:
                file.write(PROBE.format(header=header, value=value))
            try:
                objects = self.compiler.compile(
                    [source],
                    output_dir=folder,
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args + compile_args,
                )
                library = os.path.join(folder, "probe" + (".dll" if sys.platform == "win32" else ".so"))
                self.compiler.link_shared_object(objects, library, extra_postargs=link_args, target_lang="c++")
            except (CompileError, ExecError, LinkError, PlatformError) as error:
                return str(error)
        return None

    def remove_older(self, ext):
        # otherwise an editable install would go on loading what was built from other sources
        if self.editable_mode:
            older, _ = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
            if os.path.exists(older):
                os.remove(older)


def digest(paths):
    """Of names and contents: what was built says what it was built from."""
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            found.update(os.path.basename(path).encode() + file.read())
    return found.hexdigest()[:16]


extension = Pybind11Extension(
    "semantica._C",
    sorted(glob("csrc/*.cpp")),
    depends=glob("csrc/*.h"),
    define_macros=[("SEMANTICA_SOURCES", "h" + digest(sorted(glob("csrc/*.cpp") + glob("csrc/*.h"))))],
    cxx_std=17,
)
setup(ext_modules=[extension], cmdclass={"build_ext": OptionalBuild})
