"""Alternative texts of the pictures in shards, local and remote, and training on them; tables that are not whole."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from semantica.cli import main
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs
from semantica.train.data.store import Store
from semantica.train.pages.config import MineConfig, ResizeConfig
from semantica.train.pages.mine import mine
from semantica.train.pages.resize import resize
from semantica.train.pages.write import ShardFile
from semantica.words import WordTokenizer

# of each page's pictures; None is no text, and so is what says nothing
ALTS = (("red  ring", None, "two crosses"), ("?!", "a \u00e9clair"), (None, None), ("disc", "red ring", "disc", "..."))
SHOWN = ["red ring", "two crosses", "a \u00e9clair", "disc", "red ring", "disc"]
SMALL = ["--patch-size", "4", "--channels", "16", "--depths", "1", "--width", "32", "--depth", "1", "--heads", "2",
         "--batch", "2", "--steps", "1", "--workers", "0", "--device", "cpu", "--precision", "fp32"]  # fmt: skip


@pytest.fixture(scope="module")
def shards(crawl, tmp_path_factory) -> Path:
    """Two inputs, and so two shards, with the same texts on other pictures."""
    root = tmp_path_factory.mktemp("alts")
    paths = []
    for number in range(2):
        one = crawl.Crawl()
        for page, alts in enumerate(ALTS):
            names = [f"http://s{number}.org/{page}-{i}.jpg" for i in range(len(alts))]
            tags = [f"<img src={n}" + (f' alt="{a}">' if a else ">") for n, a in zip(names, alts)]
            one.page(f"http://s{number}.org/{page}", "<meta charset=utf-8>" + "".join(tags))
            for i, name in enumerate(names):
                one.picture(name, crawl.photo(10_000 * number + 100 * page + i))
        paths.append(one.save(root / f"{number}.warc.gz"))
    mine(MineConfig(tuple(paths), root / "out", encoder="colour-and-shape", processes=1))
    return root / "out"


def records(shards: Path) -> dict[str, str]:
    """Name of a picture, as the data calls it -> its text, read with tarfile alone."""
    found = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, rest = member.name.partition(".")
                if rest == "json":
                    images = json.load(tar.extractfile(member))["images"]
                    found |= {f"{path.name}:{key}.{i}": image["alt"] for i, image in enumerate(images)}
    return found


@pytest.mark.parametrize("mode", ["pages", "reconstruct"])
def test_targets_are_the_pictures_with_a_text(shards, mode):
    data, truth = open_data(shards, mode, captions=True), records(shards)
    texts = {data.name_of(ref): text for ref, (text,) in data.captions.texts.items()}
    assert texts == {name: text for name, text in truth.items() if any(map(str.isalnum, text))}
    assert sorted(texts.values()) == sorted(2 * SHOWN) and len(data.page) == 6
    assert data.describe() == "12 pictures on 6 pages, alternative texts" and not data.bad
    drawn = [data.draw(0, i) for i in range(4 * len(data))]
    assert {pair.target.ref for pair in drawn} == data.captions.texts.keys()
    # conditions need none
    assert ({view.ref for pair in drawn for view in pair.conditions} <= data.captions.texts.keys()) == (mode != "pages")
    plain = open_data(shards, mode)
    assert len({plain.digest(), data.digest()}) == 2 and plain.captions is None and len(plain.page) == 8


def test_each_sample_has_the_text_of_its_target(shards):
    data = open_data(shards, captions=True)
    pairs = Pairs(data, seed=1, image_size=8, global_batch=2, tokenizers={"text": WordTokenizer.learn(data.captions)})
    for i in range(12):
        assert pairs[i]["caption"] == data.captions.texts[data.draw(1, i).target.ref][0]
    training, held = data.split(0.34, 0)
    assert len(held.page) == 2 and not training.captions.texts.keys() & held.captions.texts.keys()
    assert training.captions.texts | held.captions.texts == data.captions.texts


def test_texts_come_from_afar_and_stay_when_pictures_are_resized(shards, tmp_path):
    local, memory = open_data(shards, captions=True), fsspec.filesystem("memory")
    for path in shards.iterdir():
        if path.is_file():
            memory.pipe(f"/alts/{path.name}", path.read_bytes())
    remote = open_data("memory://alts", captions=True)
    assert remote.captions == local.captions and remote.digest() == local.digest()
    resize(ResizeConfig((shards,), 64, tmp_path / "small", processes=1))
    assert open_data(tmp_path / "small", captions=True).captions == local.captions


def test_a_damaged_record_costs_the_texts_of_its_page_and_is_named(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    before = open_data(copy, captions=True)
    first = sorted(copy.glob("*.tar"))[0]
    with tarfile.open(first) as tar:
        members = [member for member in tar if member.name.endswith(".json")]
    content = bytearray(first.read_bytes())
    # one is no JSON any more, and one tells of other pictures
    content[members[0].offset_data] = 0
    place = content.index(b'"sha256": "', members[3].offset_data) + len(b'"sha256": "')
    content[place : place + 4] = b"0000" if content[place : place + 4] != b"0000" else b"1111"
    first.write_bytes(content)
    data = open_data(copy, captions=True)
    assert len(data.bad) == 2 and data.bad[0][0].startswith(f"{first.name}:") and data.bad[0][0].endswith(".json")
    assert data.bad[1][1] == "no texts of its page: of other pictures"
    assert len(data.page) == len(before.page) - 2


@pytest.mark.parametrize("on", ["text", "both"])
def test_a_run_is_trained_on_them(shards, tmp_path, on, capsys):
    options = [*SMALL, "--condition-on", on, "--held-out", "0.34", "--sample-every", "1"]
    assert main(["train", "--data", str(shards), "--out", str(tmp_path / "run"), *options]) == 0
    assert "alternative texts; held out: " in capsys.readouterr().out
    words = json.loads((tmp_path / "run" / "encoder" / "text" / "config.json").read_text())["vocabulary"]
    assert set(words) <= {word for text in SHOWN for word in text.split()} and "disc" in words
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()


def test_shards_without_texts_are_one_line(shards, tmp_path, capsys, crawl):
    one = crawl.Crawl().page("http://e.org/", "<img src=1.jpg><img src=2.jpg>")
    for name in (1, 2):
        one.picture(f"http://e.org/{name}.jpg", crawl.photo(name))
    mine(MineConfig((one.save(tmp_path / "e.warc.gz"),), tmp_path / "none", encoder="none", processes=1))
    options = ["--out", str(tmp_path / "run"), *SMALL, "--condition-on", "text"]
    capsys.readouterr()
    assert main(["train", "--data", str(tmp_path / "none"), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert "has an alternative text: give shards of pages that have" in said and "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["an empty page", "a page more", "a place outside", "a similarity less", "floats"])
def test_a_table_that_is_not_of_its_pages_costs_its_shard(shards, tmp_path, what):
    """Of shards that others made, with a hash that is right."""
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    index = json.loads((copy / "index.json").read_text())
    entry = index["shards"][0]
    path = copy / f"{entry['name']}.safetensors"
    table = load_file(path)
    if what == "an empty page":
        table |= {
            "count": np.append(table["count"], np.int32(0)),
            "key": np.concatenate([table["key"], table["key"][:1]]),
        }
    elif what == "a page more":
        table["count"] = np.append(table["count"], np.int32(2))
    elif what == "a place outside":
        table["offset"] = table["offset"] + (np.arange(len(table["offset"])) == 3) * np.int64(entry["bytes"])
    elif what == "a similarity less":
        table["cosine"] = table["cosine"][1:]
    else:
        table["count"] = table["count"].astype(np.float32)
    save_file(table, path)
    entry["table_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "index.json").write_text(json.dumps(index))
    data = open_data(copy, low=-1.0)
    assert data.bad == ((entry["name"], "its table is not of the pages that it counts"),)
    assert len(data.page) == len(ALTS)


def test_what_is_opened_is_closed_when_it_is_forgotten(tmp_path):
    (tmp_path / "x").write_bytes(b"abcdef")
    store, shard = Store(tmp_path), ShardFile(tmp_path, "pages-x")
    assert store.read("x", 2, 3) == b"cde"
    files = store.files("x").file, shard.hashing.file
    del store, shard
    assert all(file.closed for file in files) and [path.name for path in tmp_path.iterdir()] == ["x"]
