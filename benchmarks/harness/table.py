"""The one renderer of rows: on the terminal, as Markdown, as a page and as a picture. Each kind brings its columns."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from semantica.benchmarks.harness.store import OURS
from semantica.report import Part, bars, markdown, svg, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from semantica.benchmarks.harness.suite import Bench

Row = dict
Body = list[tuple[str, ...]]


@dataclass(frozen=True)
class Column:
    """A head, and how a row is written below it: a format of its fields, or a function of it and of all rows."""

    head: str
    cell: str | Callable[[Row, list[Row]], str]
    detail: bool = False
    """Left out of the README."""

    def write(self, row: Row, rows: list[Row]) -> str:
        return self.cell.format_map(row) if isinstance(self.cell, str) else self.cell(row, rows)


@dataclass(frozen=True)
class Kind:
    """What rows of one kind are shown as.

    Attributes:
        title: of the page; `about` stands below it.
        columns: one of them is called "implementation".
        by: a field: the page has a table for each of its values, without the first `apart` columns.
        figure: of rows, at least one.
        figures: a heading on the page -> the rows of a figure.
    """

    title: str
    about: str
    columns: tuple[Column, ...]
    by: str
    apart: int
    figure: Callable[[list[Row]], "Figure"]
    figures: Callable[[list[Row]], dict[str, list[Row]]]


def milliseconds(head: str, *fields: str, detail: bool = False) -> Column:
    """Of times in microseconds, one or several with a dash between."""
    return Column(head, lambda row, rows: " - ".join(f"{row[name] / 1e3:.1f}" for name in fields), detail)


def mebibytes(head: str, field: str) -> Column:
    """Empty where nobody knows."""
    return Column(head, lambda row, rows: "" if row[field] is None else f"{row[field] / 2**20:.0f}")


def share(head: str, field: str, form: str = ".0%", detail: bool = False) -> Column:
    """Of a ceiling, which says so where that could not be measured."""
    return Column(head, lambda row, rows: UNMEASURED if row[field] is None else format(row[field], form), detail)


UNMEASURED = "not measured"
# which row of a race it is
RACED = (
    Column("operator", "{op}", detail=True),
    Column("problem", "{shape}"),
    Column("implementation", "{impl}"),
    Column("arithmetic", "{dtype}"),
)


def raced_with(row: Row, rows: list[Row], *same: str) -> list[Row]:
    """Rows of the same problem from the same run: what another run measured is no base of a ratio. `same`: further
    fields of it."""
    same = ("op", "shape", "layout", "direction", "device", "date", *same)
    return [other for other in rows if all(other.get(field) == row.get(field) for field in same)]


def apart(row: Row, other: Row) -> str:
    """A mark of ratios to a row that was not in the same rounds, for want of memory: the ceilings beside it differ."""
    return "~" if any(row.get(field) != other.get(field) for field in ("copy_gbps", "matrix_tflops")) else ""


def is_rival(row: Row) -> bool:
    """Whether a row is of what others ship: neither this package's nor the user's own."""
    return row.get("kernel_hash") is None and row["impl"] not in OURS and ":" not in row["impl"]


def ratio(row: Row, other: Row | None) -> str:
    """How many times less time a row takes than another."""
    return "" if other is None else f"{apart(row, other)}{other['median_us'] / row['median_us']:.2f}x"


def against(name: str, *same: str) -> Column:
    """To an implementation in the same run."""

    def cell(row: Row, rows: list[Row]) -> str:
        found = (other for other in raced_with(row, rows, *same) if other["impl"] == name)
        return ratio(row, next(found, None))

    return Column(f"against {name}", cell)


def against_fastest(*same: str) -> Column:
    """To whichever of the others in the same run was fastest: a base that was chosen beforehand may be a slow one."""

    def cell(row: Row, rows: list[Row]) -> str:
        found = filter(is_rival, raced_with(row, rows, *same))
        return ratio(row, min(found, key=lambda other: other["median_us"], default=None))

    return Column("against the fastest other", cell)


def heads(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(column.head for column in columns)


def cells(columns: Sequence[Column], rows: list[Row], among: list[Row] | None = None) -> Body:
    """Rows as text; `among` are those that they are compared with, by default themselves."""
    return [tuple(column.write(row, rows if among is None else among) for column in columns) for row in rows]


def show(columns: Sequence[str], body: Body) -> None:
    """A table on the terminal; columns that are the same all along stand above it, empty ones nowhere."""
    from rich.console import Console
    from rich.table import Table

    values = [{line[i] for line in body} for i in range(len(columns))]
    alike = [i for i, found in enumerate(values) if len(body) > 1 and len(found) == 1]
    named = [f"{columns[i].strip()}: {body[0][i]}" for i in alike if body[0][i]]
    if named:
        print("; ".join(named))
    numeric = [all(re.fullmatch(r"[-~0-9.%x/ ]*", cell) for cell in found) for found in values]
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        if i not in alike:
            table.add_column(column.strip(), justify="right" if numeric[i] else "left", no_wrap=True)
    for line in body:
        table.add_row(*(cell for i, cell in enumerate(line) if i not in alike))
    # as wide as the table: cut figures are worse than long lines
    width = max(80, Console(width=1000, markup=False).measure(table).maximum)
    Console(width=width, highlight=False, markup=False).print(table)


REFUSED = ("problem", "direction", "implementation", "reason")


def refused(row: Row) -> tuple[str, ...]:
    """A line of `REFUSED`."""
    return row["problem"], row.get("direction", ""), row["impl"], row["reason"]


def as_markdown(
    columns: Sequence[Column], rows: list[Row], stale: Callable[[Row], bool], marked: str = "implementation"
) -> str:
    """Without details and columns that are empty; rows that are stale or a quick look say so in the column `marked`."""
    columns = [column for column in columns if not column.detail and any(column.write(row, rows) for row in rows)]
    body = []
    for row, line in zip(rows, cells(columns, rows)):
        mark = " (stale)" * stale(row) + " (quick)" * row.get("quick", False)
        body.append(tuple(cell + mark * (head == marked) for head, cell in zip(heads(columns), line)))
    return markdown(heads(columns), body)


def page(path: Path, kind: Kind, rows: list[Row], bench: "Bench") -> None:
    """Write figures and tables of rows, what was not timed and why, and what ran."""
    parts = [Part(text=kind.about, note=True)]
    parts += [Part(heading, svg=svg(kind.figure(own))) for heading, own in kind.figures(rows).items() if own]
    for value in dict.fromkeys(row[kind.by] for row in rows):
        columns = kind.columns[kind.apart :]
        body = cells(columns, [row for row in rows if row[kind.by] == value], rows)
        parts.append(Part(value, columns=heads(columns), rows=tuple(body)))
    parts += [
        Part(heading, columns=tuple(named), rows=tuple(body)) for heading, (named, body) in bench.tables(rows).items()
    ]
    parts.append(Part("Wrong, not timed", columns=REFUSED, rows=tuple(map(refused, bench.wrong))))
    parts.append(Part("Absent", columns=("implementation", "reason"), rows=tuple(bench.absent.items())))
    if rows:
        facts = ("device", "arch", "torch", "triton", "commit", "date")
        # rows of an earlier run may be of another version
        every = {fact: dict.fromkeys(str(row[fact]) for row in rows) for fact in facts}
        parts.append(Part("What ran", columns=("", ""), rows=tuple((k, ", ".join(v)) for k, v in every.items())))
    write_page(path, kind.title, [part for part in parts if part.text or part.svg or part.rows], 1200)


def times_by_shape(rows: list[Row], label: str, floor: str) -> "Figure":
    """Bars of median time by implementation, a panel for each shape, what the bf16 matrix rate allows as a line.

    Args:
        label: of the times. floor: of the line.
    """
    panels = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        fields = ("median_us", "p20_us", "p80_us")
        times = {f"{row['impl']} ({row['dtype']})": tuple(row[k] / 1e3 for k in fields) for row in own}
        matrix = own[0]["matrix_tflops"]
        panels[shape] = times, None if matrix is None else own[0]["flops"] / matrix / 1e9
    return bars(panels, label, floor)
