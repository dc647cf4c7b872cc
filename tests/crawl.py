"""Crawls made by an independent writer (warcio), and pictures that no rule objects to; the fixture `crawl` is this."""

import base64
import gzip
import hashlib
import io
import zlib
from pathlib import Path

import brotli
import numpy as np
from PIL import Image
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

DATE = "2024-05-01T00:00:00Z"


def photo(seed: int, width: int = 96, height: int = 80, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """A picture of smooth random colours: every seed looks different to a perceptual hash."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sha1(payload: bytes) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(payload).digest()).decode()


def encode(body: bytes, encoding: str) -> bytes:
    squeeze = zlib.compressobj(wbits=-15)
    return {
        "": lambda: body,
        "gzip": lambda: gzip.compress(body),
        "br": lambda: brotli.compress(body),
        "deflate": lambda: zlib.compress(body),
        "deflate raw": lambda: squeeze.compress(body) + squeeze.flush(),
    }[encoding]()


class Crawl:
    """Records, in the order in which they are added."""

    def __init__(self, compress: bool = True):
        self.buffer = io.BytesIO()
        self.writer = WARCWriter(self.buffer, gzip=compress)

    def add(
        self,
        url: str,
        body: bytes,
        mime: str,
        *,
        encoding: str = "",
        chunked: bool = False,
        status: str = "200 OK",
        date: str = DATE,
        headers: tuple = (),
    ) -> "Crawl":
        stored = encode(body, encoding)
        lines = [("Content-Type", mime), *headers]
        if encoding:
            lines.append(("Content-Encoding", encoding.split()[0]))
        if chunked:
            lines.append(("Transfer-Encoding", "chunked"))
            middle = len(stored) // 2
            parts = [part for part in (stored[:middle], stored[middle:]) if part]
            stored = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        self._write(url, "response", stored, StatusAndHeaders(status, lines, protocol="HTTP/1.1"), date)
        return self

    def page(self, url: str, html: str, **options) -> "Crawl":
        return self.add(url, html.encode(options.pop("code", "utf-8")), options.pop("mime", "text/html"), **options)

    def picture(self, url: str, body: bytes, **options) -> "Crawl":
        return self.add(url, body, options.pop("mime", "image/jpeg"), **options)

    def redirect(self, url: str, target: str) -> "Crawl":
        return self.add(url, b"", "text/html", status="302 Found", headers=(("Location", target),))

    def request(self, url: str) -> "Crawl":
        lines = StatusAndHeaders("GET / HTTP/1.1", [("Cookie", "secret=1"), ("Host", "x")], is_http_request=True)
        self._write(url, "request", b"", lines, DATE)
        return self

    def revisit(self, url: str, payload: bytes, of: str = "", of_date: str = DATE, date: str = DATE) -> "Crawl":
        """By digest, or by URL and date too, of a payload that is stored elsewhere as it is here (not encoded)."""
        headers = {"WARC-Payload-Digest": sha1(payload), "WARC-Date": date}
        if of:
            headers |= {"WARC-Refers-To-Target-URI": of, "WARC-Refers-To-Date": of_date}
        http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
        record = self.writer.create_warc_record(
            url, "revisit", payload=io.BytesIO(), http_headers=http, warc_headers_dict=headers
        )
        record.rec_headers.replace_header("WARC-Payload-Digest", sha1(payload))
        self.writer.write_record(record)
        return self

    def raw(self, data: bytes) -> "Crawl":
        self.buffer.write(data)
        return self

    def _write(self, url: str, kind: str, payload: bytes, http, date: str) -> None:
        record = self.writer.create_warc_record(
            url, kind, payload=io.BytesIO(payload), http_headers=http, warc_headers_dict={"WARC-Date": date}
        )
        self.writer.write_record(record)

    def bytes(self) -> bytes:
        return self.buffer.getvalue()

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.bytes())
        return path


def site(pages: int, pictures: int = 4, *, host: str = "example.com", first: int = 0, compress: bool = True) -> Crawl:
    """A site of pages with pictures of their own, and a logo on every page."""
    crawl = Crawl(compress)
    crawl.picture(f"http://{host}/logo.png", photo(10**6, 128, 128, "PNG"), mime="image/png")
    for page in range(first, first + pages):
        tags = "".join(f'<img src="/p{page}/{i}.jpg" alt="picture {i}">' for i in range(pictures))
        crawl.page(f"http://{host}/p{page}.html", f"<title>{page}</title><img src=/logo.png>{tags}")
        for i in range(pictures):
            crawl.picture(f"http://{host}/p{page}/{i}.jpg", photo(page * 1000 + i))
    return crawl
