import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from semantica.errors import UserError
from semantica.images import (
    BadImage,
    fit,
    grid,
    load_image,
    load_pixels,
    probe_image,
    save_png,
    to_rgb,
    to_tensor,
    to_uint8,
)

EXIF_ORIENTATION = 0x0112


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 90 * np.sin(x / width * 7), 127 + 90 * np.cos(y / height * 5), 255 * x * y / (height * width)]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return io.BytesIO(file.getvalue())


def png(width: int, height: int, depth: int, colour: int, body: bytes) -> io.BytesIO:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def pixels(file) -> np.ndarray:
    image = load_image(file)
    assert image.mode == "RGB" and np.array_equal(load_pixels(file), np.asarray(image))
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(kind):
    truth = picture(7, 5)
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(Image.fromarray(truth), kind, **options)
    assert np.array_equal(pixels(file), truth)
    assert probe_image(file) == (5, 7, kind)


def test_greyscale_and_bilevel():
    grey = picture(6, 9)[..., 0]
    assert np.array_equal(pixels(encoded(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, 2))
    jpeg = pixels(encoded(Image.fromarray(np.full((16, 16), 90, np.uint8)), "JPEG", quality=100))
    assert np.array_equal(jpeg, np.full((16, 16, 3), 90))
    bits = pixels(encoded(Image.fromarray(grey > 127), "PNG"))
    assert np.array_equal(bits[..., 0], np.where(grey > 127, 255, 0))


def test_cmyk():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, :8] = (0, 255, 255, 0)
    ink[:, 8:] = (255, 0, 0, 51)
    image = Image.fromarray(ink, "CMYK")
    # (255 - ink) * (255 - black) / 255
    truth = np.where(np.arange(16)[None, :, None] < 8, (255, 0, 0), (0, 204, 204))
    assert np.array_equal(pixels(encoded(image, "TIFF")), np.broadcast_to(truth, (16, 16, 3)))
    assert np.abs(pixels(encoded(image, "JPEG", quality=100)).astype(int) - truth).max() <= 2


def test_16_bit_grey_covers_the_full_range():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    truth = np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, 2)
    assert np.array_equal(pixels(encoded(Image.fromarray(values), "PNG")), truth)
    assert np.array_equal(pixels(encoded(Image.fromarray(values), "TIFF")), truth)
    assert np.array_equal(pixels(encoded(Image.fromarray(values.astype(">u2")), "TIFF")), truth)


def test_16_bit_colour():
    values = np.random.default_rng(1).integers(0, 65536, (32, 32, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    assert np.abs(pixels(png(32, 32, 16, 2, rows)) - values / 257).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(pixels(file), np.broadcast_to((255, 0, 0), (10, 12, 3)))


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(kind):
    stored = smooth(24, 40) if kind == "JPEG" else picture(24, 40)
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
        result = pixels(encoded(Image.fromarray(stored), kind, exif=exif, **options))
        truth = upright(stored)
        assert result.shape == truth.shape
        assert np.abs(result.astype(int) - truth).max() <= (3 if kind == "JPEG" else 0)


def test_16_bit_rotated_by_exif():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    assert np.array_equal(pixels(encoded(Image.fromarray(values), "PNG", exif=exif))[..., 0], [[3, 0], [4, 1], [5, 2]])


def test_broken_exif_costs_nothing():
    truth = picture(5, 6)
    file = encoded(Image.fromarray(truth), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(pixels(file), truth)


def test_alpha_is_laid_on_white():
    colour, alpha = picture(8, 8), picture(8, 8, 1)[..., 0]
    truth = (colour * (alpha[..., None] / 255) + 255 - alpha[..., None]).round()
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    assert np.abs(pixels(encoded(rgba, "PNG")) - truth).max() <= 1
    grey = Image.fromarray(np.dstack([colour[..., 0], alpha]), "LA")
    assert np.abs(pixels(encoded(grey, "PNG")) - truth[..., :1]).max() <= 1
    # one colour declared transparent, in a true-colour and in a palette picture
    keyed = np.full((4, 4, 3), 10, np.uint8)
    keyed[0, 0] = (1, 2, 3)
    keyed = encoded(Image.fromarray(keyed), "PNG", transparency=(1, 2, 3))
    assert pixels(keyed)[0, :2].tolist() == [[255] * 3, [10] * 3]
    indexed = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 2, "P")
    indexed.putpalette([200, 0, 0, 0, 0, 200])
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(indexed, kind, transparency=1))[0, :2].tolist() == [[200, 0, 0], [255] * 3]
    assert pixels(encoded(indexed, "PNG", transparency=bytes([255, 0])))[0, :2].tolist() == [[200, 0, 0], [255] * 3]


def test_modes_without_a_known_range_are_refused():
    for image in (Image.fromarray(np.ones((4, 4), np.float32)), Image.fromarray(np.ones((4, 4), np.int32))):
        with pytest.raises(BadImage, match="32-bit samples"):
            load_image(encoded(image, "TIFF"))
        with pytest.raises(BadImage, match="32-bit samples"):
            to_rgb(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_refused(kind):
    whole = encoded(Image.fromarray(picture(64, 64)), kind).getvalue()
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(BadImage) as caught:
            load_image(io.BytesIO(whole[: int(share * len(whole))]))
        assert caught.value.reason.startswith("broken: ")


def test_a_truncated_jpeg_passes_the_header_check_only(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(Image.fromarray(picture(64, 64)), "JPEG").getvalue()[:-600])
    assert probe_image(path) == (64, 64, "JPEG")
    with pytest.raises(BadImage, match="truncated") as caught:
        load_image(path, near=8)
    assert caught.value.name == str(path) and str(path) in str(caught.value)


def test_flipped_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(0)
    outcomes = {"image": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
            whole = np.frombuffer(encoded(Image.fromarray(smooth(24, 24)), kind).getvalue(), np.uint8)
            for _ in range(60):
                broken = whole.copy()
                broken[rng.integers(0, min(len(whole), 200), 4)] = rng.integers(0, 256, 4)
                try:
                    found = load_image(io.BytesIO(broken.tobytes()))
                    assert found.mode == "RGB"
                    assert np.array_equal(load_pixels(io.BytesIO(broken.tobytes())), np.asarray(found))
                    outcomes["image"] += 1
                except BadImage as error:
                    with pytest.raises(BadImage):
                        load_pixels(io.BytesIO(broken.tobytes()))
                    assert len(str(error).splitlines()) == 1 and len(error.reason) < 200
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > 30


def test_what_is_no_picture_is_refused(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("this is not a picture\n")
    empty = tmp_path / "empty.png"
    empty.touch()
    foreign = tmp_path / "foreign.png"
    Image.fromarray(picture(4, 4)).save(foreign, format="PPM")
    for path in (text, empty, foreign):
        for read in (probe_image, load_image, load_pixels):
            with pytest.raises(BadImage, match="not a picture in JPEG, PNG, WEBP, GIF, BMP or TIFF format"):
                read(path)
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("pipe.jpg", "not a regular file"), (".", "not a regular file"), ("none.jpg", "No such file")):
        with pytest.raises(BadImage, match=reason):
            load_image(tmp_path / name)


def test_too_small():
    dot = encoded(Image.new("RGB", (1, 1)), "PNG")
    with pytest.raises(BadImage, match="too small: 1x1"):
        load_image(dot)
    strip = encoded(Image.new("RGB", (40, 9)), "PNG")
    assert load_image(strip, min_side=9).size == (40, 9)
    with pytest.raises(BadImage, match="too small: 40x9.*at least 10"):
        probe_image(strip, min_side=10)


@pytest.mark.parametrize("side", [30_000, 10_000])
def test_a_decompression_bomb_is_refused_on_its_header(side, monkeypatch):
    bomb = png(side, side, 8, 2, b"\0" * 100)
    # another library may have switched Pillow's own limit off
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (probe_image, load_image, load_pixels):
            with pytest.raises(BadImage, match=f"decompression bomb: {side}x{side}"):
                read(bomb)
    # KiB; the pixels would take 300 MB and more
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_bomb_with_pillows_limit_on_gives_no_warning():
    limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="decompression bomb: 10000x10000"):
            load_image(png(10_000, 10_000, 8, 2, b"\0" * 100))
    assert limits == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (1024**3 // 4 // 3, False)


def test_bad_image_is_a_user_error_that_travels_between_processes():
    error = pickle.loads(pickle.dumps(BadImage("too small", "a\nb.png")))
    assert isinstance(error, UserError)
    assert (error.reason, error.name) == ("too small", "a\nb.png")
    assert str(error) == "cannot use the picture 'a\\nb.png': too small; repair it or choose another"


def test_near_decodes_large_jpegs_at_a_fraction():
    large = encoded(Image.fromarray(smooth(1200, 1600)), "JPEG", quality=95)
    assert load_image(large).size == (1600, 1200)
    for near, size in ((150, (200, 150)), (151, (400, 300)), (400, (800, 600)), (601, (1600, 1200))):
        assert load_image(large, near=near).size == size
    near, full = fit(load_image(large, near=128), 64), fit(load_image(large), 64)
    assert np.abs(near.astype(int) - full).max() <= 3


@pytest.mark.parametrize("share, left", [(0.0, 0), (0.5, 13), (1.0, 26)])
def test_fit_agrees_with_torch(share, left):
    truth = torch.from_numpy(picture(90, 142)).permute(2, 0, 1)[None].double()
    # the short side 90 becomes 45; then a square is cut out
    small = torch.nn.functional.interpolate(truth, size=(45, 71), mode="bicubic", antialias=True)[0].clamp(0, 255)
    result = torch.from_numpy(fit(Image.fromarray(picture(90, 142)), 45, x=share)).permute(2, 0, 1)
    # Pillow rounds after each of its two passes, and the second amplifies by the sum of its absolute weights, ~1.5
    assert (result - small[..., left : left + 45]).abs().max() < 1.25


def test_fit_places_the_crop():
    ramp = np.zeros((40, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(40)[:, None]
    image = Image.fromarray(ramp)
    assert np.array_equal(fit(image, 40), ramp[:, 30:70])
    assert np.array_equal(fit(image, 40, x=0.25), ramp[:, 15:55])
    assert np.array_equal(fit(image, 20, x=1.0, y=0.0, zoom=0.5), ramp[:20, 80:])
    assert np.array_equal(fit(image, 20, x=0.0, y=1.0, zoom=0.5, mirror=True), ramp[20:, 19::-1])
    # rounding must not push the box over the edge
    for share in np.random.default_rng(0).random(200):
        assert fit(image, 8, x=1.0, y=1.0, zoom=1 - 0.3 * share).shape == (8, 8, 3)


def test_tensors_and_back():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = to_tensor(every)
    assert tensor.dtype == torch.float32 and tensor.shape == (1, 3, 16, 16) and tensor.is_contiguous()
    truth = torch.arange(256, dtype=torch.float64).reshape(16, 16) / 127.5 - 1
    assert (tensor.double() - truth).abs().max() < 1e-7
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor), every)
    batch = [picture(6, 6, seed) for seed in range(3)]
    assert torch.equal(to_tensor(batch), to_tensor(np.stack(batch)))
    assert torch.equal(to_tensor(batch)[2, 1], torch.from_numpy(batch[2][..., 1]) / 127.5 - 1)
    assert np.array_equal(to_uint8(to_tensor(batch)), np.stack(batch))
    for wrong in (picture(6, 6), picture(6, 6)[None].astype(np.float32), np.zeros((1, 6, 6, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            to_tensor(wrong)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-7.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 0.99999, 1.0, 9.0], dtype=torch.float64)
    image = values.reshape(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).tolist() == np.full((1, 2, 2, 3), 128).tolist()


def test_grid_places_its_pictures():
    pictures = [[np.full((4, 4, 3), 10 * r + c, np.uint8) for c in range(3 - r)] for r in range(2)]
    sheet = np.asarray(grid(pictures, gap=1, apart=5))
    assert sheet.shape == (2 * 5 + 1, 3 * 5 + 1 + 5, 3)
    truth = np.full_like(sheet, 255)
    truth[1:5, 1:5], truth[1:5, 11:15], truth[1:5, 16:20] = 0, 1, 2
    truth[6:10, 1:5], truth[6:10, 11:15] = 10, 11
    assert np.array_equal(sheet, truth)
    for wrong in ([], [[]]):
        with pytest.raises(ValueError, match="at least one"):
            grid(wrong)


def test_save_png_is_all_or_nothing(tmp_path):
    path = tmp_path / "grid.png"
    truth = picture(5, 5)
    save_png(truth, path)
    assert np.array_equal(np.asarray(Image.open(path)), truth)

    class FullDisk(Image.Image):
        def save(self, file, format):
            file.write_bytes(b"half a picture")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left to write .*grid.png"):
        save_png(FullDisk(), path)
    assert np.array_equal(np.asarray(Image.open(path)), truth)
    with pytest.raises(UserError, match="No such file or directory") as caught:
        save_png(truth, tmp_path / "nowhere" / "grid.png")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_importing_needs_no_torch():
    code = "import sys, semantica.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
