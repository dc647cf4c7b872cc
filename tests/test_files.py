"""Files are written whole or not at all: crashes, full disks, what stood there before, links, unsafe kinds."""

import errno
import os
from pathlib import Path

import pytest

from semantica import UserError, files
from semantica.files import aside_of, read_json, refuse_unsafe, sha256, write_json, write_text, written


def fill(path: Path, content: str, folder: bool) -> None:
    if folder:
        (path / "inner").mkdir(parents=True)
        path = path / "inner" / "a"
    path.write_text(content)


def content(path: Path) -> str:
    return (path / "inner" / "a" if path.is_dir() else path).read_text()


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def folder(request) -> bool:
    return request.param


class Crash(BaseException):
    pass


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_written_takes_its_place_in_one_go(tmp_path, folder, apart):
    path = tmp_path / "it"
    for now in ("first", "second"):
        with written(path, apart=apart) as aside:
            fill(aside, now, folder)
            assert not path.exists() or content(path) == "first"
        assert content(path) == now and os.listdir(tmp_path) == ["it"]


@pytest.mark.parametrize("error", [Crash(), OSError(errno.EIO, "broken"), ValueError("wrong"), KeyboardInterrupt()])
def test_a_failure_leaves_what_stood_there_and_nothing_else(tmp_path, folder, error):
    path = tmp_path / "it"
    for before in (None, "before"):
        if before:
            fill(path, before, folder)
        with pytest.raises(type(error)) as caught, written(path) as aside:
            fill(aside, "half", folder)
            raise error
        assert caught.value is error
        assert [content(p) for p in tmp_path.iterdir()] == [before] * bool(before)


def test_a_failure_at_any_call_of_the_system_is_made_good(tmp_path, folder, monkeypatch):
    path = tmp_path / "it"
    fill(path, "before", folder)
    real, count = {"fsync": os.fsync, "rename": Path.rename, "replace": Path.replace}, 0

    def failing(name: str, at: int):
        def call(*arguments):
            nonlocal count
            count += 1
            if count == at:
                raise OSError(errno.EIO, "broken")
            return real[name](*arguments)

        return call

    for at in range(1, 20):
        count = 0
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing("fsync", at))
            for name in ("rename", "replace"):
                patched.setattr(Path, name, failing(name, at))
            try:
                write(path, "after", folder)
                break
            except OSError:
                # the last sync is of the folder that they lie in: the new one is in its place by then
                assert content(path) in ("before", "after") and os.listdir(tmp_path) == ["it"]
    assert at > (5 if folder else 3) and content(path) == "after"


def write(path: Path, text: str, folder: bool) -> None:
    with written(path) as aside:
        fill(aside, text, folder)


def test_leftovers_of_a_killed_process_are_swept(tmp_path, folder):
    path = tmp_path / "it"
    for stale in (aside_of(path), aside_of(path, "old")):
        fill(stale, "stale", not folder)
    fill(path, "before", folder)
    write(path, "after", folder)
    assert content(path) == "after" and not aside_of(path).exists()


def test_a_full_disk_is_one_line(tmp_path, folder):
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(UserError, match=r"^no space left to write .*/it: .*what was there before is intact$"):
            with written(tmp_path / "it") as aside:
                fill(aside, "half", folder)
                raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []
    # libraries wrap it
    assert isinstance(files.full(tmp_path, RuntimeError("I/O error: No space left on device")), UserError)
    assert files.full(tmp_path, OSError(errno.EIO, "broken")) is None


def test_what_stands_there_by_then_can_be_kept_or_refused(tmp_path, folder):
    path = tmp_path / "it"
    with written(path, "keep") as aside:
        fill(aside, "ours", folder)
        fill(path, "theirs", folder)
    assert content(path) == "theirs"
    with pytest.raises(UserError, match="it exists by now: choose another name"):
        with written(path, "refuse") as aside:
            fill(aside, "ours", folder)
    assert content(path) == "theirs" and os.listdir(tmp_path) == ["it"]
    with written(tmp_path / "new", "refuse") as aside:
        fill(aside, "ours", folder)
    assert content(tmp_path / "new") == "ours"


def test_a_file_is_no_folder_and_the_other_way_round(tmp_path, folder):
    path = tmp_path / "it"
    fill(path, "before", folder)
    with pytest.raises(NotADirectoryError if not folder else IsADirectoryError), written(path) as aside:
        fill(aside, "after", not folder)
    assert content(path) == "before" and os.listdir(tmp_path) == ["it"]


def test_links_are_replaced_not_followed(tmp_path, folder):
    target, path = tmp_path / "target", tmp_path / "it"
    fill(target, "target", folder)
    path.symlink_to(target)
    write(path, "after", folder)
    assert content(path) == "after" and not path.is_symlink() and content(target) == "target"
    # one that leads nowhere, beside or inside
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    write(tmp_path / "nowhere", "after", folder)
    assert content(tmp_path / "nowhere") == "after"
    with written(tmp_path / "holds") as aside:
        aside.mkdir()
        (aside / "link").symlink_to("missing")
    assert (tmp_path / "holds" / "link").is_symlink()


def test_all_is_on_the_disk_before_it_takes_its_place(tmp_path, folder, monkeypatch):
    path, calls = tmp_path / "it", []
    monkeypatch.setattr(files, "sync", lambda p: calls.append((p.name, path.exists())))
    write(path, "after", folder)
    inside = [("inner", False), ("a", False)] if folder else []
    assert calls == [*inside, (".it.incomplete", False), (tmp_path.name, True)]
    calls.clear()
    with written(tmp_path / "again", durable=False) as aside:
        fill(aside, "after", folder)
    assert len(calls) == 1 and content(tmp_path / "again") == "after"


def test_equal_values_are_equal_bytes(tmp_path):
    for name, value in (("a", {"x": 1, "y": [2, "ü"]}), ("b", {"y": [2, "ü"], "x": 1})):
        write_json(tmp_path / name, value, sort_keys=True)
        assert read_json(tmp_path / name) == value
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    write_text(tmp_path / "c", "ü")
    assert (tmp_path / "c").read_bytes() == b"\xc3\xbc"
    for text, words in (("[1]", "holds a list"), ("{", "cannot be read as JSON")):
        (tmp_path / "d").write_text(text)
        with pytest.raises(UserError, match=words):
            read_json(tmp_path / "d")
    with pytest.raises(UserError, match="FileNotFoundError"):
        read_json(tmp_path / "e")


@pytest.mark.parametrize("name", ["a.bin", "weights.PT", "x.py", "y.npz", "z.ckpt"])
def test_unsafe_kinds_are_refused(tmp_path, name):
    (tmp_path / "a.safetensors").touch()
    refuse_unsafe(tmp_path, tmp_path / "missing")
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} is refused"):
        refuse_unsafe(tmp_path)
