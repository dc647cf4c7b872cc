"""What the verbs of `semantica bench` share: running a suite of pytest-benchmark, tables, files."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from semantica.errors import UserError


def cumulative(switches: type, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A ladder: "plain", then each field of a dataclass of switches turned on in turn, in their order."""
    names = [field.name for field in dataclasses.fields(switches) if field.name not in without]
    ladder = {"plain": switches()}
    for i, name in enumerate(names):
        ladder[f"+ {name.replace('_', ' ')}"] = switches(**dict.fromkeys(names[: i + 1], True))
    return ladder


def writable(*paths: Path | None) -> None:
    """Raises `UserError` for a file whose folder does not exist: before hours of measuring, not after."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: {path.parent} is not a folder")


def need(*packages: str) -> None:
    """Raises `UserError` for packages of the extra `bench` that are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is missing: pip install "semantica-diffusion[bench]"')


def device_kind(name: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        UserError: no such device, or one of several GPUs: what is measured is the first that is visible.
    """
    from semantica.device import pick_device

    device = pick_device(name)
    if device.index:
        raise UserError(f"--device {name}: benchmarks run on the first GPU; choose it with CUDA_VISIBLE_DEVICES")
    return device.type


def run_suite(plan, module: ModuleType) -> dict:
    """The results file of pytest-benchmark, as a value.

    Args:
        plan: what to run; registered as a plugin under the module's name for it.
        module: the suite.
    """
    import pytest

    class Named:
        @staticmethod
        def pytest_configure(config):
            config.pluginmanager.register(plan, module.PLUGIN)

    suite, said = Path(module.__file__), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "rows.json"
        # no configuration but this: neither the user's project nor ours
        options = [
            "-c", os.devnull, "--rootdir", str(suite.parents[1]), "--noconftest", "--import-mode=importlib", "-q", "-s",
            "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist", f"--benchmark-json={stored}",
        ]  # fmt: skip
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*options, str(suite)], plugins=[Named()])
        if code == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or (code and not plan.wrong):
            raise RuntimeError(f"the suite broke:\n{said.getvalue()}")
        if not stored.exists() or not stored.stat().st_size:
            return {"benchmarks": [], "semantica": {"wrong": plan.wrong, "absent": plan.absent}}
        content = json.loads(stored.read_text())
        # results are published, host names are not
        for name in ("node", "release"):
            content["machine_info"].pop(name, None)
        return content


def publish(config, plan, content: dict, columns: tuple[str, ...], cells: Callable, page: Callable, figure: Callable):
    """Store, show and draw what a suite found, as `json`, `html` and `png` of a configuration ask.

    Args:
        columns, cells: heads of the table, and `(row, rows) -> tuple of text`.
        page: `(path, rows, plan)` writes a page. figure: of rows, at least one.
    """
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    if config.json is not None:
        write(config.json, json.dumps(content, indent=1))
    show(columns, [cells(row, rows) for row in rows])
    for name, reason in plan.absent.items():
        print(f"absent: {name} ({reason})")
    for row in plan.wrong:
        which = " ".join(filter(None, (row["problem"], row.get("direction"), row["impl"])))
        print(f"WRONG, not timed: {which}: {row['reason']}")
    if config.html is not None:
        page(config.html, rows, plan)
    if config.png is not None and rows:
        figure(rows).savefig(config.png, dpi=150)


def show(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table on the terminal; columns that are the same all along stand above it, empty ones nowhere."""
    from rich.console import Console
    from rich.table import Table

    values = [{row[i] for row in rows} for i in range(len(columns))]
    alike = [i for i, found in enumerate(values) if len(rows) > 1 and len(found) == 1]
    named = [f"{columns[i].strip()}: {rows[0][i]}" for i in alike if rows[0][i]]
    if named:
        print("; ".join(named))
    numeric = [all(re.fullmatch(r"[-0-9.%x/ ]*", cell) for cell in found) for found in values]
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        if i not in alike:
            table.add_column(column.strip(), justify="right" if numeric[i] else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell for i, cell in enumerate(row) if i not in alike))
    # as wide as the table: cut figures are worse than long lines
    Console(width=max(80, Console(width=1000).measure(table).maximum), highlight=False).print(table)


def write(path: Path, text: str) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
