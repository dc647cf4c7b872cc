"""`semantica bench loading`: samples a second from one worker; what each way to decode a picture costs and loses."""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.table import Column, cells, heads, show
from semantica.benchmarks.harness.verb import check_files
from semantica.errors import UserError
from semantica.files import write_json

DRAWN = ("300x300", "640x480", "1024x768", "2048x1536")
DECODED = (
    Column("pictures", "{pictures}"),
    Column("way", "{way}"),
    Column("ms a picture", "{ms:.2f}"),
    Column("PSNR dB, mean", "{psnr:.1f}"),
    Column("worst", "{worst:.1f}"),
)
LOADED = (
    Column("pictures", "{pictures}"),
    Column("loader", "{loader}"),
    Column("samples/s, one worker", "{rate:,.0f}"),
    Column("lowest - highest", "{low:,.0f} - {high:,.0f}"),
    Column("against plain", "{ratio:.2f}x"),
)


@dataclass(frozen=True)
class LoadingConfig:
    """Time how samples are loaded: a plain loader (Pillow, floats and noise made in the worker), the trainer's, and
    that on pictures which `semantica pairs --resize` has stored; and each way to decode a picture, with its loss.

    PSNR is of the centre square against the picture decoded whole and resized in float64. All in turns, one worker.
    """

    size: int = 256
    """Side of the images that training sees."""
    data: Path | None = None
    """Folder of label folders with JPEGs, in the place of drawn photos of four sizes."""
    pictures: int = 24
    """Pictures of each size that are drawn, or decoded one by one."""
    samples: int = 160
    """Timed samples of each loader in each round."""
    rounds: int = 5
    json: Path | None = None
    """Store the rows."""

    def check(self) -> "LoadingConfig":
        """Raises `UserError` for impossible options."""
        for name, least in (("size", 16), ("pictures", 4), ("samples", 16), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}: give at least {least}")
        check_files(self.json)
        return self


def loading(config: LoadingConfig) -> int:
    """Run the races; returns the exit code. Raises `UserError` for impossible options and data."""
    import torch

    from semantica.benchmarks.harness.store import environment
    from semantica.benchmarks.loading.photos import draw_photos

    config.check()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    decoded, loaded = [], []
    where = environment("cpu")
    try:
        with tempfile.TemporaryDirectory() as place:
            folders = {}
            for size in DRAWN if config.data is None else ():
                folders[size] = Path(place, size)
                draw_photos(folders[size], config.pictures, *map(int, size.split("x")))
            for name, folder in (folders or {config.data.name: config.data}).items():
                decoded += decode_race(name, folder, config)
                loaded += load_race(name, folder, Path(place, f"{name}-small"), config)
    finally:
        torch.set_num_threads(threads)
    show(heads(DECODED), cells(DECODED, decoded))
    print()
    show(heads(LOADED), cells(LOADED, loaded))
    if config.json is not None:
        code = {"op": "loading", "arch": where["arch"], "kernel_hash": source_hash("loading", where["arch"])}
        rows = [row | code for row in (*decoded, *loaded)]
        write_json(config.json, {"environment": where, "loading": rows})
    return 0


def decode_race(name: str, folder: Path, config: LoadingConfig) -> list[dict]:
    """A row for each way to decode, all on the same pictures in turns."""
    import numpy as np

    from semantica.benchmarks.loading.contenders import decoders, truth

    paths = sorted(folder.glob("*/*.jp*g"))
    if not paths:
        raise UserError(f"{folder} holds no label folders with JPEGs: give another --data")
    some = [path.read_bytes() for path in random.Random(0).sample(paths, min(config.pictures, len(paths)))]
    expected = [truth(data, config.size) for data in some]
    ways, rows = decoders(config.size), []
    times = in_turns(ways, lambda decode: [decode(data) for data in some], config.rounds)
    for way, decode in ways.items():
        errors = [np.mean((decode(data) - right) ** 2) for data, right in zip(some, expected)]
        psnr = [float(10 * np.log10(255**2 / max(error, 1e-9))) for error in errors]
        ms = median(times[way]) * 1e3 / len(some)
        rows.append({"pictures": name, "way": way, "ms": ms, "psnr": float(np.mean(psnr)), "worst": min(psnr)})
    return rows


def load_race(name: str, folder: Path, small: Path, config: LoadingConfig) -> list[dict]:
    """A row for each loader, in turns with workers of their own."""
    from semantica.benchmarks.loading.contenders import BATCH, our_batches, pairs_of, plain_batches, store_small
    from semantica.train.data.loading import AHEAD

    store_small(folder, small, config.size)
    given, stored = pairs_of(folder, config.size), pairs_of(small, config.size)
    loaders = {
        "plain": lambda: plain_batches(given),
        "trainer's": lambda: our_batches(given),
        "trainer's, --resize": lambda: our_batches(stored),
    }
    count = -(-config.samples // BATCH)
    rates: dict[str, list[float]] = {way: [] for way in loaders}
    for turn in range(config.rounds):
        for way in random.Random(turn).sample(list(loaders), len(loaders)):
            feed = loaders[way]()
            # what is made while nobody asks is not counted
            for _ in range(AHEAD + 2):
                next(feed)
            began = time.perf_counter()
            for _ in range(count):
                next(feed)
            rates[way].append(count * BATCH / (time.perf_counter() - began))
            del feed
    plain = median(rates["plain"])
    return [
        {"pictures": name, "loader": way, "rate": median(found), "low": min(found), "high": max(found)}
        | {"ratio": median(found) / plain}
        for way, found in rates.items()
    ]


def in_turns(ways: dict[str, Callable], work: Callable, rounds: int) -> dict[str, list[float]]:
    """Seconds of `work` on each, in random order within rounds, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(ways), len(ways)):
            began = time.perf_counter()
            work(ways[name])
            if turn:
                times[name].append(time.perf_counter() - began)
    return times
