"""`semantica bench`: its verbs, and what reads their files: `compare` and `table`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from semantica.benchmarks.finetuning.table import KIND as TUNING
from semantica.benchmarks.harness.table import REFUSED, Column, as_markdown, cells, heads, refused, show
from semantica.benchmarks.kernels import command as bench_kernels
from semantica.benchmarks.kernels import tune_command as bench_tune
from semantica.benchmarks.loading import command as bench_loading
from semantica.benchmarks.quality import edits as bench_edits
from semantica.benchmarks.quality import guiders as bench_guiders
from semantica.benchmarks.quality import segment as bench_segment
from semantica.benchmarks.quality import streams as bench_streams
from semantica.benchmarks.quality.published import edited as bench_edited
from semantica.benchmarks.quality.published import subjects as bench_subjects
from semantica.benchmarks.sampling import command as bench_sample
from semantica.benchmarks.serving import command as bench_serve
from semantica.benchmarks.training import command as bench_train
from semantica.benchmarks.training import tables as training_tables
from semantica.benchmarks.unets.table import KIND as UNETS
from semantica.errors import UserError
from semantica.options import parse

USAGE = """usage: semantica bench kernels [options]           time the operators beside other implementations
       semantica bench kernels --compile-only      compile every Triton kernel without a GPU: registers, spills, ...
       semantica bench sample [options]            time whole sampling runs: latency, throughput, accuracy
       semantica bench sample --ladder             the plain pipeline, then each optimisation added in turn
       semantica bench sample --models sd-1.5      a public UNet and its decoder, or those of a diffusers folder
       semantica bench train [options]             time training steps: ladder, MFU, each operator's share
       semantica bench train --models sd-1.5       fine-tuning of a public UNet, whole and by LoRA
       semantica bench loading [options]           samples a second from one worker, decoders and what they lose
       semantica bench serve [options]             a server under load: throughput, latency, memory
       semantica bench guiders [options]           figures of ways of guidance, on drawn pictures
       semantica bench edits [options]             figures of edits by scores (sds, dds, cds), on drawn pictures
       semantica bench streams [options]           do samples follow a picture and a text at once, by kinds of fusion
       semantica bench pie-bench [options]         score edited pictures on PIE-Bench
       semantica bench dreambench [options]        score pictures of subjects on DreamBench or DreamBench++
       semantica bench segment [options]           open-vocabulary segmentation of drawn scenes, unseen crossings
       semantica bench compare A.json B.json       ratios of time, with the band of noise
       semantica bench table FILE.json ...         the rows as Markdown, stale ones marked
       semantica bench tune --op group_norm        tune an operator's launch table on the GPU at hand

semantica bench VERB --help lists the options. Files are pytest-benchmark's JSON: `pytest-benchmark compare` reads
them too.
"""


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
    summary: bool = False
    """Of kernels: geometric means over the shapes instead of every row."""


COMPARED = (
    Column("operator", "{op}"),
    Column("shape", "{shape}"),
    Column("layout", "{layout}"),
    Column("dtype", "{dtype}"),
    Column("direction", "{direction}"),
    Column("implementation", "{impl}"),
    Column("before us", "{before_us:.1f}"),
    Column("now us", "{now_us:.1f}"),
    Column("ratio", "{ratio:.3f}"),
    Column("noise", "{low:.2f} - {high:.2f}"),
    Column("machine", lambda row, rows: "" if row["machine"] is None else f"{row['machine']:.2f}"),
    Column("", "{verdict}"),
)


def compare(config: CompareConfig) -> int:
    """Print ratios; returns the exit code.

    Raises:
        UserError: a file is not ours, or the two have no row in common.
    """
    from semantica.benchmarks.harness import store

    if config.fail is not None and not config.fail >= 0:
        raise UserError(f"--fail is {config.fail}: give a percentage of at least 0")
    ratios = store.compare(store.rows(config.a), store.rows(config.b))
    if not ratios:
        raise UserError(
            f"{config.a} and {config.b} have no row in common (operator, shape, implementation, device, ...)"
        )
    limit = None if config.fail is None else 1 + config.fail / 100
    for row in ratios:
        regressed = limit is not None and row["clear"] and row["ratio"] > limit
        change = "slower" if row["ratio"] > 1 else "faster"
        row["verdict"] = "REGRESSED" if regressed else change if row["clear"] else ""
    slower = [row for row in ratios if row["verdict"] == "REGRESSED"]
    show(heads(COMPARED), cells(COMPARED, ratios))
    print(f"{len(ratios)} rows in common, {len(slower)} regressed" if limit else f"{len(ratios)} rows in common")
    return 1 if slower else 0


def table(config: TableConfig) -> int:
    """Print Markdown, a table for each kind of row, and what was not timed.

    Raises:
        UserError: no file, or one that is not ours.
    """
    from semantica.benchmarks.harness import store
    from semantica.benchmarks.harness.sources import stale
    from semantica.benchmarks.harness.summary import COLUMNS, EVALUATION, evaluations, summary
    from semantica.report import markdown

    if not config.files:
        raise UserError("give at least one results file")
    rows = [row for path in config.files for row in store.rows(path)]
    wrong = [row for path in config.files for row in store.refused(store.read(path))]
    if config.summary:
        rows = [row for row in rows if row["op"] not in KINDS]
        # races of operators alone have a direction
        wrong = [row for row in wrong if "direction" in row]
        if not rows:
            raise UserError("--summary is of operators' rows, and there are none: leave it out")
    # a table for each machine and version: what they measured is not one figure
    for machine in dict.fromkeys(map(machine_of, [*rows, *wrong])):
        own = [row for row in rows if machine_of(row) == machine]
        if config.summary:
            print(markdown(COLUMNS, summary(own)))
            if lines := evaluations(own):
                print(f"\nOne evaluation of each model:\n\n{markdown(EVALUATION, lines)}")
        else:
            every(own)
        if lines := [refused(row) for row in wrong if machine_of(row) == machine]:
            print(f"\nWrong, not timed:\n\n{markdown(REFUSED, lines)}")
        print("\n{}, torch {}, triton {}.\n".format(*machine))
    for path in () if config.summary else config.files:
        scaled = store.read(path).get("semantica", {}).get("scaling")
        if scaled:
            print(f"{path.name}: {training_tables.SCALING}\n")
            print(as_markdown(training_tables.SCALED, scaled, stale, "processes"))
    return 0


def machine_of(row: dict) -> tuple:
    # what was refused by earlier versions does not say where
    return tuple(row.get(field, "unknown") for field in ("device", "torch", "triton"))


def every(rows: list[dict]) -> None:
    """Print each row, a table for each kind."""
    from semantica.benchmarks.harness.sources import stale

    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(KINDS.get(row["op"], bench_kernels.KIND).title, []).append(row)
    for own in kinds.values():
        print(as_markdown(KINDS.get(own[0]["op"], bench_kernels.KIND).columns, own, stale))


# rows of whole runs have columns of their own; all others are operators'
KINDS = {"sample": bench_sample.KIND, "sample_ladder": bench_sample.KIND, "train": training_tables.KIND}
KINDS |= {"finetune": TUNING}
KINDS |= dict.fromkeys(("unet", "unet_ladder", "decoder", "decoder_ladder"), UNETS)
VERBS = {
    "kernels": (bench_kernels.KernelsConfig, bench_kernels.kernels),
    "sample": (bench_sample.SamplingConfig, bench_sample.sample),
    "train": (bench_train.TrainingConfig, bench_train.train),
    "loading": (bench_loading.LoadingConfig, bench_loading.loading),
    "serve": (bench_serve.ServeBenchConfig, bench_serve.serve),
    "edits": (bench_edits.EditsConfig, bench_edits.edits),
    "pie-bench": (bench_edited.PieConfig, bench_edited.score),
    "dreambench": (bench_subjects.SubjectsConfig, bench_subjects.score),
    "guiders": (bench_guiders.GuidersConfig, bench_guiders.guiders),
    "streams": (bench_streams.StreamsConfig, bench_streams.streams),
    "segment": (bench_segment.SegmentBenchConfig, bench_segment.segment),
    "compare": (CompareConfig, compare),
    "table": (TableConfig, table),
    "tune": (bench_tune.TuneConfig, bench_tune.tune),
}


def run(arguments: list[str]) -> int:
    """One benchmark, by its name and options; returns the exit code. Raises `UserError`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        raise UserError(f"unknown benchmark {name!r}: choose one of {', '.join(VERBS)}")
    config, function = VERBS[name]
    return function(parse(config, f"bench {name}", rest))
