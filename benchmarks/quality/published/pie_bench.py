"""PIE-Bench as it is distributed: pictures, what each shows and shall show, and where it may change.

Ju et al., arXiv 2310.01506; github.com/cure-lab/PnPInversion (README, evaluation/evaluate.py):

    ROOT/mapping_file.json      {"000000000000": {"image_path": "0_random_140/000000000000.jpg", "original_prompt",
                                "editing_prompt", "editing_instruction", "editing_type_id", "blended_word", "mask"}}
    ROOT/annotation_images/0_random_140/000000000000.jpg

Brackets in prompts mark what differs. A mask is [start, length, start, length, ...] over the rows of the picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantica.errors import UserError
from semantica.files import read_json

MAPPING, PICTURES = "mapping_file.json", "annotation_images"
TEXTS = ("image_path", "original_prompt", "editing_prompt", "editing_instruction", "editing_type_id", "blended_word")


@dataclass(frozen=True)
class Edit:
    """One picture to be edited.

    name: its number. path: below `annotation_images`. source, target: what it shows and shall show. words: which of
    each are exchanged, "" for none. kind: editing type, "0" to "9". mask: runs as in the file.
    """

    name: str
    path: str
    source: str
    target: str
    instruction: str
    words: str
    kind: str
    mask: tuple[int, ...]

    def region(self, height: int, width: int) -> np.ndarray:
        """Where it may change, bool `[height, width]`; the outermost pixels are always among it, as in the benchmark.

        Raises:
            UserError: runs that begin outside such a picture.
        """
        starts, lengths = np.array(self.mask, np.int64).reshape(-1, 2).T
        if (starts >= height * width).any():
            raise UserError(f"the mask of {self.name} is of a larger picture than {width} x {height}: restore that")
        inside = np.zeros(height * width, bool)
        for start, length in zip(starts, lengths, strict=True):
            inside[start : start + length] = True
        inside = inside.reshape(height, width)
        inside[[0, -1]] = inside[:, [0, -1]] = True
        return inside


def read_edits(root: Path, kinds: tuple[str, ...] = ()) -> list[Edit]:
    """The edits of ROOT/mapping_file.json in its order; kinds: editing types, by default all.

    Raises:
        UserError: no such file or folder, an entry that is none, a path that leads out of the folder, or no edit of
            these kinds.
    """
    path = root / MAPPING
    if not path.is_file() or not (root / PICTURES).is_dir():
        raise UserError(f"{root} has no {MAPPING} and {PICTURES}: give the folder of PIE-Bench")
    found = [entry(name, row, path) for name, row in read_json(path).items()]
    chosen = [edit for edit in found if not kinds or edit.kind in kinds]
    if not chosen:
        have = ", ".join(sorted({edit.kind for edit in found}))
        raise UserError(f"{path} has no edits of type {', '.join(kinds)}, only {have or 'none'}: choose among those")
    return chosen


def entry(name: str, row: Any, path: Path) -> Edit:
    """An edit of its entry. Raises `UserError`."""
    said = [row.get(field) for field in TEXTS] if isinstance(row, dict) else [None]
    lacking = [field for field, value in zip(TEXTS, said) if not isinstance(value, str)]
    if lacking:
        raise UserError(f"{path}: {name!r} has no {lacking[0]}: restore the file")
    place, source, target, instruction, kind, words = said
    parts = Path(place).parts
    if Path(place).is_absolute() or ".." in parts or not parts:
        raise UserError(f"{path}: {name!r} lies at {place!r}, outside of {PICTURES}: restore the file")
    mask = row.get("mask")
    if not isinstance(mask, list) or len(mask) % 2 or not all(type(n) is int and 0 <= n < 1 << 31 for n in mask):
        raise UserError(
            f"{path}: {name!r} has no mask in runs, [start, length, ...] of whole numbers: restore the file"
        )
    plain = [text.replace("[", "").replace("]", "") for text in (source, target)]
    return Edit(name, place, *plain, instruction, words, kind, tuple(mask))
