"""What the verbs of `semantica bench` that measure share: their outputs, and the way from a bench to its figures."""

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
from semantica.files import write_json

if TYPE_CHECKING:
    from semantica.benchmarks.harness.suite import Bench


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
    """Go on where a killed run has stopped: what --json holds already is kept, except for what is stale by now."""

    def check(self) -> None:
        """Raises `UserError` for a file whose folder does not exist: before hours of measuring, not after."""
        if self.resume and self.json is None:
            raise UserError("--resume needs --json FILE: the rows to go on from")
        for path in (self.json, self.html, self.png):
            if path is not None and not path.parent.is_dir():
                raise UserError(f"{path} cannot be written: {path.parent} is not a folder")

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


def need(*packages: str) -> None:
    """Raises `UserError` for packages of the extra `bench` that are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is missing: pip install "semantica-diffusion[bench]"')


def named_apart(models: Sequence[str]) -> None:
    """Raises `UserError` for two of --models that rows would not tell from each other."""
    if len({Path(model).name for model in models}) < len(models):
        raise UserError(f"--models {','.join(models)}: two are called alike, and so would be their rows")


def measured(path: Path, bench: "Bench") -> dict:
    """What a file holds of a bench's races, which the bench then need not run.

    Raises:
        UserError: it cannot be read, or its rows are of another device.
    """
    if not path.exists():
        return {"benchmarks": [], "semantica": {"wrong": []}}
    content, device = store.read(path), store.environment(bench.device)["device"]
    fresh: dict[str, dict[str, dict]] = {}
    for benchmark in content["benchmarks"]:
        row = benchmark["extra_info"]
        if row["device"] != device:
            raise UserError(f"--resume: {path} holds rows of {row['device']}, this is {device}: give another file")
        # a few rounds of --quick stand for no others
        if not stale(row) and row.get("quick", False) == getattr(bench, "quick", False):
            fresh.setdefault(benchmark["group"], {})[row["impl"]] = benchmark
    wrong: dict[str, dict[str, dict]] = {}
    for row in content["semantica"]["wrong"]:
        # what was wrong is not for ever: our code may have been mended since
        if stale(row):
            continue
        wrong.setdefault(" ".join(filter(None, (row["problem"], row.get("direction")))), {})[row["impl"]] = row
    kept, refused = [], []
    for race, names in list(bench.races.items()):
        good, bad = (found.get(" ".join(race), {}) for found in (fresh, wrong))
        # a race is of all its implementations, side by side: one that lacks some is run again
        if {*good, *bad} >= {*names}:
            kept += [good[name] for name in names if name in good]
            refused += [bad[name] for name in names if name in bad]
            del bench.races[race]
    return {**content, "benchmarks": kept, "semantica": {**content["semantica"], "wrong": refused}}


def measure(config: Outputs, bench: "Bench", kind: table.Kind) -> None:
    """Run a bench; store, show and draw what was found as the configuration asks. Rows are stored as they come."""
    from semantica.benchmarks.harness.suite import run

    before = measured(config.json, bench) if config.resume else None
    if before is not None:
        bench.wrong = list(before["semantica"]["wrong"])
        print(f"{len(before['benchmarks'])} rows are there, {len(bench.races)} races are left", file=sys.stderr)

    def joined(content: dict) -> dict:
        return {**content, "benchmarks": [*(before["benchmarks"] if before else ()), *content["benchmarks"]]}

    if config.json is not None:
        bench.keep = lambda content: write_json(config.json, joined(content))
    # nothing left to do: the file stays as it is
    content = joined(run(bench)) if bench.races or before is None else before
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    if config.json is not None:
        write_json(config.json, content)
    table.show(table.heads(kind.columns), table.cells(kind.columns, rows))
    for name, reason in bench.absent.items():
        print(f"absent: {name} ({reason})")
    for row in bench.wrong:
        which = " ".join(filter(None, (row["problem"], row.get("direction"), row["impl"])))
        print(f"WRONG, not timed: {which}: {row['reason']}")
    for heading, shown in bench.tables(rows).items():
        print(f"\n{heading}")
        table.show(*shown)
    if config.html is not None:
        table.page(config.html, kind, rows, bench)
    if config.png is not None and rows:
        kind.figure(rows).savefig(config.png, dpi=150)
