"""`semantica pairs --resize`: smaller pictures on the same pages, that training shows alike and need not resize."""

import hashlib
import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantica import images
from semantica.cli import main
from semantica.errors import UserError
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs
from semantica.train.data.shards import MARK
from semantica.train.pages import resize as module
from semantica.train.pages.config import MineConfig, ResizeConfig
from semantica.train.pages.mine import mine
from semantica.train.pages.resize import resize

SIDE = 64
SIZES = ((200, 200), (300, 200), (150, 400), (64, 80), (72, 64))


@pytest.fixture(scope="module")
def shards(crawl, tmp_path_factory) -> Path:
    """Two inputs of three pages with five pictures, two of which are small enough already."""
    root = tmp_path_factory.mktemp("resize")
    paths = []
    for number in range(2):
        one = crawl.Crawl()
        for page in range(3):
            names = [f"http://s{number}.org/{page}-{i}.jpg" for i in range(len(SIZES))]
            one.page(f"http://s{number}.org/{page}", "".join(f"<img src={name}>" for name in names))
            for i, (name, size) in enumerate(zip(names, SIZES)):
                kind = "PNG" if i == 1 else "JPEG"
                one.picture(name, crawl.photo(10_000 * number + 100 * page + i, *size, kind))
        paths.append(one.save(root / f"{number}.warc.gz"))
    mine(MineConfig(tuple(paths), root / "out", encoder="colour-and-shape", processes=1))
    return root / "out"


@pytest.fixture(scope="module")
def small(shards) -> Path:
    out = shards.with_name("small")
    stats = resize(ResizeConfig((shards,), SIDE, out, processes=1))
    assert stats["resized"] | {"bytes": 0} == {"resized": 18, "kept": 12, "left_out": 0, "bytes": 0}
    return out


def pages(shards: Path) -> dict[str, tuple[list[bytes], np.ndarray, dict]]:
    """Key -> pictures, embeddings and record, read with tarfile alone."""
    found = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in files.items():
            key, _, rest = name.partition(".")
            pictures, vectors, record = found.setdefault(key, ([], [], {}))
            if rest == "json":
                record.update(json.loads(data))
            elif rest == "emb.npy":
                vectors.append(np.load(io.BytesIO(data), allow_pickle=False))
            else:
                pictures.append(data)
    return {key: (pictures, vectors[0], record) for key, (pictures, vectors, record) in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2))))


def test_pages_stay_and_pictures_shrink(shards, small):
    before, after = pages(shards), pages(small)
    assert list(before) == list(after) and len(after) == 6
    for key, (pictures, vectors, record) in after.items():
        old, old_vectors, old_record = before[key]
        assert np.array_equal(vectors, old_vectors)
        assert {k: v for k, v in record.items() if k != "images"} == {
            k: v for k, v in old_record.items() if k != "images"
        }
        for data, was, entry, told, size in zip(pictures, old, record["images"], old_record["images"], SIZES):
            image = Image.open(io.BytesIO(data))
            assert entry["sha256"] == hashlib.sha256(data).hexdigest()
            assert (entry["width"], entry["height"]) == image.size
            assert all(entry[name] == told[name] for name in ("url", "alt", "phash"))
            if min(size) <= SIDE:
                assert data == was and entry == told
                continue
            assert image.format == "JPEG" and min(image.size) == SIDE and not image.getexif()
            assert entry["source"] == {name: told[name] for name in ("width", "height", "sha256")}
            truth = images.load_image(io.BytesIO(was)).resize(image.size, Image.Resampling.BICUBIC)
            assert psnr(np.asarray(image), np.asarray(truth)) > 38


def test_training_draws_the_same_and_sees_the_same(shards, small, monkeypatch):
    one, two = (open_data(folder, low=-0.5) for folder in (shards, small))
    assert len(one) == len(two) and np.array_equal(one.cosine, two.cosine) and two.sha.shape == (30, MARK)
    options = dict(seed=4, image_size=SIDE, global_batch=4)
    large = [Pairs(one, **options)[i] for i in range(24)]
    # nothing is left to be resized
    monkeypatch.setattr("torch.nn.functional.interpolate", lambda *_, **__: pytest.fail("a picture was resized"))
    found = [Pairs(two, **options)[i] for i in range(24)]
    for i, (a, b) in enumerate(zip(large, found)):
        pair = one.draw(4, i)
        assert pair == two.draw(4, i) and a["flips"] == b["flips"]
        for name, view in (("target", pair.target), ("condition", pair.conditions[0])):
            # of pictures that are longer than wide the place is a whole pixel of either size
            square = SIZES[view.ref % len(SIZES)] == (200, 200)
            assert psnr(a[name], b[name]) > (38 if square else 25)


def test_an_interrupted_run_is_continued_and_another_is_refused(shards, small, tmp_path, monkeypatch):
    out = tmp_path / "again"

    def stop(*_):
        raise UserError("stopped")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="stopped"):
        patched.setattr(module, "write_report", stop)
        resize(ResizeConfig((shards,), SIDE, out, processes=1))
    # of the two shards one is to be made again
    lost = sorted((out / "done").iterdir())[0]
    lost.unlink()
    (out / f"{lost.stem}.tar").write_bytes(b"half")
    resize(ResizeConfig((shards,), SIDE, out, processes=1))
    made, whole = contents(out), contents(small)
    # the report names the folder
    assert made.pop("report.html") and whole.pop("report.html") and made == whole
    with pytest.raises(UserError, match="with another --resize: choose another --out"):
        resize(ResizeConfig((shards,), 2 * SIDE, out, processes=1))
    with pytest.raises(UserError, match="holds no resized shards"):
        resize(ResizeConfig((out,), SIDE, shards, processes=1))


def test_damaged_pictures_are_left_out_and_similarities_stay_with_their_pairs(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    before = open_data(copy)
    # the second of the first page's five pictures, and four of the second page's, which then has no pair
    for ref in (1, 5, 6, 7, 8):
        name, offset, size = before._place(ref)
        with open(copy / name, "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
    stats = resize(ResizeConfig((copy,), SIDE, tmp_path / "out", processes=1))
    assert stats["resized"]["left_out"] == 5 and stats["stored"]["pages"] == 5 and stats["stored"]["images"] == 24
    after = open_data(tmp_path / "out")
    assert after.count.tolist() == [4, 5, 5, 5, 5]
    kept = [0, 2, 3, 4]
    pairs = dict(zip(itertools.combinations(range(5), 2), before.cosine))
    assert after.cosine[:6].tolist() == [pairs[pair] for pair in itertools.combinations(kept, 2)]
    vectors, record = next(iter(pages(tmp_path / "out").values()))[1:]
    assert len(vectors) == 4 and [entry["url"][-5] for entry in record["images"]] == list("0234")


def test_shards_that_cannot_be_used_are_named(shards, tmp_path, capsys):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    first, second = sorted(path.stem for path in copy.glob("*.tar"))
    with open(copy / f"{first}.tar", "ab") as file:
        file.write(b"more")
    stats = resize(ResizeConfig((copy,), SIDE, tmp_path / "out", processes=1))
    assert stats["stored"]["shards"] == 1 and f"left out, {first}: has " in capsys.readouterr().out


def test_mistakes_are_one_line(shards, tmp_path, capsys):
    for arguments, message in (
        (["pairs", shards, shards, "--resize", "64"], "--resize takes one folder of shards"),
        (["pairs", tmp_path / "no", "--resize", "64"], "--resize takes one folder of shards"),
        (["pairs", tmp_path, "--resize", "64"], "has no index.json"),
        (["pairs", shards, "--resize", "8"], "--resize is 8"),
        (["pairs", shards, "--resize", "64", "--urls-only"], "leave out --urls-only"),
        (["pairs", "--tokens", shards, "--resize", "64"], "--tokens takes no crawl"),
        (["pairs", "--report", shards, "--resize", "64"], "--report takes one folder"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and message in said[0], said
    assert main(["pairs", str(shards), "--resize", "64", "--processes", "1", "--out", str(tmp_path / "out")]) == 0
    assert "18 pictures resized, 12 stay as they were, 0 could not be read" in capsys.readouterr().out
