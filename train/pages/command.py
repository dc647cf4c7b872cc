"""What `semantica pairs` does with its options."""

from semantica.train.data.tokencost import report
from semantica.train.pages.config import PairsConfig
from semantica.train.pages.mine import mine
from semantica.train.pages.report import show
from semantica.train.pages.urls import write_urls


def run(config: PairsConfig) -> None:
    """Mine, list URLs, or report. Raises `UserError` as these do."""
    if config.report is not None and (config.report / "identity.json").exists():
        report(config.report)
    elif config.report is not None:
        show(config.report, config.low, config.high)
    elif config.urls_only:
        write_urls(config)
    else:
        summary(config, mine(config))


def summary(config: PairsConfig, stats: dict) -> None:
    """A row for each input, the sums, and what is wrong."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{config.out}")
    for i, name in enumerate(("input", "pages", "linked", "kept", "pages stored", "pairs", "problems")):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in stats["inputs"][:50]:
        stored = row["stored"]
        figures = (row["pages"], row["linked"], stored["images"], stored["pages"], stored["pairs"], row["problems"])
        table.add_row(row["name"], *map(str, figures))
    Console().print(table)
    reasons = ", ".join(f"{name} {count}" for name, count in stats["pictures"].items())
    print(f"links: {reasons or 'none'}")
    for row in stats["inputs"][:50]:
        for place, what in row["problems_named"][:5]:
            print(f"{row['name']}, {place}: {what}")
    print(f"report: {config.out / 'report.html'}")
