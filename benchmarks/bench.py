"""`semantica bench`: time the operators, compare two runs, inspect what the compiler makes of the kernels."""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantica.errors import UserError

USAGE = """usage: semantica bench kernels [options]           time the operators beside other implementations
       semantica bench kernels --compile-only      compile every Triton kernel without a GPU: registers, spills, ...
       semantica bench compare A.json B.json       ratios of time, with the band of noise
       semantica bench table FILE.json ...         the rows as Markdown, stale ones marked

semantica bench kernels --help lists the options. Files are pytest-benchmark's JSON: `pytest-benchmark compare` reads
them too.
"""


@dataclass(frozen=True)
class KernelsConfig:
    """Time the operators beside other implementations. A wrong result is listed and not timed."""

    op: Literal["all", "group_norm", "cross_attention"] = "all"
    filter: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """Words that a row must all have, such as "bfloat16 channels_last fused"."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    direction: tuple[Literal["forward", "backward", "both"], ...] = ("forward", "backward")
    """What is timed: each alone, or "both" as one."""
    impl: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE:FUNCTION")] = ()
    """Own implementations, called as the operator given by --op is; with --compile-only, functions that yield
    (name, list of Launch)."""
    part: Annotated[str, tyro.conf.arg(metavar="K/N")] = "1/1"
    """Every N-th problem from the K-th on, where time is short: the files of all parts are one result."""
    quick: bool = False
    """A few small shapes and few rounds: to try things out, not to be quoted."""
    compile_only: bool = False
    """Compile the Triton kernels instead of running anything; needs no GPU."""
    arch: str = "sm_80,sm_90,sm_100,sm_120"
    """Architectures to compile for."""
    workers: int = 1
    """Processes that compile."""
    json: Path | None = None
    """Store the rows."""
    html: Path | None = None
    """Write a page of tables and roofline plots."""
    png: Path | None = None
    """Write the roofline plot as a picture."""


@dataclass(frozen=True)
class CompareConfig:
    """Ratios of time, B to A, row by row, with the band of noise. Below 1 is faster."""

    a: tyro.conf.Positional[Path]
    b: tyro.conf.Positional[Path]
    fail: Annotated[float | None, tyro.conf.arg(metavar="PERCENT")] = None
    """Exit with code 1 when a row became slower by more than this, clearly outside the noise."""


@dataclass(frozen=True)
class TableConfig:
    """Stored rows as Markdown; a row whose kernel has changed since is marked stale."""

    files: tyro.conf.Positional[tuple[Path, ...]]


def kernels(config: KernelsConfig) -> int:
    """Run the suite, or compile only; returns the exit code.

    Raises:
        UserError: impossible options, a package that is missing, or nothing to do.
    """
    for path in (config.json, config.html, config.png):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: {path.parent} is not a folder")
    if config.workers < 1:
        raise UserError(f"--workers is {config.workers}: give at least 1")
    if config.compile_only:
        return compile_only(config)
    if config.impl and config.op == "all":
        raise UserError("--impl needs --op group_norm or --op cross_attention: which of them it computes")
    if not config.direction:
        raise UserError("--direction needs at least one of forward, backward, both")
    for package in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is missing: pip install "semantica-diffusion[bench]"')

    from semantica.benchmarks.problems import OPS
    from semantica.benchmarks.suite_kernels import Plan
    from semantica.device import pick_device

    part = re.fullmatch(r"(\d+)/(\d+)", config.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        raise UserError(f"--part {config.part!r}: give K/N with 1 <= K <= N, such as 1/3")
    plan = Plan(
        ops=list(OPS) if config.op == "all" else [config.op],
        words=config.filter.split(),
        device=pick_device(config.device).type,
        directions=config.direction,
        own=config.impl,
        quick=config.quick,
        part=(int(part[1]), int(part[2])),
    )
    if not plan.rows():
        raise UserError(f"no row has all of {config.filter!r}: see `semantica bench kernels --quick` for names")
    content = run_suite(plan)
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    if config.json is not None:
        write(config.json, json.dumps(content, indent=1))
    show(COLUMNS, [cells(row, rows) for row in rows])
    for name, reason in plan.absent.items():
        print(f"absent: {name} ({reason})")
    for row in plan.wrong:
        print(f"WRONG, not timed: {row['problem']} {row['direction']} {row['reason']}")
    if config.html is not None:
        kernels_page(config.html, rows, plan)
    if config.png is not None and rows:
        figure(rows).savefig(config.png, dpi=150)
    # other packages' faults are listed, ours and the user's fail
    return 1 if any(row["impl"] == "fused" or row["impl"] in config.impl for row in plan.wrong) else 0


def run_suite(plan) -> dict:
    """The results file of pytest-benchmark, as a value."""
    import pytest

    from semantica.benchmarks import suite_kernels

    class Named:
        @staticmethod
        def pytest_configure(config):
            config.pluginmanager.register(plan, suite_kernels.PLUGIN)

    suite, said = Path(suite_kernels.__file__), io.StringIO()
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
        return json.loads(stored.read_text())


COLUMNS = (
    "operator", "shape", "layout", "dtype", "direction", "implementation", "median us", "p20 - p80", "wall us",
    "effective GB/s", "of copy", "moved GB/s", "of copy ", "TFLOP/s", "of matrix", "against eager", "error / eager's",
)  # fmt: skip


def cells(row: dict, rows: list[dict]) -> tuple[str, ...]:
    """A row as text. Effective: bytes that nobody can avoid; moved: what this one really moves, if known."""
    same = ("op", "shape", "layout", "dtype", "direction", "device")
    eager = [r for r in rows if r["impl"] == "eager" and all(r[k] == row[k] for k in same)]
    attention = row["op"] == "cross_attention"
    known = row["gbps"] is not None
    return (
        *(row[k] for k in ("op", "shape", "layout", "dtype", "direction")),
        row["impl"] if row["uses"] == row["impl"] else f"{row['impl']} ({row['uses']})",
        f"{row['median_us']:.1f}",
        f"{row['p20_us']:.1f} - {row['p80_us']:.1f}",
        f"{row['wall_us']:.1f}",
        f"{row['effective_gbps']:.1f}",
        f"{row['effective_share_of_copy']:.0%}",
        f"{row['gbps']:.1f}" if known else "",
        f"{row['share_of_copy']:.0%}" if known else "",
        f"{row['tflops']:.3g}" if attention else "",
        f"{row['share_of_matrix_rate']:.0%}" if attention else "",
        f"{eager[0]['median_us'] / row['median_us']:.2f}x" if eager else "",
        f"{row['max_err'] / row['max_err_eager']:.2f}" if row["max_err_eager"] else f"{row['max_err']:.1g} / 0",
    )


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


def figure(rows: list[dict]):
    """Roofline of all rows; the ceilings are medians over the races."""
    from semantica.report import roofline

    points: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        x, y = points.setdefault(f"{row['op']} {row['impl']}", ([], []))
        x.append(row["flops"] / row["effective_bytes"])
        y.append(row["tflops"])
    copy, matrix = (sorted(row[k] for row in rows)[len(rows) // 2] for k in ("copy_gbps", "matrix_tflops"))
    return roofline(points, copy, matrix)


def kernels_page(path: Path, rows: list[dict], plan) -> None:
    from semantica.report import Part, svg, write_page

    about = (
        "Implementations ran in random order within rounds, after the same warm-up, on inputs filled anew for every "
        "call and with cold caches; each result was checked against float64 before and after. Effective GB/s: bytes "
        "that no implementation can avoid over the median time; moved: bytes this one really moves, where known; "
        "shares are of a copy, and of a matrix product, timed in the same rounds."
    )
    parts = [Part(text=about, note=True)]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        parts.append(Part(f"Roofline, {dtype}", svg=svg(figure(own))))
    for op in dict.fromkeys(row["op"] for row in rows):
        body = tuple(cells(row, rows)[1:] for row in rows if row["op"] == op)
        parts.append(Part(op, columns=COLUMNS[1:], rows=body))
    wrong = tuple((row["problem"], row["direction"], row["impl"], row["reason"]) for row in plan.wrong)
    parts.append(Part("Wrong, not timed", columns=("problem", "direction", "implementation", "reason"), rows=wrong))
    absent = tuple(plan.absent.items())
    parts.append(Part("Absent", columns=("implementation", "reason"), rows=absent))
    if rows:
        facts = tuple((k, str(rows[0][k])) for k in ("device", "arch", "torch", "triton", "commit", "date"))
        parts.append(Part("What ran", columns=("", ""), rows=facts))
    write_page(path, "Semantica: operators", [part for part in parts if part.text or part.svg or part.rows], 1200)


def write(path: Path, text: str) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


# rows that a terminal shows one by one
SHOWN = 40
COMPILED_COLUMNS = (
    "specimen", "kernel", "arch", "warps", "stages", "constants", "registers", "spilled B (st / ld)", "shared B",
    "blocks/SM", "bound by", "occupancy", "tensor core", "loads (bits: n)", "stores (bits: n)", "atomics", "PTX",
)  # fmt: skip


def compiled_cells(row: dict) -> tuple[str, ...]:
    def pairs(counts: dict) -> str:
        return " ".join(f"{key}:{n}" for key, n in counts.items())

    constants = " ".join(f"{k}={v}" for k, v in row["constants"].items())
    start = (row["name"], row["kernel"], row["arch"], str(row["warps"]), str(row["stages"]), constants)
    if "error" in row:
        return (*start, row["error"], *[""] * (len(COMPILED_COLUMNS) - len(start) - 1))
    return (
        *start,
        str(row["registers"]),
        f"{row['spill_stores_bytes']} / {row['spill_loads_bytes']}",
        str(row["shared_bytes"]),
        str(row["blocks_per_sm"]),
        row["bound"],
        f"{row['occupancy']:.0%}",
        pairs(row["tensor"]),
        pairs(row["loads"]),
        pairs(row["stores"]),
        str(row["atomics"]),
        row["ptx"],
    )


def worst_by_kernel(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: over all launches of a kernel on an architecture."""
    columns = ("kernel", "arch", "launches", "refused", "registers", "spilled B", "shared B", "blocks/SM", "occupancy",
               "tensor core", "narrowest load", "narrowest store", "atomics")  # fmt: skip
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["arch"]), []).append(row)
    body = []
    for (kernel, arch), group in found.items():
        good = [row for row in group if "error" not in row]
        start = (kernel, arch, str(len(group)), str(len(group) - len(good)))
        if not good:
            body.append((*start, *[""] * (len(columns) - len(start))))
            continue
        narrow = [
            min(({int(w) for row in good for w in row[k] if w != "TMA"}), default="") for k in ("loads", "stores")
        ]
        body.append(
            (
                *start,
                f"{min(row['registers'] for row in good)} - {max(row['registers'] for row in good)}",
                str(max(row["spill_stores_bytes"] + row["spill_loads_bytes"] for row in good)),
                str(max(row["shared_bytes"] for row in good)),
                str(min(row["blocks_per_sm"] for row in good)),
                f"{min(row['occupancy'] for row in good):.0%}",
                " ".join(sorted({name for row in good for name in row["tensor"]})),
                *map(str, narrow),
                str(max(row["atomics"] for row in good)),
            )
        )
    return columns, body


def compile_only(config: KernelsConfig) -> int:
    """Table, JSON and page of what the compiler makes of every launch; 1 when one does not compile or does not fit."""
    from tqdm import tqdm

    from semantica.benchmarks.compile_only import SHIPPED, architectures, jobs, run

    words = config.filter.split() + ([config.op] if config.op != "all" else [])
    todo = jobs(config.impl or (SHIPPED,), architectures(config.arch), words)
    rows = list(tqdm(run(todo, config.workers), total=len(todo), unit=" kernels", leave=False, disable=None))
    if config.json is not None:
        write(config.json, json.dumps({"compiled": rows}, indent=1))
    body = [compiled_cells(row) for row in rows]
    # hundreds of rows are for the page; the terminal gets the worst of each kernel
    show(*((COMPILED_COLUMNS, body) if len(rows) <= SHOWN else worst_by_kernel(rows)))
    if config.html is not None:
        from semantica.report import Part, write_page

        about = (
            "Compiled without a GPU. Spilled bytes, accesses and tensor-core instructions are counted in the machine "
            "code as it stands, not as often as it runs. Blocks/SM is what registers, shared memory and threads allow."
        )
        columns, worst = worst_by_kernel(rows)
        page = [
            Part(text=about, note=True),
            Part("The worst of each kernel", columns=columns, rows=tuple(worst)),
            Part("Every launch", columns=COMPILED_COLUMNS, rows=tuple(body)),
        ]
        write_page(config.html, "Semantica: compiled kernels", page)
    bad = [row for row in rows if "error" in row or row["blocks_per_sm"] == 0]
    for row in bad:
        reason = row.get("error", f"does not fit: one block exceeds the {row.get('bound')} of a multiprocessor")
        print(f"semantica: {row['name']} {row['kernel']} {row['arch']}: {reason}", file=sys.stderr)
    return 1 if bad else 0


def compare(config: CompareConfig) -> int:
    """Print ratios; returns the exit code.

    Raises:
        UserError: a file is not ours, or the two have no row in common.
    """
    from semantica.benchmarks import store

    if config.fail is not None and not config.fail >= 0:
        raise UserError(f"--fail is {config.fail}: give a percentage of at least 0")
    ratios = store.compare(store.rows(config.a), store.rows(config.b))
    if not ratios:
        raise UserError(
            f"{config.a} and {config.b} have no row in common (operator, shape, implementation, device, ...)"
        )
    limit = None if config.fail is None else 1 + config.fail / 100
    slower = [row for row in ratios if limit is not None and row["clear"] and row["ratio"] > limit]
    columns = ("operator", "shape", "layout", "dtype", "direction", "implementation",
               "before us", "now us", "ratio", "noise", "machine", "")  # fmt: skip
    body = [
        (
            row["op"], row["shape"], row["layout"], row["dtype"], row["direction"], row["impl"],
            f"{row['before_us']:.1f}", f"{row['now_us']:.1f}", f"{row['ratio']:.3f}",
            f"{row['low']:.2f} - {row['high']:.2f}", f"{row['machine']:.2f}",
            "REGRESSED" if row in slower else ("slower" if row["ratio"] > 1 else "faster") if row["clear"] else "",
        )
        for row in ratios
    ]  # fmt: skip
    show(columns, body)
    print(f"{len(ratios)} rows in common, {len(slower)} regressed" if limit else f"{len(ratios)} rows in common")
    return 1 if slower else 0


def table(config: TableConfig) -> int:
    """Print Markdown.

    Raises:
        UserError: no file, or one that is not ours.
    """
    from semantica.benchmarks import store
    from semantica.report import markdown

    if not config.files:
        raise UserError("give at least one results file")
    rows = [row for path in config.files for row in store.rows(path)]
    keep = [i for i, name in enumerate(COLUMNS) if name not in ("wall us", "moved GB/s", "of copy ", "error / eager's")]
    body = []
    for row in rows:
        line = [cells(row, rows)[i] for i in keep]
        line[5] += " (stale)" if store.stale(row) else ""
        body.append(tuple(line))
    print(markdown(tuple(COLUMNS[i] for i in keep), body))
    for device in dict.fromkeys((row["device"], row["torch"], row["triton"]) for row in rows):
        print("\n{}, torch {}, triton {}.".format(*device))
    return 0


VERBS = {"kernels": (KernelsConfig, kernels), "compare": (CompareConfig, compare), "table": (TableConfig, table)}
