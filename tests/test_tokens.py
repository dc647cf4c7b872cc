"""Stored tokens: those of the encoder, the same bytes after a kill, the same training; what is refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from semantica import UserError
from semantica.cli import main
from semantica.images import fit, load_image, to_tensor
from semantica.model.encoders import frozen_encoder
from semantica.train.config import TrainConfig
from semantica.train.data import encode, tokenfile
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs
from semantica.train.data.tokens import read_index
from semantica.train.loop import train

SIDE = 28


def store(home: Path, out: Path, photos: Path | None = None, **changes) -> int:
    return main(["pairs", "--tokens", str(photos or home / "photos"), "--out", str(out), *options(home, **changes)])


def options(home: Path, encoder: Path | str | None = None, size: int = SIDE) -> list[str]:
    words = ["--encoder", str(encoder or home / "dino"), "--encoder-size", str(size)]
    return [*words, "--precision", "fp32", "--processes", "1"]


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "tokens"))


@pytest.fixture
def photos(home, tmp_path) -> Path:
    # file times are kept
    return Path(shutil.copytree(home / "photos", tmp_path / "photos"))


def config(home: Path, out: Path, **changes) -> TrainConfig:
    options = dict(
        data=str(home / "photos"), out=out, steps=3, batch=4, warmup=2, precision="fp32", held_out=0.2, log_every=1,
        eval_every=3, sample_every=9, workers=0, device="cpu", encoder=str(home / "dino"), encoder_size=SIDE,
        image_size=16, conditioning="both", ema=0.5,
    )  # fmt: skip
    return TrainConfig(**options | changes)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the timings."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "stats.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_tokens_are_those_of_the_encoder_for_both_views(home, stored):
    encoder = frozen_encoder(str(home / "dino"), SIDE)
    data = open_data(home / "photos", tokens=stored)
    for path in ("g0/0.png", "g3/6.png", "g5/2.png"):
        picture = load_image(home / "photos" / path)
        for mirror in (False, True):
            expected = encoder(to_tensor([fit(picture, SIDE, mirror=mirror)]))
            tokens, pooled = data.tokens.read(path, mirror)
            for actual, wanted in ((tokens, expected.tokens[0]), (pooled, expected.pooled[0])):
                assert actual.dtype == np.float16 and actual.shape == wanted.shape
                # fp16 keeps 11 bits; batches of another size sum in another order
                bound = 2**-11 * wanted.abs() + 2**-25 + 1e-5
                assert ((torch.from_numpy(actual.astype(np.float32)) - wanted).abs() <= bound).all()
                # the bytes of the mapped file itself
                assert not actual.flags.owndata and not actual.flags.writeable
    plain, mirrored = (data.tokens.read("g0/0.png", mirror)[0].astype(np.float32) for mirror in (False, True))
    assert np.abs(plain - mirrored).max() > 0.01


def test_any_safetensors_reader_can_read_them(stored):
    index = read_index(stored)
    assert [entry["pictures"] for entry in index["files"]] == [42]
    with safe_open(stored / "part-00000.safetensors", "numpy") as file:
        assert file.get_slice("tokens").get_shape() == [42, 2, 4, 32] and file.get_tensor("pooled").shape == (42, 2, 32)
        assert np.isfinite(file.get_tensor("tokens")).all()
    encoder = index["identity"]["encoder"]
    assert encoder["image_size"] == SIDE and len(encoder["weights_sha256"]) == 64
    assert index["identity"]["arithmetic"] == {"batch": 32, "compile": False, "device": "cpu", "precision": "float32"}


def test_the_pass_says_what_it_costs_and_saves(stored, capsys):
    stats = json.loads((stored / "stats.json").read_text())
    # two views of four tokens and a pooled vector, 32 wide, two bytes each
    assert stats["pictures"] == 42 and stats["token_bytes"] - 42 * 2 * 5 * 32 * 2 < 512
    # patch embedding; query, key, value, output; scores and their sum; MLP, for 5 tokens in 2 layers
    macs = 4 * 3 * 14 * 14 * 32 + 2 * (5 * 4 * 32 * 32 + 2 * 5 * 5 * 32 + 2 * 5 * 32 * 4 * 32)
    assert stats["encoder_macs"] == macs and stats["encoder_seconds"] > 0 and stats["reading_seconds"] > 0
    assert main(["pairs", "--report", str(stored)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{stats['token_bytes'] / 42:,.0f} bytes a picture" in said and "4 x 32, fp16" in said


def killed_at(home: Path, out: Path, moment) -> None:
    """Run the command in a process of its own, and kill it when `moment()` is true."""
    code = (
        "import sys, time; from semantica.train.data import encode, tokenfile\n"
        "encode.FILE = 10 * encode.picture_bytes((4, 32))\n"
        "real = tokenfile.write_json\n"
        "def slow(*a, **k): real(*a, **k); time.sleep(0.3)\n"
        "tokenfile.write_json = slow\n"
        "from semantica.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-P", "-c", code, "pairs", "--tokens", str(home / "photos"), "--out", str(out)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen([*command, *options(home)], **quiet, start_new_session=True) as process:
        deadline = time.monotonic() + 100
        while not moment() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)


def test_killed_and_continued_are_the_same_bytes(home, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "FILE", 10 * encode.picture_bytes((4, 32)))
    assert store(home, tmp_path / "whole") == 0
    whole = content(tmp_path / "whole")
    assert sum(name.startswith("part-") for name in whole) == 3 * 5
    out = tmp_path / "parts"
    killed_at(home, out, lambda: (out / "part-00001.json").exists())
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match="not finished"):
        open_data(home / "photos", tokens=out)
    (out / ".part-00002.tokens.incomplete").write_bytes(b"half")
    first = (out / "part-00000.safetensors").stat().st_mtime_ns
    assert store(home, out) == 0
    assert content(out) == whole and (out / "part-00000.safetensors").stat().st_mtime_ns == first


def test_pictures_that_are_prepared_in_another_way_are_no_part_of_the_same_tokens(home, copy, tmp_path, capsys):
    """The same weights, once half of the tokens are stored."""
    (copy / "index.json").unlink()
    next(copy.glob("part-*.json")).unlink()
    before, encoder = content(copy), shutil.copytree(home / "dino", tmp_path / "dino")
    (encoder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 56}, "crop_size": 28}))
    assert store(home, copy, encoder=encoder) == 2 and content(copy) == before
    assert "holds tokens of pictures that were prepared with image_size=28" in capsys.readouterr().err


def test_a_crash_at_any_point_of_a_unit_is_made_good(home, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "FILE", 20 * encode.picture_bytes((4, 32)))
    assert store(home, tmp_path / "whole") == 0
    whole, out = content(tmp_path / "whole"), tmp_path / "crashed"
    real, calls = {"fsync": os.fsync, "replace": Path.replace}, {"count": 0}

    class Crash(BaseException):
        pass

    for stop in range(1, 60):
        calls["count"] = 0

        def stopping(name, stop=stop):
            def call(*arguments):
                calls["count"] += 1
                if calls["count"] == stop:
                    raise Crash
                return real[name](*arguments)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", stopping("fsync"))
            patched.setattr(Path, "replace", stopping("replace"))
            try:
                store(home, out)
                break
            except Crash:
                pass
    # every attempt got one file operation further, from where the one before had stopped
    assert stop > 10 and content(out) == whole


def test_a_changed_picture_is_one_error_and_only_its_file_is_made_again(home, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "FILE", 10 * encode.picture_bytes((4, 32)))
    out = tmp_path / "tokens"
    assert store(home, out, photos) == 0
    before = content(out)
    path = photos / "g2" / "3.png"
    # same bytes, another time: a copy
    os.utime(path, ns=(1, 1))
    open_data(photos, tokens=out)
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(UserError, match=r"picture 'g2/3.png' changed since .* run 'semantica pairs --tokens"):
        open_data(photos, tokens=out)
    Image.new("RGB", (40, 40), "red").save(path)
    assert store(home, out, photos) == 0
    after = content(out)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"index.json", "part-00001.json", "part-00001.safetensors", "part-00001.table.safetensors"}
    open_data(photos, tokens=out)
    Image.new("RGB", (40, 40), "blue").save(photos / "g0" / "new.png")
    with pytest.raises(UserError, match="'g0/new.png' has no stored tokens"):
        open_data(photos, tokens=out)


def test_another_encoder_or_size_is_one_error(home, stored, tmp_path, capsys):
    import transformers

    def refused(words: str, **changes) -> None:
        with pytest.raises(UserError, match=words) as caught:
            train(config(home, tmp_path / "run", **{"tokens": str(stored), **changes}))
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()

    # the same weights elsewhere are the same encoder
    same = shutil.copytree(home / "dino", tmp_path / "same")
    train(config(home, tmp_path / "moved", steps=1, encoder=str(same), tokens=str(stored), held_out=0.0))
    refused("give the --encoder that made them", encoder="vit", encoder_size=None)
    refused("were made with --encoder-size 28, not 224", encoder_size=None)
    refused("were made with --encoder-size 28, not 56", encoder_size=56)
    refused("were made with --encoder-tokens patches, not all", encoder_tokens="all")
    refused("not facebook/dinov2-small", encoder="facebook/dinov2-small")
    refused("give --crop centre", mode="reconstruct")
    refused("is no folder of stored tokens", tokens=str(tmp_path / "nothing"))
    refused("cannot be mapped into memory", tokens="s3://bucket/tokens")
    torch.manual_seed(1)
    other = transformers.Dinov2Model(transformers.Dinov2Config.from_pretrained(home / "dino"))
    other.save_pretrained(tmp_path / "other")
    refused("not .*other", encoder=str(tmp_path / "other"))
    assert store(home, stored, encoder=tmp_path / "other") == 2
    assert store(home, stored, size=56) == 2
    assert store(home, home / "photos") == 2
    assert store(home, tmp_path / "x", encoder="none") == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("semantica: ")]
    assert len(lines) == 4 and "image_size=28" in lines[1] and "holds no stored tokens" in lines[2]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("flip", "tokens in .*part-00000.safetensors are not what was stored"),
        ("cut", "part-00000.safetensors has .* bytes instead of"),
        ("gone", "part-00000.safetensors has no bytes instead of"),
        ("pickle", "part-00000.safetensors is missing or holds no stored tokens"),
        ("table", "part-00000.table.safetensors is missing or altered"),
        ("encoder", "diffusion_pytorch_model.safetensors is missing or altered"),
        ("format", "has format 7"),
        ("outside", "leads out of the folder"),
        ("index", "is not what was written"),
        ("unsafe", "tokens.pt is refused unopened"),
    ],
)
def test_files_that_are_wrong_altered_or_missing_are_one_line(home, copy, tmp_path, damage, words):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    def flip(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[:5000] + bytes(b ^ 1 for b in whole[5000:-5000]) + whole[-5000:])

    path, index = copy / "part-00000.safetensors", json.loads((copy / "index.json").read_text())
    bomb = pickle.dumps(Bomb())
    if damage == "flip":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    elif damage == "pickle":
        path.write_bytes(bomb.ljust(path.stat().st_size, b"\0"))
    elif damage == "table":
        table = copy / "part-00000.table.safetensors"
        table.write_bytes(table.read_bytes()[:-1] + b"\xff")
    elif damage == "encoder":
        flip(copy / "encoder" / "diffusion_pytorch_model.safetensors")
    elif damage == "unsafe":
        (copy / "tokens.pt").write_bytes(bomb)
    else:
        if damage == "outside":
            index["files"][0]["name"] = "../part-00000"
        changes = {"format": {"format": 7}, "index": {"files": [{"name": "part-00000"}]}, "outside": {}}[damage]
        (copy / "index.json").write_text(json.dumps(index | changes))
    with pytest.raises(UserError, match=words) as caught:
        train(config(home, tmp_path / "run", tokens=str(copy)))
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()
    if damage != "flip":
        assert not (tmp_path / "run").exists()


def test_what_fp16_does_not_hold_is_an_error(home, tmp_path, monkeypatch, capsys):
    check = tokenfile.check_range
    check("x", torch.full((2, 3), 65504.0), torch.zeros(3))
    for value in (65520.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="beyond what fp16 holds"):
            check("x", torch.tensor([1.0, value]), torch.zeros(3))

    def loud(*arguments):
        quiet = real(*arguments)
        return lambda pictures: tuple(1e5 * a for a in quiet(pictures))

    real = encode.encoding
    monkeypatch.setattr(encode, "encoding", loud)
    assert store(home, tmp_path / "tokens") == 2
    assert "a token of picture 'g0/0.png' is" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "tokens").iterdir() if p.name.startswith("part-")]


def test_a_full_disk_leaves_nothing_half_written(home, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tokenfile, "tables", full)
        assert store(home, tmp_path / "tokens") == 2
    assert "no space left to write" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "tokens").iterdir()} == {"identity.json", "encoder"}
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        assert store(home, tmp_path / "tokens") == 2
    assert "has room for 0.0 GB" in capsys.readouterr().err
    assert store(home, tmp_path / "tokens") == 0


def test_broken_pictures_have_no_tokens_and_are_passed_over(home, photos, tmp_path, capsys):
    path = photos / "g1" / "2.png"
    path.write_bytes(path.read_bytes()[:90])
    out = tmp_path / "tokens"
    assert store(home, out, photos) == 0
    assert "bad picture g1/2.png" in capsys.readouterr().out and read_index(out)["files"][0]["unusable"] == 1
    pairs = Pairs(open_data(photos, tokens=out), seed=0, image_size=16, global_batch=4)
    items = [pairs[i] for i in range(len(pairs))]
    assert {path for item in items for path, _ in item["bad"]} == {"g1/2.png"}
    assert all(np.abs(tokens).max() > 0 for item in items for tokens in item["tokens"])


def test_shards_have_a_file_of_tokens_each(home, crawl, tmp_path):
    from semantica.train.pages.config import MineConfig
    from semantica.train.pages.mine import mine

    paths = []
    for number in range(2):
        one = crawl.Crawl()
        for page in range(3):
            names = [f"http://s{number}.org/{page}-{i}.jpg" for i in range(3)]
            one.page(f"http://s{number}.org/{page}", "".join(f"<img src={name}>" for name in names))
            for i, name in enumerate(names):
                one.picture(name, crawl.photo(100 * number + 10 * page + i))
        paths.append(one.save(tmp_path / f"{number}.warc.gz"))
    mine(MineConfig(tuple(paths), tmp_path / "shards", encoder="none", processes=1))
    assert main(["pairs", "--tokens", str(tmp_path / "shards"), *options(home)]) == 0
    out = tmp_path / "shards.tokens"
    data = open_data(tmp_path / "shards", tokens=out)
    assert [entry["name"] for entry in read_index(out)["files"]] == list(data.name) and len(data.name) == 2
    encoder = frozen_encoder(str(home / "dino"), SIDE)
    for ref in (0, 8, 9, 17):
        expected = encoder(to_tensor([fit(data.load(ref, 2 * SIDE), SIDE, mirror=True)])).tokens[0]
        actual = torch.from_numpy(data.tokens.read(ref, True)[0].astype(np.float32))
        torch.testing.assert_close(actual, expected, rtol=2**-11, atol=1e-5)
    train(config(home, tmp_path / "run", data=str(tmp_path / "shards"), tokens=str(out), steps=1))
    other = crawl.Crawl()
    other.page("http://s.org/", "".join(f"<img src=http://s.org/{i}.jpg>" for i in range(3)))
    for i in range(3):
        other.picture(f"http://s.org/{i}.jpg", crawl.photo(900 + i))
    mine(MineConfig((other.save(tmp_path / "2.warc.gz"),), tmp_path / "others", encoder="none", processes=1))
    with pytest.raises(UserError, match="shard 'pages-00000-00000' changed since"):
        open_data(tmp_path / "others", tokens=out)
    with pytest.raises(UserError, match="belong to shards, and .* holds folders"):
        open_data(home / "photos", tokens=out)
