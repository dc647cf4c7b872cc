"""ImageNet and SUN397 as they are distributed: which picture is of which class, and what the classes are called.

ImageNet (ILSVRC 2012, arXiv 1409.0575), as torchvision's `ImageNet` and `ImageFolder` and Kaggle's archive have it:

    ROOT/train/n01440764/*.JPEG, ROOT/val/n01440764/*.JPEG               also below ROOT/ILSVRC/Data/CLS-LOC
    ROOT/.../val/ILSVRC2012_val_00000001.JPEG                            flat, with LOC_val_solution.csv
    LOC_synset_mapping.txt                          "n01440764 tench, Tinca tinca"; beside the pictures, or up to four
    imagenet_class_index.json                       {"0": ["n01440764", "tench"], ...}           folders above them
    LOC_val_solution.csv                            ImageId,PredictionString

SUN397 (Xiao et al., CVPR 2010), as torchvision's `SUN397` reads it, with the partitions of its page:

    SUN397/ClassName.txt ("/a/abbey"), SUN397/a/abbey/sun_*.jpg, SUN397/c/cathedral/indoor/sun_*.jpg
    Training_01.txt ... Testing_10.txt ("/a/abbey/sun_aakbdcgfpksytcwj.jpg")    there, in a folder of it, or beside it
"""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from semantica.errors import UserError
from semantica.files import read_json
from semantica.train.data.folders import (
    LOOSE,
    SIDE_FILES,
    FolderData,
    gathered,
    listing,
    names_in,
    refuse_thresholds,
    scan,
)

WNID, FLAT = re.compile(r"n\d{8}"), re.compile(r"(ILSVRC2012_val_\d{8})\.JPEG")
SYNSETS, INDEX, SOLUTION = "LOC_synset_mapping.txt", "imagenet_class_index.json", "LOC_val_solution.csv"
PARTS, BELOW, ABOVE = ("train", "val"), "ILSVRC/Data/CLS-LOC", 4
CLASSES, SPLIT = "ClassName.txt", re.compile(r"(Training|Testing)_\d\d\.txt")
SUN_CLASS = re.compile(r"/[a-z](/[\w-]+)+")


def is_imagenet(root: str) -> bool:
    """Whether pictures in folders named after synsets lie there, the flat validation set, or both parts of the set."""
    try:
        names = os.listdir(root)
    except OSError:
        return False
    return any(WNID.fullmatch(name) or FLAT.fullmatch(name) for name in names) or bool(parts_of(Path(root)))


def parts_of(root: Path) -> list[Path]:
    """Training and validation pictures where a folder holds both, or one of them."""
    places = (root / below / part for below in ("", BELOW) for part in PARTS)
    return [place for place in places if place.is_dir() and any(map(WNID.fullmatch, os.listdir(place)))]


def open_imagenet(root: str, mode: str, low: float | None, high: float | None) -> FolderData:
    """Labels are synsets, which are unique (two classes are called crane); their names are texts of the pictures.

    Raises:
        UserError: as `scan`; a folder of both parts; flat pictures without the file that says their classes; a file of
            classes that is none.
    """
    refuse_thresholds(root, low, high)
    path = Path(root)
    if parts := parts_of(path):
        raise UserError(f"{root!r} holds parts of ImageNet, and data is one of them: give {str(parts[-1])!r}")
    names = synsets(path)
    with listing():
        flat = [name for name in names_in(path) if not (path / name).is_dir()]
    if not any(map(FLAT.fullmatch, flat)):
        return replace(scan(root, mode), names=names)
    classes, files, bad = solution(path), [], []
    for name in flat:
        found = FLAT.fullmatch(name)
        if found and found[1] in classes:
            files.append((classes[found[1]], name))
        elif found or Path(name).suffix.lower() not in SIDE_FILES:
            bad.append((name, f"no class in {SOLUTION}" if found else LOOSE))
    # classes in their own order, whatever the pictures' is
    return replace(gathered(path, mode, sorted(files), bad), names=names)


def above(root: Path, name: str) -> Path | None:
    """A file beside the pictures or in one of the folders above them."""
    places = (folder / name for folder in (root.absolute(), *root.absolute().parents[:ABOVE]))
    return next((place for place in places if place.is_file()), None)


def synsets(root: Path) -> dict[str, tuple[str, ...]]:
    """Names of each synset; none where no file says them. Raises `UserError` for a file of something else."""
    if path := above(root, SYNSETS):
        found = {}
        for number, line in enumerate(lines(path), 1):
            wnid, _, said = line.partition(" ")
            names = tuple(name.strip() for name in said.split(",") if name.strip())
            if not WNID.fullmatch(wnid) or not names:
                raise UserError(f"{path}, line {number}: {line[:80]!r} is no synset and its names: restore the file")
            found[wnid] = names
        return found
    if path := above(root, INDEX):
        rows = list(read_json(path).values())
        if not all(isinstance(row, list) and len(row) == 2 and WNID.fullmatch(str(row[0])) for row in rows):
            raise UserError(f'{path} is no index of classes: expected {{"0": ["n01440764", "tench"], ...}}')
        return {wnid: (str(name).replace("_", " "),) for wnid, name in rows}
    return {}


def solution(root: Path) -> dict[str, str]:
    """The synset of each validation picture. Raises `UserError` where no file says it, or for another file."""
    path = above(root, SOLUTION)
    if path is None:
        raise UserError(
            f"{str(root)!r} holds ImageNet's validation pictures without their classes: put {SOLUTION} there or above, "
            "or sort them into folders named after their synsets"
        )
    found = {}
    for number, row in enumerate(csv.reader(lines(path)), 1):
        wnid = row[1].partition(" ")[0] if len(row) == 2 else ""
        if number > 1 and not WNID.fullmatch(wnid):
            raise UserError(f"{path}, line {number}: expected a picture and its synset, such as ILSVRC2012_val_..,n0..")
        if number > 1:
            found[row[0]] = wnid
    return found


def lines(path: Path) -> Iterator[str]:
    """Lines that are not empty. Raises `UserError` for a file that is no text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: restore it") from error


def is_sun(root: str) -> bool:
    """Whether it is the folder of SUN397, or one of the files that list its partitions."""
    path = Path(root)
    return (path / CLASSES).is_file() or (SPLIT.fullmatch(path.name) is not None and path.is_file())


def open_sun(root: str, mode: str, low: float | None, high: float | None) -> FolderData:
    """All pictures of SUN397, or those of a partition; labels as torchvision has them, such as "cathedral/indoor".

    Raises:
        UserError: as `scan`; no pictures around a partition's file; a class without a folder, or a line that is no
            picture of one.
    """
    refuse_thresholds(root, low, high)
    path = Path(root)
    folder = path if path.is_dir() else home(path)
    classes = list(lines(folder / CLASSES))
    for number, line in enumerate(classes, 1):
        if not SUN_CLASS.fullmatch(line):
            raise UserError(f"{folder / CLASSES}, line {number}: {line[:80]!r} is no class, such as '/a/abbey'")
    if path.is_dir():
        with listing():
            found = [(name, file) for name in classes for file in pictures_in(folder / name[1:])]
    else:
        found = list(partition(path, set(classes)))
    files = [(name[3:], f"{name[1:]}/{file}") for name, file in found]
    names = {name[3:]: (name[3:].replace("_", " ").replace("/", " "),) for name in classes}
    return replace(gathered(folder, mode, files, []), names=names)


def pictures_in(folder: Path) -> Iterator[str]:
    """Other classes may lie in folders of a class's."""
    return (name for name in names_in(folder) if not (folder / name).is_dir())


def partition(path: Path, classes: set[str]) -> Iterator[tuple[str, str]]:
    """(class, file) of each line."""
    for number, line in enumerate(lines(path), 1):
        name, _, file = line.rpartition("/")
        if name not in classes or file.startswith("."):
            raise UserError(f"{path}, line {number}: {line[:80]!r} is no picture of a class in {CLASSES}")
        yield name, file


def home(path: Path) -> Path:
    """The folder of the pictures that a partition's file lists. Raises `UserError` where there is none."""
    for place in (path.parent, path.parent.parent, path.parent / "SUN397", path.parent.parent / "SUN397"):
        if (place / CLASSES).is_file() and (place / "a").is_dir():
            return place
    raise UserError(f"there is no folder of SUN397 around {path}: put it into the folder that has {CLASSES} and 'a'")
