"""What the verbs of `semantica bench` that measure share: their outputs, and the way from a bench to its figures."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from semantica.benchmarks.harness import store, table
from semantica.benchmarks.harness.sources import stale
from semantica.errors import UserError
from semantica.files import write_json, written

if TYPE_CHECKING:
    from semantica.benchmarks.harness.suite import Bench


# what matplotlib writes wherever it is installed
PICTURES = (".png", ".jpg", ".svg", ".pdf")


@dataclass(frozen=True)
class Outputs:
    """What every verb that measures can be asked for."""

    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of tables and plots."""
    png: Path | None = None
    """Write the plot as a picture."""
    resume: bool = False
    """Go on where a killed run has stopped: what --json holds already is kept, except for what is stale by now, was
    refused for want of memory, or was not raced with the rest. Rows that are not asked for this time stay in the file
    as they are."""

    def check(self) -> None:
        """Raises `UserError` for a file that cannot be written: before hours of measuring, not after."""
        if self.resume and self.json is None:
            raise UserError("--resume needs --json FILE: the rows to go on from")
        check_files(self.json, self.html, self.png)
        if self.png is not None and self.png.suffix.lower() not in PICTURES:
            raise UserError(f"--png {self.png}: give a name that ends in {' or '.join(PICTURES)}")

    def device_kind(self) -> str:
        """ "cpu" or "cuda".

        Raises:
            UserError: no such device, or one of several GPUs: what is measured is the first that is visible.
        """
        from semantica.device import pick_device

        device = pick_device(self.device)
        if device.index:
            raise UserError(
                f"--device {self.device}: benchmarks run on the first GPU; choose it with CUDA_VISIBLE_DEVICES"
            )
        return device.type


def check_files(*paths: Path | None) -> None:
    """Raises `UserError` for a file to be written that is a folder, or is to lie in none."""
    for path in paths:
        if path is not None and path.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder")
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: {path.parent} is not a folder")


def leave_out(config: object, why: str, *names: str) -> None:
    """Raises `UserError` for the first of the named options that is not what it is by default.

    Args:
        config: a dataclass of options. why: it would change nothing here.
    """
    for option in dataclasses.fields(config):
        if option.name in names and getattr(config, option.name) != option.default:
            raise UserError(f"--{option.name.replace('_', '-')} {why}: leave it out")


def need(*packages: str) -> None:
    """Raises `UserError` for packages of the extra `bench` that are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is missing: pip install "semantica-diffusion[bench]"')


def listed(names: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(filter(None, (name.strip() for name in names.split(",")))))


def named_apart(models: Sequence[str]) -> None:
    """Raises `UserError` for two of --models that rows would not tell from each other."""
    if len({Path(model).name for model in models}) < len(models):
        raise UserError(f"--models {','.join(models)}: two are called alike, and so would be their rows")


def measured(path: Path, bench: "Bench") -> tuple[dict, dict, dict[str, dict]]:
    """What a file holds of a bench's races, which the bench then need not run; what it holds of anything else; and
    what it holds of each race that is run again all the same, by the race's name.

    Raises:
        UserError: it cannot be read, its rows are of another device, or of a full run where a quick one is asked for.
    """
    if not path.exists():
        return content_of([], []), content_of([], []), {}
    content, device = store.read(path), store.environment(bench.device)["device"]
    asked = {" ".join(race): names for race, names in bench.races.items()}
    found = {race: content_of([], []) for race in asked}
    rows, refused, others = {}, {}, content_of([], [])
    for benchmark in content["benchmarks"]:
        row, race = benchmark["extra_info"], benchmark["group"]
        if row["device"] != device:
            raise UserError(f"--resume: {path} holds rows of {row['device']}, this is {device}: give another file")
        here = row["impl"] in asked.get(race, ())
        (found[race] if here else others)["benchmarks"].append(benchmark)
        if here and getattr(bench, "quick", False) and not row.get("quick", False):
            raise UserError(f"--resume: {path} holds rows that a quick look would replace: give another file")
        if here and not stale(row) and bench.serves(row):
            rows[race, row["impl"]] = benchmark | {"extra_info": bench.renewed(row)}
    for row in store.refused(content):
        race = " ".join(filter(None, (row["problem"], row.get("direction"))))
        here = row["impl"] in asked.get(race, ())
        (found[race] if here else others)["semantica"]["wrong"].append(row)
        if here and lasting(row, bench, device):
            refused[race, row["impl"]] = row
    kept, kept_refused = [], []
    for race, names in list(bench.races.items()):
        every = [(" ".join(race), name) for name in names]
        runs = {rows[one]["extra_info"]["date"] for one in every if one in rows}
        # a race is of all its implementations, side by side: one that lacks some, or has some of two runs, is run again
        if all(one in rows or one in refused for one in every) and len(runs) <= 1:
            kept += [rows[one] for one in every if one in rows]
            kept_refused += [refused[one] for one in every if one in refused]
            del bench.races[race], found[" ".join(race)]
    more = {key: value for key, value in content.get("semantica", {}).items() if key != "wrong"}
    return {**content, **content_of(kept, kept_refused, more)}, others, found


def lasting(row: dict, bench: "Bench", device: str) -> bool:
    """Whether what was refused before would be refused now: our code may have been mended since, memory may be free,
    and a quick look, or another device, says nothing of this one."""
    alike = row.get("quick") == getattr(bench, "quick", False) and row.get("device") == device
    alike &= bench.which((row["problem"],)).get("model") == row.get("model")
    return alike and not stale(row) and not store.lacks_memory(row["reason"])


def content_of(benchmarks: list[dict], wrong: list[dict], more: dict | None = None) -> dict:
    """The shape of a results file."""
    return {"benchmarks": benchmarks, "semantica": {**(more or {}), "wrong": wrong}}


def measure(config: Outputs, bench: "Bench", kind: table.Kind) -> None:
    """Run a bench; store, show and draw what was found as the configuration asks. Rows are stored as they come."""
    from semantica.benchmarks.harness.suite import run

    names = {name for race in bench.races.values() for name in race}
    before, others, again = measured(config.json, bench) if config.resume else (None, content_of([], []), {})
    told = store.rows(config.json) if config.resume and config.json.exists() else []
    if before is not None:
        bench.wrong = list(before["semantica"]["wrong"])
        print(f"{len(before['benchmarks'])} rows are there, {len(bench.races)} races are left", file=sys.stderr)

    def joined(content: dict) -> dict:
        return {**content, "benchmarks": [*(before["benchmarks"] if before else ()), *content["benchmarks"]]}

    def stored(content: dict) -> dict:
        """With what was not asked for this time, and what was measured before of races that are still to be run; of
        what stands beside rows, the latest that there is."""
        done = {" ".join(race) for race in bench.outcomes}
        rest = [others, *(of for race, of in again.items() if race not in done)]
        found, old = content["semantica"], before["semantica"] if before else {}
        absent = {name: why for name, why in old.get("absent", {}).items() if name not in names} | bench.absent
        found = found | {key: value for key, value in old.items() if not found.get(key)} | {"absent": absent}
        found |= {"wrong": [*(row for of in rest for row in of["semantica"]["wrong"]), *content["semantica"]["wrong"]]}
        rows = [*(row for of in rest for row in of["benchmarks"]), *content["benchmarks"]]
        return {**content, "benchmarks": rows, "semantica": found}

    if config.json is not None:
        bench.keep = lambda content: write_json(config.json, stored(joined(content)))
    content = joined(run(bench)) if bench.races or before is None else before
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    # nothing left to do, and nothing new of what is there: the file stays as it is
    if config.json is not None and (bench.races or before is None or not all(row in told for row in rows)):
        write_json(config.json, stored(content))
    table.show(table.heads(kind.columns), table.cells(kind.columns, rows))
    for name, reason in bench.absent.items():
        print(f"absent: {name} ({reason})")
    for row in bench.wrong:
        print(f"WRONG, not timed: {' '.join(filter(None, table.refused(row)[:3]))}: {row['reason']}")
    for heading, shown in bench.tables(rows).items():
        print(f"\n{heading}")
        table.show(*shown)
    if config.html is not None:
        table.page(config.html, kind, rows, bench)
    if config.png is not None and rows:
        with written(config.png) as aside:
            kind.figure(rows).savefig(aside, dpi=150, format=config.png.suffix.lower()[1:])
