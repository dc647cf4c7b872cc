"""Mining at length: killed at any moment, on either engine, over more input, the result and the memory are the same."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from semantica.train.pages.config import MineConfig
from semantica.train.pages.mine import locked, mine

FIXED = ("tar", "safetensors", "index.json", "stats.json")


def shards_of(folder: Path) -> dict[str, bytes]:
    """Everything but the report, whose plots are made anew."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    assert not [name for name in files if "incomplete" in name or name.startswith("work")]
    return {name: path.read_bytes() for name, path in files.items() if name != "report.html"}


@pytest.fixture(scope="module")
def crawls(crawl, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("crawls")
    for number in range(5):
        crawl.site(6, host=f"s{number % 2}.org", first=10 * number).save(root / f"{number}.warc.gz")
    return root


def command(crawls: Path, out: Path, *options: str) -> list[str]:
    fixed = ["--encoder", "colour-and-shape", "--shard-mb", "1", "--processes", "2"]
    return [sys.executable, "-P", "-m", "semantica.cli", "pairs", str(crawls), "--out", str(out), *fixed, *options]


def undisturbed(crawls: Path, out: Path) -> tuple[dict[str, bytes], float]:
    began = time.monotonic()
    subprocess.run(command(crawls, out), check=True, capture_output=True, timeout=120)
    return shards_of(out), time.monotonic() - began


def kill_and_repeat(crawls: Path, out: Path, moments: list[float]) -> int:
    """SIGKILL the whole command at each moment, then let it end; how often it was still running."""
    killed = 0
    for moment in moments:
        process = subprocess.Popen(command(crawls, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    done = subprocess.run(command(crawls, out), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return killed


def test_a_killed_run_ends_with_the_same_bytes(crawls, tmp_path):
    wanted, seconds = undisturbed(crawls, tmp_path / "whole")
    # the last phases, where shards are written
    killed = kill_and_repeat(crawls, tmp_path / "killed", [0.8 * seconds])
    assert shards_of(tmp_path / "killed") == wanted and killed == 1
    assert sum(name.startswith("done/") for name in wanted) == 5


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(crawls, tmp_path):
    wanted, seconds = undisturbed(crawls, tmp_path / "whole")
    rng = random.Random(0)
    moments = [rng.uniform(0.1, 0.8) * seconds for _ in range(8)]
    for attempt in range(6):
        killed = kill_and_repeat(crawls, tmp_path / f"often-{attempt}", moments)
        assert shards_of(tmp_path / f"often-{attempt}") == wanted
        if killed:
            break
        # it ended before each of them: the machine is faster than it was
        moments = [moment / 2 for moment in moments]
    assert killed >= 1
    for number in range(12):
        moment = rng.uniform(0.2, 1.0) * seconds
        for attempt in range(6):
            out = tmp_path / f"{number}-{attempt}"
            hit = kill_and_repeat(crawls, out, [moment])
            assert shards_of(out) == wanted, number
            if hit:
                break
            # it ended before: the machine is faster than it was
            moment /= 2
        assert hit, number


def test_one_run_at_a_time(crawls, tmp_path):
    def run() -> subprocess.CompletedProcess:
        return subprocess.run(command(crawls, tmp_path / "out"), capture_output=True, text=True, timeout=60)

    (tmp_path / "out" / "work").mkdir(parents=True)
    # as another run holds it, for as long as this one needs to notice
    with locked(tmp_path / "out"):
        second = run()
        assert second.returncode == 2 and "another run is writing" in second.stderr
    assert run().returncode == 0 and shards_of(tmp_path / "out")
    # and one more finds nothing to do
    again = run()
    assert again.returncode == 0 and "nothing to do" in again.stdout


@pytest.mark.slow
def test_ray_gives_the_same_bytes(crawl, crawls, tmp_path):
    ray = pytest.importorskip("ray")
    wanted, _ = undisturbed(crawls, tmp_path / "local")
    # a GPU that exists by name alone: the encoder's actors are placed on it
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        options = dict(encoder="colour-and-shape", shard_mb=1, on="ray")
        mine(MineConfig((crawls,), tmp_path / "ray", **options))
    finally:
        ray.shutdown()
    assert shards_of(tmp_path / "ray") == wanted


def peak(arguments: list[str]) -> float:
    """MiB: the largest sum over the processes of a command of what each holds by itself."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most, tree = 0.0, psutil.Process(process.pid)

    def watch() -> None:
        nonlocal most
        while process.poll() is None:
            total = 0
            for one in [tree, *tree.children(recursive=True)] if tree.is_running() else ():
                try:
                    total += one.memory_full_info().uss
                except psutil.Error:
                    continue
            most = max(most, total / 2**20)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.wait(240) == 0
    watcher.join()
    return most


@pytest.mark.slow
def test_memory_stays_flat_while_the_input_grows_tenfold(crawl, tmp_path):
    # in one file, whose tables must not grow in memory, and over files
    crawl.site(60, host="one.org").save(tmp_path / "small" / "a.warc.gz")
    crawl.site(600, host="one.org").save(tmp_path / "large" / "a.warc.gz")
    for number in range(10):
        os.makedirs(tmp_path / "many", exist_ok=True)
        crawl.site(60, host=f"{number}.org", first=1000 * number).save(tmp_path / "many" / f"{number}.warc.gz")
    small, large, many = (peak(command(tmp_path / n, tmp_path / f"{n}-out", "--processes", "1"))
                          for n in ("small", "large", "many"))  # fmt: skip
    assert large < 1.5 * small and many < 1.5 * small, (small, large, many)
