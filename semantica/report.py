"""The one report writer: a self-contained HTML page of text, tables, plots and pictures."""

import base64
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from semantica.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
div.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
table.long { font-size: .8rem; white-space: nowrap }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
img.pixels { image-rendering: pixelated; width: 100%; max-width: {{ width }}px }
svg { max-width: 100%; height: auto } p.note { color: #555 } code { background: #f3f3f3; padding: 0 .2rem }
</style></head><body><h1>{{ title }}</h1>
{% for part in parts %}{% if part.heading %}<h2>{{ part.heading }}</h2>{% endif %}
{% if part.text %}<p{% if part.note %} class="note"{% endif %}>{{ part.text }}</p>{% endif %}
{% if part.rows %}<div class="wide"><table{% if part.columns|length > 6 %} class="long"{% endif %}>
<tr>{% for cell in part.columns %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% if part.link %}<p><a href="{{ part.link }}">{{ part.link }}</a></p>{% endif %}
{% if part.png %}<img class="pixels" alt="{{ part.alt }}" src="data:image/png;base64,{{ part.png }}">{% endif %}
{% if part.svg %}{{ part.svg | safe }}{% endif %}
{% endfor %}</body></html>
"""


@dataclass(frozen=True)
class Part:
    """One section: a heading, then whichever of text, table, link, picture and plot are given."""

    heading: str = ""
    text: str = ""
    note: bool = False
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    png: str = ""
    alt: str = ""
    link: str = ""
    svg: str = ""


def picture(path: Path) -> str:
    """A PNG file as text for `Part.png`."""
    return base64.b64encode(path.read_bytes()).decode()


def plot(curves: dict[str, tuple[list[float], list[float]]], x_label: str, y_label: str, log: bool = False) -> str:
    """Curves `{name: (x, y)}` as an SVG text for `Part.svg`."""
    # the object interface: no window system, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, marker="o" if len(x) < 20 else None, markersize=3)
    axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return svg(figure)


def roofline(
    points: dict[str, tuple[list[float], list[float]]], copy_gbps: float | None, matrix_tflops: float | None
) -> "Figure":
    """Achieved rates under the two measured ceilings, which are not drawn where one of them is None.

    Args:
        points: `{name: (operations per byte, TFLOP/s)}`.
        copy_gbps: bandwidth of a copy in GB/s: the slanted ceiling.
        matrix_tflops: rate of a matrix product in TFLOP/s: the level one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    if copy_gbps is not None and matrix_tflops is not None:
        ridge = matrix_tflops * 1e3 / copy_gbps
        found = [value for x, _ in points.values() for value in x]
        low, high = min(*found, ridge) / 2, max(*found, ridge) * 2
        ceiling = [(low, low * copy_gbps / 1e3), (ridge, matrix_tflops), (high, matrix_tflops)]
        label = f"ceilings: copy {copy_gbps:.4g} GB/s, matrix product {matrix_tflops:.3g} TFLOP/s"
        axes.plot(*zip(*ceiling), color="black", linewidth=1, label=label)
    for (name, (x, y)), marker in zip(points.items(), itertools.cycle("osD^vP*X")):
        axes.plot(x, y, marker, label=name, markersize=5, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must be moved", ylabel="TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    # beside the points, never on them
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def bars(
    panels: dict[str, tuple[dict[str, tuple[float, float, float]], float | None]], label: str, floor_label: str
) -> "Figure":
    """Horizontal bars, a panel for each problem.

    Args:
        panels: `{problem: ({name: (median, low, high)}, floor)}`; the floor is drawn as a line, where there is one.
        label: of the values.
    """
    from matplotlib.figure import Figure

    heights = [len(values) + 1.5 for values, _ in panels.values()]
    figure = Figure(figsize=(8, 0.3 * sum(heights) + 0.8), layout="constrained")
    every = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (problem, (values, floor)) in zip(every, panels.items()):
        names = list(values)
        medians, lows, highs = zip(*values.values())
        errors = [[m - low for m, low in zip(medians, lows)], [high - m for m, high in zip(medians, highs)]]
        axes.barh(names, medians, xerr=errors, color="#6b9bc3", error_kw={"elinewidth": 1})
        for name, median in values.items():
            axes.annotate(f" {median[0]:.4g}", (median[2], name), va="center", fontsize=8)
        if floor is not None:
            axes.axvline(floor, color="black", linewidth=1, linestyle="--", label=floor_label)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(problem, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    every[-1].set_xlabel(label, fontsize=9)
    legends = (axes.get_legend_handles_labels() for axes in every)
    if any(found := next((legend for legend in legends if legend[0]), ())):
        figure.legend(*found, frameon=False, fontsize=8, loc="outside lower center")
    return figure


def svg(figure: "Figure") -> str:
    """A figure as text for `Part.svg`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table for a README: text columns to the left, the rest to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_page(path: Path, title: str, parts: list[Part], width: int = 900) -> None:
    """Write the page aside, then rename it."""
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(PAGE).render(title=title, parts=parts, width=width)
    write_text(path, page)
