"""One run at a time in a folder: refused while it lasts, free once its process is gone, workers or no workers."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest

from semantica import UserError, lock
from semantica.cli import main
from semantica.export.write import new_folder
from semantica.lock import locked
from semantica.train.config import TrainConfig
from semantica.train.data import encode
from semantica.train.loop import train
from semantica.train.preemption import Stop
from semantica.train.run import track

# takes the lock and starts a worker, which would outlive it by a minute
HOLDER = """
import os, pathlib, sys, time
from semantica.lock import locked
with locked(pathlib.Path(sys.argv[1]), "taken"):
    told, ready = os.pipe()
    if not (worker := os.fork()):
        os.write(ready, b"1")
        time.sleep(60)
    os.read(told, 1)
    print(worker, flush=True)
    time.sleep(60)
"""


def config(photos, out, **changes) -> TrainConfig:
    options = dict(
        data=str(photos), out=out, steps=2, batch=4, precision="fp32", held_out=0.2, workers=0, device="cpu"
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})


def test_a_killed_holder_is_no_holder_though_its_workers_live(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-P", "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match="^taken$"), locked(path, "taken"):
                pytest.fail("two hold one lock")
            holder.kill()
            holder.wait()
            os.kill(worker, 0)
            with locked(path, "taken"):
                assert path.exists()
        finally:
            os.kill(worker, signal.SIGKILL)
            holder.kill()
    assert os.listdir(tmp_path) == []


def test_a_lock_is_for_one_user_of_a_process_and_on_a_file_that_is_there(tmp_path, monkeypatch):
    path, alone = tmp_path / "lock", lock.alone
    with locked(path, "first"), pytest.raises(UserError, match="^second$"), locked(path, "second"):
        pytest.fail("two hold one lock")

    def late(descriptor: int) -> bool:
        # the holder of before has removed the file after it was opened here
        monkeypatch.setattr(lock, "alone", alone)
        path.unlink()
        return alone(descriptor)

    monkeypatch.setattr(lock, "alone", late)
    with locked(path, "first"), pytest.raises(UserError), locked(path, "second"):
        pytest.fail("two hold one lock")
    assert not path.exists() and not lock.HELD


class Second(Stop):
    """Starts another training into the same folder within the first one's step."""

    def __init__(self, settings: TrainConfig):
        self.settings, self.said = settings, []

    def __call__(self) -> bool:
        before = {path.name: path.read_bytes() for path in self.settings.out.iterdir() if path.is_file()}
        with pytest.raises(UserError) as refused:
            train(dataclasses.replace(self.settings, steps=9))
        self.said.append(str(refused.value))
        assert before == {path.name: path.read_bytes() for path in self.settings.out.iterdir() if path.is_file()}
        return False


def test_two_trainings_do_not_write_into_one_folder(photos, tmp_path):
    settings = config(photos, tmp_path / "run", steps=1)
    second = Second(settings)
    train(settings, second)
    said = f"another training writes into {settings.out}: wait for it, or choose another --out"
    assert second.said == [said]
    assert (settings.out / "checkpoints" / "step-00000001").is_dir() and not (settings.out / ".lock").exists()


def test_a_run_that_cannot_begin_lets_go_of_its_folder_and_of_its_tracker(photos, tmp_path, monkeypatch):
    settings, ended = config(photos, tmp_path / "run"), []

    class Tracker:
        def finish(self):
            ended.append(self)

    def refuse(*_):
        raise UserError("the checkpoint belongs to another model")

    monkeypatch.setattr(track, "begin", lambda *_: Tracker())
    monkeypatch.setattr("semantica.train.setup.resume", refuse)
    with pytest.raises(UserError, match="another model"):
        train(dataclasses.replace(settings, track="wandb"))
    assert len(ended) == 1 and not lock.HELD and not (settings.out / ".lock").exists()


def test_a_tracker_begins_once_the_folder_can_be_written(photos, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(track, "begin", lambda *arguments: begun.append(arguments))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        train(config(photos, tmp_path / "file" / "run", track="wandb"))
    assert begun == []


def test_two_runs_do_not_store_tokens_in_one_folder(home, tmp_path, monkeypatch, capsys):
    out, write, codes = tmp_path / "tokens", encode.write_unit, []
    command = ["pairs", "--tokens", str(home / "photos"), "--out", str(out), "--encoder", str(home / "dino")]
    command += ["--encoder-size", "28", "--precision", "fp32", "--processes", "1"]

    def meanwhile(*arguments):
        if not codes:
            codes.append(main(command))
        write(*arguments)

    monkeypatch.setattr(encode, "write_unit", meanwhile)
    assert main(command) == 0 and codes == [2]
    assert f"another run stores tokens in {out}: wait for it" in capsys.readouterr().err
    assert not (out / ".lock").exists()


def test_two_exports_do_not_write_one_bundle(tmp_path):
    out = tmp_path / "bundle"
    with new_folder(out) as folder:
        (folder / "a").write_text("first")
        with pytest.raises(UserError, match="another process makes .*bundle: wait for it"), new_folder(out):
            pytest.fail("two make one folder")
        assert (folder / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["bundle"] and os.listdir(out) == ["a"]
