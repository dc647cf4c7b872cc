"""Who is raced in loading: decoders of one picture, and ways to a batch of samples."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from semantica.images import cut, fit, jpeg_decoder, load_image, load_pixels, to_planes
from semantica.train.data.draws import NOISE, generator
from semantica.train.data.folders import scan
from semantica.train.data.loading import host_batches, start_worker
from semantica.train.data.pairs import MARGIN, Pairs
from semantica.train.pages.resize import QUALITY, SUBSAMPLING, shrink

BATCH = 16


def truth(data: bytes, size: int) -> np.ndarray:
    """The centre square, decoded whole and resized in float64: antialiased bicubic, `[size, size, 3]`."""
    pixels = np.asarray(load_image(io.BytesIO(data)))
    side = min(pixels.shape[:2])
    top, left = ((whole - side) // 2 for whole in pixels.shape[:2])
    planes = torch.from_numpy(pixels[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].double()
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).clamp(0, 255).numpy()


def decoders(size: int) -> dict[str, Callable[[bytes], np.ndarray]]:
    """Bytes to the centre square uint8 `[size, size, 3]`; those that are installed."""

    def whole(data: bytes) -> np.ndarray:
        return fit(load_image(io.BytesIO(data)), size)

    def fraction(data: bytes) -> np.ndarray:
        return fit(load_image(io.BytesIO(data), near=round(MARGIN * size)), size)

    def pillow(data: bytes) -> np.ndarray:
        return cut(np.array(load_image(io.BytesIO(data), near=round(MARGIN * size))), size)

    def installed(data: bytes) -> np.ndarray:
        return cut(load_pixels(io.BytesIO(data), near=round(MARGIN * size)), size)

    found = {"Pillow": whole, "Pillow, scaled decoding": fraction, "Pillow, scaled, resized by torch": pillow}
    return found | ({"simplejpeg, scaled, resized by torch": installed} if jpeg_decoder() else {})


class Plain(Dataset):
    """What most would write first: Pillow alone, noise and scaling in the worker, floats that cross."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pairs, size = self.pairs, self.pairs.image_size
        pair = pairs.data.draw(pairs.seed, index)
        views = {"target": pair.target, "condition": pair.conditions[0]}
        shape = (3, size, size)
        item = {"noise": generator(pairs.seed, NOISE, index).standard_normal(shape, np.float32)}
        for name, view in views.items():
            x, y, _ = view.crop
            image = pairs.data.load(view.ref, 2 * size)
            item[name] = to_planes([fit(image, size, x=x, y=y, mirror=view.flip)])[0]
        return {name: torch.from_numpy(array) for name, array in item.items()}


def plain_batches(pairs: Pairs) -> Iterator[dict]:
    """Batches of `Plain` from one worker, collated by torch."""
    loader = DataLoader(
        Plain(pairs),
        batch_sampler=(range(start, start + BATCH) for start in range(0, 1 << 40, BATCH)),
        num_workers=1,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    return iter(loader)


def our_batches(pairs: Pairs) -> Iterator[dict]:
    """What one worker of the trainer's hands over."""
    return host_batches(pairs, first_index=0, batch=BATCH, workers=1)


def store_small(photos: Path, out: Path, size: int) -> None:
    """The same folders as `semantica pairs --resize` would store their pictures."""
    for path in sorted(photos.glob("*/*")):
        (out / path.parent.name).mkdir(parents=True, exist_ok=True)
        image = load_image(path)
        small = shrink(image, size) if min(image.size) > size else image
        options = dict(quality=QUALITY, subsampling=SUBSAMPLING, optimize=True)
        small.save(out / path.parent.name / f"{path.stem}.jpg", **options)


def pairs_of(folder: Path, size: int) -> Pairs:
    return Pairs(scan(folder, "folders"), seed=0, image_size=size, global_batch=BATCH)
