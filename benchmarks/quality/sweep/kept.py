"""What of a sweep is there already, and what it was made of: it is kept where that is still the same.

In --out: `runs/NAME` is a cell's run folder; `cells/NAME` holds `cell.json`, what was asked of it; `trained.json`, of
which files the trained run is; `guidance-G.json`, an evaluation; `log.txt`, what its process said.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import semantica
from semantica.benchmarks.quality.sweep.description import Cell, Options, Sweep
from semantica.benchmarks.quality.sweep.typed import plain
from semantica.errors import UserError
from semantica.files import read_json, sha256
from semantica.train.config import FREE, TrainConfig

# a run that took more steps is no longer what it was
FREELY = FREE - {"steps"}
# paths that are written to
WRITTEN = {"out", "model", "cache"}
# bytes at the end of a log, and lines in them, that the last step is looked for in
TAIL, LINES = 8192, 4
# of a run folder what its samples come from, and its log with the held-out loss
PUBLISHED = ("model_index.json", "metrics.jsonl", "unet/*", "encoder/*", "scheduler/*")


def place_of(out: Path, name: str) -> Path:
    """The folder of what is known of a cell."""
    return out / "cells" / name


@functools.cache
def content(path: Path) -> str:
    """SHA-256 of a file, or of the names and sizes of all files below a folder; once in a process."""
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def inputs(options: Options, config: type) -> dict[str, str]:
    """What lies under each option that is a path on this machine, of those that are read."""
    usual = {field.name: plain(field.default) for field in dataclasses.fields(config)}
    given = {name: value for name, value in options.items() if isinstance(value, str) and value != usual[name]}
    paths = {name: Path(value) for name, value in given.items() if name not in WRITTEN and "://" not in value}
    return {name: content(path) for name, path in paths.items() if path.exists()}


def asked(sweep: Sweep, cell: Cell) -> Options:
    """All that a cell's process has to know."""
    from semantica.benchmarks.quality.evaluate import EvaluateConfig

    return {
        "train": cell.train,
        "inputs": inputs(cell.train, TrainConfig),
        "evaluate": sweep.evaluate,
        "evaluate_inputs": inputs(sweep.evaluate, EvaluateConfig),
        "guidance": list(sweep.guidance),
    }


def check(place: Path, request: Options) -> None:
    """Raises `UserError` where a run was begun with other settings, or on other data: hours of training are not thrown
    away because a file was edited. More steps continue it."""
    run = Path(request["train"]["out"])
    # an attempt that failed before it saved anything binds to nothing
    saved = (run / "model_index.json").exists() or any((run / "checkpoints").glob("step-*"))
    if not (place / "cell.json").exists() or not saved:
        return
    before, advice = read_json(place / "cell.json"), f"choose another --out, or remove {run}"
    for name, then, now in changed(before["train"], request["train"]):
        if name != "steps" or then > now:
            raise UserError(f"{run} was made with {name} {then!r}, not {now!r}: {advice}")
    for name, now in request["inputs"].items():
        if before["inputs"].get(name, now) != now:
            raise UserError(f"what lies in {request['train'][name]} ({name}) changed since {run} was made: {advice}")


def changed(before: Options, now: Options) -> Iterator[tuple[str, Any, Any]]:
    """Options that differ, of those that alter what a run computes: name, then, now."""
    # a run made before an option existed had its default
    usual = {field.name: plain(field.default) for field in dataclasses.fields(TrainConfig)}
    for name, value in now.items():
        if name not in FREELY and (then := before.get(name, usual[name])) != value:
            yield name, then, value


def files_of(run: Path) -> dict[str, str]:
    """SHA-256 of each file of a published run."""
    found = (path for pattern in PUBLISHED for path in sorted(run.glob(pattern)))
    stats = ((path, path.stat()) for path in found)
    return {path.relative_to(run).as_posix(): hashed(path, s.st_size, s.st_mtime_ns) for path, s in stats}


@functools.cache
def hashed(path: Path, size: int, changed: int) -> str:
    """Of a file as it was then, once in a process."""
    return sha256(path)


def trained(place: Path, request: Options) -> dict[str, str] | None:
    """The files of a run that was trained as asked, and has not changed since; None for any other."""
    known = written_by(place / "trained.json")
    if known is None or known["inputs"] != request["inputs"] or any(changed(known["train"], request["train"])):
        return None
    files = files_of(Path(request["train"]["out"]))
    return files if files == known["files"] else None


def evaluation_key(request: Options, guidance: float, files: dict[str, str]) -> Options:
    """What the figures of an evaluation are a function of."""
    made_of = {"options": request["evaluate"], "inputs": request["evaluate_inputs"], "files": files}
    return {**made_of, "guidance": guidance, "semantica": semantica.__version__}


def evaluation_at(place: Path, guidance: float) -> Path:
    return place / f"guidance-{guidance:g}.json"


def evaluated(place: Path, request: Options, guidance: float, files: dict[str, str]) -> Options | None:
    """An evaluation that is still what is asked for; None for any other."""
    found = written_by(evaluation_at(place, guidance))
    same = found is not None and found.get("sweep", {}).get("of") == evaluation_key(request, guidance, files)
    return found if same else None


def written_by(path: Path) -> dict[str, Any] | None:
    """A file that a cell's process wrote whole; None where there is none, or where something else stands."""
    try:
        return read_json(path) if path.exists() else None
    except UserError:
        return None


def complete(place: Path, request: Options) -> bool:
    """Whether nothing is left to do for a cell."""
    files = trained(place, request)
    return files is not None and all(evaluated(place, request, g, files) for g in request["guidance"])


def steps_of(run: Path) -> int:
    """The last step that a run's log knows of; 0 where there is none."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            # of a line that is being written, or that begins before these bytes, nothing is known
            lines = file.read().decode(errors="replace").splitlines()[-LINES:]
    except OSError:
        return 0
    found = 0
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            found = max(found, int(json.loads(line)["step"]))
    return found
