"""The examples in other languages: short, and their images are those of Python from the same model and noise."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantica.engines.bundle import open_bundle
from semantica.errors import UserError
from semantica.images import fit
from semantica.solvers import noise

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
BUNDLE = HERE / "stored" / "bundle"
NODE_PACKAGE = "onnxruntime-node@1.30.0"
# where headers of ONNX Runtime lie: Debian's package libonnxruntime-dev, and a release unpacked there
HEADERS = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/opt/onnxruntime/include")
COUNT, STEPS, GUIDANCE = 3, 7, 2.5


@pytest.mark.parametrize("path", ["node/variations.mjs", "browser/index.html", "cpp/variations.cpp"])
def test_examples_are_short(path):
    assert (EXAMPLES / path).read_text().count("\n") < 100


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The stored bundle in one file."""
    pytest.importorskip("onnx_ir")
    from semantica.export.one_file import write

    return write(open_bundle(BUNDLE), tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    patches = np.random.default_rng(2).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return fit(Image.fromarray(patches), 32)


@pytest.fixture
def files(model, picture, tmp_path) -> list[str]:
    """Arguments of the examples: the model, a picture, where the images go, and what they are made with."""
    Image.fromarray(picture).save(tmp_path / "picture.ppm")
    drawn().tofile(tmp_path / "noise.f32")
    numbers = [str(value) for value in (COUNT, STEPS, GUIDANCE)]
    return [str(model), str(tmp_path / "picture.ppm"), str(tmp_path / "out.ppm"), *numbers, str(tmp_path / "noise.f32")]


def drawn() -> np.ndarray:
    return noise(0, (COUNT, 3, 32, 32))


def pythons(model: Path, picture: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes in Python, uint8 `[COUNT, 32, 32, 3]`."""
    import onnxruntime

    inputs = {
        "image": np.repeat(picture[None], COUNT, 0),
        "noise": noise,
        "steps": np.array(STEPS),
        "guidance": np.array(GUIDANCE, np.float32),
    }
    return onnxruntime.InferenceSession(model).run(["images"], inputs)[0]


def assert_equal(images: np.ndarray, expected: np.ndarray) -> None:
    """To a level of 255 where another build rounds otherwise."""
    levels = np.abs(images.reshape(expected.shape).astype(int) - expected)
    assert levels.max() <= 1 and (levels > 0).mean() < 0.01 and expected.std() > 5


def refusals(command: list[str], files: list[str]) -> None:
    """What an example says of a picture that is none, and of no arguments: a line, and no output."""
    for arguments in ([], [files[0], files[0], *files[2:]]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "is no binary PPM" in done.stderr and not Path(files[2]).exists()


@pytest.mark.slow
def test_node(model, picture, files, tmp_path):
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    shutil.copy(EXAMPLES / "node" / "variations.mjs", tmp_path)
    install = [npm, "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", NODE_PACKAGE]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install {NODE_PACKAGE}: {done.stderr[:200]}")
    command = [node, str(tmp_path / "variations.mjs")]
    refusals(command, files)
    subprocess.run([*command, *files], check=True)
    assert_equal(np.asarray(Image.open(files[2])), pythons(model, picture, drawn()))


def library(folder: Path) -> Path:
    """The shared library in the installed package onnxruntime, under the names that linkers and loaders look for."""
    package = importlib.util.find_spec("onnxruntime")
    found = sorted(Path(package.submodule_search_locations[0], "capi").glob("libonnxruntime.so.1*"))
    if not found:
        pytest.skip("the package onnxruntime brings no shared library here")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(found[0])
    return folder


@pytest.mark.slow
def test_cpp(model, picture, files, tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    headers = next((place for place in HEADERS if Path(place, "onnxruntime_cxx_api.h").is_file()), None)
    if compiler is None or headers is None:
        pytest.skip("no C++ compiler, or no onnxruntime_cxx_api.h: apt-get install libonnxruntime-dev, or a release")
    place, program = library(tmp_path), str(tmp_path / "variations")
    options = ["-std=c++17", "-O2", "-Wall", f"-I{headers}", f"-L{place}", f"-Wl,-rpath,{place}"]
    source = str(EXAMPLES / "cpp" / "variations.cpp")
    subprocess.run([compiler, *options, source, "-lonnxruntime", "-o", program], check=True)
    refusals([program], files)
    subprocess.run([program, *files], check=True)
    assert_equal(np.asarray(Image.open(files[2])), pythons(model, picture, drawn()))


# Math.random in numbers that Python has too: Park and Miller's generator
RANDOM = "{ let state = 1; Math.random = () => (state = (state * 16807) % 2147483647) / 2147483647 }"


def of_math_random() -> np.ndarray:
    """The noise that the browser's example draws then."""
    state, uniform = 1, []
    for _ in range(2 * COUNT * 3 * 32 * 32):
        state = state * 16807 % 2147483647
        uniform.append(state / 2147483647)
    first, second = np.array(uniform).reshape(-1, 2).T
    return (np.sqrt(-2 * np.log(1 - first)) * np.cos(2 * np.pi * second)).astype(np.float32).reshape(COUNT, 3, 32, 32)


@pytest.mark.slow
def test_browser(model, picture, tmp_path):
    from semantica.export.web import runtime

    spec = importlib.util.spec_from_file_location("browser", HERE / "browser.py")
    drive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drive)
    if drive.binary() is None:
        pytest.skip("no Chromium is installed")
    try:
        package = runtime.contents()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path / "served"
    dist = folder / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name, content in package.items():
        (dist / name).write_bytes(content)
    shutil.copy(EXAMPLES / "browser" / "index.html", folder)
    shutil.copy(model, folder / "model.onnx")
    Image.fromarray(picture).save(tmp_path / "picture.png")
    with drive.serve(folder) as address:
        browser = drive.Browser(tmp_path / "profile")
        try:
            browser.call("Page.addScriptToEvaluateOnNewDocument", source=RANDOM)
            browser.open(address)
            browser.wait("document.querySelector('#status').textContent === 'Ready.'")
            browser.choose("#file", tmp_path / "picture.png")
            for name, value in {"count": COUNT, "steps": STEPS, "guidance": GUIDANCE}.items():
                browser.run(f"void (document.querySelector('#{name}').value = {value})")
            browser.run("document.querySelector('#form').requestSubmit()")
            browser.wait("document.querySelector('#status').textContent === 'Done.'")
            made = browser.run(
                "[...document.querySelectorAll('canvas')].map(c =>"
                " [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
            )
        finally:
            browser.close()
    images = np.array(made, np.uint8).reshape(COUNT, 32, 32, 4)[..., :3]
    assert_equal(images, pythons(model, picture, of_math_random()))
    # a browser asks for an icon that the example does not have
    assert [problem for problem in browser.problems if "favicon" not in problem] == []
