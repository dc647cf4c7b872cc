import itertools
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from semantica.errors import UserError
from semantica.images import load_image, to_tensor, to_uint8
from semantica.train.data.batch import planes
from semantica.train.data.draws import ORDER, generator, order
from semantica.train.data.folders import scan
from semantica.train.data.loading import batches
from semantica.train.data.pairs import PATIENCE, Pairs, bad_record

SIDE = 8


def write(path, label: int, number: int, kind: str = "PNG"):
    """A picture that tells who it is: red = label, green = number; blue is dark on the left and bright on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((SIDE, SIDE, 3), (label, number, 0), np.uint8)
    pixels[:, SIDE // 2 :, 2] = 200
    Image.fromarray(pixels).save(path, format=kind)


def who(pixels: np.ndarray) -> tuple[int, int]:
    return int(pixels[0, 0, 0]), int(pixels[0, 0, 1])


def mirrored(pixels: np.ndarray) -> bool:
    return bool(pixels[0, 0, 2] > pixels[0, -1, 2])


SIZES = (2, 3, 5, 4)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for label, size in enumerate(SIZES):
        for number in range(size):
            write(root / f"g{label}" / f"p{number}.png", label, number)
    return root


def pairs(data, **options) -> Pairs:
    return Pairs(data, **{"seed": 3, "image_size": SIDE, "global_batch": 4, "crop": None} | options)


def shown(dataset: Pairs, index: int) -> dict[str, np.ndarray]:
    """What the trainer sees of one sample, as bytes."""
    batch = dataset.batch([index])
    return {name: to_uint8(batch[name])[0] for name in ("condition", "target")}


def cut(path):
    """Shorten a JPEG so that its header still reads well."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-500])


def same(one, two) -> bool:
    tensors = [key for key in one if key != "bad"]
    assert one.keys() == two.keys() and len(tensors) == 6
    return one["bad"] == two["bad"] and all(torch.equal(one[key], two[key]) for key in tensors)


def failure(root, mode="folders") -> str:
    with pytest.raises(UserError) as caught:
        scan(root, mode)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scan_lists_in_natural_order_whatever_the_file_system_says(folder, monkeypatch):
    for number in (10, 9, 100):
        write(folder / "g10" / f"x{number}.png", 10, number)
    for name in ("list.json", "g0/notes.TXT", "g0/a.tsv", "g0/.hidden.png", "g1/readme.md", "g1/m.csv", "g1/m.jsonl"):
        (folder / name).write_text("side file")
    (folder / ".git").mkdir()
    (folder / "g3" / "p1.png").write_text("no picture")
    write(folder / "lonely" / "p0.png", 9, 9)
    data = scan(folder, "folders")
    assert list(data.groups) == ["g0", "g1", "g2", "g3", "g10"]
    assert data.groups["g10"] == ("g10/x9.png", "g10/x10.png", "g10/x100.png")
    assert data.groups["g3"] == ("g3/p0.png", "g3/p2.png", "g3/p3.png")
    assert data.alone == ("lonely",)
    assert data.bad == (("g3/p1.png", "not a picture in JPEG, PNG, WEBP, GIF, BMP or TIFF format"),)
    assert len(data) == 2 + 3 + 5 + 3 + 3 and data.sizes["g0/p1.png"] == (folder / "g0" / "p1.png").stat().st_size
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path)[::-1])
    assert scan(folder, "folders") == data


def test_reconstruct_takes_pictures_anywhere_and_alone(folder):
    write(folder / "single.png", 50, 0)
    write(folder / "lonely" / "p0.png", 9, 9)
    data = scan(folder, "reconstruct")
    assert data.groups[""] == ("single.png",) and data.groups["lonely"] == ("lonely/p0.png",)
    assert len(data) == sum(SIZES) + 2 and not data.bad and not data.alone
    assert dict(scan(folder, "folders").bad) == {"single.png": "not in a label folder"}


def test_scan_errors_are_one_line(folder, tmp_path):
    assert "'nowhere' does not exist: give" in failure("nowhere")
    assert "is not a folder" in failure(folder / "g0" / "p0.png")
    (tmp_path / "empty" / "label").mkdir(parents=True)
    assert "holds no pictures" in failure(tmp_path / "empty")
    assert "unknown data mode 'pages'" in failure(folder, "pages")
    for label in range(3):
        write(tmp_path / "singles" / f"g{label}" / "p0.png", label, 0)
    assert "no label folder in" in failure(tmp_path / "singles") and len(scan(tmp_path / "singles", "reconstruct")) == 3
    # one level too high
    message = failure(tmp_path)
    assert "'data/g0' (a folder inside a label folder)" in message


def test_more_than_half_bad_stops_and_names_the_first(folder):
    good = sum(SIZES)
    for number in range(good):
        (folder / "g1" / f"z{number}.jpg").write_text("no picture")
    assert len(scan(folder, "folders").bad) == good
    (folder / "g0" / "one\nmore.jpg").write_text("no picture")
    message = failure(folder)
    assert f"{good + 1} of {2 * good + 1} files" in message and r"the first is 'g0/one\nmore.jpg'" in message


def test_links_may_not_lead_outside(folder, tmp_path):
    write(tmp_path / "secret" / "s0.png", 77, 0)
    write(tmp_path / "secret" / "s1.png", 77, 1)
    (folder / "g0" / "out.png").symlink_to(tmp_path / "secret" / "s0.png")
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "g0" / "inside.png").symlink_to(folder / "g1" / "p0.png")
    (folder / "g0" / "dangling.png").symlink_to(folder / "none.png")
    (folder / "g0" / "loop.png").symlink_to(folder / "g0" / "loop.png")
    data = scan(folder, "folders")
    reasons = dict(data.bad)
    assert reasons["g0/out.png"] == reasons["outside"] == "leads outside the data folder"
    assert set(reasons) == {"g0/out.png", "outside", "g0/dangling.png", "g0/loop.png"}
    assert "g0/inside.png" in data.groups["g0"]
    # the data folder itself may be a link
    (tmp_path / "link").symlink_to(folder)
    assert scan(tmp_path / "link", "folders").groups == data.groups


def test_digest_tells_folders_apart(folder, tmp_path):
    before = scan(folder, "folders").digest()
    assert len(before) == 16
    shutil.copytree(folder, tmp_path / "copy")
    assert scan(tmp_path / "copy", "folders").digest() == before
    (folder / "g0" / "p0.png").rename(folder / "g0" / "p7.png")
    renamed = scan(folder, "folders").digest()
    with open(folder / "g1" / "p0.png", "ab") as file:
        file.write(b"x")
    assert len({before, renamed, scan(folder, "folders").digest()}) == 3


def test_split_is_disjoint_and_deterministic(folder):
    for label in range(4, 20):
        for number in range(2):
            write(folder / f"g{label}" / f"p{number}.png", label, number)
    data = scan(folder, "folders")
    train, held = data.split(0.25, seed=1)
    assert len(held.groups) == 5 and len(train.groups) == 15
    assert {**train.groups, **held.groups} == data.groups and not set(train.groups) & set(held.groups)
    assert set(train.sizes) == {path for paths in train.groups.values() for path in paths}
    assert data.split(0.25, seed=1) == (train, held) != data.split(0.25, seed=2)
    assert [len(part.groups) for part in data.split(1e-9, seed=1)] == [19, 1]
    assert data.split(0, seed=1)[0].groups == data.groups and len(data.split(0, seed=1)[1]) == 0

    pictures = scan(folder, "reconstruct")
    train, held = pictures.split(0.5, seed=1)
    assert len(held) == len(pictures) // 2 == len(train)
    assert {**train.sizes, **held.sizes} == pictures.sizes
    assert any(label in held.groups for label in train.groups)

    for fraction, reason in ((-0.1, "out of range"), (1.0, "out of range"), (0.99, "cannot hold out 20 of 20")):
        with pytest.raises(UserError, match=reason):
            data.split(fraction, seed=1)


def test_every_epoch_visits_each_target_once(folder):
    for mode in ("folders", "reconstruct"):
        data = scan(folder, mode)
        epochs = [[data.draw(5, e * len(data) + i).target.ref for i in range(len(data))] for e in range(4)]
        for epoch in epochs:
            assert sorted(epoch) == sorted(data.sizes)
        assert len(set(map(tuple, epochs))) == 4
        assert epochs[0] != [data.draw(6, i).target.ref for i in range(len(data))]


def test_every_worker_keeps_the_order_of_an_epoch_in_few_bytes():
    found = order(70_000, 3, 5)
    assert np.array_equal(found, generator(3, ORDER, 5).permutation(70_000))
    assert found.nbytes == 4 * 70_000 and order.cache_parameters()["maxsize"] == 2


def test_conditions_are_uniform_over_the_others_of_the_group(folder):
    data = scan(folder, "folders")
    epochs = 400
    counts: dict[tuple[str, str], int] = {}
    for index in range(epochs * len(data)):
        pair = data.draw(0, index)
        condition, target = pair.conditions[0].ref, pair.target.ref
        assert condition != target
        assert condition in data.groups[pair.group] and target in data.groups[pair.group]
        counts[condition, target] = counts.get((condition, target), 0) + 1
    assert len(counts) == sum(size * (size - 1) for size in SIZES)
    for (condition, _), count in counts.items():
        chance = 1 / (len(data.groups[condition.split("/")[0]]) - 1)
        assert abs(count - epochs * chance) <= 4 * math.sqrt(epochs * chance * (1 - chance))


def test_draws_are_pure_and_crops_uniform(folder):
    data = scan(folder, "folders")
    indices = [0, 17, 2**33 + 5, 3]
    draws = [data.draw(9, index) for index in indices]
    assert [scan(folder, "folders").draw(9, index) for index in indices[::-1]][::-1] == draws
    crops = np.array([(p.conditions[0].crop, p.target.crop) for p in (data.draw(9, i) for i in range(3000))])
    # a uniform number has mean 1/2, variance 1/12; the six are uncorrelated
    flat = crops.reshape(3000, 6)
    assert flat.min() >= 0 and flat.max() < 1
    assert np.abs(flat.mean(0) - 0.5).max() < 4 / math.sqrt(12 * 3000)
    assert np.abs(np.corrcoef(flat.T) - np.eye(6)).max() < 4 / math.sqrt(3000)


def test_items_show_the_pair_that_was_drawn(folder):
    data = scan(folder, "folders")
    dataset = pairs(data, condition_size=16)
    for index in range(2 * len(data)):
        item, pair, seen = dataset[index], data.draw(3, index), shown(dataset, index)
        assert item["target"].shape == (SIDE, SIDE, 3) and item["condition"].shape == (16, 16, 3)
        assert item["target"].dtype == item["condition"].dtype == np.uint8
        for name, view in (("condition", pair.conditions[0]), ("target", pair.target)):
            label, number = who(seen[name])
            assert f"g{label}/p{number}.png" == view.ref
            assert mirrored(seen[name]) == view.flip
        assert item["index"] == index and item["bad"] == []


def test_flips_and_drops_have_their_rates(folder):
    data, total = scan(folder, "folders"), 3000
    dataset = pairs(data, drop=0.25)
    cells, drops = np.zeros((2, 2)), 0
    for index in range(total):
        item = dataset[index]
        target, condition = item["flips"]
        cells[int(condition), int(target)] += 1
        drops += item["drop"]
    bound = 4 * math.sqrt(total * 0.25 * 0.75)
    # two independent flips: all four outcomes alike
    assert np.abs(cells - total / 4).max() <= bound
    assert abs(drops - total / 4) <= bound
    still = pairs(data, flip=False)
    assert not any(mirrored(pixels) for i in range(50) for pixels in shown(still, i).values())
    assert [sum(pairs(data, drop=p)[i]["drop"] for i in range(50)) for p in (0.0, 1.0)] == [0, 50]


def test_reconstruct_gives_the_same_view_twice(folder):
    dataset = pairs(scan(folder, "reconstruct"), crop=0.6)
    items = [shown(dataset, index) for index in range(100)]
    assert all(np.array_equal(item["condition"], item["target"]) for item in items)
    assert 25 < sum(mirrored(item["target"]) for item in items) < 75


def test_crops_are_cut_where_they_were_drawn(tmp_path):
    ramp = np.zeros((10, 40, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 5 * np.arange(40), 20 * np.arange(10)[:, None]
    for name in ("a.png", "b.png"):
        (tmp_path / "g").mkdir(exist_ok=True)
        Image.fromarray(ramp).save(tmp_path / "g" / name)
    data = scan(tmp_path, "folders")
    for index in range(40):
        x, y, zoom = data.draw(3, index).target.crop
        side = 10 * (1 - zoom * 0.5)
        centre = x * (40 - side) + side / 2 - 0.5, y * (10 - side) + side / 2 - 0.5
        view = pairs(data, image_size=4, crop=0.5, flip=False)[index]["target"].astype(float).mean((0, 1))
        # the mean of a linear ramp over a square is its value at the centre; place and side are whole pixels
        assert abs(view[0] / 5 - centre[0]) < 0.8 and abs(view[1] / 20 - centre[1]) < 0.8
        middle = pairs(data, image_size=10, flip=False)[index]["target"]
        assert np.array_equal(middle, ramp[:, 15:25])


def test_noise_levels_are_stratified_exactly(folder):
    size = 12
    dataset = pairs(scan(folder, "folders"), global_batch=size)
    levels = np.array([dataset[index]["u"] for index in range(size * 60)]).reshape(60, size)
    assert levels.min() > 0 and levels.max() < 1
    strata = np.floor(levels * size).astype(int)
    assert np.array_equal(np.sort(strata, 1), np.broadcast_to(np.arange(size), (60, size)))
    assert len({tuple(row) for row in strata}) == 60
    within = (levels * size - strata).ravel()
    assert abs(within.mean() - 0.5) < 4 / math.sqrt(12 * within.size)
    assert abs(within.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / within.size)


def test_noise_is_standard_normal_and_each_samples_own(folder):
    data = scan(folder, "folders")
    noise = pairs(data, image_size=32).batch(range(60))["noise"].numpy()
    assert noise.dtype == np.float32 and noise.shape == (60, 3, 32, 32)
    count = noise.size
    assert abs(noise.mean()) < 4 / math.sqrt(count) and abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise.astype(np.float64) ** 4).mean() - 3) < 4 * math.sqrt(96 / count)
    correlation = np.corrcoef(noise.reshape(60, -1)) - np.eye(60)
    assert np.abs(correlation).max() < 5 / math.sqrt(3 * 32 * 32)
    # options of other random streams leave it alone
    other = pairs(data, image_size=32, drop=0.9, flip=False, crop=0.5, global_batch=7)
    assert np.array_equal(other.batch([5])["noise"][0], noise[5])
    assert not np.array_equal(pairs(data, image_size=32, seed=4).batch([5])["noise"][0], noise[5])


def test_a_batch_is_mirrored_and_scaled_on_the_device(folder):
    dataset = pairs(scan(folder, "folders"), condition_size=16)
    batch = dataset.batch(range(5))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items() if key not in ("bad", "group")} == {
        "condition": (torch.float32, (5, 3, 16, 16)),
        "target": (torch.float32, (5, 3, SIDE, SIDE)),
        "noise": (torch.float32, (5, 3, SIDE, SIDE)),
        "u": (torch.float64, (5,)),
        "drop": (torch.bool, (5,)),
        "index": (torch.int64, (5,)),
    }
    items = [dataset[index] for index in range(5)]
    assert batch["group"] == [item["group"] for item in items]
    turned = [item["target"][:, :: -1 if item["flips"][0] else 1] for item in items]
    assert {item["flips"][0] for item in items} == {True, False}
    assert torch.equal(batch["target"], to_tensor(turned)) and batch["target"].is_contiguous()
    assert batch["u"].tolist() == [item["u"] for item in items] and batch["index"].tolist() == list(range(5))
    # every value that there is, to the bit
    every = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).reshape(1, 16, 16, 3)
    assert torch.equal(planes(every, torch.tensor([False])), to_tensor(every.numpy()))


def test_workers_starts_and_micro_batches_make_no_difference(folder):
    dataset = pairs(scan(folder, "folders"), crop=0.7)
    dataset = pickle.loads(pickle.dumps(dataset))

    def take(count, **options):
        stream = batches(dataset, **{"first_index": 4, "batch": 4} | options)
        try:
            return list(itertools.islice(stream, count))
        finally:
            stream.close()

    state = torch.get_rng_state()
    truth = take(6, workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.cat([batch["index"] for batch in truth]).tolist() == list(range(4, 28))
    for workers in (1, 2):
        assert all(map(same, truth, take(6, workers=workers)))
    # resumed at step 3 of the same run, and in micro-batches of two
    assert all(map(same, truth[3:], take(3, workers=1, first_index=16)))
    halves = take(4, workers=0, batch=2)
    for key in ("condition", "target", "noise", "u", "drop", "index"):
        assert torch.equal(torch.cat([half[key] for half in halves]), torch.cat([whole[key] for whole in truth[:2]]))


def test_a_picture_found_broken_is_replaced_by_the_next_of_its_group(folder):
    cut(folder / "g2" / "p1.png")
    data = scan(folder, "folders")
    assert len(data) == sum(SIZES) and not data.bad
    dataset, seen = pairs(data, flip=False), 0
    for index in range(2 * len(data)):
        item, pair = dataset[index], data.draw(3, index)
        condition, target = pair.conditions[0].ref, pair.target.ref
        shown = {name: "g{}/p{}.png".format(*who(item[name])) for name in ("condition", "target")}
        if "g2/p1.png" not in (condition, target):
            assert item["bad"] == [] and shown == {"condition": condition, "target": target}
            continue
        seen += 1
        [(path, reason)] = item["bad"]
        assert path == "g2/p1.png" and "truncated" in reason
        assert bad_record(path, reason) == {"path": path, "reason": reason}
        if target == path:
            assert shown["target"] == "g2/p2.png"
            assert shown["condition"] == (condition if condition != "g2/p2.png" else "g2/p3.png")
        else:
            other = "g2/p3.png" if target == "g2/p2.png" else "g2/p2.png"
            assert shown == {"target": target, "condition": other}
    assert seen >= 2
    streams = [batches(dataset, first_index=0, batch=len(data), workers=workers) for workers in (0, 1)]
    one, two = map(next, streams)
    assert same(one, two) and len(one["bad"]) >= 1
    for stream in streams:
        stream.close()


def test_a_group_found_broken_gives_way_to_the_next_target(folder):
    for number in range(SIZES[1] - 1):
        cut(folder / "g1" / f"p{number}.png")
    data = scan(folder, "folders")
    indices = [index for index in range(len(data)) if data.draw(3, index).group == "g1"]
    assert len(indices) == SIZES[1]
    for index in indices:
        item = pairs(data)[index]
        later = next(p for p in (data.draw(3, i) for i in itertools.count(index)) if p.group != "g1")
        assert "g{}/p{}.png".format(*who(item["target"])) == later.target.ref
        assert {path for path, _ in item["bad"]} == {"g1/p0.png", "g1/p1.png"}
        assert item["index"] == index


@pytest.mark.parametrize(
    "workers, count, mode", [(0, 3, "folders"), (0, 1, "reconstruct"), (1, PATIENCE + 6, "folders")]
)
def test_data_that_is_all_broken_stops_with_one_line(tmp_path, workers, count, mode):
    (tmp_path / "g").mkdir()
    cut(tmp_path / "g" / "p0.png")
    for number in range(1, count):
        shutil.copy(tmp_path / "g" / "p0.png", tmp_path / "g" / f"p{number}.png")
    stream = batches(pairs(scan(tmp_path, mode)), first_index=0, batch=2, workers=workers)
    tried = min(count, PATIENCE)
    with pytest.raises(UserError, match=f"^no readable pair after {tried} broken pictures in .*truncated") as caught:
        next(stream)
    assert "\n" not in str(caught.value)


def test_one_readable_picture_is_no_pair(folder):
    shutil.rmtree(folder / "g3")
    for path in sorted(folder.glob("*/*.png"))[1:]:
        cut(path)
    with pytest.raises(UserError, match="^no readable pair after 9 broken pictures"):
        pairs(scan(folder, "folders"))[0]


def test_options_out_of_range(folder):
    data = scan(folder, "folders")
    for wrong in ({"drop": 1.5}, {"drop": -0.1}, {"crop": 0.0}, {"crop": 1.2}):
        with pytest.raises(UserError, match="out of range"):
            pairs(data, **wrong)


def test_large_jpegs_feed_small_sizes(tmp_path):
    y, x = np.mgrid[0:600, 0:800]
    wide = np.stack([x // 4, y // 4, (x + y) // 8], -1).astype(np.uint8)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "g").mkdir(exist_ok=True)
        Image.fromarray(wide).save(tmp_path / "g" / name, quality=95)
    data = scan(tmp_path, "folders")
    item = pairs(data, image_size=16, flip=False)[0]
    centre = load_image(tmp_path / "g" / "a.jpg").crop((100, 0, 700, 600))
    truth = np.asarray(centre.resize((16, 16), Image.Resampling.BOX))
    assert np.abs(item["target"][1:-1, 1:-1].astype(int) - truth[1:-1, 1:-1]).max() <= 4
