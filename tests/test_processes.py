"""What the processes of a run agree on, which part each takes, and what a run does to the process that calls it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import semantica
from semantica import UserError, memory
from semantica.cli import main
from semantica.train import processes
from semantica.train.config import TrainConfig
from semantica.train.data.folders import scan
from semantica.train.data.loading import batches
from semantica.train.data.pairs import Pairs
from semantica.train.loop import train


def config(photos, out, **changes) -> TrainConfig:
    options = dict(data=str(photos), out=out, steps=1, batch=4, precision="fp32", held_out=0.0, workers=0, device="cpu")
    return TrainConfig(**{**options, **changes})


@pytest.mark.parametrize("where", ["semantica", "semantica.kernels", "semantica.train"])
@pytest.mark.parametrize("below", ["more.py", "room/more.py", "room/within/more.py"])
def test_the_code_that_processes_compare_is_that_of_all_rooms(tmp_path, monkeypatch, where, below):
    before = processes.code_digest()
    package = sys.modules[where]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert processes.code_digest() == before
    path = tmp_path / below
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("changed = True")
    first = processes.code_digest()
    path.write_text("changed = False")
    assert len({before, first, processes.code_digest()}) == 3


@pytest.mark.parametrize("room", ["export", "benchmarks"])
def test_what_training_does_not_run_is_not_compared(tmp_path, monkeypatch, room):
    """In an installed package these lie within it, in a checkout beside it."""
    before = processes.code_digest()
    (tmp_path / room).mkdir()
    (tmp_path / room / "more.py").write_text("changed = True")
    monkeypatch.setattr(semantica, "__path__", [*semantica.__path__, str(tmp_path)])
    assert processes.code_digest() == before


def test_each_process_takes_its_part_of_every_batch(photos):
    pairs = Pairs(scan(photos, "folders"), seed=3, image_size=8, global_batch=8)

    def take(batch, count, part=(0, 1)):
        feed = batches(pairs, first_index=16, batch=batch, workers=0, part=part)
        return [next(feed) for _ in range(count)]

    whole = take(4, 4)
    parts = [take(4, 4, (rank, 2)) for rank in (0, 1)]
    for batch, *halves in zip(whole, *parts):
        for name in ("index", "noise", "target", "condition", "u", "drop"):
            assert torch.equal(batch[name], torch.cat([half[name] for half in halves])), name
    assert torch.cat([b["index"] for b in whole]).tolist() == list(range(16, 32))


def test_processes_whose_processors_differ_are_told_so(photos, tmp_path, monkeypatch):
    """Of the same --precision auto, where one machine multiplies bf16 natively and another does not."""

    def all_gather_object(self, value):
        other = isinstance(value, dict) and "the arithmetic of a step" in value
        return [value, {"the arithmetic of a step": "float32 on cpu"} if other else value]

    monkeypatch.setattr(processes.World, "all_gather_object", all_gather_object)
    words = (
        "^the processes disagree on the arithmetic of a step: bfloat16 on cpu on process 0, float32 on cpu on process 1"
    )
    with pytest.raises(UserError, match=f"{words}: give all the same --precision and --device"):
        train(config(photos, tmp_path / "run", precision="bf16"))
    assert not (tmp_path / "run").exists()


def test_a_mode_without_torchrun_is_refused(photos, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="WORLD_SIZE are set and MASTER_PORT is not"):
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
            patched.setenv(name, value)
        train(config(photos, tmp_path / "run"))
    with pytest.raises(UserError, match="--parallel fsdp needs several processes: start them with 'torchrun"):
        train(config(photos, tmp_path / "run", parallel="fsdp"))
    with pytest.raises(UserError, match="--timeout is 0"):
        train(config(photos, tmp_path / "run", timeout=0.0))
    assert not (tmp_path / "run").exists()


def test_a_timeout_may_be_longer_than_clocks_go(monkeypatch):
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: False)
    limits = []

    def rendezvous(limit):
        limits.append(limit.total_seconds())
        raise processes.dist.DistStoreError("nobody")

    monkeypatch.setattr(processes, "fresh_rendezvous", rendezvous)
    for timeout in (float("inf"), 1e15, 60.0):
        with pytest.raises(processes.LostProcess):
            processes.World("ddp", timeout=timeout)
    assert limits == [processes.LONGEST, processes.LONGEST, 60]


def test_only_the_command_changes_what_its_process_does_with_freed_memory(photos, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: asked.append(True))
    train(config(photos, tmp_path / "call"))
    assert not asked
    options = {k: v for k, v in config(photos, tmp_path / "verb").record().items() if k in ("data", "out", "steps")}
    said = [f"--{k}={v}" for k, v in options.items()]
    assert main(["train", *said, "--batch=4", "--workers=0", "--held-out=0", "--device=cpu"]) == 0
    assert asked == [True]


# a thread that waits for a lock of C handles no signals, as in an exchange with other processes
WAITING = """
import ctypes
from semantica.train.preemption import Preemption
wait, lock = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
with Preemption(patience=0.3) as stop:
    wait(lock)
    print("waiting", flush=True)
    wait(lock)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks of glibc")
@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (0, 1)])
def test_a_process_that_waits_for_others_hears_a_signal(rank, world):
    """Of several the first says so in a line; one process alone waits for nobody and goes on."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WAITING],
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        if world == 1:
            time.sleep(1)
            assert process.poll() is None
        else:
            assert process.wait(timeout=30) == 1
    finally:
        process.kill()
    lines = process.communicate()[1].split("\n")
    assert [line for line in lines if line] == [
        "semantica: asked to stop, and another of the processes did not answer within 0 s: "
        "the same command continues from the newest complete checkpoint"
    ] * (rank == 0 and world == 2)


@pytest.mark.parametrize("said, lost", [
    ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", True),
    ("Application timeout caused pair closure", True),
    ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
])  # fmt: skip
def test_what_gloo_says_of_a_process_that_does_not_answer_is_known(said, lost):
    assert processes.lost(RuntimeError(said)) is lost
