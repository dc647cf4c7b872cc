"""HTML -> links to pictures, by every usual way of placing one on a page."""

import re
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from resiliparse.parse.encoding import detect_encoding
from resiliparse.parse.html import HTMLTree

from semantica.train.pages.config import MAX_LINKS, MAX_URL

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LAZY = (
    "data-src", "data-original", "data-lazy-src", "data-lazy", "data-defer-src", "data-lazyload", "data-echo",
    "data-original-src", "data-actualsrc", "data-hi-res-src", "data-full-src", "data-image", "data-img-src",
    "data-image-src", "data-url", "data-bg", "data-background", "data-background-image",
)  # fmt: skip
LAZY_SETS = ("data-srcset", "data-lazy-srcset", "data-original-set")
META = {"og:image", "og:image:url", "og:image:secure_url", "twitter:image", "twitter:image:src"}
# no part of it can match in two ways, so that no text takes more than linear time
CSS_URL = re.compile(r"url\(([^()]*)\)", re.IGNORECASE)
# what JSON may hold and no encoding of text can
HALVES = re.compile("[\ud800-\udfff]")
# a parser compares each attribute of a tag with all before it
LONG_TAG, MANY_WORDS = 1 << 16, 8192


class BadPage(ValueError):
    """A page that is not parsed."""


@dataclass(frozen=True)
class Link:
    """A link as written in the page. kind: img, srcset, source, lazy, meta, css or a; element: its number, so that the
    ways in which one element names its picture can be told from several pictures."""

    url: str
    alt: str
    kind: str
    element: int


def page_links(html: bytes, charset: str) -> tuple[str, list[Link]]:
    """The `<base>` address ("" if none) and the links to pictures, in the order of the page.

    Args:
        html: as received.
        charset: as the server said it; else the page's own `<meta>`, else what the bytes look like.

    Raises:
        BadPage: markup made to stall a parser, or none at all.
    """
    if any(len(tag) > LONG_TAG and len(tag.split()) > MANY_WORDS for tag in html.split(b">")):
        raise BadPage(f"html: a tag of more than {MANY_WORDS} words")
    try:
        tree = HTMLTree.parse_from_bytes(html, encoding(html, charset), errors="replace")
        # sliced: iteration would run the query again for each element
        elements = tree.document.query_selector_all("base[href],img,source,meta,a[href],link[href],[style]")[:]
    except Exception as error:
        raise BadPage(f"html: {str(error)[:80] or type(error).__name__}") from error
    base, links = "", []
    for number, element in enumerate(elements):
        tag, get = element.tag, element.getattr
        alt = " ".join((get("alt") or "").split())[:500]
        found: list[tuple[str, str]] = []
        if tag == "base":
            base = base or (get("href") or "").strip()
        elif tag == "img":
            found = [("img", get("src")), ("srcset", largest(get("srcset")))]
            found += [("lazy", get(name)) for name in LAZY] + [("lazy", largest(get(name))) for name in LAZY_SETS]
        elif tag == "source":
            # a source of a video names no picture
            if element.parent is not None and element.parent.tag == "picture":
                found = [("source", largest(get(name))) for name in ("srcset", *LAZY_SETS)] + [("source", get("src"))]
        elif tag == "meta":
            if (get("property") or get("name") or "").strip().lower() in META:
                found = [("meta", get("content"))]
        elif tag == "link":
            if (get("rel") or "").strip().lower() == "image_src":
                found = [("meta", get("href"))]
        elif tag == "a":
            if is_image_url(get("href") or ""):
                found = [("a", get("href"))]
        if style := get("style"):
            found += [("css", url.strip().strip("'\"")) for url in CSS_URL.findall(style)[:20]]
            if tag != "img":
                found += [("lazy", get(name)) for name in LAZY[-3:]]
        for kind, url in found:
            url = (url or "").strip()
            if url and not url[:5].lower() == "data:":
                links.append(Link(url, alt, kind, number))
    return base, links[:MAX_LINKS]


def encoding(html: bytes, charset: str) -> str:
    """As browsers decide it: byte order mark, then the server's word, then the page's, then a guess."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if html.startswith(mark):
            return name
    if charset:
        try:
            "".encode(charset)
            return charset
        except LookupError:
            pass
    return detect_encoding(html, from_html_meta=True)


def largest(srcset: str | None) -> str:
    """The candidate of a `srcset` with the largest width or density; "" if there is none."""
    best, size, url, value = "", -1.0, "", 1.0
    words = [*(srcset or "")[: 8 * MAX_URL].split(), ","]
    for word in words:
        if not url:
            # an address may hold commas, but not end with one
            url = word.strip(",")
            done = word.endswith(",")
        else:
            number, comma, rest = word.partition(",")
            with suppress(ValueError):
                value = float(number[:-1])
            done = bool(comma)
        if url and done:
            best, size = (url, value) if value > size else (best, size)
            # "1x,next.jpg 2x"
            url, value = (rest if word.strip(",") != url and rest else ""), 1.0
    return best


def canonical(url: str, base: str = "") -> str | None:
    """An absolute URL in one spelling: no fragment, lower-case host, no default port, unsafe characters quoted.

    None for what is no http(s) (or, from a `file:` page, file) address, or longer than `MAX_URL`.
    """
    if len(url) > MAX_URL:
        return None
    try:
        url = whole_characters("".join(c for c in url.strip() if c not in "\t\r\n\0"))
        parts = urlsplit(resolved(url, base) if base else url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https") and not (scheme == "file" and base[:5] in ("", "file:")):
        return None
    if not host and scheme != "file":
        return None
    # an address of IPv6
    host = f"[{host}]" if ":" in host else host
    if port is not None and port != {"http": 80, "https": 443}.get(scheme):
        host = f"{host}:{port}"
    path = quote(undotted(parts.path or "/"), safe="/%:@!$&'()*+,;=~-._")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|")
    return urlunsplit((scheme, host, path, query, ""))


def resolved(url: str, base: str) -> str:
    """An address as a page at `base` means it. Raises `ValueError` for one that cannot be read."""
    parts, own = urlsplit(url), urlsplit(base)
    if parts.scheme or parts.netloc or parts.path[:1] in ("", "/"):
        return urljoin(base, url)
    # urljoin would drop the empty segments of "a//b.jpg", which browsers ask for
    path = f"{own.path.rpartition('/')[0]}/{parts.path}"
    return urlunsplit((own.scheme, own.netloc, path, parts.query, ""))


def undotted(path: str) -> str:
    """An absolute path without its "." and ".." segments (RFC 3986, section 5.2.4); empty segments stay."""
    if "/." not in path:
        return path
    kept: list[str] = []
    _, *segments = path.split("/")
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join([*kept, ""] if segments[-1] in (".", "..") else kept)


def whole_characters(text: str) -> str:
    """A text that can be encoded: U+FFFD stands for each half of a character, as in browsers."""
    return HALVES.sub("\ufffd", text)


def is_image_url(url: str) -> bool:
    """Whether the path ends like that of a picture file."""
    return url.split("#")[0].split("?")[0].lower().endswith(IMAGE_SUFFIXES)


def site(url: str) -> str:
    """The host without "www.": what furniture is counted over."""
    return (urlsplit(url).hostname or "").removeprefix("www.")
