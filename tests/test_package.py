"""What is installed, what importing costs, and which way imports point."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import semantica

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# folder -> import name, and what each may import besides itself
LAYERS = {
    "kernels": ("semantica.kernels", ("semantica._C", "semantica._cuda")),
    "semantica": ("semantica", ("semantica.kernels",)),
    "train": ("semantica.train", ("semantica", "semantica.kernels")),
    "export": ("semantica.export", ("semantica", "semantica.kernels")),
    "benchmarks": ("semantica.benchmarks", ("semantica", "semantica.kernels", "semantica.train", "semantica.export")),
}
UPPER = ("semantica.kernels", "semantica.train", "semantica.export", "semantica.benchmarks")


def python(code: str, *flags: str, cwd: Path, **env: str) -> str:
    """Standard output of another Python; its standard error is shown when it fails."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=os.environ | env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed_in(folder: Path, code: str, **env: str) -> str:
    """Runs `code` where `folder` is the only place that semantica is installed in."""
    # -S leaves out this environment's own editable install, and with it site-packages, which is put back without it
    setup = f"import site, sys; site.addsitedir({str(folder)!r}); sys.path.append({sysconfig.get_path('purelib')!r})\n"
    return python(setup + code, "-P", "-S", cwd=folder, **env)


def pip(*arguments: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--no-index", "-v"],
        env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def modules(folder: Path, package: str) -> set[str]:
    """The paths that the Python files and tables of a source folder have in a wheel."""
    tables = folder.glob("*/*.json") if folder.name == "kernels" else ()
    files = (path.relative_to(folder) for path in (*folder.rglob("*.py"), *tables))
    return {f"{package.replace('.', '/')}/{path.as_posix()}" for path in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The sources alone, so that nothing that lies about in the checkout can get into a build."""
    tree = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.name in (*LAYERS, "csrc", "tests"):
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"))
        elif path.is_file():
            shutil.copy(path, tree)
    return tree


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    python(f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # Python 3.11.2 has no filters
        tar.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def no_compiler_wheel(sdist, tmp_path_factory) -> Path:
    """The unpacked wheel that is built from the source distribution where there is no compiler."""
    out = tmp_path_factory.mktemp("no_compiler")
    log = pip("wheel", str(sdist), "-w", str(out), CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert "semantica is installed without semantica._C" in log
    return unpack(out)


def unpack(folder: Path) -> Path:
    (wheel,) = folder.glob("semantica_diffusion-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def expected_modules() -> set[str]:
    return set().union(*(modules(ROOT / folder, name) for folder, (name, _) in LAYERS.items()))


IMPORT_ALL = """
import semantica, semantica.kernels, semantica.train, semantica.export, semantica.benchmarks
for module in (semantica, semantica.kernels, semantica.train, semantica.export, semantica.benchmarks):
    print(module.__file__)
"""


def test_sdist_holds_every_source(sdist):
    for folder in (*LAYERS, "csrc", "tests"):
        pages = {"export": (".html", ".css", ".js", ".svg"), "semantica": (".html",)}
        more = {"kernels": (".json",), **pages}.get(folder, ())
        suffixes = (".py", ".cpp", ".cu", ".cuh", ".h", ".sh", ".txt", *more)
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}
        there = {p.relative_to(sdist) for p in (sdist / folder).rglob("*") if p.suffix in suffixes}
        assert here == there and here
    for name in ("LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()


def test_wheel_without_a_compiler_has_every_module_and_imports(no_compiler_wheel):
    files = {p.relative_to(no_compiler_wheel).as_posix() for p in no_compiler_wheel.rglob("*") if p.is_file()}
    assert {name for name in files if name.endswith((".py", ".json"))} == expected_modules()
    page = {f"semantica/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "export" / "web" / "page").rglob("*.*")}
    assert {name for name in files if name.startswith("semantica/export/web/page/")} == page and len(page) > 10
    assert "semantica/serving/page.html" in files
    info = f"semantica_diffusion-{semantica.__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"semantica", info}
    assert not [name for name in files if name.endswith((".so", ".pyd", ".cpp"))]
    printed = installed_in(no_compiler_wheel, IMPORT_ALL).split()
    folders = [Path(line).parent.relative_to(no_compiler_wheel).as_posix() for line in printed]
    assert folders == ["semantica", *(name.replace(".", "/") for name in UPPER)]


def test_doctor_says_that_the_compiled_part_is_missing(no_compiler_wheel):
    report = installed_in(
        no_compiler_wheel,
        "from semantica import doctor\nfor f in doctor.compiled(): print(*f)",
        CXX="/nonexistent/c++",
    )
    assert report.startswith("semantica._C not built, and there is no C++ compiler ('/nonexistent/c++' is not found): ")
    assert "install g++ or clang++" in report and report.rstrip().endswith("note")


@pytest.mark.slow
def test_wheels_from_the_tree_and_from_the_sdist_are_the_same(tree, sdist, tmp_path):
    names = []
    for source in (tree, sdist):
        out = tmp_path / str(len(names))
        pip("wheel", str(source), "-w", str(out))
        site = unpack(out)
        names.append({p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()})
        info = installed_in(site, "import semantica._C as c; print(c.__file__, c.build_info()['cxx_standard'])")
        assert info.split() == [str(site / "semantica" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"), "17"]
    assert names[0] == names[1]
    assert {name for name in names[0] if name.endswith((".py", ".json"))} == expected_modules()


@pytest.mark.slow
def test_an_error_in_csrc_is_an_error(tree, tmp_path):
    broken = shutil.copytree(tree, tmp_path / "broken")
    (broken / "csrc" / "broken.cpp").write_text("int f() { return no_such_name; }\n")
    with pytest.raises(AssertionError, match="no_such_name"):
        pip("wheel", str(broken), "-w", str(tmp_path / "out"))


def test_editable_install_shows_new_files(tree, tmp_path):
    # no compiler, to be quick: what is tested is the map from folders to sub-packages
    target = tmp_path / "site"
    pip("install", "-e", str(tree), "--target", str(target), CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert [Path(line).parent for line in installed_in(target, IMPORT_ALL).split()] == [
        tree / folder for folder in ("semantica", "kernels", "train", "export", "benchmarks")
    ]
    new = {"semantica": "semantica.new.inner", "train": "semantica.train.new.inner", "export": "semantica.export.new"}
    for folder, name in new.items():
        path = tree / folder / "new"
        if name.endswith("inner"):
            path.mkdir()
            (path / "__init__.py").touch()
            (path / "inner.py").write_text("value = 7\n")
        else:
            path.with_suffix(".py").write_text("value = 7\n")
    try:
        code = f"import importlib\nfor n in {sorted(new.values())}: print(importlib.import_module(n).value)"
        assert installed_in(target, code).split() == ["7", "7", "7"]
        code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
        assert installed_in(target, code).strip() == "None"
    finally:
        shutil.rmtree(tree / "semantica" / "new")
        shutil.rmtree(tree / "train" / "new")
        (tree / "export" / "new.py").unlink()


def test_import_is_light(tmp_path):
    heavy = ("torch", "diffusers", "transformers", "numpy", "PIL", "rich", "tyro", "packaging")
    code = f"import sys, semantica; dir(semantica); print([n for n in {heavy} if n in sys.modules])"
    assert python(code, "-P", cwd=tmp_path).strip() == "[]"


def test_public_names_resolve():
    assert [name for name in semantica.__all__ if getattr(semantica, name) is None] == []
    assert set(semantica.__all__) <= set(dir(semantica))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        semantica.nothing  # noqa: B018


def imports(source: str) -> list[tuple[str, bool]]:
    """Every imported module, and whether the import runs when the file is imported."""
    found = []

    def visit(node: ast.AST, eager: bool):
        if isinstance(node, ast.Import):
            found.extend((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from semantica import train` names the sub-package only behind the import
            found.extend((f"{module}.{a.name}" if module == "semantica" else module, eager) for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, eager and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(source), True)
    return found


def layer_of(module: str) -> str | None:
    """The sub-package a module of ours belongs to, None for somebody else's."""
    if module in ("semantica._C", "semantica._cuda"):
        return module
    for name in (*UPPER, "semantica"):
        if module == name or module.startswith(name + "."):
            return name
    return None


def wrong_imports(path: str, source: str) -> list[str]:
    """Imports in the file at `path`, relative to the root, that point the wrong way."""
    own, allowed = LAYERS[path.split("/")[0]]
    wrong = []
    for module, eager in imports(source):
        if module.startswith(".") or module.split(".")[0] in set(LAYERS) - {"semantica"}:
            wrong.append(module)
            continue
        layer = layer_of(module)
        lazy_verb = path == "semantica/cli.py" and not eager
        if layer and layer not in (own, "semantica._C", "semantica._cuda", *allowed) and not lazy_verb:
            wrong.append(module)
    return wrong


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("kernels/a.py", "import semantica.kernels.b, semantica._C, torch", 0),
        ("kernels/a.py", "from semantica.model.uvit import UViT", 1),
        ("kernels/a.py", "from semantica import errors", 1),
        ("kernels/a.py", "from . import b", 1),
        ("semantica/a.py", "import kernels.b\nfrom kernels import c", 2),
        ("semantica/a.py", "def f():\n    from semantica import train", 1),
        ("semantica/cli.py", "def f():\n    from semantica import train", 0),
        ("semantica/cli.py", "import semantica.train", 1),
        ("semantica/cli.py", "class A:\n    from semantica.benchmarks import demo", 1),
        ("train/a.py", "import semantica.export", 1),
        ("export/a.py", "from semantica.train.loop import run", 1),
        ("export/a.py", "from semantica.benchmarks import x", 1),
        ("benchmarks/a.py", "import semantica.train, semantica.export, semantica", 0),
    ],
)
def test_wrong_imports_are_found(path, source, count):
    assert len(wrong_imports(path, source)) == count


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {str(p.relative_to(ROOT)): wrong_imports(p.relative_to(ROOT).as_posix(), p.read_text()) for p in files}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_tests_import_no_folder_by_its_own_name():
    for path in (ROOT / "tests").glob("*.py"):
        assert not [m for m, _ in imports(path.read_text()) if m.split(".")[0] in set(LAYERS) - {"semantica"}], path


def test_our_kernels_folder_shadows_nothing():
    # what a script in the root of the checkout gets: the folder is exposed, and neither library may take it for theirs
    printed = python(
        """
import sys
sys.path.insert(0, "")
import importlib.util, os
print(os.path.samefile(importlib.util.find_spec("kernels").origin, "kernels/__init__.py"))
import diffusers, transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils.import_utils import is_kernels_available
from transformers import CLIPVisionModelWithProjection, Dinov2Model, SiglipVisionModel
print(is_kernels_available(), transformers.utils.is_kernels_available())
# somebody has imported the folder by that name: its operators must not have been registered a second time
import kernels, semantica.kernels
print(kernels.group_norm is semantica.kernels.group_norm)
""",
        cwd=ROOT,
    )
    assert printed.split() == ["True", "False", "False", "True"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_constraints_pin_what_make_installs():
    project, pinned = PROJECT["project"], pins()
    extras = project["optional-dependencies"]
    named = {"train", "pairs", "export", "bench", "cuda-build", "flash", "float8", "tensorrt", "tensorrt-rtx", "ray"}
    named |= {"quantise", "serve", "serve-ray", "timm", "lsun"}
    assert set(extras) == {*named, "test"}
    tested = ("train", "bench", "pairs", "serve", "test", "cuda-build")
    lines = sum((extras[name] for name in tested), project["dependencies"])
    needs = {need.name: need for need in map(Requirement, [*lines, *PROJECT["build-system"]["requires"]])}
    # a CUDA build of torch pins its own triton; a range says which versions the kernels are for
    assert str(needs.pop("triton").specifier) == "<3.10,>=3.6" and "triton" not in pinned
    for need in needs.values():
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), need
    assert pinned["torch"] == "2.13.0"
    assert re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text()) == [pinned["torch"]]


def test_constraints_hold_the_whole_closure():
    pinned = pins()
    # torch's CUDA builds bring libraries that torch itself pins
    pinned_by_torch = ("nvidia-", "cuda-", "triton")
    seen, todo = set(), [("semantica-diffusion", extra) for extra in ("", "train", "bench", "serve", "test")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for need in map(Requirement, metadata.requires(name) or []):
            wanted = canonicalize_name(need.name)
            if wanted.startswith(pinned_by_torch) or need.marker and not need.marker.evaluate({"extra": extra}):
                continue
            assert wanted in pinned, f"{need} of {name}"
            todo += [(wanted, item) for item in ("", *need.extras)]
    assert {canonicalize_name(name) for name, _ in seen} >= {"torch", "pytest", "tyro"}


def test_every_import_is_declared():
    declared = [*PROJECT["project"]["dependencies"], *sum(PROJECT["project"]["optional-dependencies"].values(), [])]
    # triton comes with the torch builds that can use it, the other with NVIDIA's server of that name
    names = {canonicalize_name(Requirement(line).name) for line in declared} | {"triton", "triton-python-backend-utils"}
    owners = metadata.packages_distributions()
    undeclared = {}
    for path in (path for folder in LAYERS for path in (ROOT / folder).rglob("*.py")):
        for top in {module.split(".")[0] for module, _ in imports(path.read_text())} - sys.stdlib_module_names:
            if top != "semantica" and not names & {canonicalize_name(name) for name in owners.get(top, [top])}:
                undeclared[top] = str(path.relative_to(ROOT))
    assert undeclared == {}


def test_distribution_and_import_agree():
    assert metadata.version("semantica-diffusion") == semantica.__version__
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
