"""report.html of shards: what was found and dropped, how large and how similar pictures are, and examples."""

import base64
import io
from pathlib import Path

import numpy as np

from semantica.errors import UserError
from semantica.files import read_json
from semantica.images import BadImage, fit, grid
from semantica.report import Part, svg, write_page
from semantica.train.data.shards import ShardData, allowed, open_listed, open_shards, read_index, with_partner
from semantica.train.data.store import Store
from semantica.train.pages.config import ReportConfig
from semantica.train.pages.stats import REASONS
from semantica.train.pages.write import BINS, SIDES

TILE, EXAMPLE_PAGES, ACROSS, EXAMPLE_PAIRS = 96, 8, 8, 8


def write_report(out: Path, stats: dict, index: dict, low: float | None = None, high: float | None = None) -> None:
    """Write `out/report.html`.

    Args:
        out: folder of shards.
        stats, index: what stats.json and index.json hold.
        low, high: thresholds to show the effect of, None for no bound.

    Raises:
        UserError: jinja2 or matplotlib is missing, or the shards cannot be read.
    """
    parts = [totals(stats, index), inputs(stats), dropped(stats)]
    for name, title, label, width in (
        ("images_per_page", "Pictures per page", "pictures of a page, after all rules (1: not stored, 0: left out)", 1),
        ("side", "Sizes", "shorter side of stored pictures, in pixels", SIDES),
    ):
        # most pages of a crawl have none, and would flatten the rest
        values = {int(key): count for key, count in stats[name].items() if int(key) or name == "side"}
        parts.append(Part(title, svg=bars(list(values), list(values.values()), label, width)))
    if index["shards"]:
        data = open_index(out, index)
        if len(data.cosine):
            parts += similarities(stats, data, low, high)
        parts += examples(data)
    named = [(row["name"], place, what) for row in stats["inputs"] for place, what in row["problems_named"]][:200]
    if named:
        text = f"{stats['problems']} in all; the first:"
        parts.append(Part("Problems", text, columns=("input", "where", "what"), rows=tuple(named)))
    try:
        write_page(out / "report.html", f"Pairs in {out.name}", parts)
    except ImportError as error:
        raise UserError(f"report.html needs {error.name}: install semantica-diffusion[pairs]") from error


def open_index(out: Path, index: dict, low: float | None = None, high: float | None = None) -> ShardData:
    return open_listed(Store(out), index, "pages", low, high)


def totals(stats: dict, index: dict) -> Part:
    stored = stats["stored"]
    rows = (
        ("pages", f"{stats['pages'].get('pages', 0):,}"),
        ("pages that are stored (2 pictures or more)", f"{stored['pages']:,}"),
        ("links to pictures", f"{stats['pages'].get('linked', 0):,}"),
        ("pictures stored", f"{stored['images']:,}"),
        ("ordered pairs", f"{stored['pairs']:,}"),
        ("revisits resolved / not", f"{stats['pages'].get('revisits_resolved', 0):,} / "
            f"{stats['pages'].get('revisits_unresolved', 0):,}"),
        ("shards", f"{stored['shards']:,} ({stored['bytes'] / 2**20:,.1f} MiB)"),
        ("encoder", index["encoder"]["name"]),
    )  # fmt: skip
    return Part(columns=("", ""), rows=rows)


def inputs(stats: dict) -> Part:
    columns = ("input", "pages", "linked", "kept", "pages stored", "pairs", "problems")
    rows = tuple(
        (row["name"], *(f"{n:,}" for n in (row["pages"], row["linked"], row["pictures"].get("kept", 0),
            row["stored"]["pages"], row["stored"]["pairs"], row["problems"])))
        for row in stats["inputs"][:500]
    )  # fmt: skip
    return Part("Inputs", columns=columns, rows=rows)


def dropped(stats: dict) -> Part:
    rows = tuple((name, REASONS[name], f"{stats['pictures'][name]:,}") for name in REASONS if name in stats["pictures"])
    text = "Each link of a page is counted once: stored, or under the first rule that it met."
    return Part("Links by what became of them", text, columns=("reason", "", "links"), rows=rows)


def similarities(stats: dict, data: ShardData, low: float | None, high: float | None) -> list[Part]:
    """The histogram, what thresholds keep, and pairs around them (around the deciles, where none is given)."""
    edges = np.linspace(-1, 1, BINS + 1)
    counts = np.array(stats["similarity"])
    seen = np.flatnonzero(counts)
    used = slice(max(0, seen[0] - 2), seen[-1] + 3) if len(seen) else slice(0, BINS)
    lines = [bound for bound in (low, high) if bound is not None]
    image = bars(edges[:-1][used], counts[used], "cosine of a pair's embeddings", 2 / BINS, lines)
    deciles = np.quantile(data.cosine, np.arange(1, 10) / 10)
    text = "Deciles: " + ", ".join(f"{value:.3f}" for value in deciles) + "."
    parts = [Part("Similarity of pairs", text, svg=image)]
    if lines:
        parts.append(Part("What the thresholds keep", columns=("", "all", "kept"), rows=kept(data, low, high)))
    for bound in lines or deciles[[0, 4, 8]].tolist():
        picture, cosines = pairs_around(data, bound)
        text = "Upper and lower picture of each column are a pair; similarity " + ", ".join(f"{c:.3f}" for c in cosines)
        parts.append(Part(f"Pairs around {bound:.3f}", text, note=True, png=picture, alt=f"pairs around {bound:.3f}"))
    return parts


def kept(data: ShardData, low: float | None, high: float | None) -> tuple[tuple[str, str, str], ...]:
    """Rows of (what, all, kept under the thresholds)."""
    targets = with_partner(data.first, data.start, data.count, data.cosine, low, high)
    pages = np.add.reduceat(targets, data.first) > 0
    pairs = int(allowed(data.cosine, low, high).sum())
    figures = (
        ("pairs", len(data.cosine), pairs),
        ("pictures with a partner", len(targets), int(targets.sum())),
        ("pages", len(pages), int(pages.sum())),
    )
    return tuple((name, f"{all_:,}", f"{some:,} ({some / all_:.1%})") for name, all_, some in figures)


def pairs_around(data: ShardData, bound: float) -> tuple[str, list[float]]:
    """The pairs just below and just above a similarity, as a picture, and their similarities."""
    order = np.argsort(data.cosine, kind="stable")
    place = int(np.searchsorted(data.cosine[order], bound))
    chosen = order[max(0, place - EXAMPLE_PAIRS // 2) : place + EXAMPLE_PAIRS // 2]
    columns = []
    for pair in chosen:
        page = int(np.searchsorted(data.start, pair, side="right")) - 1
        i, j = (int(side[pair - data.start[page]]) for side in np.triu_indices(int(data.count[page]), 1))
        columns.append([tile(data, int(data.first[page]) + k) for k in (i, j)])
    return png([list(row) for row in zip(*columns)]), [float(data.cosine[pair]) for pair in chosen]


def examples(data: ShardData) -> list[Part]:
    """Pages spread over the shards, a row of pictures each."""
    chosen = np.unique(np.linspace(0, len(data.page) - 1, EXAMPLE_PAGES).astype(int))
    rows = []
    for page in data.page[chosen]:
        first, count = int(data.first[page]), int(data.count[page])
        rows.append([tile(data, ref) for ref in range(first, first + min(count, ACROSS))])
    text = f"{len(rows)} pages, one in each row, at most {ACROSS} of their pictures."
    return [Part("Examples", text, note=True, png=png(rows), alt="pictures of some pages")]


def tile(data: ShardData, ref: int) -> np.ndarray:
    try:
        return fit(data.load(ref, 2 * TILE), TILE)
    except BadImage:
        return np.full((TILE, TILE, 3), 200, np.uint8)


def png(rows: list[list[np.ndarray]]) -> str:
    buffer = io.BytesIO()
    grid(rows).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def bars(places, counts, label: str, width: float, lines: list[float] = ()) -> str:
    """A histogram as SVG: of bins of a width that begin at these places, or of whole numbers, width 1, about them."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("report.html needs matplotlib: install semantica-diffusion[pairs]") from error
    # element ids that are the same in every run
    with matplotlib.rc_context({"svg.hashsalt": "semantica"}):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        places = np.asarray(places, float)
        axes.bar(places + (width / 2 if width != 1 else 0), counts, width=width * 0.92)
        for line in lines:
            axes.axvline(line, color="black", linewidth=1)
        axes.set(xlabel=label, ylabel="count")
        return svg(figure)


def report(config: ReportConfig) -> None:
    """`semantica pairs --report`: of stored tokens what they cost, of shards what thresholds keep.

    Raises:
        UserError: as `semantica.train.data.tokencost.report` and `show`.
    """
    if (config.report / "identity.json").exists():
        from semantica.train.data import tokencost

        tokencost.report(config.report)
    else:
        show(config.report, config.low, config.high)


def show(shards: Path, low: float | None, high: float | None) -> None:
    """Print what thresholds keep of shards, and write report.html again.

    Raises:
        UserError: no finished shards there, or no embeddings while thresholds are given.
    """
    index, stats = read_index(Store(shards)), read_json(shards / "stats.json")
    data = open_shards(str(shards), low=low, high=high)
    whole = data if (low, high) == (None, None) else open_shards(str(shards))
    stored = stats["stored"]
    print(f"{stored['pages']:,} pages, {stored['images']:,} pictures, {stored['pairs']:,} ordered pairs")
    if not len(whole.cosine):
        print("no embeddings: pairs cannot be filtered")
    else:
        values = ", ".join(f"{v:.3f}" for v in np.quantile(whole.cosine, np.arange(1, 10) / 10))
        print(f"similarity, deciles: {values}")
        for name, before, after in kept(whole, low, high) if whole is not data else ():
            print(f"{name}: {after} of {before}")
    for name, reason in whole.bad:
        print(f"{name}: {reason}")
    write_report(shards, stats, index, low, high)
    print(f"wrote {shards / 'report.html'}")


def summary(out: Path, stats: dict) -> None:
    """A row for each input, the sums, and what is wrong."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{out}")
    for i, name in enumerate(("input", "pages", "linked", "kept", "pages stored", "pairs", "problems")):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in stats["inputs"][:50]:
        stored = row["stored"]
        figures = (row["pages"], row["linked"], stored["images"], stored["pages"], stored["pairs"], row["problems"])
        table.add_row(row["name"], *map(str, figures))
    # names of files are no markup
    Console(markup=False).print(table)
    reasons = ", ".join(f"{name} {count}" for name, count in stats["pictures"].items())
    print(f"links: {reasons or 'none'}")
    for row in stats["inputs"][:50]:
        for place, what in row["problems_named"][:5]:
            print(f"{row['name']}, {place}: {what}")
    print(f"report: {out / 'report.html'}")
