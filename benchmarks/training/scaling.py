"""How training speeds up with more processes: `semantica train` itself under torchrun, by its own log."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from semantica.benchmarks.harness.sources import source_hash
from semantica.benchmarks.harness.store import environment
from semantica.benchmarks.training import ROUNDS
from semantica.errors import ArtifactError, UserError
from semantica.progress import phase

# steps of a row in the log; the first row, with compiling, is not counted
EVERY = 4


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
            # torchrun's own code is 1 whatever happened; its report has those of the processes
            mistake = re.search(r"exitcode\s*: 2\b", done.stderr)
            kind = UserError if mistake else ArtifactError
            raise kind(f"training in {processes} processes failed: {said[0].removeprefix('semantica: ')}")
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
) -> list[dict]:
    """Train with each number of processes, `batch` pictures a step in each of them; at least `steps` count.

    On a CPU all processes have as many threads as the largest number of them leaves for one.

    Returns:
        For each number `processes`; `threads` of each, 0 where a GPU computes; `batch` of all together; `images_per_s`
        and `data_wait`, the share of time spent waiting for data, the median of each run; and what the code was.

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
    turns = [(turn, count) for turn in range(rounds) for count in counts]
    with phase(f"scaling: {rounds} rounds of {', '.join(map(str, counts))} processes", len(turns)) as done:
        for turn, count in turns:
            arguments = [
                f"--data={place / 'web' / 'train'}", f"--preset={preset}", f"--batch={batch * count}",
                f"--steps={EVERY * (1 + -(-steps // EVERY))}", f"--device={device}", "--compile", "--held-out=0",
                f"--workers={workers}", f"--log-every={EVERY}", "--sample-every=1000000", "--save-every=1000000",
            ]  # fmt: skip
            rows = run(count, threads, arguments, place / f"{count}-{turn}")[1:]
            speeds, waits = ([row[name] for row in rows] for name in ("images_per_s", "data_wait"))
            found[count].append((statistics.median(speeds), statistics.median(waits)))
            print(f"timed  {count} processes, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            done.update()
    arch = environment(device)["arch"]
    code = {"op": "scaling", "arch": arch, "kernel_hash": source_hash("scaling", arch)}
    return [
        {"processes": n, "threads": threads, "batch": batch * n}
        | dict(zip(("images_per_s", "data_wait"), map(list, zip(*measured))))
        | code
        for n, measured in found.items()
    ]
