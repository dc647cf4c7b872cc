"""sweep.html: the curves of a sweep, what each axis changes, and the table of all means."""

from pathlib import Path
from typing import TYPE_CHECKING

from semantica.benchmarks.quality.sweep.figures import against_each_other, against_guidance, against_points, words
from semantica.benchmarks.quality.sweep.results import Group, Mean, all_names, baselines, effects, groups, named
from semantica.report import Part, svg, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# options that filter pairs by similarity
THRESHOLDS = {"low", "high"}


def table(
    found: list[Group], beside: dict[str, dict[str, Mean]], names: list[str]
) -> tuple[tuple[str, ...], list[tuple]]:
    """Columns and rows: means over seeds of each setting and guidance, after the baselines."""
    axes = list(found[0].settings)
    columns = (*map(words, axes), "guidance", "seeds", *map(words, names))
    rows = []
    for label, row in beside.items():
        cells = [row[name].write() if name in row else "" for name in names]
        head = (label, *[""] * (len(axes) - 1)) if axes else ()
        rows.append((*head, "" if axes else label, "", *cells))
    for group in found:
        means = group.means()
        cells = [means[name].write() if name in means else "" for name in names]
        rows.append((*group.settings.values(), f"{group.guidance:g}", str(len(group.rows)), *cells))
    return columns, rows


def differences(rows: list[dict], axes: list[str], names: list[str]) -> tuple[tuple[str, ...], list[tuple]]:
    """Columns and rows of what each axis changes."""
    columns = ("axis", "", "guidance", *map(words, names))
    body = []
    for axis in axes:
        for effect in effects(rows, axis):
            cells = [effect.figures[name].write("+") if name in effect.figures else "" for name in names]
            body.append((words(axis), f"{effect.value} - {effect.base}", f"{effect.guidance:g}", *cells))
    return columns, body


def titled(text: str) -> str:
    return words(text[:1].upper() + text[1:])


def curves(content: dict, found: list[Group], names: list[str]) -> dict[str, "Figure"]:
    """Heading -> figure, of those that there are figures for."""
    beside, made = baselines(content), {}
    if distance := named(names, "fid", "frechet", "fd"):
        made[titled(f"{words(distance)} against guidance")] = against_guidance(found, distance, beside)
    pairs = (
        (named(names, "recall"), named(names, "precision"), "Precision against recall"),
        (diversity := named(names, "diversity", "vendi"), named(names, "on_topic"), "On-topic rate against diversity"),
    )
    for x, y, heading in pairs:
        if x and y:
            made[heading] = against_each_other(found, x, y, beside)
    for axis, points in content["axes"].items():
        if diversity and any(THRESHOLDS & point.keys() for point in points.values()):
            made[titled(f"{diversity} against {axis}")] = against_points(found, axis, diversity)
    return made


def page(path: Path, content: dict) -> None:
    """Write the page of what sweep.json holds."""
    rows, failed = content["rows"], {k: v for k, v in content["cells"].items() if v["state"] == "failed"}
    states = [cell["state"] for cell in content["cells"].values()]
    about = (
        f"{states.count('finished')} of {len(states)} cells are trained and evaluated. Bars and ± are 95 % intervals "
        "of the mean over seeds (Student's t: two seeds say little); of a single seed, that of its evaluation where it "
        "has one. A bar that is larger than what is shown is cut."
    )
    parts = [Part(text=about, note=True)]
    parts.append(
        Part(
            "Failed",
            columns=("cell", "reason"),
            rows=tuple((name, cell["reason"]) for name, cell in failed.items()),
        )
    )
    if rows:
        found, names = groups(rows), all_names(rows)
        parts += [Part(heading, svg=svg(drawn)) for heading, drawn in curves(content, found, names).items()]
        columns, body = differences(rows, list(content["axes"]), names)
        note = "Differences to the first value of each axis: within a seed the mean over all other settings."
        parts += [Part("What each axis changes", note, True, columns, tuple(body))] * bool(body)
        columns, body = table(found, baselines(content), names)
        note = "Baselines first; means over seeds."
        if any(value.biased for group in found for value in group.means().values()):
            note += (
                " A star: of so few pictures this distance is biased upwards; compare it within this table, also with "
                "that of real pictures, and with no other."
            )
        parts.append(Part("All settings", note, True, columns, tuple(body)))
    points = tuple(
        (words(axis), name, ", ".join(f"{k} = {v}" for k, v in point.items()) or "as in train")
        for axis, named_points in content["axes"].items()
        for name, point in named_points.items()
    )
    for heading, given in (("train", content["description"]["train"]), ("evaluate", content["evaluate"])):
        parts.append(Part(f"Options: {heading}", columns=("", ""), rows=tuple((k, str(v)) for k, v in given.items())))
    parts.append(Part("Points of axes", columns=("axis", "point", "options"), rows=points))
    write_page(path, "A sweep of settings", [part for part in parts if part.text or part.svg or part.rows], 1200)
