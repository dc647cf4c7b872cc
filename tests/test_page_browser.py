"""The page of `semantica export --web` in a headless Chromium: its pictures are Python's, and people can use it."""

import importlib.util
import io
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from semantica.engines import load_engine
from semantica.engines.bundle import open_bundle
from semantica.errors import UserError
from semantica.export.web import write
from semantica.images import ORIENTATION, fit, load_image
from semantica.pipelines.bundle import BundlePipeline

HERE = Path(__file__).parent
BUNDLE = HERE / "stored" / "bundle"
# what the page says of itself
STATUS = "document.querySelector('#status').textContent"
# whether it has a model, a picture and time
READY = "document.querySelector('#make').ariaDisabled === 'false'"


def driver() -> ModuleType:
    """The module `browser.py` of this folder."""
    spec = importlib.util.spec_from_file_location("browser", HERE / "browser.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The stored bundle's page."""
    return page_of(BUNDLE, tmp_path_factory.mktemp("web") / "page")


def page_of(bundle: Path, out: Path) -> Path:
    try:
        return write(open_bundle(bundle), out)
    except UserError as error:
        if "npm" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def browse(tmp_path):
    """A function that opens a page in a browser of its own and waits for what it says of the model."""
    drive, close = driver(), []
    if drive.binary() is None:
        pytest.skip("no Chromium is installed")

    def browse(folder: Path, isolated: bool = False, flags: tuple[str, ...] = (), says: str = "Ready"):
        server = drive.serve(folder, isolated)
        address = server.__enter__()
        browser = drive.Browser(tmp_path / f"profile{len(close)}", *flags)
        close.append((browser, server, address))
        browser.size(1100, 800)
        browser.open(address)
        browser.wait(f"{STATUS}.startsWith('{says}')")
        return browser

    yield browse
    for browser, server, address in close:
        browser.close()
        server.__exit__(None, None, None)
        assert [url for url in browser.addresses if not url.removeprefix("blob:").startswith(address)] == []


@pytest.fixture
def photo(tmp_path) -> Path:
    """A picture of smooth patches that is neither square nor of the model's size."""
    patches = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(patches).resize((157, 120), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def set_to(browser, **settings) -> None:
    for name, value in settings.items():
        browser.run(f"void (find => {{ find.value = '{value}'; find.dispatchEvent(new Event('input')) }})"
                    f"(document.querySelector('#{name}'))")  # fmt: skip


def make(browser) -> None:
    browser.wait(READY)
    browser.run("document.querySelector('#make').click()")


def made(browser) -> list[np.ndarray]:
    """The variations, once all are there."""
    browser.wait("!document.querySelector('#sheet').hidden")
    images = browser.run(
        "[...document.querySelectorAll('#grid img')].map(image => {"
        " const [width, height] = [image.naturalWidth, image.naturalHeight];"
        " const context = Object.assign(document.createElement('canvas'), { width, height }).getContext('2d');"
        " context.drawImage(image, 0, 0);"
        " return [height, width, [...context.getImageData(0, 0, width, height).data]] })"
    )
    return [np.array(rgba, np.uint8).reshape(height, width, 4)[..., :3] for height, width, rgba in images]


def download(browser, selector: str, folder: Path) -> Path:
    """The file that a link saves."""
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    name = browser.run(f"document.querySelector({selector!r}).download")
    browser.run(f"document.querySelector({selector!r}).click()")
    browser.until((folder / name).exists, f"{name} is saved")
    return folder / name


def psnr(bundle: Path, photo: Path, images: list[np.ndarray], **settings) -> float:
    """dB of the worst image to what Python makes of the same."""
    pipeline = BundlePipeline(load_engine(bundle, "onnxruntime", "cpu"))
    expected = pipeline(Image.open(photo).convert("RGB"), len(images), **settings).images
    errors = [np.square(np.asarray(a, float) - b).mean() for a, b in zip(expected, images, strict=True)]
    # of the finest error that 8 bits show in one image
    return 10 * np.log10(255**2 / max(*errors, 1 / images[0].size))


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "guidance", "isolated"), [("dpmpp_2m", 3.0, False), ("ddpm", 1.0, True)])
def test_pictures_are_pythons(solver, guidance, isolated, written, browse, photo, tmp_path):
    browser = browse(written, isolated)
    facts = browser.run("document.querySelector('#facts').textContent")
    assert "32 x 32 pixels, fp32, on WebAssembly" in facts and ("1 thread;" in facts or isolated)
    browser.choose("#file", photo)
    set_to(browser, count=5, steps=6, guidance=guidance, seed=2**32 + 7, solver=solver)
    make(browser)
    images = made(browser)
    assert len(images) == 5 and images[0].std() > 5
    settings = dict(num_inference_steps=6, guidance_scale=guidance, seed=2**32 + 7, solver=solver)
    # 40 is what is asked; the same float32 arithmetic in another order changes hardly any byte
    assert psnr(BUNDLE, photo, images, **settings) > 60
    saved = download(browser, "li:nth-child(5) a", tmp_path)
    assert saved.name == "photo-seed4294967303-4.png"
    assert np.array_equal(np.asarray(Image.open(saved).convert("RGB")), images[4])
    sheet = np.asarray(Image.open(download(browser, "#sheet", tmp_path)).convert("RGB"))
    # the picture itself comes first; three in a row, two pixels between them
    assert sheet.shape == (70, 104, 3) and np.array_equal(sheet[36:68, 70:102], images[4])
    assert np.array_equal(sheet[2:34, 2:34], fit(Image.open(photo), 32)) and browser.problems == []


@pytest.mark.slow
def test_pictures_of_every_kind_are_read_as_in_python(written, browse, tmp_path):
    rng = np.random.default_rng(3)
    whole = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((403, 301), Image.BICUBIC)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    see_through = np.linspace(0, 255, 403 * 301).reshape(301, 403).astype(np.uint8)
    kinds = {
        "turned.jpg": (whole, {"exif": turned, "quality": 85}),
        "whole.webp": (whole, {"quality": 80}),
        "grey.png": (whole.convert("L"), {}),
        "palette.gif": (whole.quantize(64), {}),
        "clear.png": (Image.fromarray(np.dstack([whole, see_through])), {}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (60, 90)).astype(np.uint16)), {}),
        "plain.bmp": (whole, {}),
    }
    browser = browse(written)
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
        browser.choose("#file", tmp_path / name)
        browser.wait(f"document.querySelector('#name').textContent.startsWith('{name}')")
        rgba = browser.run("[...document.querySelector('#shown').getContext('2d').getImageData(0, 0, 32, 32).data]")
        levels = np.abs(np.array(rgba).reshape(32, 32, 4)[..., :3] - fit(load_image(tmp_path / name), 32).astype(int))
        # 16 bits become 8 in another way, and Pillow before 13 resizes tall pictures in another order
        assert levels.max() <= (1 if name in ("deep.png", "turned.jpg") else 0), name
    assert browser.problems == []


@pytest.mark.slow
def test_webgpu(written, browse, photo):
    # a graphics card in software, which Chromium brings
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    browser = browse(written, flags=flags)
    if not browser.run("navigator.gpu ? navigator.gpu.requestAdapter().then(Boolean) : false"):
        pytest.skip("this Chromium has no WebGPU")
    assert "on WebGPU" in browser.run("document.querySelector('#facts').textContent")
    browser.choose("#file", photo)
    set_to(browser, count=1, steps=2, guidance=1, seed=1)
    make(browser)
    settings = dict(num_inference_steps=2, guidance_scale=1.0, seed=1, solver="dpmpp_2m")
    assert psnr(BUNDLE, photo, made(browser), **settings) > 40
    assert browser.problems == []


@pytest.mark.slow
def test_by_keyboard_alone(written, browse, photo):
    browser = browse(written)

    def focus() -> str:
        return browser.run("document.activeElement.id || document.activeElement.ariaLabel")

    def tab(to: str) -> None:
        browser.key("Tab")
        assert focus() == to

    tab("file")
    outline = "getComputedStyle(document.querySelector('#drop')).outlineStyle"
    assert browser.run(outline) == "solid"
    # what a file dialog, which has no place here, would do
    browser.choose("#file", photo)
    browser.wait(READY)
    tab("count")
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    tab("steps")
    for _ in range(17):
        browser.key("ArrowLeft")
    tab("guidance")
    browser.key("ArrowRight")
    tab("seed")
    browser.key("5")
    tab("another")
    tab("solver")
    tab("make")
    browser.key("Enter")
    images = made(browser)
    # the focus stays where it was
    assert focus() == "make" and browser.run(STATUS).startswith("Done in ")
    seed = int(browser.run("document.querySelector('#seed').value"))
    assert seed in (5, 50)
    settings = dict(num_inference_steps=3, guidance_scale=1.6, seed=seed, solver="dpmpp_2m")
    assert len(images) == 2 and psnr(BUNDLE, photo, images, **settings) > 40
    tab("sheet")
    tab("Save variation 1")
    unnamed = browser.run(
        "[...document.querySelectorAll('input, select, button, progress, [role=img], img')].filter(one =>"
        " !(one.labels?.length || one.ariaLabel || one.alt || one.textContent.trim())).map(one => one.outerHTML)"
    )
    assert unnamed == [] and browser.problems == []


@pytest.mark.slow
def test_cancel_and_what_is_no_picture(written, browse, photo, tmp_path):
    browser = browse(written)
    browser.run("document.querySelector('#form').requestSubmit()")
    assert browser.run(STATUS) == "Choose a picture first."
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    browser.choose("#file", tmp_path / "broken.png")
    browser.wait(f"{STATUS} === 'This is no picture that the browser can read.'")
    browser.choose("#file", photo)
    set_to(browser, count=16, steps=100)
    make(browser)
    browser.wait("document.querySelector('#counted').textContent.startsWith('Step ')")
    assert browser.run("document.querySelector('#bar').value") < 0.5
    browser.run("document.querySelector('#cancel').click()")
    browser.wait(f"{STATUS} === 'Cancelled.'")
    assert browser.run("document.querySelector('#cancel').hidden && document.querySelector('#sheet').hidden")
    set_to(browser, count=1, steps=2, guidance=1.5)
    make(browser)
    settings = dict(num_inference_steps=2, guidance_scale=1.5, seed=0, solver="dpmpp_2m")
    assert psnr(BUNDLE, photo, made(browser), **settings) > 40
    assert browser.problems == []


@pytest.mark.slow
def test_a_folder_that_is_not_whole(written, browse, tmp_path):
    folder = tmp_path / "page"
    folder.mkdir()
    for path in written.iterdir():
        if path.name != "model":
            (folder / path.name).symlink_to(path)
    browser = browse(folder, says="The model cannot be loaded: /model/model.json: the server says 404 File not found")
    shutil.copytree(written / "model", folder / "model")
    (folder / "model" / "weights.safetensors").write_bytes(b"cut off")
    browser.open(browser.run("location.href"))
    browser.wait(f"{STATUS} === 'The model cannot be loaded: /model/weights.safetensors has 7 bytes, not 301536:"
                 " copy the page\\'s folder again'")  # fmt: skip


# a picture on the page's own canvas, pasted or dropped
GIVEN = """
(async () => {{
  const canvas = Object.assign(document.createElement("canvas"), {{ width: 40, height: 30 }});
  canvas.getContext("2d").fillRect(0, 0, 20, 30);
  const transfer = new DataTransfer();
  transfer.items.add(new File([await new Promise(done => canvas.toBlob(done))], "given.png", {{ type: "image/png" }}));
  document.body.dispatchEvent(new {event});
}})()
"""
EVENTS = {
    "paste": "ClipboardEvent('paste', { clipboardData: transfer, bubbles: true })",
    "drop": "DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true })",
}


@pytest.mark.slow
def test_paste_drop_narrow_screens_and_dark_ones(written, browse):
    browser = browse(written)
    for event in EVENTS.values():
        browser.run("document.querySelector('#name').textContent = ''")
        browser.run(GIVEN.format(event=event))
        browser.wait("document.querySelector('#name').textContent.startsWith('given.png')")
        left, right = browser.run(
            "[4, 28].map(x => [...document.querySelector('#shown').getContext('2d').getImageData(x, 16, 1, 1).data])"
        )
        # transparent pixels lie on white
        assert left == [0, 0, 0, 255] and right == [255, 255, 255, 255]
    browser.media(prefers_reduced_motion="reduce")
    set_to(browser, count=4, steps=2)
    make(browser)
    assert len(made(browser)) == 4
    for width in (320, 360, 768, 1100):
        browser.size(width, 700)
        assert browser.run("document.documentElement.scrollWidth") <= width
        sides = browser.run("[...document.querySelectorAll('#grid img')].map(i => [i.clientWidth, i.clientHeight])")
        assert all(across == down > 90 for across, down in sides)
    grounds = []
    for scheme in ("light", "dark"):
        browser.media(prefers_color_scheme=scheme)
        grounds.append(np.asarray(Image.open(io.BytesIO(browser.picture())).convert("L"))[2, 2])
    assert grounds[0] > 200 and grounds[1] < 50 and browser.problems == []


def photograph(bundle: Path, picture: Path, out: Path) -> None:
    """A screenshot of the page with six variations of a picture."""
    import tempfile

    drive = driver()
    with tempfile.TemporaryDirectory() as folder:
        page = write(open_bundle(bundle), Path(folder, "page"))
        with drive.serve(page) as address:
            browser = drive.Browser(Path(folder, "profile"), "--hide-scrollbars")
            try:
                browser.size(1100, 800)
                browser.media(prefers_reduced_motion="reduce")
                browser.open(address)
                browser.wait(f"{STATUS}.startsWith('Ready')")
                browser.choose("#file", picture)
                set_to(browser, count=6)
                make(browser)
                made(browser)
                height = browser.run("Math.ceil(document.documentElement.getBoundingClientRect().height)")
                browser.size(1100, height)
                shown = Image.open(io.BytesIO(browser.picture())).convert("RGB")
            finally:
                browser.close()
    shown.save(out, optimize=True)


if __name__ == "__main__":
    # python tests/test_page_browser.py BUNDLE PICTURE OUT.png makes the picture in the README
    photograph(*map(Path, sys.argv[1:4]))
