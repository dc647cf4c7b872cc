"""How training speeds up with more processes: `semantica train` itself under torchrun, by its own log."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from semantica.errors import ArtifactError, UserError

# of each number of processes in turn, so that a slow spell hits all alike
ROUNDS = 3
# steps of a row in the log; the first row, with compiling, is not counted
EVERY = 4
COLUMNS = ("processes", "threads each", "batch", "images/s", "lowest - highest", "speed-up", "efficiency", "data wait")


@dataclass(frozen=True)
class Scaled:
    """One number of processes: images per second of all together, and the share of time spent waiting for data, each
    the median of a run, by round. threads: of each process; 0 where a GPU computes."""

    processes: int
    threads: int
    batch: int
    images_per_s: tuple[float, ...]
    data_wait: tuple[float, ...]


def launch(processes: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """torchrun's command before `semantica`'s own arguments, and the environment to run it in."""
    # -P: the root of a checkout must not be on sys.path
    start = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    limits = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return [*start, "--no-python", sys.executable, "-P", "-m", "semantica.cli"], {**os.environ, **limits}


def run(processes: int, threads: int, arguments: list[str], out: Path) -> list[dict]:
    """One training run; returns the rows of its log that hold a speed.

    Raises:
        UserError: it was refused, with its own words.
        ArtifactError: it broke.
    """
    command, environment = launch(processes, threads)
    command += ["train", f"--out={out}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("semantica: ")]
        if said:
            raise UserError(f"training in {processes} processes failed: {said[0].removeprefix('semantica: ')}")
        broken = re.findall(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception)\b.*)", done.stderr, re.MULTILINE)
        reason = broken[0] if broken else f"exit code {done.returncode}"
        raise ArtifactError(f"training in {processes} processes broke: {reason}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    return [row for row in rows if "images_per_s" in row]


def measure(
    counts: tuple[int, ...],
    preset: str,
    batch: int,
    steps: int,
    device: str,
    workers: int,
    place: Path,
    rounds: int = ROUNDS,
) -> list[Scaled]:
    """Train with each number of processes, `batch` pictures a step in each of them; at least `steps` count.

    On a CPU all processes have as many threads as the largest number of them leaves for one.

    Raises:
        UserError: more processes than GPUs, or a run was refused.
        ArtifactError: a run broke.
    """
    import torch

    from semantica.benchmarks.quality.web import draw_web

    if device == "cuda" and max(counts) > torch.cuda.device_count():
        raise UserError(f"--processes {max(counts)} on {torch.cuda.device_count()} GPUs: give at most one for each")
    threads = max(1, torch.get_num_threads() // max(counts)) if device == "cpu" else 0
    draw_web(place / "web", groups=16, images_per_group=16)
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    for turn in range(rounds):
        for count in counts:
            arguments = [
                f"--data={place / 'web' / 'train'}", f"--preset={preset}", f"--batch={batch * count}",
                f"--steps={EVERY * (1 + -(-steps // EVERY))}", f"--device={device}", "--compile", "--held-out=0",
                f"--workers={workers}", f"--log-every={EVERY}", "--sample-every=1000000", "--save-every=1000000",
            ]  # fmt: skip
            rows = run(count, threads, arguments, place / f"{count}-{turn}")[1:]
            speeds, waits = ([row[name] for row in rows] for name in ("images_per_s", "data_wait"))
            found[count].append((statistics.median(speeds), statistics.median(waits)))
            print(f"timed  {count} processes, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return [
        Scaled(count, threads, batch * count, *(tuple(column) for column in zip(*rounds)))
        for count, rounds in found.items()
    ]


def cells(scaled: list[Scaled]) -> list[tuple[str, ...]]:
    """Rows of `COLUMNS`; speed-up and efficiency are against the first row, by median."""
    body = []
    one = scaled[0]
    for row in scaled:
        speed = statistics.median(row.images_per_s)
        gain = speed / statistics.median(one.images_per_s)
        body.append(
            (
                str(row.processes),
                str(row.threads or ""),
                str(row.batch),
                f"{speed:.1f}",
                f"{min(row.images_per_s):.1f} - {max(row.images_per_s):.1f}",
                f"{gain:.2f}x",
                f"{gain * one.processes / row.processes:.0%}",
                f"{statistics.median(row.data_wait):.1%}",
            )
        )
    return body
