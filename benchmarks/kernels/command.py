"""`semantica bench kernels`: time the operators, or inspect what the compiler makes of the kernels."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from semantica.benchmarks.harness.suite import device_kind, need, publish, run_suite, show, writable, write
from semantica.errors import UserError


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


def kernels(config: KernelsConfig) -> int:
    """Run the suite, or compile only; returns the exit code.

    Raises:
        UserError: impossible options, a package that is missing, or nothing to do.
    """
    writable(config.json, config.html, config.png)
    if config.workers < 1:
        raise UserError(f"--workers is {config.workers}: give at least 1")
    if config.compile_only:
        return compile_only(config)
    if config.impl and config.op == "all":
        raise UserError("--impl needs --op group_norm or --op cross_attention: which of them it computes")
    if not config.direction:
        raise UserError("--direction needs at least one of forward, backward, both")
    need("pytest", "pytest_benchmark")

    from semantica.benchmarks.kernels import suite as suite_kernels
    from semantica.kernels import OPERATORS

    part = re.fullmatch(r"(\d+)/(\d+)", config.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        raise UserError(f"--part {config.part!r}: give K/N with 1 <= K <= N, such as 1/3")
    plan = suite_kernels.Plan(
        ops=list(OPERATORS) if config.op == "all" else [config.op],
        words=config.filter.split(),
        device=device_kind(config.device),
        directions=config.direction,
        own=config.impl,
        quick=config.quick,
        part=(int(part[1]), int(part[2])),
    )
    if not plan.rows():
        raise UserError(f"no row has all of {config.filter!r}: see `semantica bench kernels --quick` for names")
    content = run_suite(plan, suite_kernels)
    publish(config, plan, content, COLUMNS, cells, kernels_page, figure)
    # other packages' faults are listed, ours and the user's fail
    return 1 if any(row["impl"] == "fused" or row["impl"] in config.impl for row in plan.wrong) else 0


COLUMNS = (
    "operator", "shape", "layout", "dtype", "direction", "implementation", "median us", "p20 - p80", "wall us",
    "effective GB/s", "of copy", "moved GB/s", "of copy ", "TFLOP/s", "of matrix", "against eager", "error / eager's",
)  # fmt: skip
# left out of the README
DETAILS = ("wall us", "moved GB/s", "of copy ", "error / eager's")


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

    from semantica.benchmarks.kernels.compile_only import SHIPPED, architectures, jobs, run

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
