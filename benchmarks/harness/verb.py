"""What the verbs of `semantica bench` that measure share: their outputs, and the way from a bench to its figures."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from semantica.benchmarks.harness import table
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

    def check(self) -> None:
        """Raises `UserError` for a file whose folder does not exist: before hours of measuring, not after."""
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


def measure(config: Outputs, bench: "Bench", kind: table.Kind) -> None:
    """Run a bench; store, show and draw what was found as the configuration asks."""
    from semantica.benchmarks.harness.suite import run

    content = run(bench)
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    if config.json is not None:
        write_json(config.json, content)
    table.show(table.heads(kind.columns), table.cells(kind.columns, rows))
    for name, reason in bench.absent.items():
        print(f"absent: {name} ({reason})")
    for row in bench.wrong:
        which = " ".join(filter(None, (row["problem"], row.get("direction"), row["impl"])))
        print(f"WRONG, not timed: {which}: {row['reason']}")
    for heading, shown in bench.tables().items():
        print(f"\n{heading}")
        table.show(*shown)
    if config.html is not None:
        table.page(config.html, kind, rows, bench)
    if config.png is not None and rows:
        kind.figure(rows).savefig(config.png, dpi=150)
