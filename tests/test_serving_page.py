"""The page of `semantica serve` in a headless Chromium: a picture becomes images, what is wrong is said."""

import base64
import importlib.util
from pathlib import Path

import pytest

from semantica.images import load_image
from semantica.pipelines.sample import load_pipeline, variations
from semantica.sampling.settings import Sampling
from semantica.serving.limits import Limits

SPEC = importlib.util.spec_from_file_location("browser", Path(__file__).parent / "browser.py")
browser = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(browser)
KEY = "a-key-of-this-server"
PIXELS = """(async () => {
  const image = document.querySelector("#images img"), canvas = document.createElement("canvas");
  await image.decode();
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
})()"""


@pytest.mark.slow
@pytest.mark.skipif(browser.binary() is None, reason="needs Chromium")
def test_a_picture_becomes_images(served, tmp_path):
    with served.modelled(served.STORED / "bundle", limits=Limits(keys=(KEY,))) as running:
        page = browser.Browser(tmp_path / "profile")
        try:
            page.size(360, 700)
            page.open(f"{running.url}/")
            assert page.run("document.title") == "semantica" and page.run("document.activeElement.id") == ""
            # nothing is wider than a telephone
            assert page.run("document.documentElement.scrollWidth") <= 360
            # without a picture, then without a key
            page.run("document.getElementById('form').requestSubmit()")
            page.wait("document.getElementById('status').textContent === 'Give a picture.'")
            page.choose("#file", served.PICTURE)
            page.run("document.getElementById('form').requestSubmit()")
            page.wait("document.getElementById('status').textContent.startsWith('Give a key')")
            for name, value in (("key", KEY), ("n", 2), ("steps", 3), ("seed", 7)):
                page.run(f"document.getElementById('{name}').value = '{value}'")
            # the form is sent by the return key in one of its fields
            page.run("document.getElementById('seed').focus()")
            page.key("Enter")
            page.wait("document.querySelectorAll('#images img').length === 2")
            assert page.run("document.getElementById('status').textContent").startswith("Seed 7, ")
            assert page.run("document.querySelector('#images a').download") == "7-0.png"
            shown = bytes(page.run(PIXELS))
            # every way into the form is reached by the tab key, the choice of a file too
            reached = set()
            page.run("document.activeElement.blur()")
            for _ in range(12):
                page.key("Tab")
                reached.add(page.run("document.activeElement.id"))
            assert {"file", "n", "steps", "guidance", "seed", "key", "go"} <= reached
            # the refusal for want of a key is a line in the console, and is all that is there
            assert all("401" in problem for problem in page.problems), page.problems
            assert {a.split(":")[0] for a in page.addresses if not a.startswith(running.url)} <= {"data", "blob"}
        finally:
            page.close()
    pipeline = load_pipeline(served.STORED / "bundle", "cpu")
    settings = Sampling(3, "dpmpp_2m", pipeline.guidance, seed=7)
    expected = variations(pipeline, [load_image(served.PICTURE)], 2, settings)[0, 0]
    assert [*shown[0::4]] == expected[..., 0].ravel().tolist() and [*shown[2::4]] == expected[..., 2].ravel().tolist()


@pytest.mark.slow
@pytest.mark.skipif(browser.binary() is None, reason="needs Chromium")
def test_cancelling_frees_the_engine(served, tmp_path):
    engine = served.Held()
    with served.live(engine, served.BOTH) as running:
        page = browser.Browser(tmp_path / "profile")
        try:
            page.open(f"{running.url}/")
            page.run("document.getElementById('prompt').value = 'two dogs'")
            page.run("document.getElementById('go').click()")
            engine.wait()
            page.wait("!document.getElementById('stop').disabled && document.getElementById('go').disabled")
            page.run("document.getElementById('stop').click()")
            page.wait("document.getElementById('status').textContent === 'Cancelled.'")
            served.until(lambda: engine.abandoned)
            engine.release()
            page.run("document.getElementById('go').click()")
            page.wait("document.querySelectorAll('#images img').length === 4")
            source = page.run("document.querySelector('#images img').src")
            assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
            assert engine.batches[-1][0].job.prompt == "two dogs" and page.problems == []
        finally:
            page.close()
            engine.release()
