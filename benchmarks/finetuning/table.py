"""How the rows of fine-tuning public UNets are shown."""

import functools

from semantica.benchmarks.harness.table import (
    RACED,
    Column,
    Kind,
    against,
    against_fastest,
    mebibytes,
    milliseconds,
    share,
    times_by_shape,
)

KIND = Kind(
    title="Semantica: fine-tuning public UNets",
    about=(
        "The step of diffusers' text-to-image scripts, whole or by LoRA, each implementation in a process of its own, "
        "steps in turn, from the same weights on the same latents, noise and tokens. Error: relative, of the gradient "
        "of each parameter (root mean square over them) to stock diffusers in fp32; above 1e-4 in fp32, or 1.5 times "
        "that of stock diffusers in bf16, nothing is timed, and predictions and losses are held to the same. First "
        "step: with compiling. Operations: forward and backward, nothing computed twice. ~: to an implementation that "
        "memory did not hold beside this one."
    ),
    columns=(
        *RACED,
        milliseconds("median ms", "median_us"),
        milliseconds("p20 - p80", "p20_us", "p80_us", detail=True),
        Column("steps", "{rounds}", detail=True),
        Column("steps/s", lambda row, rows: f"{1e6 / row['median_us']:.3f}"),
        against("plain"),
        against("strong"),
        against_fastest(),
        Column("gradient's error", "{gradient_error:.1e}"),
        Column("stock bf16's", "{half_gradient_error:.1e}"),
        Column("prediction's", "{prediction_error:.1e}", detail=True),
        Column("first step s", "{first_s:.1f}"),
        mebibytes("peak MiB", "peak_bytes"),
        Column("TFLOP/s", "{tflops:.3g}", detail=True),
        share("of matrix", "share_of_matrix_rate"),
    ),
    by="shape",
    apart=2,
    figure=functools.partial(
        times_by_shape,
        label="ms a step (median; 20th to 80th percentile)",
        floor="operations at the measured bf16 matrix rate",
    ),
    figures=lambda rows: {"Time of a step": rows},
)
