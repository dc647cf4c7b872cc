"""Builds semantica._C from csrc/ with a C++17 compiler, semantica._cuda from csrc/cuda with nvcc, both with pybind11.

`csrc/backend.py` says what pip can be told about it; everything else is in pyproject.toml.
"""

import importlib.util
import os
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError, OptionError, PlatformError

# (compile flags, link flags)
OPENMP = {
    "win32": (["/openmp"], []),
    "darwin": (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
}.get(sys.platform, (["-fopenmp"], ["-fopenmp"]))
# what every source in csrc/ needs: the headers of python and a c++17 library
PROBE = '#include <Python.h>\n#include <string_view>\n{header}\nextern "C" int probe() {{ return {value}; }}\n'
C, CUDA = "semantica._C", "semantica._cuda"


def load(name, path):
    """A file of the package as a module by itself: the package needs what is not installed yet."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = load("semantica_nvcc", Path(__file__).parent / "semantica" / "nvcc.py")


class OptionalBuild(build_ext):
    """With no working compiler the package is installed without `_C` or `_cuda`; an error in csrc/ is an error.

    CUDA that was asked for by name and cannot be built is an error too.
    """

    # otherwise options are looked up under the name of the class, once it is initialized again for an editable install
    command_name = "build_ext"
    user_options = [
        *build_ext.user_options,
        ("cuda=", None, "auto (for the GPUs here, if any), no, all, or architectures such as sm_90a,sm_120a"),
        ("cuda-compiler=", None, "path of nvcc; by default CUDA_HOME's, PATH's or the one that pip installed"),
    ]

    def initialize_options(self):
        super().initialize_options()
        self.cuda, self.cuda_compiler = "auto", None

    def finalize_options(self):
        super().finalize_options()
        try:
            self.architectures = nvcc.wanted(self.cuda, nvcc.cards() if self.cuda == "auto" else ())
        except ValueError as error:
            raise OptionError(str(error)) from error

    def build_extension(self, ext):
        if ext.name == CUDA:
            self.build_cuda(ext)
            return
        if self.compiler.compiler_type != "msvc":
            ext.extra_compile_args.append("-O3")
        complaint = self.probe(ext, "", "0", [], [])
        if complaint is not None:
            self.leave_out(ext, f"no C++17 program can be built here ({complaint})")
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

    def leave_out(self, ext, why):
        """Go on without an extension, in one line."""
        # an optional extension may be missing, but its errors are hidden too: decided before compiling
        ext.optional = True
        self.warn(f"semantica is installed without {ext.name}: {why}")
        # otherwise an editable install would go on loading what was built from other sources
        if older := self.older(ext):
            os.remove(older)

    def older(self, ext):
        """What an earlier editable install has left, if anything."""
        if not self.editable_mode:
            return None
        path, _ = self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext)
        return path if os.path.exists(path) else None

    def build_cuda(self, ext):
        """Compile every source for all architectures, and link: nvcc knows its own headers and libraries best."""
        if not self.architectures:
            why = "no NVIDIA GPU of compute capability 8.0 or newer is here; to build for one elsewhere: -C cuda=all"
            self.leave_out(ext, "it was not asked for (cuda=no)" if self.cuda == "no" else why)
            return
        try:
            compiler = nvcc.compiler(Path(self.cuda_compiler) if self.cuda_compiler else None)
        except nvcc.Unusable as error:
            if self.cuda != "auto":
                raise CompileError(f"semantica._cuda was asked for (cuda={self.cuda}), but {error}") from error
            self.leave_out(ext, str(error))
            return
        target, names = Path(self.get_ext_fullpath(ext.name)), " ".join(self.architectures)
        version = ".".join(map(str, compiler.version))
        built = f"{nvcc.digest(ext.depends)} {version} {target.name} {names}"
        target.parent.mkdir(parents=True, exist_ok=True)
        older = self.older(ext)
        # minutes of compiling, for what is there already
        if older and built.encode() in Path(older).read_bytes():
            self.copy_file(older, str(target))
            return
        folder, began, jobs = Path(self.build_temp), time.monotonic(), len(os.sched_getaffinity(0))
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*nvcc.FLAGS, f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        macros = {"SOURCES": nvcc.digest(ext.depends), "ARCHITECTURES": names, "COMPILER": version, "BUILT": built}
        flags += [f'-DSEMANTICA_{name}="{value}"' for name, value in macros.items()]
        flags += [*nvcc.gencode(self.architectures), f"--threads={max(1, jobs // len(ext.sources))}"]

        def compile(source):
            made = folder / f"{Path(source).name}.o"
            done = compiler.run("-c", *flags, source, "-o", made)
            if done.returncode:
                raise CompileError(f"{source} does not compile:\n{done.stderr}{done.stdout}")
            return made

        with ThreadPoolExecutor(min(jobs, len(ext.sources))) as pool:
            objects = list(pool.map(compile, ext.sources))
        # the runtime goes in: the module needs the driver alone, whatever CUDA torch was built with
        done = compiler.run("-shared", "-cudart=static", "-cudadevrt=none", *objects, "-o", target)
        if done.returncode:
            raise LinkError(f"semantica._cuda does not link:\n{done.stderr}{done.stdout}")
        took = time.monotonic() - began
        self.warn(f"semantica._cuda: {len(objects)} files for {names} by {compiler} in {took:.0f} s on {jobs} cores")


extensions = [
    Pybind11Extension(
        C,
        sorted(glob("csrc/*.cpp")),
        depends=glob("csrc/*.h"),
        define_macros=[("SEMANTICA_SOURCES", "h" + nvcc.digest(glob("csrc/*.cpp") + glob("csrc/*.h")))],
        cxx_std=17,
    ),
    Extension(
        CUDA,
        [*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/module.cpp"],
        depends=[str(path) for path in nvcc.sources(Path("csrc/cuda"))],
    ),
]
setup(ext_modules=extensions, cmdclass={"build_ext": OptionalBuild})
