"""Bodies of requests: read under limits, kept in memory, judged by what they hold."""

import asyncio
import base64
import hashlib
import hmac
import io
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from semantica.errors import first_line
from semantica.images import BadImage, fit, load_image, probe_image
from semantica.inputs import SINGLE
from semantica.serving.limits import Limits
from semantica.serving.refusals import SHOWN, Refused, closed

# bytes of a body without a picture, and of one field of a form
JSON, FIELD = 1 << 20, 1 << 17
MOST_FIELDS = 32
MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Budget:
    """Bytes that all uploads together may hold."""

    def __init__(self, size: int):
        self.free = size

    @contextmanager
    def held(self) -> Iterator[Callable[[int], None]]:
        """A function that takes bytes, all of which are given back at the end; it raises `Refused`."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if count > self.free:
                raise closed("Too much is being uploaded at the moment.")
            self.free -= count
            taken += count

        try:
            yield take
        finally:
            self.free += taken


def check_key(request: Request, keys: tuple[str, ...]) -> None:
    """Raises `Refused` for a request that brings none of the keys; takes as long whichever it is like."""
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(given.strip().encode()).digest()
    known = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    if scheme.lower() != "bearer" or not any(known):
        headers = {"WWW-Authenticate": "Bearer"}
        raise Refused(
            401, "invalid_api_key", "Give a key of this server as 'Authorization: Bearer KEY'.", headers=headers
        )


def check_site(request: Request) -> None:
    """Raises `Refused` for what a browser sends at the wish of a page from elsewhere: such a page cannot read a
    response, but could keep a server busy that only its visitor's machine reaches."""
    if request.headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
        raise Refused(403, "cross_site", "Pages from elsewhere may not ask for images.")


async def chunks(request: Request, limit: int, take: Callable[[int], None]) -> AsyncIterator[bytes]:
    """The body as it comes. Raises `Refused` above the limit."""
    size = 0
    declared = request.headers.get("content-length", "")
    large = Refused(413, "request_too_large", f"A request may have at most {limit} bytes.")
    if declared.isdecimal() and int(declared[:SHOWN]) > limit:
        raise large
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise large
        take(len(chunk))
        yield chunk


async def received(
    request: Request, multipart: bool, limits: Limits, take: Callable[[int], None]
) -> tuple[bytes | dict[str, str], bytes | None]:
    """Fields, as JSON or as the texts of a form, and the picture.

    Raises:
        Refused: too large, too slow, of another kind, or broken.
    """
    wanted = "multipart/form-data" if multipart else "application/json"
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise Refused(415, "unsupported_content_type", f"This address takes {wanted}.")
    try:
        async with asyncio.timeout(limits.patience):
            if multipart:
                return await form(request, limits, take)
            return b"".join([part async for part in chunks(request, min(JSON, limits.upload), take)]), None
    except TimeoutError:
        headers = {"connection": "close"}
        raise Refused(408, "request_timeout", "The body came too slowly.", headers=headers) from None


async def form(request: Request, limits: Limits, take: Callable[[int], None]) -> tuple[dict[str, str], bytes | None]:
    stream = chunks(request, limits.upload, take)
    parser = MultiPartParser(request.headers, stream, max_files=1, max_fields=MOST_FIELDS, max_part_size=FIELD)
    # never on the disk
    parser.spool_max_size = limits.upload + 1
    try:
        parts = await parser.parse()
    # the second by itself from older starlettes
    except (MultiPartException, FormParserError) as error:
        raise Refused(400, "invalid_form", f"The form cannot be read: {first_line(error)}") from None
    try:
        return await parts_of(parts)
    finally:
        await parts.close()


async def parts_of(parts: FormData) -> tuple[dict[str, str], bytes]:
    """Texts by name, and the picture. Raises `Refused` for what is missing, given twice or of the wrong kind."""
    texts: dict[str, str] = {}
    picture = None
    for name, value in parts.multi_items():
        # clients send lists under this name, of one picture too
        name = SINGLE if name == f"{SINGLE}[]" else name
        if isinstance(value, UploadFile) != (name == SINGLE):
            what = "a file" if name == SINGLE else "text"
            raise Refused(400, "invalid_value", f"{name[:SHOWN]!r} must be {what}.", name[:SHOWN])
        if name in texts:
            raise Refused(400, "invalid_value", f"{name[:SHOWN]!r} is given more than once.", name[:SHOWN])
        if isinstance(value, UploadFile):
            picture = await value.read()
        else:
            texts[name] = value
    if picture is None:
        raise Refused(400, "missing_required_parameter", f"Missing required parameter: {SINGLE!r}.", SINGLE)
    return texts, picture


def decoded(picture: bytes, side: int, limits: Limits) -> np.ndarray:
    """uint8 `[side, side, 3]`: the square in the middle of a picture, which is judged by its content.

    Raises:
        Refused: no picture, a broken one, or one of more pixels than may be.
    """
    try:
        file = io.BytesIO(picture)
        width, height, _ = probe_image(file)
        if width * height > limits.pixels:
            raise BadImage(f"{width}x{height} is above {limits.pixels} pixels")
        return fit(load_image(file), side)
    except BadImage as error:
        raise Refused(400, "invalid_image", f"The picture cannot be used: {error.reason}.", SINGLE) from None


def encoded(image: np.ndarray, form: str, quality: int, url: bool) -> dict[str, str]:
    """An image `[H, W, 3]` uint8 as a member of a response's `data`."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **({} if form == "png" else {"quality": quality}))
    text = base64.b64encode(file.getvalue()).decode()
    return {"url": f"data:{MIME[form]};base64,{text}"} if url else {"b64_json": text}
