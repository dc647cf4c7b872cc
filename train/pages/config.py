"""What mining can be told, and the limits that hostile input meets."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from semantica.errors import UserError

Config = TypeVar("Config")
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
class Rules:
    """What decides the bytes of the shards; see `MineConfig`."""

    encoder: str
    min_side: int
    max_aspect: float
    max_side: int
    furniture_pages: int
    furniture_share: float
    shard_mb: int

    def check(self) -> "Rules":
        """Raises `UserError` for impossible numbers."""
        for name, least in (("min_side", 2), ("max_side", 64), ("furniture_pages", 2), ("shard_mb", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least {least}")
        if self.max_side < self.min_side:
            raise UserError(f"--max-side {self.max_side} is below --min-side {self.min_side}: give a larger one")
        if not self.max_aspect >= 1:
            raise UserError(f"--max-aspect is {self.max_aspect}: give at least 1")
        if not 0 <= self.furniture_share <= 1:
            raise UserError(f"--furniture-share is {self.furniture_share}: give 0 to 1")
        return self


@dataclass(frozen=True)
class MineConfig:
    """Find the pictures that share a web page: crawls and saved pages in, shards for `semantica train --data` out.

    The same command continues a run that was interrupted.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """WARC files (.warc, .warc.gz), WACZ files, folders of saved pages, img2dataset's .tar files or its folder."""
    out: Path | None = None
    """Folder of shards to write."""
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
    on: Annotated[Literal["local", "ray"], tyro.conf.arg(aliases=["--engine"])] = "local"
    """Processes of this machine, or a Ray cluster (the one in RAY_ADDRESS, else this machine)."""
    processes: int | None = None
    """Processes of this machine, by default one per processor, as far as the encoder's GPU has room."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """Where the encoder runs."""

    def rules(self) -> Rules:
        """The options that decide what the shards hold."""
        return narrowed(self, Rules)

    def check(self) -> "MineConfig":
        """Raises `UserError` for impossible options."""
        need_inputs(self.inputs, self.out)
        self.rules().check()
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes is {self.processes}: give at least 1")
        return self


@dataclass(frozen=True)
class UrlsConfig:
    """Write a parquet of (page, url, alt) for img2dataset: for crawls that hold only HTML."""

    inputs: tuple[Path, ...]
    """As of `MineConfig`."""
    out: Path | None
    """A .parquet file."""

    def check(self) -> "UrlsConfig":
        """Raises `UserError` for impossible options."""
        need_inputs(self.inputs, self.out)
        return self


@dataclass(frozen=True)
class ResizeConfig:
    """Store the pictures of shards at the size that training shows."""

    inputs: tuple[Path, ...]
    """One folder of shards."""
    resize: int
    """Short side of the pictures to be stored, in pixels."""
    out: Path | None = None
    """Folder of shards to write; by default beside those, as SHARDS-256px."""
    processes: int | None = None

    def check(self) -> "ResizeConfig":
        """Raises `UserError` for impossible options."""
        if len(self.inputs) != 1 or not self.inputs[0].is_dir():
            raise UserError("--resize takes one folder of shards on this machine: give what 'semantica pairs' made")
        if self.resize < 16:
            raise UserError(f"--resize is {self.resize}: give at least 16 pixels")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes is {self.processes}: give at least 1")
        return self


@dataclass(frozen=True)
class ReportConfig:
    """Show what is stored: of shards what thresholds would keep, of tokens what they cost and save."""

    report: Path
    """Show what --low and --high would keep of these shards, and write their report.html again; or show what stored
    tokens cost and save."""
    low: float | None = None
    """With --report: smallest similarity (cosine) of a pair."""
    high: float | None = None
    """With --report: largest similarity (cosine) of a pair."""


def need_inputs(inputs: tuple[Path, ...], out: Path | None) -> None:
    if not inputs or out is None:
        raise UserError("nothing to do: give crawls to read and --out SHARDS, or --report SHARDS")


def narrowed(options: Any, config: type[Config]) -> Config:
    """Those options that another dataclass has too."""
    return config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(config)})
