"""A sweep's processes: interrupted, killed, several at a time or in Ray, it ends with the same figures to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from semantica import UserError
from semantica.benchmarks.quality.sweep.command import SweepConfig, sweep
from semantica.benchmarks.quality.web import draw_web
from semantica.lock import held

# a network that a processor trains in no time, at a rate that shows in its samples
TRAIN = {
    "steps": 60, "batch": 4, "channels": [32], "depths": [1], "width": 32, "depth": 1, "heads": 1, "image_size": 16,
    "lr": 0.003, "warmup": 0, "ema": 0.9, "flip": False, "workers": 0, "device": "cpu", "precision": "fp32",
    "log_every": 1, "save_every": 5,
}  # fmt: skip
PAIRS, RECONSTRUCT, BROKEN = (f"kind-{kind}_seed-0" for kind in ("pairs", "reconstruct", "broken"))
# seconds after which something hangs: other work may hold the processors
PATIENCE = 1200


@pytest.fixture(scope="module")
def described(tmp_path_factory) -> Path:
    """A sweep of three cells, of which one has an encoder that is none."""
    folder = tmp_path_factory.mktemp("described")
    draw_web(folder / "web", groups=4, images_per_group=2)
    (folder / "none").mkdir()
    kinds = {
        "pairs": {"mode": "folders"},
        "broken": {"encoder": str(folder / "none")},
        "reconstruct": {"mode": "reconstruct"},
    }
    evaluate = {"data": str(folder / "web" / "val"), "conditions": 8, "n": 2, "steps": 2, "device": "cpu"}
    content = {
        "train": TRAIN | {"data": str(folder / "web" / "train"), "val": str(folder / "web" / "val")},
        "axes": {"kind": kinds},
        "evaluate": evaluate | {"guidance": [1, 4]},
    }
    path = folder / "SWEEP.json"
    path.write_text(json.dumps(content))
    return path


def start(described: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "semantica.cli", "sweep", str(described), "--out", str(out), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # these tests may run in the background, where a shell has interruptions ignored
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finished(process: subprocess.Popen, out: Path) -> list[dict]:
    """The rows of a sweep that has named the cell that fails, and has done all others."""
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, said + errors
    assert f"semantica: cell {BROKEN} failed: " in errors and "the same command tries them again" in errors
    content = json.loads((out / "sweep.json").read_text())
    assert {name: cell["state"] for name, cell in content["cells"].items()} == {
        PAIRS: "finished", BROKEN: "failed", RECONSTRUCT: "finished",
    }, errors  # fmt: skip
    # of a mistake, its own line
    assert "is of type None: expected a model of timm, or one of" in content["cells"][BROKEN]["reason"]
    assert [(row["cell"], row["guidance"]) for row in content["rows"]] == [
        (name, scale) for name in (PAIRS, RECONSTRUCT) for scale in (1.0, 4.0)
    ]
    assert not (out / ".lock").exists() and (out / "sweep.html").exists()
    return content["rows"]


def until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE, "it hangs"
        time.sleep(0.02)


def saved(out: Path, name: str) -> bool:
    return any((out / "runs" / name / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def undisturbed(described, tmp_path_factory) -> list[dict]:
    """Rows of two cells at a time."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    rows = finished(start(described, out, "--jobs", "2"), out)
    # training did something, and each setting something else
    assert len({json.dumps(row["figures"]) for row in rows}) == 4
    return rows


@pytest.mark.slow
def test_interrupted_and_killed_it_ends_with_the_same_rows(described, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = start(described, out)
    until(lambda: saved(out, PAIRS))
    with pytest.raises(UserError, match="another sweep writes into"):
        sweep(SweepConfig(described, out))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    # what it had started has left before it
    assert process.returncode == 130 and "stopping: trainings are saved" in errors
    assert not any(held(run / ".lock") for run in (out / "runs").iterdir())

    process = start(described, out)
    until(lambda: saved(out, RECONSTRUCT))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    first = (out / "cells" / PAIRS / "trained.json").read_bytes()
    # nobody tells its cell, which saves and leaves; until then the next sweep's cell waits
    assert finished(start(described, out), out) == undisturbed
    assert (out / "cells" / PAIRS / "trained.json").read_bytes() == first
    assert not held(out / "runs" / RECONSTRUCT / ".lock")


@pytest.mark.slow
def test_ray_ends_with_the_same_rows(described, undisturbed, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    assert finished(start(described, out, "--ray", "--ray-cpus", "1"), out) == undisturbed


@pytest.mark.slow
def test_more_processors_than_a_node_of_ray_has_are_refused(described, tmp_path):
    pytest.importorskip("ray")
    process = start(described, tmp_path / "out", "--ray", "--ray-cpus", "9999")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "--ray-cpus 9999: the largest node of Ray's cluster has" in errors
