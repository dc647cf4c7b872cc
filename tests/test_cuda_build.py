"""The CUDA part of the build: which compiler is found, when the package goes on without, and what the module says.

Compilers of the fast tests are small scripts that say what nvcc says; the slow ones compile.
"""

import configparser
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from semantica import doctor, native, nvcc

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(nvcc.find() is None, reason="no nvcc")
SAYS = '#!/bin/sh\n[ "$1" = --version ] && {{ echo "Cuda compilation tools, release {release}, V1"; exit 0; }}\n'
REFUSES = 'echo "host_config.h(143): error: -- unsupported GNU version! gcc versions later than 15" >&2\nexit 1\n'


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def compiler_of(path: Path, release: str, rest: str = "") -> Path:
    return script(path, SAYS.format(release=release) + rest)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No toolkit and no driver on this machine."""
    for name in ("CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(nvcc, "USUAL", tmp_path / "no" / "nvcc")
    monkeypatch.setattr(nvcc, "packaged", list)
    cached = nvcc.cards
    cached.cache_clear()
    yield tmp_path
    cached.cache_clear()


def test_the_compiler_is_the_toolkits_then_the_paths_then_pips(nowhere, monkeypatch):
    assert nvcc.find() is None
    usual = compiler_of(nowhere / "no" / "nvcc", "13.0")
    assert nvcc.find() == usual
    monkeypatch.undo()
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    # as the packages of the index lay it out: nvidia is a namespace without an __init__.py
    place = nowhere / "site" / "nvidia"
    older, newer = (compiler_of(place / part / "bin" / "nvcc", "13.0") for part in ("cu12", "cu13"))
    monkeypatch.syspath_prepend(str(nowhere / "site"))
    assert nvcc.packaged()[:2] == [newer, older]
    monkeypatch.setenv("PATH", str(nowhere / "bin"))
    assert nvcc.find() == newer
    on_path = compiler_of(nowhere / "bin" / "nvcc", "13.0")
    assert nvcc.find() == on_path
    home = compiler_of(nowhere / "home" / "bin" / "nvcc", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "home"))
    assert nvcc.find() == home


@pytest.mark.parametrize(
    ("release", "rest", "words"),
    [
        ("12.4", "exit 0\n", ("too old", "12.8 is needed", "12.4 was found")),
        ("13.0", REFUSES, ("compiles nothing here", "unsupported GNU version")),
        ("13.0", 'echo "#error CUDA toolkit headers are incompatible" >&2; exit 1\n', ("cuda-toolkit[nvcc,cccl]",)),
        ("", "exit 0\n", ("does not say its release",)),
    ],
)
def test_a_compiler_that_will_not_do_is_named_in_one_line(tmp_path, release, rest, words):
    path = compiler_of(tmp_path / "nvcc", release, rest)
    with pytest.raises(nvcc.Unusable) as caught:
        nvcc.compiler(path)
    text = str(caught.value)
    assert all(word in text for word in (*words, str(path))) and "\n" not in text


def test_cards_and_the_code_that_they_run(nowhere):
    assert nvcc.cards() == ()
    script(nowhere / "bin" / "nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    nvcc.cards.cache_clear()
    assert nvcc.cards() == ()
    script(nowhere / "bin" / "nvidia-smi", "#!/bin/sh\nprintf '9.0\\n7.5\\n9.0\\n'\n")
    nvcc.cards.cache_clear()
    assert nvcc.cards() == ((7, 5), (9, 0))
    every = nvcc.wanted("all", ())
    # machine code for one architecture alone (a), for a whole generation, or what the driver compiles
    served = {
        (7, 5): None, (8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "compute_80",
        (12, 0): "sm_120a", (12, 1): "compute_80",
    }  # fmt: skip
    assert {card: nvcc.runs_on(card, every) for card in served} == served
    assert nvcc.runs_on((9, 0), ("sm_80",)) is None
    assert nvcc.wanted("auto", ((7, 5), (9, 0))) == ("sm_90a",) and nvcc.wanted("auto", ((7, 5),)) == ()
    assert nvcc.wanted("no", ((9, 0),)) == () and nvcc.wanted("sm_90a, sm_80", ()) == ("sm_90a", "sm_80")
    with pytest.raises(ValueError, match="cuda=sm_75: choose from auto"):
        nvcc.wanted("sm_75", ())
    assert nvcc.gencode(("sm_90a", "compute_80")) == [
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The sources that setup.py needs, with a kernel of their own."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "semantica", "kernels", "train", "export", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    return tree


def build(tree: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    """setup.py by itself, without the C++ part."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace", *options]
    env = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", **env}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def told(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if "semantica._cuda" in line]


def test_the_package_goes_on_without_in_one_line(tree, tmp_path):
    old = compiler_of(tmp_path / "old" / "bin" / "nvcc", "11.8")
    refusing = compiler_of(tmp_path / "refusing" / "bin" / "nvcc", "13.0", REFUSES)
    script(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 9.0\n")
    # no card: a compiler is not even looked for, so that an install is as quick as before
    found = {"nothing": build(tree, PATH=str(tmp_path / "no"), CUDA_HOME=str(refusing.parents[1]))}
    for name, path in (("old", old), ("refusing", refusing)):
        found[name] = build(tree, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", CUDA_HOME=str(path.parents[1]))
    words = {"nothing": "no NVIDIA GPU", "old": "12.8 is needed, 11.8 was found", "refusing": "unsupported GNU version"}
    for name, done in found.items():
        lines = told(done)
        assert done.returncode == 0 and len(lines) == 1 and words[name] in lines[0], done.stderr
        assert "semantica is installed without semantica._cuda" in lines[0]
    assert not list((tree / "semantica").glob("_cuda*.so"))


def test_what_was_asked_for_and_cannot_be_built_is_an_error(tree, tmp_path):
    old = compiler_of(tmp_path / "nvcc", "11.8")
    done = build(tree, "--cuda=all", f"--cuda-compiler={old}")
    assert done.returncode == 1 and "was asked for (cuda=all), but" in done.stderr and "11.8 was found" in done.stderr
    done = build(tree, "--cuda=sm_12")
    assert done.returncode == 1 and "cuda=sm_12: choose from auto, no, all, sm_80" in done.stderr


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_pip_is_told_reaches_the_command_that_compiles(tmp_path, monkeypatch):
    backend = load("backend", ROOT / "csrc" / "backend.py")
    (tmp_path / "mine.cfg").write_text("[build_ext]\nparallel = 2\n[egg_info]\ntag_build = x\n")
    monkeypatch.setenv("DIST_EXTRA_CONFIG", str(tmp_path / "mine.cfg"))
    with backend.told({"cuda": "sm_90a", "cuda-compiler": "/opt/nvcc", "editable-mode": "strict"}) as rest:
        assert rest == {"editable-mode": "strict"}
        file = configparser.RawConfigParser()
        file.read(os.environ["DIST_EXTRA_CONFIG"])
        assert dict(file["build_ext"]) == {"parallel": "2", "cuda": "sm_90a", "cuda_compiler": "/opt/nvcc"}
        assert file["egg_info"]["tag_build"] == "x"
    assert os.environ["DIST_EXTRA_CONFIG"] == str(tmp_path / "mine.cfg")
    with backend.told({"cuda-compiler": "packages"}) as rest:
        assert rest == {} and os.environ["DIST_EXTRA_CONFIG"] == str(tmp_path / "mine.cfg")
    assert backend.required({"cuda-compiler": "packages"}) == ["cuda-toolkit[nvcc,cccl]>=13.0; sys_platform == 'linux'"]
    assert backend.required(None) == backend.required({"cuda": "all"}) == []


def test_doctor_says_why_the_module_is_not_there(nowhere, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(nowhere / "native.py"))
    assert "no NVIDIA GPU is here" in native.explain(ImportError(), "_cuda")

    def with_cards(*cards):
        monkeypatch.setattr(nvcc, "cards", lambda: cards)
        return native.explain(ImportError(), "_cuda")

    assert "compute capability 7.5: 8.0 is needed" in with_cards((7, 5))
    assert "no CUDA compiler is here: pip install -C cuda-compiler=packages" in with_cards((9, 0))
    compiler_of(nowhere / "bin" / "nvcc", "12.4")
    assert "nvcc 12.8 is needed" in with_cards((9, 0)) and "is 12.4" in with_cards((9, 0))
    compiler_of(nowhere / "bin" / "nvcc", "13.0")
    assert "though nvcc 13.0 is here now" in with_cards((9, 0))
    (nowhere / "_cuda.cpython-399-x86_64-linux-gnu.so").touch()
    assert "built for another Python" in with_cards((9, 0))


class Module:
    """What doctor asks of `semantica._cuda`, as a driver of one release would let it answer."""

    def __init__(self, driver: str | None, trouble: str | None):
        self.driver, self.trouble = (lambda: driver), (lambda: trouble)

    def build_info(self) -> dict:
        return {"compiler": "nvcc 13.0", "architectures": ["sm_90a"], "runtime": "13.0"}


def test_doctor_says_whether_the_driver_runs_it(monkeypatch):
    old = "CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)"
    cases = {
        ("13.0", None): ("loaded; nvcc 13.0, for sm_90a", "ok"),
        (None, old): ("there is no driver here", "note"),
        ("12.4", old): (f"does not run: {old}", "warning"),
    }
    monkeypatch.setattr(doctor, "cpp", lambda: iter(()))
    for (driver, trouble), (words, status) in cases.items():
        found = Module(driver, trouble), ""
        monkeypatch.setattr(native, "load", lambda name, found=found: found)
        ((name, value, said),) = doctor.compiled()
        assert name == "semantica._cuda" and words in value and said == status


KERNEL = "__global__ void kernel(float* x) { x[threadIdx.x] = 1; }\n"


@needs_nvcc
@pytest.mark.slow
def test_it_is_built_loads_without_a_driver_and_is_not_built_twice(tree, tmp_path):
    (tree / "csrc" / "cuda" / "extra.cu").write_text(KERNEL)
    pip = [sys.executable, "-P", "-m", "pip", "install", "-e", str(tree), "--target", str(tmp_path / "site"), "-v"]
    pip += ["--no-deps", "--no-build-isolation", "--no-index", "--upgrade", "-C", "cuda=sm_80,sm_90a"]
    env = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = [subprocess.run(pip, env=env, capture_output=True, text=True) for _ in range(2)]
    first, second = (one.stdout + one.stderr for one in done)
    assert [one.returncode for one in done] == [0, 0], first + second
    assert "files for sm_80 sm_90a by nvcc" in first and "files for" not in second, second
    (path,) = (tree / "semantica").glob(f"_cuda*{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    # a process of its own: the module stays loaded
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("semantica._cuda", {str(path)!r})
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
error = issubclass(module.CudaError, RuntimeError)
print(module.build_info()["architectures"], module.driver(), module.trouble(), error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("['sm_80', 'sm_90a'] ") and done.stdout.strip().endswith("True"), done.stderr
    if shutil.which("nvidia-smi") is None:
        assert "None CUDA driver version is insufficient" in done.stdout
    # it needs the driver alone, which it loads when it is used
    needed = subprocess.run(["ldd", str(path)], capture_output=True, text=True).stdout
    assert "cudart" not in needed and "libcuda" not in needed


@needs_nvcc
@pytest.mark.slow
def test_an_error_in_the_sources_is_an_error(tree):
    broken = tree / "csrc" / "cuda" / "broken.cu"
    broken.write_text("__global__ void f() { no_such_name(); }\n")
    try:
        done = build(tree, "--cuda=sm_90a")
    finally:
        broken.unlink()
    assert done.returncode == 1 and 'identifier "no_such_name" is undefined' in done.stderr
    assert "broken.cu does not compile" in done.stderr
