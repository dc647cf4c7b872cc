"""What stored tokens cost on disk, and what they save in each training step: measured, then said in plain figures."""

import time
from pathlib import Path

import numpy as np
from torch import nn

from semantica.files import read_json
from semantica.model.cost import encoding_cost
from semantica.train.data.source import Source
from semantica.train.data.tokens import VIEWS, attach, read_index

# pictures that are read in one go, as a training batch would, and how often
ROWS, TIMES = 64, 3


def measure(root: Path, data: Source, encoder: nn.Module, encode) -> dict[str, float | int]:
    """Bytes on disk, and seconds for one view of a picture: of the encoder, and of reading its stored tokens instead.

    Args:
        root: finished tokens of `data`.
        encoder: on its device.
        encode: how it runs, from `semantica.train.data.encode.encoding`; its results arrive on the host.
    """
    index = read_index(root)
    stored = attach(data, root).tokens
    batch, side = index["identity"]["arithmetic"]["batch"], encoder.image_size
    generator = np.random.default_rng(0)
    known = list(stored.numbers) if stored.numbers is not None else range(len(stored.row))
    forward, reading = [], []
    for _ in range(TIMES):
        pictures = generator.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        began = time.perf_counter()
        encode(pictures)
        forward.append((time.perf_counter() - began) / (VIEWS * batch))
        chosen = generator.integers(len(known), size=ROWS).tolist()
        began = time.perf_counter()
        np.stack([stored.read(known[i], bool(i % 2))[0] for i in chosen])
        reading.append((time.perf_counter() - began) / ROWS)
    files = index["files"]
    return {
        "pictures": sum(entry["pictures"] for entry in files),
        "unusable": sum(entry["unusable"] for entry in files),
        "token_bytes": sum(entry["bytes"] for entry in files),
        "picture_bytes": data.picture_bytes(),
        "encoder_macs": encoding_cost(encoder)[0] // 2,
        "encoder_seconds": min(forward),
        "reading_seconds": min(reading),
    }


def report(root: Path) -> None:
    """Print what `stats.json` and the identity of stored tokens say.

    Raises:
        UserError: no finished tokens there.
    """
    from rich.console import Console
    from rich.table import Table

    identity, stats = read_index(root)["identity"], read_json(root / "stats.json")
    encoder, arithmetic = identity["encoder"], identity["arithmetic"]
    count, width = identity["shape"]
    pictures = max(1, stats["pictures"])
    batch = 64
    table = Table(title=f"{root}", show_header=False)
    table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    how = f"{arithmetic['precision']} on {arithmetic['device']}{', compiled' if arithmetic['compile'] else ''}"
    rows = (
        ("encoder", f"{encoder['source']}, {encoder['image_size']} px, {how}"),
        ("pictures", f"{stats['pictures']:,}, each in {VIEWS} views: its centre, and the mirror image of it"),
        ("could not be decoded", f"{stats['unusable']:,}"),
        ("tokens of a view", f"{count} x {width}, fp16"),
        ("on disk", f"{stats['token_bytes'] / 1e6:,.1f} MB: {stats['token_bytes'] / pictures:,.0f} bytes a picture, "
            f"{stats['token_bytes'] / max(1, stats['picture_bytes']):.1f} times the pictures themselves"),
        ("not computed again", f"{stats['encoder_macs'] / 1e9:.2f} GMAC for each condition picture in each step"),
        (f"for a batch of {batch}", f"the encoder took {stats['encoder_seconds'] * batch * 1e3:,.0f} ms, reading takes "
            f"{stats['reading_seconds'] * batch * 1e3:,.1f} ms in one process that loads data"),
    )  # fmt: skip
    for row in rows:
        table.add_row(*row)
    # names of folders are no markup
    Console(markup=False).print(table)
    print(f"semantica train --data … --encoder {encoder['source']} --tokens {root}")
