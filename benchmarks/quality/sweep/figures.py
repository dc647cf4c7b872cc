"""The curves of a sweep: each is one setting over guidance, means over seeds with their intervals."""

from collections.abc import Iterable
from itertools import cycle
from typing import TYPE_CHECKING

from semantica.benchmarks.quality.sweep.results import Group, Mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*Xph<>"
# curves in one figure whose points say their guidance
LABELLED = 6
# between curves, as a share of the width
APART = 0.006
# times the largest mean, beyond which a baseline is not shown
FAR = 2
SHORT = {"fid": "FID", "kid": "KID", "fd": "Frechet distance", "kd": "kernel distance"}
Baselines = dict[str, dict[str, Mean]]


def styles(names: Iterable[str]) -> dict[str, dict]:
    """A colour and a marker of its own for each name, the same in all figures."""
    from matplotlib import colormaps

    colours = [*colormaps["tab10"].colors]
    return {
        name: {"color": colours[i % len(colours)], "marker": marker, "linestyle": ("-", "--", ":")[i // 10 % 3]}
        for i, (name, marker) in enumerate(zip(names, cycle(MARKERS)))
    }


def by_name(groups: Iterable[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.name, []).append(group)
    return found


def words(name: str) -> str:
    return SHORT.get(name, name.replace("_", " "))


def against_guidance(groups: list[Group], name: str, baselines: Baselines) -> "Figure":
    """A figure of each setting against guidance, a little apart so that bars do not cover each other; baselines that
    have it as lines."""
    drawn = Drawing("guidance", words(name), by_name(groups))
    scales = [group.guidance for group in groups]
    apart = APART * (max(scales) - min(scales))
    for i, (setting, own) in enumerate(drawn.curves.items()):
        beside = apart * (i - (len(drawn.curves) - 1) / 2)
        points = [(Mean(group.guidance + beside), group.means()[name]) for group in own if name in group.means()]
        drawn.curve(setting, points, [])
    largest = max((up.value for _, up in drawn.means), default=0.0)
    for (label, row), style in zip(baselines.items(), cycle(("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2))))):
        # noise is so far from everything that nothing else would be told apart
        if (found := row.get(name)) and found.value <= FAR * largest:
            drawn.axes.axhline(found.value, color="black", linewidth=0.8, linestyle=style, label=label)
            drawn.seen(Mean(scales[0]), found)
    return drawn.finished()


def against_each_other(groups: list[Group], x: str, y: str, baselines: Baselines) -> "Figure":
    """One figure against another, a curve over guidance for each setting; baselines that have both as points."""
    drawn = Drawing(words(x), words(y), by_name(groups))
    for setting, own in drawn.curves.items():
        both = [(group.guidance, means) for group in own if {x, y} <= (means := group.means()).keys()]
        drawn.curve(setting, [(means[x], means[y]) for _, means in both], [f"{scale:g}" for scale, _ in both])
    for (label, row), marker in zip(baselines.items(), cycle("*+x1")):
        across, up = row.get(x), row.get(y)
        if across and up:
            drawn.axes.plot(across.value, up.value, marker, color="black", linestyle="none", label=label)
            drawn.seen(across, up)
    return drawn.finished()


def against_points(groups: list[Group], axis: str, name: str) -> "Figure":
    """A figure against the points of an axis, in their order: a panel for each guidance, a curve for each setting of
    the other axes."""
    points = list(dict.fromkeys(group.settings[axis] for group in groups))

    def others(group: Group) -> str:
        return ", ".join(value for other, value in group.settings.items() if other != axis) or words(name)

    scales = list(dict.fromkeys(group.guidance for group in groups))
    curves: dict[str, list[Group]] = {}
    for group in groups:
        curves.setdefault(others(group), []).append(group)
    drawn = Drawing("", words(name), curves, len(scales))
    for panel, scale in zip(drawn.panels, scales):
        drawn.axes = panel
        panel.set_title(f"guidance {scale:g}", fontsize=9)
        for setting, own in curves.items():
            here = {group.settings[axis]: group.means() for group in own if group.guidance == scale}
            found = [(Mean(i), here[p][name]) for i, p in enumerate(points) if name in here.get(p, {})]
            drawn.curve(setting, found, [])
        panel.set_xticks(range(len(points)), points, fontsize=8)
        panel.set_xlabel(words(axis), fontsize=9)
        panel.set_xlim(-0.4, len(points) - 0.6)
    return drawn.finished()


def bounds(mean: Mean) -> tuple[float, ...]:
    """What of a mean and its interval is to be seen."""
    if mean.low is None or mean.high - mean.low > 2 * abs(mean.value):
        return (mean.value,)
    return mean.low, mean.value, mean.high


class Drawing:
    """Axes side by side, with one legend below; as much is seen as all means and their intervals need, but for those
    that are larger than the mean itself, as of two seeds they may be: these are cut."""

    def __init__(self, x_label: str, y_label: str, curves: dict[str, list[Group]], panels: int = 1):
        from matplotlib.figure import Figure

        rows = -(-len(curves) // 2)
        size = (max(7, 2.6 * panels + 1), 3.6 + 0.22 * rows)
        self.figure, self.curves, self.styles = Figure(size, layout="constrained"), curves, styles(curves)
        self.panels = list(self.figure.subplots(1, panels, sharey=True, squeeze=False)[0])
        self.axes: Axes = self.panels[0]
        self.axes.set(xlabel=x_label, ylabel=y_label)
        self.means: list[tuple[Mean, Mean]] = []
        for axes in self.panels:
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)

    def seen(self, x: Mean, y: Mean) -> None:
        self.means.append((x, y))

    def curve(self, name: str, points: list[tuple[Mean, Mean]], labels: list[str]) -> None:
        if not points:
            return
        x, y = ([point[i].value for point in points] for i in (0, 1))
        errors = {
            axis: [[p[i].value - p[i].low for p in points], [p[i].high - p[i].value for p in points]]
            for i, axis in enumerate(("xerr", "yerr"))
            if all(p[i].low is not None for p in points)
        }
        self.axes.errorbar(
            x, y, **errors, **self.styles[name], markersize=4, linewidth=1.2, elinewidth=0.8, capsize=2, label=name
        )
        for place in zip(x, y, labels) if len(self.curves) <= LABELLED else ():
            self.axes.annotate(place[2], place[:2], xytext=(4, 4), textcoords="offset points", fontsize=7)
        self.means += points

    def finished(self) -> "Figure":
        for i, limit in enumerate(("set_xlim", "set_ylim")):
            values = [value for point in self.means for value in bounds(point[i])]
            if values and not (limit == "set_xlim" and len(self.panels) > 1):
                room = 0.12 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
                getattr(self.axes, limit)(min(values) - room, max(values) + room)
        handles = {label: h for axes in self.panels for h, label in zip(*axes.get_legend_handles_labels())}
        self.figure.legend(
            handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside lower center", ncols=2
        )
        return self.figure
