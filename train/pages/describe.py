"""One vector per picture, from an encoder or a classical descriptor; always in batches of one size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from semantica.errors import UserError
from semantica.train.pages.config import ENCODER_BATCH

NONE, CLASSICAL = "none", "colour-and-shape"
CLASSICAL_SIDE = 64

# uint8 [ENCODER_BATCH, S, S, 3] -> float16 [ENCODER_BATCH, C], rows of length 1
Describe = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Encoder:
    """Which encoder describes the pictures.

    name: as the user gave it; fingerprint: of its weights; side: of the pictures that it sees, None without encoder.
    device: the kind of device where it runs; its arithmetic differs in the last bits from that of another.
    """

    name: str
    fingerprint: str
    side: int | None
    device: str


def describe_encoder(name: str, device: str) -> tuple[Encoder, str]:
    """Load an encoder once, to know that it can be loaded and which weights it has; and its device with its number.

    Raises:
        UserError: it cannot be loaded, or there is no such device.
    """
    if name == NONE:
        return Encoder(name, "", None, "cpu"), "cpu"
    if name == CLASSICAL:
        return Encoder(name, "1", CLASSICAL_SIDE, "cpu"), "cpu"
    from semantica.device import pick_device
    from semantica.model.encoders import weights_sha256

    where = pick_device(device)
    try:
        # the processes that describe have copies of their own
        encoder = loaded(name)
    except UserError as error:
        raise UserError(f"{error}; or give --encoder {CLASSICAL} (no download, not semantic) or {NONE}") from error
    return Encoder(name, weights_sha256(encoder)[:16], encoder.image_size, where.type), str(where)


def loaded(name: str):
    from semantica.model.encoders import PretrainedEncoder

    return PretrainedEncoder.from_source(name)


@lru_cache(maxsize=1)
def network(name: str, device: str):
    return loaded(name).to(device)


def describer(encoder: Encoder, place: str) -> Describe:
    """The function that describes a batch in this process, on a device."""
    if encoder.name == CLASSICAL:
        from semantica.features import colour_and_shape

        return lambda pictures: unit(colour_and_shape(pictures))
    import torch

    from semantica.images import to_tensor

    if encoder.device == "cpu":
        # as many workers as processors; and sums are cut alike everywhere
        torch.set_num_threads(1)
    tower = network(encoder.name, place)
    return lambda pictures: unit(tower(to_tensor(pictures).to(place)).pooled.float().cpu().numpy())


def unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-12)).astype(np.float16)


class Batcher:
    """Collects pictures and describes them `ENCODER_BATCH` at a time; the last batch is filled up with black."""

    def __init__(self, describe: Describe, done: Callable[[int, np.ndarray], None]):
        self.describe, self.done = describe, done
        self.keys: list[int] = []
        self.views: list[np.ndarray] = []

    def add(self, key: int, view: np.ndarray) -> None:
        self.keys.append(key)
        self.views.append(view)
        if len(self.keys) == ENCODER_BATCH:
            self.flush()

    def flush(self) -> None:
        if self.keys:
            batch = np.zeros((ENCODER_BATCH, *self.views[0].shape), np.uint8)
            batch[: len(self.views)] = self.views
            for key, row in zip(self.keys, self.describe(batch)):
                self.done(key, row)
            self.keys, self.views = [], []
