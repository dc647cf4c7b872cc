"""`semantica pairs`: one command line for mining, lists of URLs, reports and stored tokens."""

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from semantica.errors import UserError
from semantica.train.data.config import TokensConfig
from semantica.train.pages.config import MineConfig, ReportConfig, UrlsConfig, narrowed

RUN = {
    MineConfig: "semantica.train.pages.mine:mine_and_show",
    UrlsConfig: "semantica.train.pages.urls:write_urls",
    ReportConfig: "semantica.train.pages.report:report",
    TokensConfig: "semantica.train.data.encode:store_tokens",
}


@dataclass(frozen=True)
class PairsConfig(ReportConfig, TokensConfig, MineConfig):
    """Find the pictures that share a web page: crawls and saved pages in, shards for `semantica train --data` out.

    The same command continues a run that was interrupted.
    """

    out: Path | None = None
    """Folder of shards to write; with --urls-only a .parquet file; with --tokens the folder of tokens."""
    encoder: Annotated[str, tyro.conf.arg(metavar="NAME")] = "facebook/dinov2-small"
    """What similarity is measured with: DINOv2, CLIP or SigLIP by hub name or local folder; "colour-and-shape", a
    classical descriptor that needs no download and knows no meaning; or "none": pairs are then not filtered."""
    processes: int | None = None
    """Processes of this machine, by default one per processor; with --tokens, those that decode pictures."""
    urls_only: bool = False
    """Write a parquet of (page, url, alt) for img2dataset instead of shards: for crawls that hold only HTML."""
    tokens: str | None = None
    """Store what --encoder makes of every picture of this data (shards, or a folder that `semantica train --data`
    takes) in --out, by default beside it as DATA.tokens, for `semantica train --tokens`. A token belongs to a view:
    the centre of each picture and its mirror image are stored, so that flips of conditions stay random."""
    report: Path | None = None
    """Show what --low and --high would keep of these shards, and write their report.html again; or show what stored
    tokens cost and save."""

    def chosen(self) -> MineConfig | UrlsConfig | ReportConfig | TokensConfig:
        """The options of the one that is asked for. Raises `UserError` for impossible ones, and those of another."""
        thresholds = (self.low, self.high) != (None, None)
        config = UrlsConfig if self.urls_only else MineConfig
        if self.report is not None:
            if self.inputs or self.out or self.tokens:
                raise UserError("--report takes one folder and no other input: leave out INPUT, --out and --tokens")
            config = ReportConfig
        elif self.tokens is not None:
            if self.inputs or self.urls_only or self.on != "local" or thresholds:
                raise UserError("--tokens takes no crawl: leave out INPUT, --urls-only, --on, --low and --high")
            config = TokensConfig
        chosen = narrowed(self, config)
        if config is not ReportConfig:
            chosen.check()
            if thresholds:
                raise UserError("--low and --high belong to --report and to 'semantica train': shards hold all pairs")
        return chosen


def run(config: PairsConfig) -> None:
    """Do what is asked for. Raises `UserError` as that does, and where a package is missing."""
    chosen = config.chosen()
    try:
        function = pkgutil.resolve_name(RUN[type(chosen)])
    except ImportError as error:
        raise UserError(f"'semantica pairs' needs {error.name}: install semantica-diffusion[pairs]") from error
    function(chosen)
