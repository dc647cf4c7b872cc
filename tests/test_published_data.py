"""ImageNet, SUN397 and LSUN in miniature copies of their layouts: classes, their names, parts, and what is wrong."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from semantica import UserError
from semantica.benchmarks.quality.evaluate import EvaluateConfig, evaluate
from semantica.train.data.open import open_data


def drawn(number, kind="JPEG"):
    """The bytes of a picture that is known again by its colour."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 32), (number, 255 - number, 128)).save(stream, kind, quality=95)
    return stream.getvalue()


def put(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawn(number))


@pytest.fixture
def imagenet(tmp_path):
    """Kaggle's archive: the validation pictures flat, their classes in a table four folders above."""
    root = tmp_path / "imagenet"
    pictures = root / "ILSVRC" / "Data" / "CLS-LOC"
    rows = ["ImageId,PredictionString"]
    for number, wnid in enumerate(("n01440764", "n02012849", "n03126707")):
        for i in range(3):
            put(pictures / "train" / wnid / f"{wnid}_{i}.JPEG", 10 * number)
            name = f"ILSVRC2012_val_{10 * i + number:08d}"
            put(pictures / "val" / f"{name}.JPEG", 10 * number)
            rows.append(f"{name},{wnid} 1 2 30 31 {wnid} 1 1 9 9 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n")
    return root


def test_imagenet_of_kaggle_and_of_torchvision_are_the_same_classes(imagenet):
    pictures = imagenet / "ILSVRC" / "Data" / "CLS-LOC"
    training, flat = (open_data(pictures / part, captions=True) for part in ("train", "val"))
    assert list(training.groups) == list(flat.groups) == ["n01440764", "n02012849", "n03126707"]
    assert flat.groups["n02012849"] == tuple(f"ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 11, 21))
    # both cranes have that name, and stay two classes
    assert set(flat.captions) == {"tench", "Tinca tinca", "crane"} and len(flat) == len(training) == 9
    assert flat.captions.texts["ILSVRC2012_val_00000000.JPEG"] == ("tench", "Tinca tinca")
    # sorted into folders, with the index of Keras instead
    (imagenet / "LOC_synset_mapping.txt").unlink()
    for label, paths in flat.groups.items():
        for path in paths:
            put(imagenet / "val" / label / path, 0)
    index = {"0": ["n01440764", "tench"], "134": ["n02012849", "crane"], "517": ["n03126707", "tower_crane"]}
    (imagenet / "imagenet_class_index.json").write_text(json.dumps(index))
    sorted_ = open_data(imagenet / "val", captions=True)
    assert {label: len(paths) for label, paths in sorted_.groups.items()} == dict.fromkeys(flat.groups, 3)
    assert set(sorted_.captions) == {"tench", "crane", "tower crane"}
    # without any file, label folders like others
    (imagenet / "imagenet_class_index.json").unlink()
    assert open_data(imagenet / "val").groups == sorted_.groups
    with pytest.raises(UserError, match="captions.jsonl does not exist"):
        open_data(imagenet / "val", captions=True)


def test_what_imagenet_lacks_is_one_line(imagenet):
    pictures = imagenet / "ILSVRC" / "Data" / "CLS-LOC"

    def said(path, **options):
        with pytest.raises(UserError) as raised:
            open_data(path, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    for path in (imagenet, pictures):
        assert "holds parts of ImageNet, and data is one of them: give" in said(path)
    assert "--low and --high are for shards" in said(pictures / "train", low=0.1)
    put(pictures / "val" / "ILSVRC2012_val_00000099.JPEG", 0)
    data = open_data(pictures / "val")
    assert data.bad == (("ILSVRC2012_val_00000099.JPEG", "no class in LOC_val_solution.csv"),) and len(data) == 9
    mapping, table = imagenet / "LOC_synset_mapping.txt", imagenet / "LOC_val_solution.csv"
    mapping.write_text("n01440764 tench\nn02012849 crane\n")
    assert "class 'n03126707' in" in said(pictures / "train", captions=True)
    mapping.write_text("n01440764 tench\ncrane\n")
    assert "LOC_synset_mapping.txt, line 2: 'crane' is no synset and its names" in said(pictures / "train")
    mapping.unlink()
    table.write_text("ImageId,PredictionString\nILSVRC2012_val_00000000,tench 1 2 3 4\n")
    assert "LOC_val_solution.csv, line 2: expected a picture and its synset" in said(pictures / "val")
    table.unlink()
    assert "validation pictures without their classes: put LOC_val_solution.csv" in said(pictures / "val")
    (imagenet / "imagenet_class_index.json").write_text('{"0": "tench"}')
    assert "is no index of classes" in said(pictures / "train")


@pytest.fixture
def sun(tmp_path):
    root = tmp_path / "SUN397"
    classes = ("/a/abbey", "/a/apartment_building/outdoor", "/c/cathedral/indoor")
    for number, name in enumerate(classes):
        for i in range(4):
            put(root / name[1:] / f"sun_{number}{i}.jpg", 10 * number)
    (root / "ClassName.txt").write_text("\n".join(classes) + "\n")
    for name, half in (("Training_01.txt", (0, 1)), ("Testing_01.txt", (2, 3))):
        listed = [f"{c}/sun_{number}{i}.jpg" for number, c in enumerate(classes) for i in half]
        (root / "Partitions").mkdir(exist_ok=True)
        (root / "Partitions" / name).write_text("\n".join(listed) + "\n")
    return root


def test_sun397_and_its_partitions(sun):
    whole = open_data(sun, captions=True)
    assert list(whole.groups) == ["abbey", "apartment_building/outdoor", "cathedral/indoor"] and len(whole) == 12
    assert set(whole.captions) == {"abbey", "apartment building outdoor", "cathedral indoor"}
    parts = [open_data(sun / "Partitions" / f"{name}_01.txt") for name in ("Training", "Testing")]
    assert sorted(parts[0].refs() + parts[1].refs()) == sorted(whole.refs())
    assert parts[1].groups["cathedral/indoor"] == ("c/cathedral/indoor/sun_22.jpg", "c/cathedral/indoor/sun_23.jpg")
    pair = parts[0].draw(0, 3)
    assert parts[0].load(pair.target.ref, None).size == (40, 32)
    # beside the folder, as in the first archive
    (sun / "Partitions" / "Testing_01.txt").rename(sun.parent / "Testing_01.txt")
    assert open_data(sun.parent / "Testing_01.txt").digest() == parts[1].digest()


def test_what_sun397_lacks_is_one_line(sun):
    listed = sun / "Partitions" / "Testing_01.txt"
    good = listed.read_text()
    for line, said in (("/a/abbey/../../x.jpg", "line 7"), ("/z/zoo/sun_1.jpg", "is no picture of a class in"),
                       ("/a/abbey/.hidden", "line 7"), ("sun_1.jpg", "line 7")):  # fmt: skip
        listed.write_text(good + line + "\n")
        with pytest.raises(UserError, match=re.escape(said)):
            open_data(listed)
    listed.write_text(good + "/a/abbey/sun_99.jpg\n")
    assert [name for name, _ in open_data(listed).bad] == ["a/abbey/sun_99.jpg"]
    with pytest.raises(UserError, match="is no class, such as '/a/abbey'"):
        (sun / "ClassName.txt").write_text("/a/abbey\n../etc\n")
        open_data(sun)
    (sun / "ClassName.txt").write_text("/a/abbey\n/b/barn\n")
    with pytest.raises(UserError, match="cannot list data folder '.*/b/barn'"):
        open_data(sun)
    (sun / "ClassName.txt").unlink()
    with pytest.raises(UserError, match="there is no folder of SUN397 around"):
        open_data(listed)


@pytest.fixture
def lsun(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    root = tmp_path / "lsun"
    for number, name in enumerate(("bedroom_val", "church_outdoor_val", "bedroom_train")):
        place = root / f"{name}_lmdb"
        place.mkdir(parents=True)
        with lmdb.open(str(place), map_size=1 << 20) as entries, entries.begin(write=True) as write:
            for i in range(4):
                write.put(f"{number}{i}".encode().ljust(40, b"f"), drawn(10 * number + i, "WEBP" if i else "JPEG"))
    return root


def test_lsun_is_read_from_its_databases(lsun, tmp_path):
    data = open_data(f"{lsun}/*_val_lmdb", captions=True)
    assert {label: len(refs) for label, refs in data.groups.items()} == {"bedroom": 4, "church_outdoor": 4}
    assert set(data.captions) == {"bedroom", "church outdoor"} and data.kind == "lsun"
    for i, ref in enumerate(data.groups["church_outdoor"]):
        # lossy formats keep one colour within a few steps
        assert np.abs(data.pixels(ref, 8).astype(int) - (10 + i, 245 - i, 128)).max() <= 4
        assert np.array_equal(data.pixels(ref, 8), np.asarray(data.load(ref, 8)))
    stamps = [data.stamp(ref).sha for ref in data.refs()]
    assert len(set(stamps)) == 8 and bytes(16) not in stamps and data.picture_bytes() > 8 * len(drawn(0))
    training, held = data.split(0.5, 0)
    assert len(training) == len(held) == 4 and type(held) is type(data)
    one = open_data(lsun / "bedroom_train_lmdb")
    assert list(one.groups) == ["bedroom"] and one.digest() != data.digest()
    with pytest.raises(UserError, match="cannot use the picture 'bedroom_val_lmdb/gone': not in its database"):
        data.load("bedroom_val_lmdb/gone", None)
    options = dict(images=tmp_path / "made", bootstrap=20, size=8, out=tmp_path / "o.json")
    for label in data.groups:
        put(tmp_path / "made" / label / "0.png", 3)
        put(tmp_path / "made" / label / "1.png", 13)
    figures = evaluate(EvaluateConfig(f"{lsun}/*_val_lmdb", **options))["figures"]
    assert figures["images"]["on_topic"] == 0.5 and figures["copy the condition"]["on_topic"] == 1.0


def test_what_lsun_lacks_is_one_line(lsun):
    def said(path, **options):
        with pytest.raises(UserError) as raised:
            open_data(path, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "bedroom_train_lmdb and bedroom_val_lmdb: give one part, such as" in said(lsun)
    assert "unknown data mode 'pages'" in said(f"{lsun}/*_val_lmdb", mode="pages")
    broken = lsun / "tower_val_lmdb"
    broken.mkdir()
    (broken / "data.mdb").write_bytes(b"no database" * 1000)
    assert "tower_val_lmdb' cannot be opened by LMDB" in said(broken)
