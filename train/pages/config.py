"""What `semantica pairs` can be told, and the limits that hostile input meets."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantica.errors import UserError

FORMAT = 1
# bytes of one page and of one picture, after their transfer and content encodings
MAX_HTML, MAX_BODY = 4 << 20, 64 << 20
# pages with more links than this are link farms; browsers refuse longer addresses too
MAX_LINKS, MAX_URL = 2000, 4096
# steps from a URL over redirects and revisits to its payload
MAX_HOPS = 8
# pictures of one page beyond this number are left out
MAX_PER_PAGE = 64
# on a large site, this many pages make a picture furniture whatever the share
FURNITURE_CEILING = 20
# bits of the 64-bit perceptual hash in which two versions of one picture may differ
NEAR_BITS = 4
# pictures per call of the encoder: always as many, so that an embedding never depends on the schedule
ENCODER_BATCH = 32


@dataclass(frozen=True)
class PairsConfig:
    """Find the pictures that share a web page: crawls and saved pages in, shards for `semantica train --data` out.

    The same command continues a run that was interrupted.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """WARC files (.warc, .warc.gz), WACZ files, folders of saved pages, img2dataset's .tar files or its folder."""
    out: Path | None = None
    """Folder of shards to write; with --urls-only a .parquet file; with --tokens the folder of tokens."""
    encoder: Annotated[str, tyro.conf.arg(metavar="NAME")] = "facebook/dinov2-small"
    """What similarity is measured with: DINOv2, CLIP or SigLIP by hub name or local folder; "colour-and-shape", a
    classical descriptor that needs no download and knows no meaning; or "none": pairs are then not filtered."""
    min_side: int = 64
    """Shortest side of a picture, in pixels."""
    max_aspect: float = 3.0
    """Longest side over shortest side: banners and sprites are beyond."""
    max_side: int = 2048
    """Pictures with a longer side are stored smaller."""
    furniture_pages: int = 3
    """A picture on at least this many pages of a site is furniture, ..."""
    furniture_share: float = 0.02
    """... and on at least this share of the site's pages; on 20 pages it always is."""
    shard_mb: int = 256
    """Size at which a shard is closed, in MiB."""
    urls_only: bool = False
    """Write a parquet of (page, url, alt) for img2dataset instead of shards: for crawls that hold only HTML."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or a Ray cluster (the one in RAY_ADDRESS, else this machine)."""
    processes: int | None = None
    """Processes of the local engine, by default one per processor; with --tokens, those that decode pictures."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """Where the encoder runs."""
    tokens: str | None = None
    """Store what --encoder makes of every picture of this data (shards, or a folder that `semantica train --data`
    takes) in --out, by default beside it as DATA.tokens, for `semantica train --tokens`. A token belongs to a view:
    the centre of each picture and its mirror image are stored, so that flips of conditions stay random."""
    encoder_size: int | None = None
    """With --tokens: side of the images that the encoder sees."""
    encoder_tokens: Literal["patches", "all"] = "patches"
    """With --tokens: patches only, or the class and register tokens too."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """With --tokens: "auto" is bf16 where the processor multiplies it natively."""
    compile: bool = False
    """With --tokens: compile the encoder's layers; pays from some thousand pictures on."""
    report: Path | None = None
    """Show what --low and --high would keep of these shards, and write their report.html again; or show what stored
    tokens cost and save."""
    low: float | None = None
    """With --report: smallest similarity (cosine) of a pair."""
    high: float | None = None
    """With --report: largest similarity (cosine) of a pair."""

    def check(self) -> "PairsConfig":
        """Raises `UserError` for impossible options."""
        if self.report is not None:
            if self.inputs or self.out or self.tokens:
                raise UserError("--report takes one folder and no other input: leave out INPUT, --out and --tokens")
        elif self.tokens is not None:
            self._check_tokens()
        elif not self.inputs or self.out is None:
            raise UserError("nothing to do: give crawls to read and --out SHARDS, or --report SHARDS")
        elif self.low is not None or self.high is not None:
            raise UserError("--low and --high belong to --report and to 'semantica train': shards hold all pairs")
        for name, least in (("min_side", 2), ("max_side", 64), ("furniture_pages", 2), ("shard_mb", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least {least}")
        if self.max_side < self.min_side:
            raise UserError(f"--max-side {self.max_side} is below --min-side {self.min_side}: give a larger one")
        if not self.max_aspect >= 1:
            raise UserError(f"--max-aspect is {self.max_aspect}: give at least 1")
        if not 0 <= self.furniture_share <= 1:
            raise UserError(f"--furniture-share is {self.furniture_share}: give 0 to 1")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes is {self.processes}: give at least 1")
        return self

    def _check_tokens(self) -> None:
        if self.inputs or self.urls_only or self.engine != "local" or (self.low, self.high) != (None, None):
            raise UserError("--tokens takes no crawl: leave out INPUT, --urls-only, --engine, --low and --high")
        if self.encoder in ("colour-and-shape", "none"):
            raise UserError(f"--encoder {self.encoder} has no tokens: give a DINOv2, CLIP or SigLIP")
        if "://" in self.tokens and self.out is None:
            raise UserError(f"--tokens {self.tokens} is not on this machine: give --out, a folder that is")

    def rules(self) -> "Rules":
        """The options that decide what the shards hold."""
        names = [field.name for field in dataclasses.fields(Rules)]
        return Rules(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Rules:
    """What decides the bytes of the shards; see `PairsConfig`."""

    encoder: str
    min_side: int
    max_aspect: float
    max_side: int
    furniture_pages: int
    furniture_share: float
    shard_mb: int
