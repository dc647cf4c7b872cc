"""The one store of figures: pytest-benchmark's JSON with our fields in `extra_info`; and what is read back from it."""

import datetime
import functools
import hashlib
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from semantica.errors import UserError

if TYPE_CHECKING:
    from semantica.benchmarks.harness.race import Times

# what makes two rows of different files the same measurement
IDENTITY = ("op", "impl", "shape", "layout", "dtype", "direction", "device")
# names of this package's implementations of an operator: a fault of one is ours
OURS = ("fused", "triton", "cuda")
# how allocators of torch, CUDA, C++, the engines and the system say that they have no more
NO_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|bad_alloc|ALLOC_FAILED|not enough memory|failed to allocate"
    r"|can(not|'t) allocate memory|ended with code -9\b|no space left",
    re.IGNORECASE,
)


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package is imported from, "+" where it was changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(changes)


def environment(device: str) -> dict:
    """What every row says about where, and in what, it was measured."""
    from semantica.benchmarks.harness.arithmetic import tf32

    return {**place(device), "tf32": tf32()}


@functools.cache
def place(device: str) -> dict:
    """Of `environment` what stays the same in a process."""
    import torch

    from semantica.doctor import installed, processor
    from semantica.kernels.launch import architecture

    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{processor()}, {torch.get_num_threads()} threads",
        "arch": architecture(torch.device(device)) if cuda else platform.machine(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def row(names: tuple[str, ...], times: "Times", device: str, flops: int, ceilings: dict[str, float]) -> dict:
    """What every row has.

    Args:
        names: in the order of `IDENTITY`, without the device's.
        ceilings: `copy_gbps` and `matrix_tflops`, and where there are several `matrix_tflops_` and a dtype; None, and
            so is what would be a share of it, where one could not be measured.
    """
    named, median = dict(zip(IDENTITY, names)), times.quantile(0.5)
    tflops, ceilings = flops / median / 1e12, {"copy_gbps": None, "matrix_tflops": None, **ceilings}
    return {
        **named,
        "uses": named["impl"],
        **{name: times.quantile(q) * 1e6 for name, q in (("median_us", 0.5), ("p20_us", 0.2), ("p80_us", 0.8))},
        "rounds": len(times.device),
        "flops": flops,
        "tflops": tflops,
        "share_of_matrix_rate": share(tflops, matrix_rate(ceilings, named["dtype"])),
        **ceilings,
        **environment(device),
    }


def matrix_rate(ceilings: dict[str, float | None], dtype: str) -> float | None:
    """TFLOP/s of a matrix product: of bf16 where whole runs compute in it, of the rows' own dtype where it is alone."""
    return ceilings.get(f"matrix_tflops_{dtype}", ceilings.get("matrix_tflops"))


def share(part: float | None, whole: float | None) -> float | None:
    """None where either could not be measured."""
    return None if part is None or whole is None else part / whole


def configured(folder: Path) -> str:
    """What tells the model in a folder from another one that is called alike: the hash of its configurations."""
    files = sorted(folder.glob("*/*config.json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def lacks_memory(reason: object) -> bool:
    """Whether something was refused for want of memory, by an error or by what was stored of it: that may pass."""
    name = type(reason).__name__ if isinstance(reason, BaseException) else ""
    return NO_MEMORY.search(f"{name} {reason}") is not None


def refused(content: dict) -> list[dict]:
    """Of a results file, what was not timed: `problem`, `impl` and `reason`, and where that was."""
    return content.get("semantica", {}).get("wrong", [])


class Replay:
    """A clock for pytest-benchmark that shows times measured before."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, benchmark, seconds: list[float]) -> None:
        """Let a benchmark fixture measure the given samples."""
        samples = iter(seconds)

        def advance() -> None:
            self.now += next(samples)

        # from zero each time, so that no digits are lost in a large sum
        def rewind() -> None:
            self.now = 0.0

        benchmark.pedantic(advance, setup=rewind, rounds=len(seconds), iterations=1)


def read(path: Path) -> dict:
    """A results file.

    Raises:
        UserError: no such file, no JSON, or not written by `semantica bench`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(benchmarks, list) or any(not set(IDENTITY) <= set(b.get("extra_info", {})) for b in benchmarks):
        raise UserError(f"{path} holds no results of semantica bench")
    return content


def rows(path: Path) -> list[dict]:
    return [benchmark["extra_info"] for benchmark in read(path)["benchmarks"]]


def identity(row: dict) -> tuple:
    return tuple(row[field] for field in IDENTITY)


def compare(before: list[dict], now: list[dict]) -> list[dict]:
    """Ratios of time, now to before, of the rows that both have; below 1 is faster.

    `low` and `high` are the band of noise: the ratio if one run had been at the 20th and the other at the 80th
    percentile of its calls. A change is `clear` when each median lies outside the other's band.
    """
    found, ratios = {identity(row): row for row in before}, []
    for row in now:
        was = found.get(identity(row))
        if was is None:
            continue
        clear = row["median_us"] > was["p80_us"] and was["median_us"] < row["p20_us"]
        clear |= row["median_us"] < was["p20_us"] and was["median_us"] > row["p80_us"]
        ratios.append(
            {
                **{field: row[field] for field in IDENTITY},
                "before_us": was["median_us"],
                "now_us": row["median_us"],
                "ratio": row["median_us"] / was["median_us"],
                "low": row["p20_us"] / was["p80_us"],
                "high": row["p80_us"] / was["p20_us"],
                "clear": clear,
                # how much the machine itself differed: above 1, it moved data more slowly
                "machine": share(was["copy_gbps"], row["copy_gbps"]),
            }
        )
    return ratios
