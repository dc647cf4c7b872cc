"""How the rows of public UNets and decoders are shown."""

import functools

from semantica.benchmarks.harness.table import (
    RACED,
    Column,
    Kind,
    Row,
    against,
    against_fastest,
    apart,
    mebibytes,
    milliseconds,
    raced_with,
    share,
    times_by_shape,
)


def added(row: Row, rows: list[Row]) -> str:
    """What an adapter costs, with its standard error, which rows of before lack."""
    if "added_us" not in row:
        return ""
    error = f" ± {row['added_error_us'] / 1e3:.1f}" if "added_error_us" in row else ""
    return f"{row['added_us'] / 1e3:.1f}{error}"


def of_stock(row: Row, rows: list[Row]) -> str:
    """What an adapter costs, as a share of what it costs stock diffusers in the same arithmetic and form."""
    found = [other for other in raced_with(row, rows) if other["impl"] == row.get("stock")]
    if not found or "added_us" not in row:
        return ""
    # a share of what the noise may have made says nothing
    if found[0]["added_us"] <= 2 * found[0].get("added_error_us", 0.0):
        return "lost in noise"
    return f"{apart(row, found[0])}{row['added_us'] / found[0]['added_us']:.0%}"


KIND = Kind(
    title="Semantica: public UNets and decoders",
    about=(
        "UNet: from noise and tokens to latents by DDIM, both branches of guidance in one batch; decoder: from latents "
        "to pictures. Each implementation ran in a process of its own, in random order within rounds, on noise that no "
        "call had before. Error: relative, to stock diffusers in fp32; above 1e-3 in fp32, or 1.5 times the error of "
        "stock diffusers in bf16, nothing is timed. First call: with building and compiling. Adapter's: what an "
        "IP-Adapter adds to an evaluation, the median difference to the same UNet without it in the same rounds, with "
        "its standard error. ~: to an implementation that memory did not hold beside this one."
    ),
    columns=(
        *RACED,
        milliseconds("ms an evaluation", "evaluation_us"),
        milliseconds("p20 - p80 ms, the run", "p20_us", "p80_us"),
        Column("runs", "{rounds}", detail=True),
        against("plain"),
        against("strong"),
        against_fastest(),
        Column("adapter's ms", added),
        Column("of stock's", of_stock),
        Column("error", "{rel_error:.1e}"),
        Column("stock bf16's", "{half_error:.1e}"),
        Column("first call s", lambda row, rows: f"{row['build_s'] + row['first_s']:.1f}"),
        mebibytes("peak MiB", "peak_bytes"),
        Column("TFLOP/s", "{tflops:.3g}", detail=True),
        share("of matrix", "share_of_matrix_rate"),
    ),
    by="shape",
    apart=2,
    figure=functools.partial(
        times_by_shape,
        label="ms (median; 20th to 80th percentile)",
        floor="operations at the measured bf16 matrix rate",
    ),
    figures=lambda rows: {"Median time": rows},
)
