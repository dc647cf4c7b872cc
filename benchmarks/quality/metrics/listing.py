"""`conditions.csv`: which condition and class each picture was made of, so that any system's can be judged."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from semantica.errors import UserError
from semantica.files import write_text

NAME, COLUMNS = "conditions.csv", ("file", "condition", "class")


@dataclass(frozen=True)
class Listed:
    """Pictures made elsewhere: `files` relative to their folder, and the condition of each, relative to the data."""

    files: list[str]
    conditions: list[str]
    classes: list[str]


def read_listing(folder: Path, groups: dict[str, tuple[str, ...]]) -> Listed:
    """Read FOLDER/conditions.csv, whose conditions are pictures of `groups` (class -> paths).

    Raises:
        UserError: it cannot be read, lacks a column, is empty, names a file twice or outside the folder, a file that
            is missing, a class or a condition that the data lacks, or a condition of another class.
    """
    path = folder / NAME
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                raise UserError(f"{path} has no column {lacking[0]!r}: its first line is {','.join(COLUMNS)}")
            rows = [tuple((row[name] or "").strip() for name in COLUMNS) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({type(error).__name__}): write it again as UTF-8") from error
    if not rows:
        raise UserError(f"{path} lists no pictures: give a line for each")
    known, seen = {label: set(paths) for label, paths in groups.items()}, set()
    for number, (name, condition, label) in enumerate(rows, 2):
        where = f"{path}, line {number}:"
        if not (folder / name).resolve().is_relative_to(folder.resolve()) or not (folder / name).is_file():
            raise UserError(f"{where} there is no file {name!r} in {folder}: correct the name or leave the line out")
        if name in seen:
            raise UserError(f"{where} {name!r} is listed twice: leave one line out")
        if label not in known:
            raise UserError(f"{where} class {label!r} is no label of --data, such as {min(known)!r}: correct it")
        if condition not in known[label]:
            raise UserError(
                f"{where} condition {condition!r} is no picture of class {label!r}, such as {min(known[label])!r}"
            )
        seen.add(name)
    return Listed(*(list(column) for column in zip(*rows, strict=True)))


def write_listing(folder: Path, listed: Listed) -> None:
    """Write FOLDER/conditions.csv, the last of the folder's files."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *zip(listed.files, listed.conditions, listed.classes, strict=True)])
    write_text(folder / NAME, text.getvalue())
