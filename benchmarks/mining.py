"""What mining costs: processor seconds per page and picture in each phase, on one thread; `docs/scale.md` uses it.

Run as `python -m semantica.benchmarks.mining OUT.json`. Processor time, not time on the clock: the figures are per core
and hold on a machine that is shared.
"""

import gzip
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from semantica.files import write_text

# a page of a photo site: markup of about 60 kB around its pictures
PICTURES, PARAGRAPHS, SIDES = 6, 350, ((1024, 768), (640, 480), (320, 240))
PAGES, POOL = 20, 24


def photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with detail at all scales, so that its size and decoding time are those of a photo."""
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 256):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), float) / cells**0.5
    total = (total - total.min()) / np.ptp(total) * 255
    buffer = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def record(url: str, mime: str, body: bytes) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n\r\n" % mime.encode() + body
    head = f"WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
    head += f"WARC-Record-ID: <urn:x:{url}>\r\nContent-Type: application/http; msgtype=response\r\n"
    return gzip.compress(head.encode() + b"Content-Length: %d\r\n\r\n" % len(http) + http + b"\r\n\r\n", 6)


def write_crawl(path: Path, pages: int, seed: int = 0, bodies: bool = True) -> None:
    """A gzipped WARC file of pages with pictures of their own, or of the pages alone."""
    rng = np.random.default_rng(seed)
    pool = [photo(rng, *SIDES[i % len(SIDES)]) for i in range(POOL)]
    words = [bytes(word).decode() for word in rng.integers(97, 123, (500, 7), dtype=np.uint8)]
    with open(path, "wb") as file:
        for page in range(pages):
            text = [f"<div class=x><p>{' '.join(rng.choice(words, 18))}</p></div>" for _ in range(PARAGRAPHS)]
            names = [f"http://site{seed}.org/{page}/{i}.jpg" for i in range(PICTURES)]
            html = "<html><body>" + "".join(text) + "".join(f"<img src={name} alt=x>" for name in names)
            file.write(record(f"http://site{seed}.org/{page}", "text/html", html.encode()))
            for i, name in enumerate(names if bodies else ()):
                # a comment makes each file one of its own
                data = pool[(page * PICTURES + i) % POOL]
                comment = b"\xff\xfe" + (2 + len(name)).to_bytes(2, "big") + name.encode()
                file.write(record(name, "image/jpeg", data[:2] + comment + data[2:]))


def tiny_tower(folder: Path) -> str:
    """DINOv2-small's architecture with random weights: the same arithmetic, no download."""
    import transformers

    config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def phases(crawl: Path, encoder_name: str) -> dict[str, float]:
    """Processor seconds of each phase of mining one file."""
    from semantica.train.pages.config import MineConfig
    from semantica.train.pages.describe import NONE, describe_encoder, describer
    from semantica.train.pages.join import join_unit
    from semantica.train.pages.read import read_unit
    from semantica.train.pages.sources import Input, digest
    from semantica.train.pages.store import merge_captures, merge_counts
    from semantica.train.pages.write import write_unit

    source = Input(str(crawl), "warc")
    encoder, place = describe_encoder(encoder_name, "cpu")
    describe = describer(encoder, place) if encoder_name != NONE else None
    rules = MineConfig((crawl,), Path("x"), encoder=encoder_name).rules()
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        folders = [out / "unit"]

        def timed(phase: str, function, *arguments):
            began = time.process_time()
            result = function(*arguments)
            seconds[phase] = time.process_time() - began
            return result

        sha = timed("hash", digest, source)
        source = Input(source.path, source.kind, sha)
        timed("read", read_unit, source, folders[0], rules, encoder, describe)
        timed("merge", merge_captures, folders, out / "captures.sqlite")
        timed("join", join_unit, 0, folders, out / "captures.sqlite")
        merge_counts(folders, out / "counts.sqlite")
        timed("write", write_unit, 0, source, folders, out / "counts.sqlite", out, rules)
        seconds["index_bytes"] = (out / "captures.sqlite").stat().st_size
        seconds["shard_bytes"] = sum(path.stat().st_size for path in out.glob("*.tar"))
    return seconds


def links_only(crawl: Path) -> float:
    """Processor seconds of `--urls-only`."""
    from semantica.train.pages.config import UrlsConfig
    from semantica.train.pages.urls import write_urls

    # its import is not the crawl's cost
    importlib.import_module("pyarrow.parquet")
    with tempfile.TemporaryDirectory() as name:
        began = time.process_time()
        write_urls(UrlsConfig((crawl,), Path(name) / "urls.parquet"))
        return time.process_time() - began


def peak(crawl: Path) -> int:
    """Largest resident size, in bytes, of a process that mines one file with the classical descriptor."""
    code = (
        "import sys; from pathlib import Path; from semantica.benchmarks.mining import phases; "
        "phases(Path(sys.argv[1]), 'colour-and-shape'); "
        # getrusage would give the parent's, where it is larger
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(crawl)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def measure(out: Path) -> dict:
    """All figures, written as JSON."""
    import torch

    torch.set_num_threads(1)
    result = {"pages": PAGES, "pictures": PAGES * PICTURES, "threads": 1, "processors": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_crawl(root / "a.warc.gz", PAGES)
        write_crawl(root / "b.warc.gz", 10 * PAGES, seed=1)
        # once before it counts, for what is loaded on first use
        phases(root / "a.warc.gz", "colour-and-shape")
        result["bytes"] = (root / "a.warc.gz").stat().st_size
        result["phases"] = {
            kind: phases(root / "a.warc.gz", source)
            for kind, source in (
                ("none", "none"), ("colour-and-shape", "colour-and-shape"), ("dinov2-small", tiny_tower(root / "e")),
            )
        }  # fmt: skip
        write_crawl(root / "c.warc.gz", 10 * PAGES, bodies=False)
        result["urls_only"] = {"pages": 10 * PAGES, "seconds": links_only(root / "c.warc.gz")}
        result["peak_bytes"] = {str(PAGES): peak(root / "a.warc.gz"), str(10 * PAGES): peak(root / "b.warc.gz")}
    write_text(out, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1])), indent=1))
