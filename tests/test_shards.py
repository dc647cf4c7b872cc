"""Training from shards: which pairs are drawn, how often, the same everywhere; and what damaged shards cost."""

import io
import itertools
import json
import math
import os
import pickle
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semantica.cli import main
from semantica.errors import UserError
from semantica.images import BadImage
from semantica.train.data.loading import batches
from semantica.train.data.open import open_data
from semantica.train.data.pairs import Pairs
from semantica.train.data.shards import open_shards, pair_number
from semantica.train.data.store import Store
from semantica.train.pages.config import MineConfig
from semantica.train.pages.mine import mine

COUNTS = (2, 3, 5, 9, 16)


@pytest.fixture(scope="module")
def shards(crawl, tmp_path_factory) -> Path:
    """Pages of 2 to 16 pictures, in three inputs."""
    root = tmp_path_factory.mktemp("shards")
    paths = []
    for number in range(3):
        one = crawl.Crawl()
        for page, count in enumerate(COUNTS):
            names = [f"http://s{number}.org/{page}-{i}.jpg" for i in range(count)]
            one.page(f"http://s{number}.org/{page}", "".join(f"<img src={name}>" for name in names))
            for i, name in enumerate(names):
                one.picture(name, crawl.photo(10_000 * number + 100 * page + i))
        paths.append(one.save(root / f"{number}.warc.gz"))
    mine(MineConfig(tuple(paths), root / "out", encoder="colour-and-shape", processes=1))
    return root / "out"


def embeddings(shards: Path) -> dict[str, np.ndarray]:
    """Key -> embeddings, read with tarfile and numpy alone."""
    found = {}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix == "emb.npy":
                    found[key] = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
    return found


def similarities(rows: np.ndarray) -> np.ndarray:
    """Of all pairs of a page, row by row."""
    return (rows.astype(np.float64) @ rows.T.astype(np.float64))[np.triu_indices(len(rows), 1)].astype(np.float32)


def middle(truth: dict[str, np.ndarray]) -> tuple[float, float]:
    """Thresholds that keep about 40 % of the pairs."""
    return tuple(np.quantile(np.concatenate([*map(similarities, truth.values())]), (0.3, 0.7)).round(3).tolist())


def name_parts(data, ref: int) -> tuple[str, int]:
    key, _, place = data.name_of(ref).partition(":")[2].partition(".")
    return key, int(place)


def test_the_shards_are_webdataset_samples(shards, monkeypatch):
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert sorted(len(json.loads(s["json"])["images"]) for s in samples) == sorted(COUNTS * 3)
    for sample in samples:
        record, table = json.loads(sample["json"]), np.load(io.BytesIO(sample["emb.npy"]), allow_pickle=False)
        assert table.shape == (len(record["images"]), 388) and set(record) == {"url", "time", "images"}
        assert np.abs(np.linalg.norm(table.astype(np.float64), axis=1) - 1).max() < 2e-3
        for i, image in enumerate(record["images"]):
            with Image.open(io.BytesIO(sample[f"{i}.jpg"])) as picture:
                assert picture.size == (image["width"], image["height"])
            assert set(image) == {"url", "alt", "width", "height", "sha256", "phash"}


def test_every_pair_has_an_allowed_similarity_and_every_allowed_pair_comes(shards):
    truth = embeddings(shards)
    low, high = middle(truth)
    data = open_shards(str(shards), low=low, high=high)
    wanted = {
        (key, i, j)
        for key, rows in truth.items()
        for i, j in itertools.permutations(range(len(rows)), 2)
        if low <= np.float32(rows[i].astype(np.float64) @ rows[j].astype(np.float64)) <= high
    }
    everything = sum(n * (n - 1) for n in COUNTS) * 3
    assert 0.1 * everything < len(wanted) < 0.9 * everything
    seen = set()
    for index in range(40_000):
        pair = data.draw(1, index)
        key, i = name_parts(data, pair.target.ref)
        other, j = name_parts(data, pair.conditions[0].ref)
        assert key == other
        seen.add((key, i, j))
    assert seen == wanted


def test_pages_weigh_by_the_square_root_and_targets_take_turns(shards):
    data = open_shards(str(shards))
    assert len(data) == 3 * sum(math.ceil(math.sqrt(n)) for n in COUNTS)
    for epoch in range(3):
        draws = [data.draw(7, epoch * len(data) + i) for i in range(len(data))]
        pages = Counter(pair.group for pair in draws)
        assert {page: math.ceil(math.sqrt(data.count[page])) for page in pages} == pages and len(pages) == 15
    # after n epochs each picture of a page was the target sqrt(n) times, give or take the rounding
    epochs = 16
    turns = Counter(data.draw(7, index).target.ref for index in range(epochs * len(data)))
    for page in range(15):
        count, share = int(data.count[page]), math.ceil(math.sqrt(data.count[page]))
        got = [turns[ref] for ref in range(data.first[page], data.first[page] + count)]
        assert max(got) - min(got) <= 1 and sum(got) == epochs * share
    orders = [[data.draw(seed, i).target.ref for i in range(len(data))] for seed in (7, 8)]
    assert orders[0] != orders[1] and sorted(orders[0]) != orders[0]


def test_several_conditions_are_different_while_there_are_enough(shards):
    data = open_shards(str(shards))
    for index in range(300):
        pair = data.draw(3, index, 4)
        refs = [view.ref for view in pair.conditions]
        others = int(data.count[pair.group]) - 1
        assert len(set(refs)) == min(4, others) and pair.target.ref not in refs
        assert pair.target == data.draw(3, index, 1).target or others
    dataset = Pairs(data, seed=0, image_size=16, conditions=3, global_batch=4)
    batch = next(batches(dataset, first_index=0, batch=4, workers=0))
    assert batch["condition"].shape == (4, 3, 3, 16, 16) and batch["target"].shape == (4, 3, 16, 16)


def test_several_conditions_are_one_longer_stream():
    from semantica.model.conditioner import encode_one
    from semantica.model.encoders import ViTEncoder

    torch.manual_seed(0)
    encoder = ViTEncoder(image_size=16, patch_size=4, width=32, depth=1, heads=1).eval()
    images = torch.randn(2, 3, 3, 16, 16)
    with torch.no_grad():
        stream, each = encode_one(encoder, images), [encoder(images[:, k]) for k in range(3)]
    assert torch.allclose(stream.tokens, torch.cat([s.tokens for s in each], 1), atol=1e-5)
    assert torch.allclose(stream.pooled, sum(s.pooled for s in each) / 3, atol=1e-5)


def take(dataset: Pairs, count: int, **options) -> list[dict]:
    stream = batches(dataset, **{"first_index": 0, "batch": 4, "workers": 0} | options)
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def same(one: dict, two: dict) -> bool:
    keys = [key for key in one if key != "bad"]
    return one["bad"] == two["bad"] and all(torch.equal(one[key], two[key]) for key in keys)


def test_workers_restarts_and_remote_shards_make_no_difference(shards):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        if path.is_file():
            memory.pipe(f"/far/{path.name}", path.read_bytes())
    options = dict(seed=2, image_size=16, condition_size=24, global_batch=8, crop=0.7)
    here = Pairs(open_data(shards, low=0.3), **options)
    whole = take(here, 6)
    assert all(map(same, whole, take(here, 6, workers=2)))
    assert all(map(same, whole[3:], take(here, 3, first_index=12)))
    assert all(map(same, whole, take(pickle.loads(pickle.dumps(here)), 6)))
    # two ranks, each a half of every global batch
    halves = [take(here, 3, first_index=4 * rank, batch=8) for rank in (0, 1)]
    assert torch.equal(halves[0][0]["target"][:4], whole[0]["target"])
    far = Pairs(open_data("memory://far", low=0.3), **options)
    assert all(map(same, whole, take(far, 6)))
    assert open_data("memory://far", low=0.3).digest() == open_data(shards, low=0.3).digest()
    assert open_data(shards, low=0.3).digest() != open_data(shards, low=0.31).digest()


def test_remote_pictures_of_a_batch_are_asked_for_together(shards, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        if path.is_file():
            memory.pipe(f"/near/{path.name}", path.read_bytes())
    asked, inside = [], []
    kind, ranges, single = type(memory), type(memory).cat_ranges, type(memory).cat_file
    data = open_shards("memory://near")

    def together(system, paths, *args, **options):
        asked.append(len(paths))
        inside.append(True)
        try:
            return ranges(system, paths, *args, **options)
        finally:
            inside.pop()

    def alone(system, *args, **options):
        assert inside, "a picture was read by itself"
        return single(system, *args, **options)

    monkeypatch.setattr(kind, "cat_ranges", together)
    monkeypatch.setattr(kind, "cat_file", alone)
    take(Pairs(data, seed=0, image_size=16, global_batch=4), 3)
    # fetched ahead by one batch at most, 4 targets and 4 conditions each, fewer where a picture is both
    assert len(asked) >= 3 and all(4 < count <= 8 for count in asked)


@pytest.fixture
def cloud(shards, monkeypatch):
    """Shards at az://shards, served as clouds are: by threads of the process that connected. Yields what is raised."""
    from fsspec.asyn import AsyncFileSystem

    raised = []

    class Cloud(AsyncFileSystem):
        protocol = "az"

        async def _cat_file(self, path, start=None, end=None, **_):
            if raised:
                raise raised[0]
            return (shards.parent / path).read_bytes()[start:end]

        async def _info(self, path, **_):
            return {"name": path, "size": (shards.parent / path).stat().st_size, "type": "file"}

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "az", Cloud)
    yield f"az://{shards.name}", raised


def test_workers_read_from_a_cloud(shards, cloud):
    """They are forked from a process whose connections they cannot use."""
    address, raised = cloud
    options = dict(seed=2, image_size=16, global_batch=4)
    here, far = (Pairs(open_data(root), **options) for root in (shards, address))
    assert far.data.remote and far[0]["bad"] == []
    assert all(map(same, take(here, 3, batch=4), take(far, 3, batch=4, workers=1)))


def test_a_library_s_own_error_is_said_in_one_line(cloud):
    address, raised = cloud
    data = open_shards(address)
    raised.append(Exception("no credentials\nat all"))
    data.prefetch({0, 1})
    with pytest.raises(BadImage, match="cannot be read: Exception: no credentials;"):
        data.load(0, 16)
    with pytest.raises(UserError, match=r"no index.json that can be read \(Exception: no credentials\)"):
        open_shards(address)


def test_pages_are_held_out_whole(shards):
    data = open_shards(str(shards))
    train, held = data.split(0.2, seed=1)
    assert len(held.page) == 3 and len(train.page) == 12 and not set(train.page) & set(held.page)
    assert {train.draw(0, i).group for i in range(len(train))} == set(train.page.tolist())
    assert len(data.split(0, seed=1)[1]) == 0
    with pytest.raises(UserError, match="cannot hold out"):
        data.split(0.99, seed=1)


def test_reconstruct_mode_takes_every_picture_as_its_own_condition(shards):
    data = open_data(shards, "reconstruct")
    item = Pairs(data, seed=0, image_size=16, global_batch=4, crop=0.5)[3]
    assert np.array_equal(item["condition"], item["target"])


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def items(root: Path, count: int = 60) -> Counter:
    """What is said to be bad over some samples."""
    dataset = Pairs(open_shards(str(root)), seed=0, image_size=16, global_batch=4)
    return Counter(reason.split(":")[0] for index in range(count) for _, reason in dataset[index]["bad"])


def test_a_flipped_byte_costs_one_picture(copy):
    data = open_shards(str(copy))
    path = copy / f"{data.name[0]}.tar"
    whole = bytearray(path.read_bytes())
    whole[int(data.offset[0]) + 200] ^= 1
    path.write_bytes(whole)
    bad = {
        name: reason
        for index in range(200)
        for name, reason in Pairs(data, seed=0, image_size=16, global_batch=4)[index]["bad"]
    }
    assert list(bad) == [data.name_of(0)] and bad[data.name_of(0)].startswith("altered")


def test_a_pickle_in_a_shard_is_never_loaded(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = pickle.dumps(Trap())
    data = open_shards(str(copy))
    path = copy / f"{data.name[0]}.tar"
    whole = bytearray(path.read_bytes())
    whole[int(data.offset[0]) : int(data.offset[0]) + len(trap)] = trap
    path.write_bytes(whole)
    # as the embeddings too, and as a table
    with tarfile.open(path) as tar:
        spots = [m.offset_data for m in tar if m.name.endswith("emb.npy")]
    for spot in spots:
        whole[spot : spot + len(trap)] = trap
    path.write_bytes(whole)
    assert set(items(copy, 200)) == {"altered"}
    (copy / f"{data.name[1]}.safetensors").write_bytes(trap)
    assert dict(open_shards(str(copy)).bad) == {data.name[1]: "its table is not that of its hash"}
    assert not (tmp_path / "sprung").exists()


def test_cut_shards_missing_members_and_lost_files_are_named(copy):
    names = open_shards(str(copy)).name
    path = copy / f"{names[0]}.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = open_shards(str(copy))
    assert [name for name, _ in data.bad] == [names[0]] and "bytes instead of" in data.bad[0][1]
    assert len(data.page) == 10 and not items(copy)
    # a member is taken out, the size is kept
    path = copy / f"{names[1]}.tar"
    size = path.stat().st_size
    kept = io.BytesIO()
    with tarfile.open(path) as tar, tarfile.open(fileobj=kept, mode="w") as out:
        for number, member in enumerate(tar):
            if number:
                out.addfile(member, tar.extractfile(member))
    path.write_bytes(kept.getvalue()[:size].ljust(size, b"\0"))
    assert set(items(copy)) == {"altered"}
    path.unlink()
    with pytest.raises(UserError, match=f"2 of 3 shards in .* cannot be used, the first is '{names[0]}'"):
        open_shards(str(copy))


def test_what_cannot_be_read_is_one_line(copy, crawl, tmp_path, capsys):
    mine(MineConfig((crawl.site(2).save(tmp_path / "x.warc"),), tmp_path / "plain", encoder="none", furniture_pages=9))
    index = json.loads((copy / "index.json").read_text())

    def rewritten(**changes) -> str:
        folder = tmp_path / f"r{len(list(tmp_path.iterdir()))}"
        shutil.copytree(copy, folder)
        (folder / "index.json").write_text(json.dumps(index | changes))
        return str(folder)

    for root, options, words in (
        (tmp_path / "plain", {"low": 0.1}, "without an encoder"),
        (copy, {"low": 0.999}, "no pair in"), (copy, {"low": 0.8, "high": 0.2}, "--low 0.8 is above"),
        (rewritten(format=2), {}, "has format 2"), (rewritten(shards=5), {}, "has format 1"),
        (rewritten(shards=[]), {}, "no page with two"), (rewritten(shards=[{"name": "x"}]), {}, "1 of 1"),
        (rewritten(shards=[{"name": "../pages-x", "bytes": 1, "table_sha256": ""}]), {}, "leads out of the folder"),
        ("pipe:cat x", {}, "is refused"), ("pipe://cat x", {}, "is refused"), ("reference://x", {}, "is refused"),
        ("simplecache::s3://x", {}, "is refused"), ("memory://nowhere", {}, "no index.json"),
        (copy, {"mode": "reconstruct", "high": 0.8}, "--low and --high are for two pictures of a page"),
        (tmp_path, {"mode": "pages"}, "no index.json"), (copy, {"mode": "folders"}, "unknown data mode"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            open_data(root, **options)
        assert "\n" not in str(caught.value)
    assert main(["train", "--data", str(tmp_path / "plain"), "--low", "0.1", "--out", str(tmp_path / "run")]) == 2
    assert "without an encoder" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert len(open_shards(str(tmp_path / "plain"))) == 2 * 3


def test_report_says_what_thresholds_keep(copy, capsys):
    truth = embeddings(copy)
    low, high = middle(truth)
    assert main(["pairs", "--report", str(copy), "--low", str(low), "--high", str(high)]) == 0
    said = capsys.readouterr().out
    cosines = np.concatenate([*map(similarities, truth.values())])
    kept = int(((cosines >= low) & (cosines <= high)).sum())
    assert f"pairs: {kept:,} ({kept / len(cosines):.1%}) of {len(cosines):,}" in said
    page = (copy / "report.html").read_text()
    assert all(f"Pairs around {bound:.3f}" in page for bound in (low, high)) and page.count("data:image/png") == 3
    stats = json.loads((copy / "stats.json").read_text())
    assert sum(stats["similarity"]) == len(cosines)
    assert np.array_equal(stats["similarity"], np.histogram(cosines, 100, (-1, 1))[0])
    assert main(["pairs", "--report", str(copy / "nothing")]) == 2


def test_pairs_of_a_page_are_numbered_row_by_row():
    for count in range(2, 9):
        i, j = np.triu_indices(count, 1)
        assert np.array_equal(pair_number(i, j, count), np.arange(len(i)))


def test_a_store_is_confined_to_its_folder(tmp_path):
    assert Store(tmp_path).remote is False
    with pytest.raises(FileNotFoundError):
        Store(tmp_path).whole("index.json")


@pytest.mark.slow
def test_a_run_on_shards_continues_bit_exactly(shards, tmp_path):
    from semantica.train.config import TrainConfig
    from semantica.train.loop import train

    options = dict(
        data=str(shards), low=0.3, high=0.95, conditions=2, batch=4, warmup=2, precision="fp32", held_out=0.2,
        workers=0, save_every=1, eval_every=2, sample_every=2, device="cpu", image_size=16,
    )  # fmt: skip
    train(TrainConfig(out=tmp_path / "whole", steps=2, **options))
    train(TrainConfig(out=tmp_path / "parts", steps=1, **options))
    train(TrainConfig(out=tmp_path / "parts", steps=2, **options))
    one, two = (
        {p.name: p.read_bytes() for p in sorted((tmp_path / name / "unet").iterdir())} for name in ("whole", "parts")
    )
    assert one == two
    assert (tmp_path / "whole" / "samples" / "step-00000002.png").exists()
    with pytest.raises(UserError, match="made with --low 0.3, not 0.2"):
        train(TrainConfig(out=tmp_path / "parts", steps=2, **options | {"low": 0.2}))
