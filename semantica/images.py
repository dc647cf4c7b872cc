"""Pictures in and out: guarded decoding, square crops, tensors, contact sheets.

Everything here takes hostile files for granted: a picture either becomes 8-bit RGB or is refused with a short reason.
"""

import functools
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from semantica.errors import UserError
from semantica.files import written
from semantica.pixels import to_planes
from semantica.pixels import to_uint8 as to_uint8

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# where Pillow starts to warn; a constant, since other libraries switch Pillow's own limit off
MAX_PIXELS = 1024**3 // 4 // 3
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
ORIENTATION = 0x0112
# of texts under the rows of a contact sheet
TEXT_HEIGHT, TEXT_LINES = 12, 2
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError):
    """A picture that cannot be used. `reason` is short, without the file's name; `str()` is the whole line."""

    def __init__(self, reason: str, name: str = "image"):
        super().__init__(reason, name)
        self.reason = reason
        self.name = name

    def __str__(self) -> str:
        return f"cannot use the picture {self.name!r}: {self.reason}; repair it or choose another"


class Probe(NamedTuple):
    """What a picture's header says: sides in pixels as stored (before any EXIF rotation) and Pillow's format name."""

    width: int
    height: int
    format: str


def probe_image(file: str | os.PathLike | BinaryIO, *, min_side: int = 2) -> Probe:
    """Read the header only: format and size are checked as by `load_image`, the pixels are not decoded.

    Raises:
        BadImage: not a picture, a format that is not read, too small, or too many pixels.
    """
    with _opened(file, min_side) as image:
        return Probe(*image.size, image.format)


def load_image(file: str | os.PathLike | BinaryIO, *, min_side: int = 2, near: int | None = None) -> Image.Image:
    """Decode one picture to upright 8-bit RGB.

    Greyscale, palette, CMYK and 16-bit pictures are converted, transparency is laid on white, EXIF orientation is
    applied, and of an animation the first frame is taken.

    Args:
        file: a path, or a seekable binary file.
        min_side: the shortest side accepted, in pixels.
        near: shortest side, in pixels, that is still of use. Large JPEGs are then decoded at 1/2, 1/4 or 1/8 of their
            size, never below it. What is then shown at a side of near / 2 differs from the same made of the whole
            picture by 45 dB (PSNR, mean of 69 photos), at near / 1.5 by 41, at near by 38.

    Raises:
        BadImage: missing, broken or truncated; not in `FORMATS`; too small; more than `MAX_PIXELS` (refused on the
            header, before any pixel is allocated); samples of 32 bits.
    """
    with _opened(file, min_side) as image:
        if near is not None:
            image.draft(None, (near, near))
        image.load()
        return to_rgb(image)


def load_pixels(file: str | os.PathLike | BinaryIO, *, min_side: int = 2, near: int | None = None) -> np.ndarray:
    """`load_image` as uint8 `[H, W, 3]`, the same bytes, without Pillow's copies where `simplejpeg` is installed.

    Raises:
        BadImage: as `load_image`.
    """
    with _opened(file, min_side) as image:
        whole = image.size
        if near is not None:
            image.draft(None, (near, near))
        if image.format == "JPEG" and image.mode == "RGB" and _orientation(image) not in UPRIGHT:
            pixels = _libjpeg(image, whole)
            if pixels is not None:
                return pixels
        image.load()
        return np.array(to_rgb(image))


def _libjpeg(image: Image.Image, whole: tuple[int, int]) -> np.ndarray | None:
    """What Pillow would make of a JPEG whose header it has read; None where that is left to Pillow."""
    library = jpeg_decoder()
    if library is None:
        return None
    image.fp.seek(0)
    data = image.fp.read()
    width, height = image.size
    try:
        # what was judged by its size must be what is decoded
        if library.decode_jpeg_header(data)[:2] != whole[::-1]:
            return None
        # the smallest scale that is below neither is the one that Pillow has chosen
        pixels = library.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=1)
    # stricter than Pillow, which may still read it, and knows what to say if not
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


@functools.cache
def jpeg_decoder() -> ModuleType | None:
    """libjpeg-turbo straight into arrays, where that package is installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB from a Pillow image of any mode, converted as by `load_image`; always a new image.

    Raises:
        BadImage: a mode that holds no picture of known range (32-bit integers, floats).
    """
    method = UPRIGHT.get(_orientation(image))
    # older Pillows open 16-bit PNG as 32-bit integers
    if image.mode in MODES_16_BIT or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion clips at 255; 65535 / 255 = 257
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage(f"32-bit samples (mode {image.mode}) have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if method is None else image.transpose(method)


def fit(
    image: Image.Image, size: int, *, x: float = 0.5, y: float = 0.5, zoom: float = 1.0, mirror: bool = False
) -> np.ndarray:
    """Cut a square out of an RGB image and resize it, antialiased (bicubic), to `[size, size, 3]` uint8.

    The square's side is `zoom` (0 < zoom <= 1) of the shorter side; x and y in [0, 1] place it from left to right and
    from top to bottom. The defaults resize the short side to `size` and crop the centre. `mirror` swaps left and right.
    """
    width, height = image.size
    side = zoom * min(width, height)
    left, top = x * (width - side), y * (height - side)
    box = (left, top, min(left + side, width), min(top + side, height))
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image)


def cut(
    pixels: np.ndarray, size: int, *, x: float = 0.5, y: float = 0.5, zoom: float = 1.0, interpolation: str = "bicubic"
) -> np.ndarray:
    """`fit` for training, on uint8 `[H, W, 3]`: several times as fast, the square's place and side in whole pixels.

    The same antialiased filter in 8 bits, by torch's vectorised loops, which know "bilinear" and "bicubic": the latter
    serves for others. A square that has the wanted size is not resized, and shares memory with `pixels`.
    """
    import torch

    height, width, _ = pixels.shape
    side = max(1, round(zoom * min(width, height)))
    left, top = round(x * (width - side)), round(y * (height - side))
    square = pixels[top : top + side, left : left + side]
    if side == size:
        return square
    # channels-last in memory, which is what has the fast loops
    planes = torch.from_numpy(square).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    mode = "bilinear" if interpolation == "bilinear" else "bicubic"
    resized = torch.nn.functional.interpolate(planes, (size, size), mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def to_tensor(images: np.ndarray | Sequence[np.ndarray]) -> "Tensor":
    """`to_planes` as a tensor."""
    import torch

    return torch.from_numpy(to_planes(images))


def grid(
    rows: Sequence[Sequence[np.ndarray]], *, gap: int = 2, apart: int = 0, texts: Sequence[str] = ()
) -> Image.Image:
    """A contact sheet on white: `rows[r][c]` uint8 `[S, S, 3]`, all of one size; rows may differ in length.

    `gap` pixels part the pictures, `apart` more set the first column off from the others. texts: one under each row,
    cut to the lines that fit there.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("a contact sheet needs at least one picture in every row")
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    margin = apart if columns > 1 else 0
    pitch = height + gap + (TEXT_LINES * TEXT_HEIGHT if texts else 0)
    shape = (len(rows) * pitch + gap, columns * (width + gap) + gap + margin, 3)
    sheet = np.full(shape, 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = gap + r * pitch, gap + c * (width + gap) + (margin if c else 0)
            sheet[top : top + height, left : left + width] = picture
    made = Image.fromarray(sheet)
    if texts:
        pen, font = ImageDraw.Draw(made), ImageFont.load_default(TEXT_HEIGHT - 2)
        for r, text in enumerate(texts):
            for i, line in enumerate(wrapped(text, shape[1] - 2 * gap, font)):
                pen.text((gap, gap + r * pitch + height + i * TEXT_HEIGHT), line, (0, 0, 0), font)
    return made


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text as lines that fit a width in pixels; of a longer one the first lines, which end in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > TEXT_LINES:
        lines = [*lines[: TEXT_LINES - 1], f"{lines[TEXT_LINES - 1]} ..."]
    return lines


def save_png(image: Image.Image | np.ndarray, path: str | os.PathLike) -> None:
    """Write a PNG beside its place and rename it, so that a reader sees the old file or the whole new one.

    Raises:
        UserError: the folder is missing or not writable, or the disk is full; nothing half-written stays.
    """
    path = Path(path)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    try:
        with written(path, apart=True) as aside:
            image.save(aside, format="PNG")
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {str(path)!r}: {why}; give a folder that exists and has room") from error


@contextmanager
def _opened(file: str | os.PathLike | BinaryIO, min_side: int) -> Iterator[Image.Image]:
    """A picture whose header is read and whose size is accepted; whatever then fails inside becomes `BadImage`."""
    path = file if isinstance(file, str | os.PathLike) else getattr(file, "name", "image")
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "image"
    try:
        if isinstance(file, str | os.PathLike):
            # opening a pipe would wait for ever
            if not stat.S_ISREG(os.stat(file).st_mode):
                raise BadImage("not a regular file")
            with open(file, "rb") as stream:
                yield _read_header(stream, min_side)
        else:
            file.seek(0)
            yield _read_header(file, min_side)
    except BadImage as error:
        raise BadImage(error.reason, name) from None
    # decoders fail on hostile bytes with nearly every type of exception there is
    except Exception as error:
        what = "cannot be read" if isinstance(error, OSError) and error.strerror else "broken"
        detail = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:120]
        raise BadImage(f"{what}: {detail}", name) from error


def _read_header(stream: BinaryIO, min_side: int) -> Image.Image:
    # not Image.open: between one and two times its limit that only warns, and it tries every format it knows
    Image.init()
    prefix = stream.read(16)
    for known in FORMATS:
        reader, accept = Image.OPEN[known]
        if accept(prefix) is True:
            stream.seek(0)
            image = reader(stream, "")
            break
    else:
        raise BadImage(f"not a picture in {', '.join(FORMATS[:-1])} or {FORMATS[-1]} format")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"decompression bomb: {width}x{height} is above {MAX_PIXELS} pixels")
    if min(width, height) < min_side:
        raise BadImage(f"too small: {width}x{height}, the shorter side must have at least {min_side} pixels")
    return image


def _orientation(image: Image.Image) -> int:
    # broken EXIF beside sound pixels is no reason to lose the picture
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
