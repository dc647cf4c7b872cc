"""Sizes of an aggregator, as options: light, so that `--help` imports no torch."""

from dataclasses import dataclass

from semantica.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """Sizes of an aggregator; the defaults are the authors' (configs/vitb_384.yaml and vitl_336.yaml)."""

    hidden: int = 128
    """Width of the cost's embedding."""
    layers: int = 2
    """Each of them aggregates over places, then across classes."""
    heads: int = 4
    window: int = 12
    """Side of the Swin blocks' windows, in tokens."""
    pool: int = 2
    """Of maps before attention across classes."""
    guidance: int = 128
    """Width of projected guidance by the picture and by the classes."""
    decoder: tuple[int, int] = (64, 32)
    """Channels after each doubling."""
    raised: tuple[int, int] = (256, 128)
    """Channels of the decoder's guidance after it was enlarged."""
    projected: tuple[int, int] = (32, 16)
    """Channels of the decoder's guidance."""
    padding: int = 256
    """Classes that attention across them is filled up to, and the most that one pass takes."""

    def check(self, grid: int) -> "Sizes":
        """Raises `UserError` where the sizes do not fit each other, or a grid of tokens of this side."""
        window = min(self.window, grid)
        if grid % window or grid % self.pool:
            raise UserError(
                f"a grid of {grid} x {grid} tokens is no multiple of windows of {window} or pools of {self.pool}: "
                "choose another image size or window"
            )
        if self.hidden % self.heads or any(width % 16 for width in self.decoder):
            raise UserError(f"hidden {self.hidden} with {self.heads} heads, decoder {self.decoder}: give a multiple of "
                            "the heads, and multiples of 16")  # fmt: skip
        if self.layers < 1 or self.padding < 1:
            raise UserError(f"{self.layers} layers, padding {self.padding}: give at least 1")
        return self
