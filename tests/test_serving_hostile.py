"""Requests that mean no good: each is refused in the documented shape or hung up on, and the next one is served."""

import io
import json
import select
import socket
import struct
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest

from semantica.serving.limits import Limits

LIMITS = Limits(upload=1 << 20, uploads=3 << 19, pixels=1 << 16, patience=60.0, connections=12)
# where that is waited for
HASTY = replace(LIMITS, patience=0.3)


@pytest.fixture(scope="module")
def running(served):
    """A server of pictures and texts, over an engine that makes whatever it is asked for."""
    engine = served.Held()
    engine.release()
    with served.live(engine, served.BOTH, LIMITS, queue=64) as running:
        yield running


@pytest.fixture(autouse=True)
def alive(served, running, monkeypatch, capfd):
    """Afterwards the next one is served, no upload is kept, nothing was written to a disk, nothing has failed."""
    written = []
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: written.append(self))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: written.append("file") or io.BytesIO())
    yield
    response = post(served, running, served.PICTURE.read_bytes())
    assert response.status_code == 200 and len(response.json()["data"]) == 1
    assert written == [] and running.batcher.queued() == 0 and not running.batcher.error
    assert "Traceback" not in capfd.readouterr().err


def post(served, running, picture: bytes, endpoint: str = "variations", **fields) -> httpx.Response:
    return served.HTTP.post(f"{running.api}/images/{endpoint}", files={"image": picture}, data=fields)


def shaped(response: httpx.Response, *expected: tuple[int, str]) -> dict:
    """An error in the documented shape, one of those expected."""
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 400
    assert (response.status_code, error["code"]) in expected, response.text
    return error


def connected(running) -> socket.socket:
    host, port = running.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def talk(running, *pieces: bytes) -> tuple[int, dict]:
    """Status and body of what is answered to bytes, until the other side hangs up or has answered one request."""
    with connected(running) as line:
        for piece in pieces:
            # the other side may hang up at once
            with suppress(OSError):
                line.sendall(piece)
        answer = b""
        with suppress(ConnectionError):
            while part := line.recv(1 << 16):
                answer += part
                head, found, body = answer.partition(b"\r\n\r\n")
                if found and body.endswith(b"}"):
                    break
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: here", *lines, "", "")).encode()


MULTIPART = "Content-Type: multipart/form-data; boundary=edge"
VARIATIONS = "/v1/images/variations"


def form(*parts: bytes, end: bytes = b"--edge--\r\n") -> bytes:
    return b"".join(b"--edge\r\n" + part + b"\r\n" for part in parts) + end


def field(name: str, value: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    return f'Content-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + value


def test_large_uploads(running, served):
    large = 413, {"error": {"code": "request_too_large", "param": None, "type": "invalid_request_error",
                            "message": "A request may have at most 1048576 bytes."}}  # fmt: skip
    # said to be large: not one byte of it is read, and nothing is sent on by "100 Continue"
    assert talk(running, head(VARIATIONS, MULTIPART, "Content-Length: 10000000000")) == large
    assert talk(running, head(VARIATIONS, MULTIPART, f"Content-Length: {'9' * 18}")) == large
    expecting = head(VARIATIONS, MULTIPART, "Content-Length: 2000000", "Expect: 100-continue")
    assert talk(running, expecting) == large
    # not said: as much as is allowed is read
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    start = form(field("image", b"", "a.png"), end=b"")
    opening = head(VARIATIONS, MULTIPART, "Transfer-Encoding: chunked") + b"%x\r\n%s\r\n" % (len(start), start)
    assert talk(running, opening, *[chunk] * 40) == large
    long = post(served, running, served.PICTURE.read_bytes(), "edits", prompt="x" * 140_000)
    shaped(long, (400, "invalid_form"))
    shaped(post(served, running, served.PICTURE.read_bytes(), "edits", prompt="x" * 32_001), (400, "invalid_value"))


def test_all_uploads_together_are_bounded(served, running):
    half = head(VARIATIONS, MULTIPART, "Content-Length: 1000000") + form(field("image", bytes(900_000), "a"), end=b"")
    with connected(running) as first, connected(running) as second:
        for line in (first, second):
            line.sendall(half)
        # one of them is one too many
        (answered, *_), *_ = select.select([first, second], [], [], served.LONG)
        answer = b""
        while b"being uploaded" not in answer:
            answer += (more := answered.recv(1 << 16))
            assert more, answer
        assert answer.startswith(b"HTTP/1.1 503 ")
    gone(served, running)


@pytest.mark.parametrize(
    "bad",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/1.1\r\nHost: here\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(10_000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: here\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: here\r\n\r\n",
        b"GET / HTTP/x\r\n\r\n",
        head(VARIATIONS, MULTIPART, "Content-Length: -1"),
        head(VARIATIONS, MULTIPART, "Content-Length: 10", "Content-Length: 12"),
        head(VARIATIONS, MULTIPART, "Transfer-Encoding: chunked", "Content-Length: x") + b"0\r\n\r\n",
        head(VARIATIONS, MULTIPART, "Transfer-Encoding: gzip"),
        head(VARIATIONS, MULTIPART, "Transfer-Encoding: chunked") + b"zz\r\n",
    ],
    ids=["tls", "headers", "header", "target", "version", "negative", "two", "smuggled", "coding", "chunk"],
)
def test_what_is_no_http(running, bad):
    status, body = talk(running, bad)
    assert (status, body["error"]["code"]) in ((400, "invalid_http"), (431, "headers_too_large"))


def test_slow_clients_are_hung_up_on(served):
    engine = served.Held()
    engine.release()
    with served.live(engine, served.CARD, HASTY) as running:
        for pieces, code in (
            ((b"POST /v1/im",), 408),
            ((), 408),
            ((head(VARIATIONS, MULTIPART, "Content-Length: 1000") + b"--edge",), 408),
            ((b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n", b"GET /hea"), 408),
        ):
            with connected(running) as line:
                for piece in pieces:
                    line.sendall(piece)
                answer = b""
                with suppress(ConnectionError):
                    while part := line.recv(1 << 16):
                        answer += part
            assert f"HTTP/1.1 {code} ".encode() in answer and b"too slowly" in answer
        # the rest of a body that nobody wants does not come for ever
        with connected(running) as line:
            line.sendall(head("/nowhere", "Transfer-Encoding: chunked"))
            with pytest.raises(OSError):
                while True:
                    line.sendall(b"1000\r\n" + bytes(0x1000) + b"\r\n")
                    time.sleep(0.01)
        # nor is a response kept for ever for who does not read it
        with connected(running) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.settimeout(0.05)
            with suppress(OSError):
                line.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 100_000)
            gone(served, running)


def gone(served, running) -> None:
    """Until no connection is left."""
    served.until(lambda: not running.server.server_state.connections)


def test_no_more_connections_than_are_allowed(served, running):
    gone(served, running)
    lines = [connected(running) for _ in range(LIMITS.connections)]
    try:
        served.until(lambda: len(running.server.server_state.connections) == LIMITS.connections)
        status, body = talk(running, b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
        assert status == 503 and body["error"]["message"] == "Too many connections are open."
    finally:
        for line in lines:
            line.close()
    gone(served, running)


def test_aborted_uploads(served, running):
    start = head(VARIATIONS, MULTIPART, "Content-Length: 500000") + form(field("image", bytes(100_000), "a"), end=b"")
    for cut in (5, 100, 300, len(start)):
        with connected(running) as line:
            line.sendall(start[:cut])
            # a reset instead of a good-bye
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone(served, running)
    assert running.figures()["semantica_rejected_total reason=client_left"] >= 1


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"".join(b"\0" + bytes(3 * width) for _ in range(height))) if data is None else data
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_pictures_that_are_none(running, served):
    whole = served.PICTURE.read_bytes()
    assert post(served, running, png(8, 8)).status_code == 200
    for picture, words in (
        (b"", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"PK\x03\x04" + bytes(100), "not a picture"),
        (b"\x80\x04\x95", "not a picture"),
        (b"/etc/passwd", "not a picture"),
        (whole[: len(whole) // 2], "broken"),
        (whole[:20], "broken"),
        (png(300, 300), "300x300 is above 65536 pixels"),
        (png(60_000, 60_000, b"x"), "decompression bomb"),
        (png(200, 200, zlib.compress(bytes(900_000))[:60]), "broken"),
        (png(1, 1), "too small"),
        (png(0, 5, b""), "."),
        (b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(30), "."),
        (b"\xff\xd8\xff\xe0" + bytes(500), "broken"),
        (b"II*\0\x08\0\0\0\xff\xff" + bytes(200), "broken"),
    ):
        error = shaped(post(served, running, picture), (400, "invalid_image"))
        assert error["param"] == "image" and words in error["message"]


def test_numbers_that_are_none(running, served):
    picture = served.PICTURE.read_bytes()
    for name, values in (
        ("n", ("-1", "0", "1.5", "nan", "1e9", "9" * 5000, "0x2", "two", "true", "\N{ARABIC-INDIC DIGIT TWO}x")),
        ("steps", ("-3", "0", "101", "inf", "1e400")),
        ("guidance", ("nan", "inf", "-inf", "1e400", "101", "None")),
        ("seed", ("-1", str(1 << 63), "9" * 4000)),
    ):
        for value in values:
            error = shaped(post(served, running, picture, **{name: value}), (400, "invalid_value"))
            assert error["param"] == name
    for text in ('{"prompt": "x", "n": NaN}', '{"prompt": "x", "guidance": -Infinity}', '{"prompt": "x", "n": -1}',
                 '{"prompt": "x", "seed": 1e999}', '{"prompt": 3}', '{"prompt": "x", "n": 1.0000001}', "[" * 100_000,
                 '{"a":' * 50_000, "", "null", "\0", '{"prompt": "x"', '{"prompt": "x", "prompt": ["y"]}'):  # fmt: skip
        response = served.HTTP.post(
            f"{running.api}/images/generations", content=text, headers={"content-type": "application/json"}, timeout=60
        )
        shaped(response, (400, "invalid_value"), (400, "unknown_parameter"), (400, "missing_required_parameter"))


def test_names_and_texts_that_lead_elsewhere(running, served):
    picture = served.PICTURE.read_bytes()
    for name in ("../../etc/passwd", "/etc/passwd", "a\0b.png", "C:\\x", "%2e%2e%2f", "x" * 900):
        body = form(field("image", picture, name))
        status, made = talk(running, head(VARIATIONS, MULTIPART, f"Content-Length: {len(body)}") + body)
        assert status == 200 and len(made["data"]) == 1
        answer = post(served, running, picture, **{name[:60]: "1"})
        shaped(answer, (400, "unknown_parameter"), (400, "invalid_form"))
        shaped(post(served, running, picture, model=name), (404, "model_not_found"), (400, "invalid_value"))
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "/v1/images/variations/..", "//etc/passwd"):
        response = served.HTTP.get(running.url + path)
        shaped(response, (404, "not_found"), (404, "model_not_found"), (405, "method_not_allowed"))


@pytest.mark.parametrize(
    "kind, body, code",
    [
        (MULTIPART, b"", "missing_required_parameter invalid_form"),
        (MULTIPART, b"garbage", "invalid_form missing_required_parameter"),
        ("Content-Type: multipart/form-data", form(field("image", b"x", "a")), "invalid_form"),
        ("Content-Type: multipart/form-data; boundary=" + "b" * 5000, b"x", "invalid_form missing_required_parameter"),
        (MULTIPART, form(b"\r\nno disposition"), "invalid_form"),
        (MULTIPART, form(b"Content-Disposition: form-data\r\n\r\nx"), "invalid_form"),
        (MULTIPART, form(*(field(f"f{i}", b"x") for i in range(200))), "invalid_form"),
        (MULTIPART, form(field("x" * 100_000, b"y")), "invalid_form unknown_parameter missing_required_parameter"),
        (MULTIPART, form(field("image", b"x", "a"), field("image", b"x", "b")), "invalid_form"),
        (MULTIPART, form(field("image", b"x")), "invalid_value"),
        (MULTIPART, form(field("n", b"1", "a.png")), "invalid_value"),
        (MULTIPART, form(field("n", b"1"), field("n", b"2"), field("image", b"x", "a")), "invalid_value"),
        (MULTIPART, form(field("image", b"x" * 50, "a"), end=b""), "invalid_form missing_required_parameter"),
        (MULTIPART + "; charset=utf-7", form(field("n", b"\xff\xfe+-")), "missing_required_parameter invalid_value"),
        ("Content-Type: application/json", b"{}", "unsupported_content_type"),
        ("Content-Type: \xff", b"{}", "unsupported_content_type"),
        ("X: y", b"{}", "unsupported_content_type"),
    ],
)  # fmt: skip
def test_forms_that_are_none(running, kind, body, code):
    request = "\r\n".join((f"POST {VARIATIONS} HTTP/1.1", "Host: here", kind, f"Content-Length: {len(body)}", "", ""))
    status, answer = talk(running, request.encode("latin-1") + body)
    assert 400 <= status < 500 and answer["error"]["code"] in code.split(), answer
