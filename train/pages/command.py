"""`semantica pairs`: one command line for mining, lists of URLs, reports and stored tokens."""

import pkgutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from semantica.errors import UserError
from semantica.train.data.config import TokensConfig
from semantica.train.pages.config import MineConfig, ReportConfig, ResizeConfig, UrlsConfig, narrowed

RUN = {
    MineConfig: "semantica.train.pages.mine:mine_and_show",
    UrlsConfig: "semantica.train.pages.urls:write_urls",
    ReportConfig: "semantica.train.pages.report:report",
    ResizeConfig: "semantica.train.pages.resize:resize_and_show",
    TokensConfig: "semantica.train.data.encode:store_tokens",
}
# options that ask for something else than mining
ASKS = ("report", "tokens", "resize", "urls_only")


@dataclass(frozen=True)
class PairsConfig(ReportConfig, TokensConfig, MineConfig):
    """Find the pictures that share a web page: crawls and saved pages in, shards for `semantica train --data` out.

    The same command continues a run that was interrupted.
    """

    out: Path | None = None
    """Folder of shards to write; with --urls-only a .parquet file; with --tokens the folder of tokens; with --resize
    by default beside INPUT, as INPUT-256px."""
    encoder: Annotated[str, tyro.conf.arg(metavar="NAME")] = "facebook/dinov2-small"
    """What similarity is measured with: DINOv2, CLIP or SigLIP by hub name or local folder; "colour-and-shape", a
    classical descriptor that needs no download and knows no meaning; or "none": pairs are then not filtered."""
    processes: int | None = None
    """Processes of this machine, by default one per processor, as far as the encoder's GPU has room; with --tokens,
    those that decode pictures."""
    urls_only: bool = False
    """Write a parquet of (page, url, alt) for img2dataset instead of shards: for crawls that hold only HTML."""
    resize: int | None = None
    """Write the shards in INPUT again, with this short side in pixels: training at --image-size 256 then decodes no
    more than it shows. Longer pictures become JPEGs (quality 95, 4:2:0; 40 to 43 dB), the others stay as they are.
    With `semantica train --crop C` give the image size divided by C."""
    tokens: str | None = None
    """Store what --encoder makes of every picture of this data (shards, or a folder that `semantica train --data`
    takes) in --out, by default beside it as DATA.tokens, for `semantica train --tokens`. A token belongs to a view:
    the centre of each picture and its mirror image are stored, so that flips of conditions stay random."""
    report: Path | None = None
    """Show what --low and --high would keep of these shards, and write their report.html again; or show what stored
    tokens cost and save."""

    def chosen(self) -> MineConfig | UrlsConfig | ReportConfig | ResizeConfig | TokensConfig:
        """The options of the one that is asked for. Raises `UserError` for impossible ones, and those of another."""
        thresholds = (self.low, self.high) != (None, None)
        config = UrlsConfig if self.urls_only else MineConfig
        if self.report is not None:
            if self.inputs or self.out or self.tokens or self.resize:
                raise UserError(
                    "--report takes one folder and no other input: leave out INPUT, --out, --tokens and --resize"
                )
            config = ReportConfig
        elif self.tokens is not None:
            if self.inputs or self.urls_only or self.on != "local" or thresholds or self.resize:
                raise UserError(
                    "--tokens takes no crawl: leave out INPUT, --urls-only, --on, --low, --high and --resize"
                )
            config = TokensConfig
        elif self.resize is not None:
            if self.urls_only or self.on != "local":
                raise UserError("--resize takes shards and no crawl: leave out --urls-only and --on")
            config = ResizeConfig
        chosen = narrowed(self, config)
        self.refuse_others(config)
        if config is not ReportConfig:
            chosen.check()
            if thresholds:
                raise UserError("--low and --high belong to --report and to 'semantica train': shards hold all pairs")
        return chosen

    def refuse_others(self, config: type) -> None:
        """Raises `UserError` for an option that was given and that what was asked for does not read."""
        # what is asked for, and the thresholds, have lines of their own
        known = {field.name for field in fields(config)} | {*ASKS} | {"low", "high"}
        asked = next((ask for ask in ASKS if getattr(self, ask) not in (None, False)), None)
        for field in fields(self):
            if field.name not in known and getattr(self, field.name) != field.default:
                what = "mining" if asked is None else f"--{asked.replace('_', '-')}"
                raise UserError(f"--{field.name.replace('_', '-')} says nothing to {what}: leave it out")


def run(config: PairsConfig) -> None:
    """Do what is asked for. Raises `UserError` as that does, and where a package is missing."""
    chosen = config.chosen()
    try:
        function = pkgutil.resolve_name(RUN[type(chosen)])
    except ImportError as error:
        raise UserError(f"'semantica pairs' needs {error.name}: install semantica-diffusion[pairs]") from error
    function(chosen)
