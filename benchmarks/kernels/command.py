"""`semantica bench kernels`: time the operators, or inspect what the compiler makes of the kernels."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from semantica.benchmarks.harness.table import Column, Kind, against, against_fastest, cells, heads, share, show
from semantica.benchmarks.harness.verb import Outputs, leave_out, listed, measure, named_apart, need
from semantica.errors import UserError
from semantica.files import write_json


@dataclass(frozen=True)
class KernelsConfig(Outputs):
    """Time the operators beside other implementations. A wrong result is listed and not timed."""

    op: Annotated[str, tyro.conf.arg(metavar="all|NAME")] = "all"
    """One operator, by the name of its function."""
    models: Annotated[str, tyro.conf.arg(metavar="NAMES")] = ""
    """Instead, the shapes of public models in one guided evaluation of the UNet and one decoding of a picture: names
    such as sd-1.5 or sdxl-base, or folders of diffusers' pipelines, separated by commas; sd-1.5+ip-adapter has the
    adapter's stream too."""
    filter: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """Words that a row must all have, such as "bfloat16 channels_last fused"."""
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
    """Compile the Triton kernels, and with nvcc those of csrc/cuda, instead of running anything; needs no GPU."""
    host_cost: bool = False
    """Time what a call costs the host, instead of the kernels, which are left out where there is no GPU."""
    arch: str = "sm_80,sm_90,sm_100,sm_120"
    """Architectures to compile for."""
    workers: int = 1
    """Processes that compile."""


def kernels(config: KernelsConfig) -> int:
    """Run the suite, or compile only; returns the exit code.

    Raises:
        UserError: impossible options, a package that is missing, or nothing to do.
    """
    from semantica.kernels import OPERATORS

    config.check()
    if config.op not in ("all", *OPERATORS):
        raise UserError(f"--op {config.op!r} is unknown: expected all, {', '.join(OPERATORS)}")
    if config.workers < 1:
        raise UserError(f"--workers is {config.workers}: give at least 1")
    raced = ("models", "direction", "part", "quick", "resume", "png")
    if config.compile_only:
        leave_out(config, "says nothing to --compile-only", "host_cost", *raced)
        return compile_only(config)
    leave_out(config, "is for --compile-only", "arch", "workers")
    if config.host_cost:
        leave_out(config, "says nothing to --host-cost", "impl", "html", *raced)
        return host_cost(config)
    if config.impl and config.op == "all":
        raise UserError("--impl needs --op NAME: which operator it computes")
    if not config.direction:
        raise UserError("--direction needs at least one of forward, backward, both")
    need("pytest", "pytest_benchmark")

    from semantica.benchmarks.harness.store import OURS
    from semantica.benchmarks.kernels.suite import KernelBench

    part = re.fullmatch(r"(\d+)/(\d+)", config.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        raise UserError(f"--part {config.part!r}: give K/N with 1 <= K <= N, such as 1/3")
    models = listed(config.models)
    named_apart(models)
    bench = KernelBench(
        ops=tuple(OPERATORS) if config.op == "all" else (config.op,),
        words=tuple(config.filter.split()),
        device=config.device_kind(),
        directions=config.direction,
        own=config.impl,
        quick=config.quick,
        part=(int(part[1]), int(part[2])),
        models=models,
    )
    if not bench.races and not bench.absent.keys() & {problem.name for problem in bench.calls}:
        raise UserError(f"no row has all of {config.filter!r}: see `semantica bench kernels --quick` for names")
    measure(config, bench, KIND)
    # other packages' faults are listed, ours and the user's fail
    return 1 if any(row["impl"] in (*OURS, *config.impl) for row in bench.wrong) else 0


ABOUT = (
    "Implementations ran in random order within rounds, after the same warm-up, on inputs filled anew for every call, "
    "with a cold L2 and, on a processor, its L3 as the last calls left it; each result was checked against float64 "
    "before and after. Effective GB/s: bytes that no implementation can avoid over the median time; moved: bytes this "
    "one really moves, where known; shares are of a copy, and of a matrix product, timed in the same rounds."
)


def known(column: Column) -> Column:
    """Of the bytes that an implementation really moves, if anybody knows them."""
    return Column(column.head, lambda row, rows: "" if row["gbps"] is None else column.write(row, rows), detail=True)


def of_products(column: Column) -> Column:
    """What says something about matrix products alone: of operators whose products torch counts too."""

    def cell(row: dict, rows: list[dict]) -> str:
        from semantica.kernels import OPERATORS

        # a stored row may be of an operator that is not registered here
        operator = OPERATORS.get(row["op"])
        return column.write(row, rows) if operator and operator.flop_formulas else ""

    return Column(column.head, cell)


def implementation(row: dict, rows: list[dict]) -> str:
    return row["impl"] if row["uses"] == row["impl"] else f"{row['impl']} ({row['uses']})"


def error(row: dict, rows: list[dict]) -> str:
    return f"{row['max_err'] / row['max_err_eager']:.2f}" if row["max_err_eager"] else f"{row['max_err']:.1g} / 0"


def figure(rows: list[dict]):
    """Roofline of all rows; the ceilings are medians over the races, of those that could be measured."""
    from semantica.report import roofline

    points: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        x, y = points.setdefault(f"{row['op']} {row['impl']}", ([], []))
        x.append(row["flops"] / row["effective_bytes"])
        y.append(row["tflops"])
    measured = ([row[k] for row in rows if row[k] is not None] for k in ("copy_gbps", "matrix_tflops"))
    return roofline(points, *(sorted(found)[len(found) // 2] if found else None for found in measured))


KIND = Kind(
    title="Semantica: operators",
    about=ABOUT,
    columns=(
        Column("operator", "{op}"),
        Column("shape", "{shape}"),
        Column("layout", "{layout}"),
        Column("dtype", "{dtype}"),
        Column("direction", "{direction}"),
        Column("implementation", implementation),
        Column("median us", "{median_us:.1f}"),
        Column("p20 - p80", "{p20_us:.1f} - {p80_us:.1f}"),
        Column("wall us", "{wall_us:.1f}", detail=True),
        # bytes that nobody can avoid, and below those that this one really moves
        Column("effective GB/s", "{effective_gbps:.1f}"),
        share("of copy", "effective_share_of_copy"),
        known(Column("moved GB/s", "{gbps:.1f}")),
        known(share("of copy ", "share_of_copy")),
        of_products(Column("TFLOP/s", "{tflops:.3g}")),
        of_products(share("of matrix", "share_of_matrix_rate")),
        against("eager", "dtype"),
        against_fastest("dtype"),
        Column("calls", lambda row, rows: ", ".join(map(str, row.get("calls", {}).values())), detail=True),
        Column("error / eager's", error, detail=True),
    ),
    by="op",
    apart=1,
    figure=figure,
    figures=lambda rows: {
        f"Roofline, {dtype}": [row for row in rows if row["dtype"] == dtype]
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    },
)

# rows that a terminal shows one by one
SHOWN = 40


def compiled(head: str, form: str, error: str = "") -> Column:
    """A column that is empty where a kernel was not compiled, except for what it says then."""
    return Column(head, lambda row, rows: (error if "error" in row else form).format_map(row))


def counted(head: str, field: str, joint: str = ":") -> Column:
    """Of a number for each key."""
    return Column(head, lambda row, rows: " ".join(f"{key}{joint}{n}" for key, n in row.get(field, {}).items()))


COMPILED = (
    Column("specimen", "{name}"),
    Column("kernel", "{kernel}"),
    Column("arch", "{arch}"),
    Column("warps", "{warps}"),
    Column("stages", "{stages}"),
    counted("constants", "constants", "="),
    compiled("registers", "{registers}", "{error}"),
    compiled("spilled B (st / ld)", "{spill_stores_bytes} / {spill_loads_bytes}"),
    compiled("shared B", "{shared_bytes}"),
    compiled("blocks/SM", "{blocks_per_sm}"),
    compiled("bound by", "{bound}"),
    compiled("occupancy", "{occupancy:.0%}"),
    counted("tensor core", "tensor"),
    counted("loads (bits: n)", "loads"),
    counted("stores (bits: n)", "stores"),
    compiled("atomics", "{atomics}"),
    compiled("PTX", "{ptx}"),
)


def extreme(choose: Callable, *fields: str, form: str = "") -> Callable[[list[dict]], str]:
    """The least or the most of a sum of fields over rows."""
    return lambda good: format(choose(sum(row[field] for field in fields) for row in good), form)


def narrowest(field: str) -> Callable[[list[dict]], str]:
    return lambda good: str(min((int(width) for row in good for width in row[field] if width != "TMA"), default=""))


# of all launches of a kernel on an architecture that compiled: a head, and what stands below it
WORST = {
    "registers": lambda good: f"{extreme(min, 'registers')(good)} - {extreme(max, 'registers')(good)}",
    "spilled B": extreme(max, "spill_stores_bytes", "spill_loads_bytes"),
    "shared B": extreme(max, "shared_bytes"),
    "blocks/SM": extreme(min, "blocks_per_sm"),
    "occupancy": extreme(min, "occupancy", form=".0%"),
    "tensor core": lambda good: " ".join(sorted({name for row in good for name in row["tensor"]})),
    "narrowest load": narrowest("loads"),
    "narrowest store": narrowest("stores"),
    "atomics": extreme(max, "atomics"),
}


def worst_by_kernel(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: over all launches of a kernel on an architecture."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["arch"]), []).append(row)
    body = []
    for place, group in found.items():
        good = [row for row in group if "error" not in row]
        told = (worst(good) if good else "" for worst in WORST.values())
        body.append((*place, str(len(group)), str(len(group) - len(good)), *told))
    return ("kernel", "arch", "launches", "refused", *WORST), body


def host_cost(config: KernelsConfig) -> int:
    """Table and JSON of what calls cost the host."""
    from semantica.benchmarks.harness import store
    from semantica.benchmarks.kernels.host_cost import COLUMNS, run
    from semantica.kernels import OPERATORS

    need("triton")
    ops, device = tuple(OPERATORS) if config.op == "all" else (config.op,), config.device_kind()
    rows = run(device, ops, tuple(config.filter.split()))
    if not rows:
        raise UserError(f"no case has {config.filter!r} in its name")
    if config.json is not None:
        write_json(config.json, {"environment": store.environment(device), "host": rows})
    show(heads(COLUMNS), cells(COLUMNS, rows))
    return 0


def compile_only(config: KernelsConfig) -> int:
    """Table, JSON and page of what the compiler makes of every launch; 1 when one does not compile or does not fit."""
    from tqdm import tqdm

    from semantica.benchmarks.kernels import compile_cuda
    from semantica.benchmarks.kernels.compile_only import SHIPPED, architectures, jobs, run
    from semantica.nvcc import Unusable

    words = config.filter.split() + ([config.op] if config.op != "all" else [])
    archs = architectures(config.arch)
    todo = jobs(config.impl or (SHIPPED,), archs, words)
    rows = list(tqdm(run(todo, config.workers), total=len(todo), unit=" kernels", leave=False, disable=None))
    if not config.impl and (files := compile_cuda.sources()):
        try:
            found = compile_cuda.run(archs, words, config.workers)
            total = len(files) * len(archs)
            rows += sum(tqdm(found, total=total, unit=" CUDA files", leave=False, disable=None), [])
        except Unusable as error:
            print(f"CUDA kernels are not compiled: {error}", file=sys.stderr)
    if not rows:
        raise UserError(f"no kernel has {' '.join(words)!r} in its name")
    if config.json is not None:
        write_json(config.json, {"compiled": rows})
    whole, worst = (heads(COMPILED), cells(COMPILED, rows)), worst_by_kernel(rows)
    # hundreds of rows are for the page; the terminal gets the worst of each kernel
    show(*(whole if len(rows) <= SHOWN else worst))
    if config.html is not None:
        from semantica.report import Part, write_page

        about = (
            "Compiled without a GPU. Spilled bytes, accesses and tensor-core instructions are counted in the machine "
            "code as it stands, not as often as it runs. Blocks/SM is what registers, shared memory and threads allow."
        )
        page = [
            Part(text=about, note=True),
            Part("The worst of each kernel", columns=worst[0], rows=tuple(worst[1])),
            Part("Every launch", columns=whole[0], rows=tuple(whole[1])),
        ]
        write_page(config.html, "Semantica: compiled kernels", page)
    bad = [row for row in rows if "error" in row or row["blocks_per_sm"] == 0]
    for row in bad:
        reason = row.get("error", f"does not fit: one block exceeds the {row.get('bound')} of a multiprocessor")
        print(f"semantica: {row['name']} {row['kernel']} {row['arch']}: {reason}", file=sys.stderr)
    return 1 if bad else 0
