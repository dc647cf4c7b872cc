"""What `semantica pairs --tokens` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantica.errors import UserError


@dataclass(frozen=True)
class TokensConfig:
    """Store what a frozen encoder makes of every picture, for `semantica train --tokens`."""

    tokens: str
    """Store what --encoder makes of every picture of this data (shards, or a folder that `semantica train --data`
    takes) in --out, by default beside it as DATA.tokens, for `semantica train --tokens`. A token belongs to a view:
    the centre of each picture and its mirror image are stored, so that flips of conditions stay random."""
    out: Path | None = None
    encoder: str = "facebook/dinov2-small"
    encoder_size: int | None = None
    """With --tokens: side of the images that the encoder sees."""
    encoder_tokens: Literal["patches", "all"] = "patches"
    """With --tokens: patches only, or the class and register tokens too."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """With --tokens: "auto" is bf16 where the processor multiplies it natively."""
    compile: bool = False
    """With --tokens: compile the encoder's layers; pays from some thousand pictures on."""
    processes: int | None = None
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"

    def check(self) -> "TokensConfig":
        """Raises `UserError` for impossible options."""
        if self.encoder in ("colour-and-shape", "none"):
            raise UserError(f"--encoder {self.encoder} has no tokens: give a DINOv2, CLIP or SigLIP")
        if "://" in self.tokens and self.out is None:
            raise UserError(f"--tokens {self.tokens} is not on this machine: give --out, a folder that is")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes is {self.processes}: give at least 1")
        return self
