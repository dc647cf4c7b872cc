"""Rooms: which way imports point between folders, no circles, and files short enough to read."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = {
    "kernels": "semantica.kernels",
    "train": "semantica.train",
    "export": "semantica.export",
    "benchmarks": "semantica.benchmarks",
    "semantica": "semantica",
}
# rooms of each house from the ground up: one may use those below it; "" are the files that lie in the house itself
FLOORS = {
    "kernels": [["", "cross_attention", "group_norm", "attention_moments", "attention_columns"]],
    "semantica": [
        [""],
        ["fused", "model"],
        ["segmentation"],
        ["sampling"],
        ["engines"],
        ["steering"],
        ["pipelines"],
        ["editing", "serving"],
    ],
    "train": [["data"], ["pages", "segmentation"], ["run"], [""]],
    "export": [["builders"], [""], ["one_file"], ["repository", "web"]],
    "benchmarks": [
        ["harness"],
        ["kernels", "loading", "quality"],
        ["sampling", "unets"],
        ["finetuning", "serving"],
        ["training"],
        [""],
    ],
}
# files of a house that stand above its rooms, and values that the rooms of a house share
ABOVE = {"semantica/doctor.py", "semantica/cli.py"}
BELOW = {"train/config.py", "train/processes.py", "train/preemption.py", "train/objective.py", "train/heads.py",
         "train/sharding.py", "export/program.py", "export/rebuild.py"}  # fmt: skip
LONGEST = 450


def sources() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, name in HOUSES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = sources()


def imported(source: str) -> set[str]:
    """The modules of ours that a source needs when it runs, now or later; not what only type checkers read."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # an operator's function has the name of its package
                function = whole in {f"semantica.kernels.{name}" for name in FLOORS["kernels"][0] if name}
                found.add(whole if whole in MODULES and not function else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


GRAPH = {name: imported(path.read_text()) - {name} for name, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    found, done = [], set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_there_are_no_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles(GRAPH) == []


def floor_of(path: Path) -> tuple[str, int]:
    """House and floor of a file."""
    house, *rooms, _ = path.relative_to(ROOT).parts
    room, floors = rooms[0] if rooms else "", FLOORS[house]
    name = path.relative_to(ROOT).as_posix()
    if name in ABOVE:
        return house, len(floors)
    return house, -1 if name in BELOW else next(i for i, floor in enumerate(floors) if room in floor)


@pytest.mark.parametrize("house", HOUSES)
def test_imports_point_down_between_rooms(house):
    wrong = []
    for name, path in MODULES.items():
        own, floor = floor_of(path)
        if own != house or path.name == "__init__.py" and path.parent.parent == ROOT:
            continue
        for other in GRAPH[name]:
            place, its_floor = floor_of(MODULES[other])
            if place == own and its_floor > floor and MODULES[other] != ROOT / house / "__init__.py":
                wrong.append((name, other))
    assert wrong == []


def test_no_file_is_too_long_to_read():
    files = [path for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0] in (*HOUSES, "tests")]
    assert len(files) > 200
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {path: count for path, count in lengths.items() if count > LONGEST} == {}


def listing() -> str:
    """Every file with the first line of its docstring, as docs/architecture.md shows them."""
    lines = []
    for house in ("kernels", "semantica", "train", "export", "benchmarks"):
        for folder in sorted({path.parent for path in (ROOT / house).rglob("*.py")}):
            lines += ["", f"### `{folder.relative_to(ROOT).as_posix()}/`", "", "| file | what |", "|---|---|"]
            for path in sorted(folder.glob("*.py")):
                what = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
                if what:
                    lines.append(f"| `{path.name}` | {what} |")
    return "\n".join(lines[1:]) + "\n"


GUIDE = ROOT / "docs" / "architecture.md"


def parts() -> tuple[str, str, str]:
    """What stands before the list of files, the list, and what follows."""
    before, rest = GUIDE.read_text().split("<!-- files -->\n")
    files, after = rest.split("<!-- end -->\n")
    return before, files, after


def test_the_guide_lists_every_file():
    # python tests/test_rooms.py writes the list
    assert parts()[1] == listing()


def test_every_file_says_what_it_is():
    empty = [str(path) for path in MODULES.values() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert empty == []


def test_the_guide_names_what_there_is():
    named = re.findall(r"`([a-z_/]+\.py):(\w+)`", parts()[0])
    assert len(named) > 30
    missing = []
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}:
            missing.append(f"{path}:{name}")
    assert missing == []


if __name__ == "__main__":
    start, _, end = parts()
    GUIDE.write_text(f"{start}<!-- files -->\n{listing()}<!-- end -->\n{end}")
