"""What a crash, a full disk, a signal or a lost process leaves behind, and how a run goes on from it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from semantica import UserError
from semantica.cli import main
from semantica.train.processes import Vote, World
from semantica.train.run import checkpoint, storage
from semantica.train.run.storage import Damaged

HERE = Path(__file__).parent
plain = checkpoint.stager


def options(data: Path, out: Path, **changes) -> list[str]:
    given = dict(
        data=data, out=out, steps=6, batch=4, warmup=2, precision="fp32", held_out=0.2, log_every=1, save_every=2,
        eval_every=6, sample_every=100, workers=0, device="cpu",
    )  # fmt: skip
    return ["train", *(f"--{k.replace('_', '-')}={v}" for k, v in {**given, **changes}.items())]


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"{name}/x": torch.full((5,), value) for name in ("unet", "ema_unet", "optimizer")}


def load(root: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The newest whole checkpoint: its step, and what is in it."""
    state, reader = checkpoint.load_newest(root, World(), print)
    found = tensors(torch.nan)
    checkpoint.load(reader, found, None)
    return state["step"], found


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("standing", [False, True])
def test_a_crash_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, standing):
    """Also where a damaged checkpoint of the same step has to make room; then the same command just goes on."""
    root, scratch = tmp_path / "run", tmp_path / "crashes"
    if standing:
        (root / "checkpoints" / "step-00000002").mkdir(parents=True)
        (root / "checkpoints" / "step-00000002" / "unet.safetensors").write_bytes(b"half")
    command = [sys.executable, "-P", str(HERE / "processes" / "crash.py"), str(root), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    attempts = sorted(scratch.iterdir())
    assert len(attempts) == int(done.stdout) > 15
    steps = []
    for place in attempts:
        step, found = load(place / "checkpoints")
        assert all((t == step).all() for t in found.values())
        steps.append(step)
        checkpoint.tidy(place / "checkpoints")
        checkpoint.save(place / "checkpoints", 2, tensors(2), {}, keep=1)
        assert [p.name for p in (place / "checkpoints").iterdir()] == ["step-00000002"]
    # the new one counts from its rename on, and not before
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 2


def test_a_full_disk_keeps_the_older_checkpoint_and_is_said_at_the_next_step(tmp_path, monkeypatch):
    root = tmp_path / "checkpoints"
    saver = checkpoint.Saver(root, World(), keep=2, device=torch.device("cpu"))
    saver.save(1, tensors(1), {})
    saver.wait()
    before = contents(root / "step-00000001")

    def full(content, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    saver.save(2, tensors(2), {})
    saver.close()
    assert saver.vote == Vote.SAVE_FAILED
    with pytest.raises(UserError, match="no space left .* earlier checkpoints are intact"):
        saver.wait()
    assert saver.vote == Vote.CONTINUE
    assert [p.name for p in root.iterdir()] == ["step-00000001"] and contents(root / "step-00000001") == before


def test_a_save_holds_the_values_of_its_step_and_only_one_is_under_way(tmp_path, monkeypatch):
    root, gate, started = tmp_path / "checkpoints", threading.Event(), []

    def slow(content, path, metadata):
        started.append(path.parent.name)
        assert gate.wait(30)
        save_file(content, path, metadata)

    monkeypatch.setattr(storage, "save_file", slow)
    saver = checkpoint.Saver(root, World(), keep=2, device=torch.device("cpu"))
    live = tensors(1)
    saver.save(1, live, {})
    for tensor in live.values():
        tensor.fill_(7)
    second = threading.Thread(target=saver.save, args=(2, live, {}))
    second.start()
    second.join(0.3)
    assert second.is_alive() and set(started) == {".step-00000001.incomplete"} and not checkpoint.folders(root)
    gate.set()
    second.join(30)
    saver.wait()
    values = [load_file(root / f"step-0000000{n}" / "unet.safetensors")["x"].tolist() for n in (1, 2)]
    assert values == [[1.0] * 5, [7.0] * 5]


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), SafetensorError("I/O error: no")])
def test_a_disk_that_fails_is_one_line_and_costs_no_checkpoint(tmp_path, monkeypatch, error):
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint.save(root, step, tensors(step), {}, keep=3)

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(storage, "save_file", fails)
        with pytest.raises(UserError, match="step-00000003 cannot be written .*: look at the disk; earlier") as caught:
            checkpoint.save(root, 3, tensors(3), {}, keep=3)
    assert "\n" not in str(caught.value) and sorted(os.listdir(root)) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=3)
    digest = checkpoint.sha256

    def fails(path: Path) -> str:
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(checkpoint, "sha256", fails)
    assert load(tmp_path)[0] == 1
    assert "cannot be read (Input/output error)); trying the one before" in capsys.readouterr().out


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path):
    """Else one would ask the others for the checkpoint before, while they fill their weights from this."""
    folder = checkpoint.save(tmp_path, 1, tensors(1), {}, keep=3)
    world = World()
    world.all_gather_object = lambda own: [own, "unet.safetensors: OSError"]
    with pytest.raises(Damaged, match="^unet.safetensors: OSError$"):
        checkpoint.read(folder, ["unet.safetensors"], world)


def test_a_machine_that_locks_no_memory_saves_all_the_same(tmp_path, monkeypatch, caplog):
    class Refused:
        def stage(self, tensors):
            raise RuntimeError("Registering memory failed with cudaError: 2.\nmore of it")

    made = []

    def stager(pinned: bool):
        made.append(pinned)
        return Refused() if pinned else plain(pinned)

    forgotten = []
    monkeypatch.setattr(checkpoint, "stager", stager)
    monkeypatch.setattr(checkpoint, "forget_error", forgotten.append)
    saver = checkpoint.Saver(tmp_path, World(), keep=2, device=torch.device("cuda"))
    for step in (1, 2):
        saver.save(step, tensors(step), {})
    saver.wait()
    assert made == [True, False] and forgotten == [saver.device] and load(tmp_path)[0] == 2
    assert [r.getMessage() for r in caplog.records if r.name == checkpoint.__name__] == [
        "checkpoints are copied through memory that is not locked (Registering memory failed with cudaError: 2.)"
    ]


def test_keeping_does_not_count_what_is_damaged(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        checkpoint.save(root, step, tensors(step), {}, keep=3)
    (root / "step-00000006" / "unet.safetensors").write_bytes(b"half")
    assert load(root)[0] == 4
    # the run went back to step 4 and saves at 5: what was broken at 6 must not push out what is whole
    checkpoint.save(root, 5, tensors(5), {}, keep=2)
    assert [p.name for p in checkpoint.folders(root)] == ["step-00000004", "step-00000005"]


def test_names_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    root = tmp_path / "checkpoints"
    folder = checkpoint.save(root, 1, tensors(1), {}, keep=1)
    state = json.loads((folder / "state.json").read_text())
    shutil.copy(folder / "unet.safetensors", tmp_path / "unet.safetensors")
    state["sha256"]["../../unet.safetensors"] = state["sha256"].pop("unet.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="every checkpoint .* is damaged"):
        load(root)


@pytest.mark.parametrize("change", [{"step": 4}, {"step": None}, {"sha256": ["unet.safetensors"]}, {"sha256": None}])
def test_a_state_that_is_not_of_its_checkpoint_is_passed_over(tmp_path, change):
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        folder = checkpoint.save(root, step, tensors(step), {}, keep=2)
    state = json.loads((folder / "state.json").read_text()) | change
    (folder / "state.json").write_text(json.dumps({name: value for name, value in state.items() if value is not None}))
    step, found = load(root)
    assert step == 1 and all((tensor == 1).all() for tensor in found.values())


def test_another_models_checkpoint_is_refused(tmp_path):
    folder = checkpoint.save(tmp_path, 1, tensors(1), {}, keep=1)
    state, reader = checkpoint.load_newest(tmp_path, World(), print)
    assert folder.name == "step-00000001" and state["step"] == 1
    for other in ({"unet/x": torch.zeros(5)}, {**tensors(0), "unet/x": torch.zeros(6)}):
        with pytest.raises(UserError, match="belongs to another model"):
            checkpoint.load(reader, other, None)


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def same_end(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs are the same bytes."""
    one, other = (contents(checkpoint.folders(out / "checkpoints")[-1]) for out in (a, b))
    assert one.keys() == other.keys() and one["state.json"] == other["state.json"]
    assert one == other


def test_a_signal_to_all_saves_says_where_and_ends_well(photos, tmp_path):
    """As a scheduler preempts a job, data workers included; the same command then ends like a run left alone."""
    command = [sys.executable, "-P", "-m", "semantica.cli"]
    given = dict(steps=40, save_every=1000, workers=1)
    with subprocess.Popen(
        [*command, *options(photos, tmp_path / "run", **given)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for(lambda: logged(tmp_path / "run") >= 2, 100)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (step,) = re.findall(r"stopped: .* is saved at step (\d+) of 40; the same command continues it", out)
    assert [p.name for p in checkpoint.folders(tmp_path / "run" / "checkpoints")] == [f"step-{int(step):08d}"]
    assert "Traceback" not in err and not (tmp_path / "run" / "model_index.json").exists()
    # what remains is short: the run may now end two steps later
    last = int(step) + 2
    for name in ("run", "straight"):
        assert main(options(photos, tmp_path / name, steps=last, save_every=1000)) == 0
    same_end(tmp_path / "run", tmp_path / "straight")


def start(torchrun, arguments: list[str], *how: str) -> subprocess.Popen:
    return torchrun("-m", "semantica.cli", *arguments, options=how)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, by rank."""
    return sorted(child.pid for child in psutil.Process(process.pid).children())


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory, torchrun) -> Path:
    """A run of two processes with FSDP2 that nothing disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    process = start(torchrun, options(photos, out, parallel="fsdp"))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def said_by(process: subprocess.Popen) -> tuple[str, list[str]]:
    """What a process printed, and its lines on the other stream that are ours or tell of an accident."""
    out, err = process.communicate(timeout=200)
    return out, [line for line in err.splitlines() if re.match("semantica: |Traceback|terminate called|Fatal", line)]


def newest_whole(out: Path) -> int:
    """The step of the newest checkpoint, which is whole, as are all others."""
    root = out / "checkpoints"
    state, _ = checkpoint.load_newest(root, World(), pytest.fail)
    return state["step"]


@pytest.mark.slow
def test_a_process_killed_while_saving_costs_the_steps_since_the_last_checkpoint(photos, tmp_path, torchrun, straight):
    """SIGKILL of one of two in the middle of a save, torchrun starts both again: the same bytes in the end."""
    killed = options(photos, tmp_path / "killed", parallel="fsdp")
    process = torchrun(str(HERE / "processes" / "struck.py"), "save", "4", *killed, options=("--max-restarts=1",))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    # torchrun names the killed one or, where that was as quick, the other that lost it
    assert "continuing from step 2" in out and re.search(r"failed \(exitcode: (-9|1)\)", err)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))
    same_end(tmp_path / "killed", straight)


@pytest.mark.slow
def test_a_process_killed_in_a_step_ends_the_other_and_the_same_command_continues(
    photos, tmp_path, side_by_side, straight
):
    given = options(photos, tmp_path / "run", parallel="fsdp", timeout=20.0)
    both = side_by_side(*[[str(HERE / "processes" / "struck.py"), "step", "5", *given]] * 2)
    (_, lines), (_, others) = map(said_by, both)
    assert [p.returncode for p in both] == [1, -signal.SIGKILL] and not others
    assert len(lines) == 1 and lines[0].startswith("semantica: another of the 2 processes ended")
    # the save at step 4 may not have been complete
    step = newest_whole(tmp_path / "run")
    assert step in (2, 4)
    both = side_by_side(*[["-m", "semantica.cli", *given]] * 2)
    (out, _), _ = map(said_by, both)
    assert [p.returncode for p in both] == [0, 0] and f"continuing from step {step}" in out
    same_end(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_of_two_ends_both_in_one_line(photos, tmp_path, side_by_side):
    given = options(photos, tmp_path / "run", log_every=100)
    both = side_by_side(*[[str(HERE / "processes" / "struck.py"), "loss", "3", *given]] * 2)
    (_, lines), (_, others) = map(said_by, both)
    assert [p.returncode for p in both] == [1, 1] and not others
    assert len(lines) == 1 and lines[0].startswith("semantica: the loss or a gradient is not finite any more")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert newest_whole(tmp_path / "run") == 2 and not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.slow
def test_processes_that_refuse_or_find_no_other_leave_with_the_code_that_is_meant(photos, tmp_path, side_by_side):
    command = ["-m", "semantica.cli", *options(photos, tmp_path / "run")]
    both = side_by_side(command, [*command, "--lr=0.1"])
    (_, lines), (_, others) = map(said_by, both)
    assert [p.returncode for p in both] == [2, 2] and not others
    assert len(lines) == 1 and "the processes disagree on --lr: 0.0003 on process 0, 0.1 on process 1" in lines[0]
    for rank, count in ((0, 1), (1, 0)):
        (alone,) = side_by_side([*command, "--timeout=2"], world=2, first=rank)
        _, lines = said_by(alone)
        assert alone.returncode == 1 and len(lines) == count
        assert all("the processes did not come together within 2 s" in line for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_hung_process_ends_the_job_within_the_timeout(photos, tmp_path, torchrun):
    process = start(torchrun, options(photos, tmp_path / "run", steps=1000, timeout=5.0))
    wait_for(lambda: logged(tmp_path / "run") >= 2, 100)
    first, second = children(process)
    os.kill(second, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: first not in children(process), 30)
    assert time.monotonic() - began < 5 + 5
    os.kill(second, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("semantica: ")]
    assert len(said) == 1 and "another of the 2 processes ended, or did not answer within 5 s" in said[0]


@pytest.mark.slow
def test_a_signal_while_another_process_hangs_ends_this_one_long_before_the_timeout(photos, tmp_path, side_by_side):
    """It waits in C++ for gradients of the other, where no handler of Python's runs."""
    given = options(photos, tmp_path / "run", steps=1000, timeout=300.0)
    both = side_by_side(*[[str(HERE / "processes" / "struck.py"), "hang", "5", *given]] * 2)
    wait_for(lambda: logged(tmp_path / "run") >= 4, 100)
    wait_for(lambda: psutil.Process(both[1].pid).status() == psutil.STATUS_STOPPED, 30)
    time.sleep(1)
    both[0].send_signal(signal.SIGTERM)
    _, lines = said_by(both[0])
    assert both[0].returncode == 1
    assert len(lines) == 1 and lines[0].startswith("semantica: asked to stop, and another of the processes did not")
    assert newest_whole(tmp_path / "run") in (2, 4)


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_is_a_traceback_and_exit_code_1(photos, tmp_path, side_by_side):
    """Not the abort of a thread that serves the group; the other process says what it lost."""
    given = options(photos, tmp_path / "run", timeout=60.0)
    both = side_by_side(*[[str(HERE / "processes" / "struck.py"), "error", "3", *given]] * 2)
    _, lines = said_by(both[0])
    _, err = both[1].communicate(timeout=60)
    assert [p.returncode for p in both] == [1, 1]
    assert len(lines) == 1 and lines[0].startswith("semantica: another of the 2 processes ended")
    # PyTorch puts the rank before each line
    assert "Traceback (most recent call last)" in err and err.rstrip().endswith("LookupError: by the fault"), err


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(photos, tmp_path, torchrun):
    process = start(torchrun, options(photos, tmp_path / "run", steps=1000, save_every=1000, parallel="fsdp"))
    wait_for(lambda: logged(tmp_path / "run") >= 2, 100)
    os.kill(children(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    (step,) = re.findall(r"stopped: .* is saved at step (\d+) of 1000", out)
    assert [p.name for p in checkpoint.folders(tmp_path / "run" / "checkpoints")] == [f"step-{int(step):08d}"]


@pytest.mark.slow
def test_impossible_commands_are_one_line_and_exit_code_2_everywhere(photos, tmp_path, torchrun):
    for changes, message in ((dict(batch=5), "--batch 5 in --accumulate 1 parts"), (dict(step=5), "unrecognized")):
        process = start(torchrun, options(photos, tmp_path / "run", **changes))
        out, err = process.communicate(timeout=100)
        said = [line for line in err.splitlines() if line.startswith("semantica: ")]
        assert len(said) == 1 and message in said[0].lower(), err
        # torchrun signals what is still leaving once one has left
        codes = set(re.findall(r"exitcode\s*: (-?\d+)", err))
        assert "2" in codes <= {"2", "-15"} and not (tmp_path / "run").exists()
