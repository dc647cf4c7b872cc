"""The table of metrics, and the lines beneath it, as a user reads them."""

from rich.console import Console
from rich.table import Table

from semantica.benchmarks.quality.metrics.jury import ORDER, SHARES

MEANINGS = {
    "fid": "FID", "kid": "KID x 1000", "fd": "Frechet distance", "kd": "kernel distance x 1000", "vendi": "Vendi score",
    "vendi_per_condition": "Vendi of a condition", "condition_similarity": "cosine to condition",
}  # fmt: skip

# small numbers, which papers show like that too
THOUSANDS = ("kid", "kd")


def show(console: Console, metrics: dict, named: str) -> None:
    """Print what `Jury.table` made, on a console that reads no markup."""
    rows, level = metrics["rows"], metrics["level"]
    title = f"{metrics['judge']} as judge; {level:.0%} intervals over {metrics['units']}"
    table = Table("", *rows, title=title)
    for name in ORDER:
        if any(name in row for row in rows.values()):
            table.add_row(MEANINGS.get(name, name.replace("_", " ")), *(cell(name, row) for row in rows.values()))
    console.print(table)
    for line in remarks(metrics, named):
        console.print(line, highlight=False)


def cell(name: str, row: dict) -> str:
    """A figure with its interval, which is in percent where the figure is; a star marks a biased one."""
    if name not in row:
        return ""
    found, share, scale = row[name], name in SHARES, 1000 if name in THOUSANDS else 1
    star = "*" if found.get("biased") else ""
    value = (f"{found['value']:.1%}" if share else f"{scale * found['value']:.3g}") + star
    if found["low"] is None:
        return value
    low, high = (f"{100 * found[end]:.0f}" if share else short(scale * found[end]) for end in ("low", "high"))
    return f"{value}\n[{low}, {high}]"


def short(value: float) -> str:
    """Two digits, or whole numbers."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def remarks(metrics: dict, named: str) -> list[str]:
    """What must be said beside the figures of the row `named`."""
    lines, row, width = [], metrics["rows"][named], metrics["features"]
    for name in ("fid", "fd"):
        if row.get(name, {}).get("biased"):
            found = row[name]
            floor = "no other real pictures are left to say by how much"
            if found["of_real"] is not None:
                few = found["real_pictures"] < found["pictures"]
                note = f", more than {found['pictures']} would have" if few else ""
                floor = f"{found['real_pictures']} others of the real ones have {found['of_real']:.3g}{note}"
            counts = f"{found['pictures']} pictures, {metrics['real_pictures']} real ones, {width} features"
            lines.append(f"* biased upwards for few pictures ({counts}): {floor}")
    absent = [name for name in ("precision", "recall", "density", "coverage", "copies") if name not in row]
    if not {"fid", "fd"} & row.keys():
        absent.insert(0, "distances")
    if absent:
        lines.append(f"too few pictures for {', '.join(absent)}: give more in --data, or more variations")
    if row["vendi"]["low"] is None:
        lines.append("no intervals: there is one condition; give more")
    return lines
