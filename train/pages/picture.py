"""One body -> a picture that may be stored, or the reason why not."""

import io
import re
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

from semantica.images import FORMATS, ORIENTATION, BadImage, fit, load_image, probe_image
from semantica.train.pages.config import Rules

# formats that are stored as they came
SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# what a page loads to count its visitors
PIXEL = 4
# a picture larger than this is stored again, as a JPEG
MAX_STORED = 16 << 20
QUALITY = 95
# pictures are decoded at about this side for their hash
HASH_SIDE = 128
ICON = re.compile(r"(?:^|[-_./])(?:fav)?icons?(?:[-_./\d]|$)", re.IGNORECASE)
ICON_SIDE = 256


class Rejected(ValueError):
    """A body that is not stored; the message is the reason that it is counted under."""


@dataclass(frozen=True)
class Picture:
    """What is stored of a picture.

    data, suffix: the file as it came, or a JPEG where it had to be converted.
    width, height: of that file, upright.
    phash: 64-bit perceptual hash (DCT of the 32x32 grey picture, Zauner 2010).
    view: uint8 [S, S, 3], the centre square that the encoder sees, or None.
    """

    data: bytes
    suffix: str
    width: int
    height: int
    phash: int
    view: np.ndarray | None


def examine(body: bytes, rules: Rules, side: int | None) -> Picture:
    """Decode a body and judge it by its own properties.

    Stored as they came are JPEG, PNG and WebP of 8 bits, still, opaque and upright. All else (GIF, BMP, TIFF, CMYK,
    16 bits, transparent, animated, to be rotated, longer than `max_side`, above 16 MiB) becomes a JPEG of quality 95
    without chroma subsampling and without metadata: of an animation the first frame, transparency on white.

    Args:
        body: the file.
        rules: sizes accepted.
        side: S of the encoder's view, None for none.

    Raises:
        Rejected: `format`, `broken`, `bomb`, `tracking_pixel`, `small`, `aspect` or `blank`.
    """
    try:
        probe = probe_image(io.BytesIO(body), min_side=1)
        short, long = sorted((probe.width, probe.height))
        if short <= 2 or long <= PIXEL:
            raise Rejected("tracking_pixel")
        if short < rules.min_side:
            raise Rejected("small")
        if long > rules.max_aspect * short:
            raise Rejected("aspect")
        as_it_came = keeps(body, probe.format, long, rules)
        near = 2 * (max(HASH_SIDE, side or 0) if as_it_came else rules.max_side)
        image = load_image(io.BytesIO(body), near=near)
    except BadImage as error:
        raise Rejected(slug(error.reason)) from error
    if all(low == high for low, high in image.getextrema()):
        raise Rejected("blank")
    if as_it_came:
        data, suffix, size = body, SUFFIX[probe.format], (probe.width, probe.height)
    else:
        image.thumbnail((rules.max_side, rules.max_side), Image.Resampling.LANCZOS)
        # only a picture much longer than wide falls under the least side here
        if min(image.size) < rules.min_side:
            raise Rejected("aspect")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY, subsampling=0, optimize=False)
        data, suffix, size = buffer.getvalue(), "jpg", image.size
    bits = imagehash.phash(image).hash.ravel()
    phash = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return Picture(data, suffix, *size, phash, fit(image, side) if side else None)


def keeps(body: bytes, name: str, long: int, rules: Rules) -> bool:
    """Whether a picture is stored as it came."""
    if name not in SUFFIX or long > rules.max_side or len(body) > MAX_STORED:
        return False
    try:
        with Image.open(io.BytesIO(body), formats=(*FORMATS, "MPO")) as image:
            still = name == "MPO" or getattr(image, "n_frames", 1) == 1
            plain = image.mode in ("RGB", "L", "P") and not image.has_transparency_data
            return still and plain and image.getexif().get(ORIENTATION, 1) in (0, 1)
    # headers that only the strict decoder will judge
    except Exception:
        return False


def slug(reason: str) -> str:
    """The reason of a `BadImage` in one word."""
    table = {"decompression bomb": "bomb", "not a picture": "format", "too small": "small"}
    return next((word for start, word in table.items() if reason.startswith(start)), "broken")


def by_name(url: str, width: int, height: int) -> str | None:
    """The reason why a picture of this name is no content, if there is one."""
    path = url.split("?")[0]
    name = path.rsplit("/", 1)[-1]
    if "sprite" in name.lower():
        return "sprite"
    if max(width, height) <= ICON_SIDE and (ICON.search(name) or "/icons/" in path.lower()):
        return "icon"
    return None
