"""A source of training data from outside: registered once, it is drawn from, held out, trained on and encoded."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from semantica import UserError
from semantica.train.config import TrainConfig
from semantica.train.data import open as kinds
from semantica.train.data.config import TokensConfig
from semantica.train.data.draws import PAIR, Pair, View, generator, order
from semantica.train.data.encode import store_tokens
from semantica.train.data.heldout import held_out_batches
from semantica.train.data.open import open_data, register_source
from semantica.train.data.pairs import Pairs
from semantica.train.data.source import MARK, Source, Stamp, around, parted
from semantica.train.data.tokens import Tokens
from semantica.train.loop import train


@dataclass(frozen=True)
class Colours(Source):
    """Pictures of one colour, several shades of each: "colours:COUNT". Pictures are known by their names."""

    root: str
    mode: str
    colours: tuple[int, ...]
    bad: tuple[tuple[str, str], ...] = ()
    tokens: Tokens | None = None
    kind: ClassVar[str] = "colours"

    def __len__(self) -> int:
        return len(self.refs())

    def describe(self) -> str:
        return f"{len(self.colours)} colours"

    def digest(self) -> str:
        return hashlib.sha256(repr(self.colours).encode()).hexdigest()[:16]

    def split(self, fraction: float, seed: int) -> tuple["Colours", "Colours"]:
        parts = parted(len(self.colours), fraction, seed, "colours")
        return tuple(replace(self, colours=tuple(self.colours[i] for i in sorted(part))) for part in parts)

    def draw(self, seed: int, index: int, conditions: int = 1) -> Pair:
        epoch, place = divmod(index, len(self))
        target = self.refs()[order(len(self), seed, epoch)[place]]
        others = [ref for ref in self.shades(target.split("-")[0]) if ref != target]
        chosen = generator(seed, PAIR, index).permutation(others)[:conditions]
        views = [View(str(ref), False, (0.5, 0.5, 0.0)) for ref in (target, *chosen)]
        return Pair(target.split("-")[0], views[0], tuple(views[1:]))

    def shades(self, colour: str) -> list[str]:
        return [f"{colour}-{shade}" for shade in range(3)]

    def target_candidates(self, group: str, start: str) -> Iterator[str]:
        return around(self.shades(group), start)

    def condition_candidates(self, group: str, target: str, start: str) -> Iterator[str]:
        return (ref for ref in around(self.shades(group), start) if ref != target)

    def load(self, ref: str, near: int) -> Image.Image:
        colour, shade = map(int, ref.split("-"))
        return Image.new("RGB", (40, 40), (40 * colour, 80 * shade, 90))

    def refs(self) -> Sequence[str]:
        return [ref for colour in self.colours for ref in self.shades(str(colour))]

    def picture_bytes(self) -> int:
        return 3 * 40 * 40 * len(self)

    def stamp(self, ref: str) -> Stamp:
        return Stamp(hashlib.sha256(self.load(ref, 1).tobytes()).digest()[:MARK])


def open_colours(root: str, mode: str, low: float | None, high: float | None) -> Colours:
    count = root.removeprefix("colours:")
    if not count.isdigit() or (low, high) != (None, None):
        raise UserError(f"{root} is no source of colours: give colours:COUNT")
    return Colours(root, mode, tuple(range(int(count))))


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    register_source("colours", lambda root: root.startswith("colours:"), "shades", open_colours)


def test_a_registered_source_is_opened_and_drawn_from(colours, tmp_path):
    data = open_data("colours:5")
    assert isinstance(data, Colours) and data.mode == "shades" and not data.remote
    with pytest.raises(UserError, match="no source of colours"):
        open_data("colours:many")
    # the others are what they were
    with pytest.raises(UserError, match="does not exist"):
        open_data(tmp_path / "nothing")
    training, held = data.split(0.4, 0)
    assert len(training) == 9 and len(held) == 6 and not set(training.colours) & set(held.colours)
    pairs = Pairs(data, seed=0, image_size=8, global_batch=4, crop=None, flip=False)
    items = [pairs[i] for i in range(15)]
    assert len({item["target"].tobytes() for item in items}) == 15
    for item in items:
        assert np.array_equal(item["condition"][..., 0], item["target"][..., 0])
        assert not np.array_equal(item["condition"], item["target"])
    (batch,) = held_out_batches(held, 0, 8, 8, "cpu")
    assert (batch["condition"][:, 0] == batch["target"][:, 0]).all() and len(batch["target"]) == 6


def test_it_is_trained_on_with_and_without_stored_tokens(colours, home, tmp_path):
    out = tmp_path / "tokens"
    dino = dict(encoder=str(home / "dino"), encoder_size=28, precision="fp32", device="cpu")
    for _ in range(2):
        store_tokens(TokensConfig("colours:5", out, processes=1, **dino))
    assert open_data("colours:5", tokens=out).tokens.read("3-1", True)[0].shape == (4, 32)
    with pytest.raises(UserError, match="picture '5-0' has no stored tokens"):
        open_data("colours:6", tokens=out)
    few = dict(steps=1, batch=4, image_size=16, workers=0, held_out=0.4, eval_every=1, **dino)
    for name, tokens in (("plain", None), ("stored", str(out))):
        train(TrainConfig("colours:5", tmp_path / name, tokens=tokens, **few))
        assert (tmp_path / name / "model_index.json").is_file()
