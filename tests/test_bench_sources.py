"""Which rows are stale: those whose code has changed, wherever it lies and however it is laid out, and no others."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from semantica import nvcc
from semantica.benchmarks.harness import sources
from semantica.benchmarks.harness.sources import (
    SOURCES,
    UNETS,
    combined,
    files_of,
    fingerprint,
    hash_of,
    kernel_hash,
    source_hash,
    stale,
)
from semantica.benchmarks.harness.store import OURS
from semantica.kernels import OPERATORS, Operator, cuda, launch

CODE = '''"""A module."""
import os
from a.b import c

LIMIT = 1_000


def f(x, *, y=None):
    """Doc."""
    # a comment
    if x > LIMIT and y is None:
        return f"{x!r:>{LIMIT}} of {os.name}" "!"
    return [x, "y"]
'''
ALIKE = {
    "comments": CODE.replace("# a comment", "# another\n\n"),
    "docstrings": CODE.replace('"""Doc."""', '"""Other."""').replace('"""A module."""', ""),
    "imports": CODE.replace("from a.b import c\n", "from a.d import c, e\nif TYPE_CHECKING:\n    import g\n"),
    "layout": CODE.replace("x > LIMIT and y is None", "(x > LIMIT\n  and (y is None))").replace("[x, ", "[\n x,\n "),
    "quotes": CODE.replace('"y"', "'y'").replace("1_000", "1000"),
}
OTHER = {
    "a number": CODE.replace("1_000", "1_001"),
    "an operator": CODE.replace("x > LIMIT", "x >= LIMIT"),
    "a default": CODE.replace("y=None", "y=0"),
    "a text": CODE.replace('"y"', '"z"'),
    "an empty text": CODE.replace('"y"', '""'),
    "no text": CODE.replace(', "y"', ""),
    "a format": CODE.replace("!r", ""),
    "a name": CODE.replace("def f", "def g"),
    "an order": CODE.replace('[x, "y"]', '["y", x]'),
}


@pytest.mark.parametrize("name", [*ALIKE, *OTHER])
def test_what_counts_is_the_code(name, tmp_path):
    def of(text: str) -> str:
        (tmp_path / "code.py").write_text(text)
        return fingerprint(tmp_path / "code.py")

    assert {**ALIKE, **OTHER}[name] != CODE
    assert (of({**ALIKE, **OTHER}[name]) == of(CODE)) == (name in ALIKE)


def test_hashes_are_those_of_every_version_of_python(tmp_path):
    """Computed by 3.11, 3.12 and 3.13, whose parsers differ in the parts of formatted texts."""
    (tmp_path / "code.py").write_text(CODE + 'g = f"{LIMIT:<{LIMIT}}"\n')
    assert fingerprint(tmp_path / "code.py")[:16] == "d5d0e23011c64e12"


def test_a_file_may_be_moved_and_renamed(tmp_path):
    for name, text in (("a.py", CODE), ("b.py", "x = 1"), ("c.py", CODE), ("d.py", "x = 2")):
        (tmp_path / name).write_text(text)
    a, b, c, d = (tmp_path / f"{name}.py" for name in "abcd")
    assert combined([a, b]) == combined([b, c]) != combined([a, d])
    assert combined([a]) != combined([a, a]) and combined([a], "more") != combined([a])


def test_a_source_that_is_not_there_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(ModuleNotFoundError, match="semantica.modle has no sources"):
        files_of("semantica.modle")
    monkeypatch.setitem(SOURCES, "sample", ("semantica.model", "semantica.nothing"))
    with pytest.raises(ModuleNotFoundError, match="semantica.nothing"):
        source_hash("sample", "x86_64")
    (tmp_path / "empty_room").mkdir()
    (tmp_path / "empty_room" / "cases.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="empty_room has no sources"):
        files_of("empty_room")


def test_hashes_of_whole_runs_cover_what_they_go_through():
    def rooms(op: str) -> set[str]:
        return {path.parent.name for name in SOURCES[op] for path in files_of(name)}

    def names(op: str) -> set[str]:
        return {path.name for name in SOURCES[op] for path in files_of(name)}

    everywhere = {"model", "kernels", "group_norm", "cross_attention"}
    assert everywhere | {"sampling", "engines", "pipelines", "export", "builders"} <= rooms("sample")
    assert {"condition.py", "solvers.py"} <= names("sample") and "stock.py" in names("sample_ladder") - names("sample")
    assert everywhere | {"train", "run", "data"} <= rooms("train") and {"loop.py", "diffusion.py"} <= names("train")
    # mining and the case table are no part of any run
    assert not {"pages"} & rooms("train") and not {"cases.py", "specimens.py"} & names("train")
    assert SOURCES["scaling"] == SOURCES["train"]


def test_public_unets_in_torch_depend_on_no_engine():
    rooms = {path.parent.name for name in UNETS for path in files_of(name)}
    assert {"fused", "group_norm", "sampling"} <= rooms and not {"engines", "export", "builders"} & rooms
    # a user's own function goes through everything
    for impl, modules in {"accelerate": UNETS, **dict.fromkeys(("inductor", "a.b:c"), SOURCES["unet"])}.items():
        for op in ("unet", "decoder"):
            assert source_hash(op, "x86_64", impl) == hash_of(modules, "x86_64"), impl
    assert len({hash_of(modules, "x86_64") for modules in (UNETS, SOURCES["unet"])}) == 2


def test_a_changed_engine_leaves_the_rows_of_torch_fresh(tmp_path, monkeypatch):
    rows = [
        {"op": op, "impl": impl, "arch": "x86_64", "kernel_hash": source_hash(op, "x86_64", impl)}
        for op in ("unet", "unet_ladder", "decoder")
        for impl in ("accelerate", "denoiser-eager", "onnxruntime", "inductor")
    ]
    assert not any(map(stale, rows))

    # no file is parsed twice
    read = functools.cache(fingerprint)
    monkeypatch.setattr(sources, "fingerprint", read)

    def changed(name: str) -> set[tuple[str, str]]:
        """Rows that are stale once a package has a file more."""
        (tmp_path / "more.py").write_text("new = True")
        more = lambda module: files_of(module) + [tmp_path / "more.py"] * (module == name)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(sources, "files_of", more)
            patch.setattr(sources, "hash_of", hash_of.__wrapped__)
            return {(row["op"], row["impl"]) for row in rows if stale(row)}

    every = {(row["op"], row["impl"]) for row in rows}
    engines = {(op, impl) for op in ("unet", "decoder") for impl in ("onnxruntime", "inductor")}
    for name in ("semantica.export", "semantica.engines", "semantica.benchmarks.unets.engines"):
        assert changed(name) == engines, name
    for name in UNETS:
        assert changed(name) == every, name


class Moved(Operator):
    """An operator whose sources lie elsewhere."""

    file: Path


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """A copy of an operator's folder in which files can be changed."""
    operator, room = OPERATORS["group_norm"], tmp_path / "group_norm"
    shutil.copytree(operator.file.parent, room, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(Moved, "file", room / "cases.py", raising=False)
    moved = Moved(**{field.name: getattr(operator, field.name) for field in dataclasses.fields(operator)})
    monkeypatch.setitem(OPERATORS, "group_norm", moved)
    monkeypatch.setitem(launch.LADDERS, "group_norm", room / "ladder.json")
    return room


def test_a_row_is_stale_once_its_code_or_its_launch_settings_changed(room, monkeypatch):
    def settings(**ladders):
        content = json.dumps({"kernel": {arch: [row] for arch, row in ladders.items()}})
        (room / "ladder.json").write_text(content)

    settings(sm_90={"warps": 4}, default={"warps": 8})
    place = {"op": "group_norm", "impl": "fused"}
    old = {**place, "arch": "sm_90", "kernel_hash": kernel_hash("group_norm", "sm_90")}
    assert not stale(old)
    settings(sm_90={"warps": 4}, default={"warps": 16}, sm_80={"warps": 2})
    assert not stale(old)
    settings(sm_90={"warps": 8}, default={"warps": 8})
    assert stale(old)
    settings(sm_90={"warps": 4}, default={"warps": 8})
    (room / "forward.py").write_text((room / "forward.py").read_text() + "\n# more\n")
    (room / "cases.py").write_text("changed = True")
    assert not stale(old)
    (room / "more.py").write_text("new = True")
    assert stale(old)
    assert not stale({**old, "kernel_hash": None}) and not stale({"op": "scaling"})
    on_cpu = {**place, "arch": "x86_64", "kernel_hash": kernel_hash("group_norm", "x86_64")}
    (room / "more.py").write_text("newer = True")
    assert not stale(on_cpu)
    (room / "cpu.py").write_text("new = True")
    assert stale(on_cpu)
    on_cpu["kernel_hash"] = kernel_hash("group_norm", "x86_64")
    monkeypatch.setattr(sources, "built_from", lambda: "other sources")
    assert stale(on_cpu)


def test_rows_of_cuda_kernels_are_stale_once_their_sources_changed_and_no_others(room, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(sources, "CUDA", tmp_path / "cuda")
    (tmp_path / "cuda").mkdir()
    kernel = tmp_path / "cuda" / "forward.cuh"

    def rows() -> dict[str, dict]:
        place = {"op": "group_norm", "arch": "sm_90"}
        return {n: {**place, "impl": n, "kernel_hash": kernel_hash(*place.values(), n)} for n in OURS}

    def changed(old: dict[str, dict]) -> set[str]:
        return {name for name, row in old.items() if stale(row)}

    def whole() -> str:
        return hash_of.__wrapped__(SOURCES["sample"], "sm_90")

    def processor() -> str:
        return hash_of.__wrapped__(SOURCES["sample"], "x86_64")

    kernel.write_text("a")
    old, run, on_cpu = rows(), whole(), processor()
    kernel.write_text("b")
    # while the table leaves every call to Triton
    assert changed(old) == {"cuda"} and whole() == run
    served = [{"layout": "contiguous", "bytes": [0, 10], "use": "cuda"}]
    (room / "choice.json").write_text(json.dumps({"forward": {"sm_90": served}, "backward": {}}))
    assert changed(old) == {"cuda", "fused"} and whole() != run
    old, run = rows(), whole()
    (tmp_path / "cuda" / "more.cu").write_text("c")
    assert changed(old) == {"cuda", "fused"} and whole() != run
    # the module knows what it was built from, whatever lies in the checkout by now
    built = SimpleNamespace(build_info=lambda: {"sources": nvcc.digest([kernel])})
    monkeypatch.setattr(cuda, "_cuda", built)
    assert not changed(old) and processor() == on_cpu
