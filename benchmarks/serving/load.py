"""A server in a process of its own, and clients that each ask again as soon as they are answered: `hey` is these."""

import csv
import io
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from semantica.errors import UserError, first_line

EDGE, VARIATIONS = "a4f1c0e2b7", "/v1/images/variations"
# seconds between two looks at a process' memory
LOOK = 0.25


@dataclass(frozen=True)
class Answer:
    """A request's HTTP status; when it was sent, in seconds from the first; and how long it took."""

    status: int
    sent: float
    took: float


class Running:
    """A server: its address, its process, and the time from its start to its first line."""

    def __init__(self, process: psutil.Popen, url: str, began: float):
        self.process, self.url, self.began = process, url, began

    def resident(self) -> int:
        """Bytes of memory."""
        return self.process.memory_info().rss

    def batches(self) -> tuple[float, float]:
        """Batches and images that it has made so far."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            text = response.read().decode()
        found = dict(re.findall(r"^semantica_batch_images_(count|sum) (\S+)$", text, re.MULTILINE))
        return float(found["count"]), float(found["sum"])


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Running]:
    """`semantica serve` until the block ends. Raises `UserError` where it does not start."""
    command = [sys.executable, "-P", "-m", "semantica.cli", "serve", "--model", str(model), "--port", "0", *options]
    began = time.perf_counter()
    with (
        # a pipe that nobody reads would stop a server that says much, as one does whose every request fails
        tempfile.TemporaryFile("w+") as log,
        psutil.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            line = process.stdout.readline()
            if not (found := re.search(r"https?://[\w.:]+", line)):
                log.seek(0)
                raise UserError(f"the server did not start: {log.read().strip()}")
            yield Running(process, found[0], began)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except psutil.TimeoutExpired:
                process.kill()


def body(steps: int) -> bytes:
    """A form with a drawn picture, as clients upload one."""
    picture, file = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), io.BytesIO()
    Image.fromarray(picture).resize((256, 256)).save(file, "PNG")
    fields = {"response_format": "b64_json", "steps": str(steps)}
    parts = [f'name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    parts.append(b'name="image"; filename="a.png"\r\n\r\n' + file.getvalue() + b"\r\n")
    head = f"--{EDGE}\r\nContent-Disposition: form-data; ".encode()
    return b"".join(head + part for part in parts) + f"--{EDGE}--\r\n".encode()


def ask(url: str, steps: int) -> None:
    """One request, which must be answered with an image."""
    headers = {"Content-Type": f"multipart/form-data; boundary={EDGE}"}
    with urllib.request.urlopen(urllib.request.Request(url + VARIATIONS, body(steps), headers)) as response:
        assert b"b64_json" in response.read()


def need_generator() -> None:
    """Raises `UserError` where `hey` is not installed."""
    if shutil.which("hey") is None:
        raise UserError("hey is missing, which makes the requests: apt-get install hey (or brew install hey)")


def load(url: str, form: Path, clients: int, requests: int) -> list[Answer]:
    """What clients were answered to so many requests of all of them; `form` holds `body`.

    Raises:
        UserError: `hey` is not installed, or failed.
    """
    need_generator()
    command = ["hey", "-n", str(requests), "-c", str(clients), "-t", "0", "-m", "POST", "-D", str(form), "-o", "csv"]
    command += ["-T", f"multipart/form-data; boundary={EDGE}", url + VARIATIONS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"hey failed: {done.stderr.strip() or first_line(RuntimeError(done.stdout))}")
    return answers(done.stdout)


def answers(table: str) -> list[Answer]:
    """hey's CSV, a row for each answered request."""
    rows = csv.DictReader(io.StringIO(table))
    return [Answer(int(row["status-code"]), float(row["offset"]), float(row["response-time"])) for row in rows]


def figures(made: Sequence[Answer], requests: int) -> dict[str, float]:
    """Throughput and latency of the requests that got images, the number of those that were refused with 429, and of
    those that got anything else or nothing."""
    served = [answer for answer in made if answer.status == 200]
    refused = sum(answer.status == 429 for answer in made)
    took = np.array([answer.took for answer in served] or [np.nan])
    end = max((answer.sent + answer.took for answer in served), default=np.nan)
    shares = {f"p{share}": 1e3 * float(np.percentile(took, share)) for share in (50, 95, 99)}
    return {"rate": len(served) / end, **shares, "refused": refused, "failed": requests - len(served) - refused}


@contextmanager
def watched(running: Running) -> Iterator[list[int]]:
    """A list that grows by the server's memory in bytes, a few times a second."""
    found, over = [running.resident()], threading.Event()

    def look() -> None:
        while not over.wait(LOOK):
            found.append(running.resident())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.append(running.resident())
