"""Pictures for training: decoded at a fraction, by any decoder the same bytes, cut and resized by any processor."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from semantica import images
from semantica.benchmarks.loading.photos import draw_photo
from semantica.images import cut, fit, load_image, load_pixels


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return io.BytesIO(file.getvalue())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def exact(whole: np.ndarray, size: int) -> np.ndarray:
    """A square picture, resized in float64."""
    planes = torch.from_numpy(whole).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).clamp(0, 255).numpy()


def test_scaled_decoding_is_never_below_what_is_of_use():
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, height, near = (int(n) for n in rng.integers(9, 700, 3))
        ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[:, None], (height, width, 3))
        file = encoded(Image.fromarray(np.ascontiguousarray(ramp)), "JPEG")
        found = load_image(file, near=near).size
        assert min(found) >= min(near, width, height)
        assert load_pixels(file, near=near).shape[1::-1] == found
        scale = width / found[0]
        # a fraction only where the next smaller one would be too small
        assert scale > 7 or min(width, height) / scale / 2 < near + 1


def test_scaled_decoding_loses_what_is_stated():
    """`load_image`'s docstring has the figures of photos; a drawn one is within them."""
    file = encoded(draw_photo(0, 768, 768), "JPEG", quality=90)
    whole = np.array(load_image(file))
    for factor in (2, 4):
        for margin, least in ((2.0, 42), (1.5, 40), (1.0, 34)):
            size = round(768 / factor / margin)
            found = load_pixels(file, near=768 // factor)
            assert found.shape[0] == 768 // factor and psnr(cut(found, size), exact(whole, size)) > least
            assert psnr(cut(whole, size), exact(whole, size)) > 50


@pytest.mark.parametrize("package", [True, False])
def test_pixels_are_those_of_pillow_with_and_without_another_decoder(package, monkeypatch):
    if package:
        pytest.importorskip("simplejpeg")
    monkeypatch.setattr(images, "jpeg_decoder", images.jpeg_decoder if package else lambda: None)
    turned = Image.Exif()
    turned[0x0112] = 6
    for options in (dict(quality=80), dict(subsampling=0), dict(progressive=True), dict(exif=turned), dict(quality=30)):
        file = encoded(draw_photo(1, 203, 150), "JPEG", **options)
        for near in (None, 140, 60, 20):
            expected = np.asarray(load_image(file, near=near))
            assert np.array_equal(load_pixels(file, near=near), expected), (options, near)
    for mode in ("L", "CMYK"):
        file = encoded(draw_photo(2, 50, 40).convert(mode), "JPEG")
        assert np.array_equal(load_pixels(file), np.asarray(load_image(file)))


def test_cut_agrees_with_fit_and_copies_what_has_its_size():
    ramp = np.zeros((40, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(40)[:, None]
    assert np.array_equal(cut(ramp, 40), ramp[:, 30:70]) and np.array_equal(cut(ramp, 40, x=0.25), ramp[:, 15:55])
    assert np.array_equal(cut(ramp, 20, x=1.0, y=0.0, zoom=0.5), ramp[:20, 80:])
    for share in np.random.default_rng(0).random(200):
        assert cut(ramp, 8, x=share, y=1 - share, zoom=1 - 0.3 * share).shape == (8, 8, 3)
    assert cut(ramp, 8, zoom=1e-3).shape == (8, 8, 3)
    # away from black and white, which the bytes between the two passes cut off
    whole = np.random.default_rng(0).integers(64, 192, (90, 90, 3), dtype=np.uint8)
    difference = np.abs(cut(whole, 45).astype(int) - fit(Image.fromarray(whole), 45))
    assert difference.max() <= 1 and difference.mean() < 0.01
    for size in (45, 120):
        assert np.abs(cut(whole, size) - exact(whole, size)).max() < 1.3


@pytest.mark.slow
def test_cut_makes_the_same_bytes_on_every_processor():
    """Torch has loops for vectors of 512 and 256 bits, and plain ones."""
    script = (
        "import hashlib, numpy as np; from semantica.images import cut\n"
        "pixels = np.random.default_rng(0).integers(0, 256, (211, 300, 3), dtype=np.uint8)\n"
        "print(hashlib.sha256(b''.join(cut(pixels, size).tobytes() for size in (64, 128, 250))).hexdigest())"
    )
    found = set()
    for kind in ("avx512", "avx2", "default"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": kind}
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1
