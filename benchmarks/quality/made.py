"""Pictures that were made: written for other judges, and read from where other systems left them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantica.benchmarks.quality.metrics.listing import Listed, write_listing
from semantica.errors import UserError
from semantica.files import written

if TYPE_CHECKING:
    from semantica.train.data.folders import FolderData


def classed(root: Path) -> "FolderData":
    """Real pictures in classes. Raises `UserError` as `open_data`, and for pictures that are in none."""
    from semantica.train.data.folders import FolderData
    from semantica.train.data.open import open_data

    data = open_data(root, "folders")
    if not isinstance(data, FolderData):
        raise UserError(f"{os.fspath(root)!r} holds {data.kind}, which have no classes: give a folder of label folders")
    return data


def read(data: "FolderData", refs: list[str], size: int) -> np.ndarray:
    """Pictures of some data uint8 `[N, size, size, 3]`, centre crops. Raises `UserError` for one that is broken."""
    from semantica.images import fit

    return np.stack([fit(data.load(ref, 2 * size), size) for ref in refs])


def resized(made: np.ndarray, size: int) -> np.ndarray:
    """Pictures uint8 `[N, S, S, 3]` to the side at which they are judged."""
    from PIL import Image

    from semantica.images import fit

    if made.shape[1] == size:
        return made
    return np.stack([fit(Image.fromarray(picture), size) for picture in made])


def read_files(root: Path, paths: list[str], size: int) -> np.ndarray:
    """Pictures uint8 `[N, size, size, 3]`, centre crops. Raises `UserError` for one that cannot be decoded."""
    from semantica.images import fit, load_image

    return np.stack([fit(load_image(root / path, near=2 * size), size) for path in paths])


def read_labelled(folder: Path, groups: dict, size: int) -> tuple[np.ndarray, list[str]]:
    """Pictures in folders named after the labels. Raises `UserError` for another label."""
    from semantica.train.data.folders import scan

    data = scan(folder, "reconstruct")
    unknown = sorted(set(data.groups) - set(groups))
    if unknown:
        raise UserError(f"--images has {unknown[0]!r}, which is no label of --data: name its folders after the labels")
    listed = [(label, path) for label, members in data.groups.items() for path in members]
    return read_files(folder, [path for _, path in listed], size), [label for label, _ in listed]


def keep(folder: Path, made: np.ndarray, n: int, sources: list[str], labels: list[str]) -> None:
    """Write n pictures of each condition, as `--images` reads them. Raises `UserError` if the folder is there."""
    from semantica.images import save_png

    listed = Listed([], [], [])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written(folder, existing="refuse") as aside:
            aside.mkdir()
            for i, picture in enumerate(made):
                listed.files.append(f"{i // n:04d}-{i % n}.png")
                listed.conditions.append(sources[i // n])
                listed.classes.append(labels[i // n])
                save_png(picture, aside / listed.files[-1])
            write_listing(aside, listed)
    except OSError as error:
        raise UserError(f"--keep {folder} cannot be written ({error.strerror}): choose another folder") from error
