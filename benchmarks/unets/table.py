"""How the rows of public UNets and decoders are shown."""

import functools

from semantica.benchmarks.harness.table import Column, Kind, against, mebibytes, milliseconds, times_by_shape

KIND = Kind(
    title="Semantica: public UNets and decoders",
    about=(
        "UNet: from noise and tokens to latents by DDIM, both branches of guidance in one batch; decoder: from latents "
        "to pictures. Each implementation ran in a process of its own, in random order within rounds, on noise that no "
        "call had before. Error: relative, to stock diffusers in fp32; above 1e-3 in fp32, or 1.5 times the error of "
        "stock diffusers in bf16, nothing is timed. First call: with building and compiling."
    ),
    columns=(
        Column("operator", "{op}", detail=True),
        Column("problem", "{shape}"),
        Column("implementation", "{impl}"),
        Column("arithmetic", "{dtype}"),
        milliseconds("ms an evaluation", "evaluation_us"),
        milliseconds("p20 - p80 ms, the run", "p20_us", "p80_us"),
        Column("runs", "{rounds}", detail=True),
        against("plain"),
        against("strong"),
        Column("error", "{rel_error:.1e}"),
        Column("stock bf16's", "{half_error:.1e}"),
        Column("first call s", lambda row, rows: f"{row['build_s'] + row['first_s']:.1f}"),
        mebibytes("peak MiB", "peak_bytes"),
        Column("TFLOP/s", "{tflops:.3g}", detail=True),
        Column("of matrix", "{share_of_matrix_rate:.0%}"),
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
