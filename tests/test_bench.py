"""`semantica bench`: what is counted, stored, compared and printed, and mistakes in one line."""

import glob
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semantica.benchmarks.harness import store
from semantica.benchmarks.harness.summary import summary
from semantica.benchmarks.kernels.implementations import available
from semantica.benchmarks.kernels.problems import Problem, problems
from semantica.benchmarks.kernels.suite import KernelBench, Traffic
from semantica.cli import main
from semantica.kernels import OPERATORS
from semantica.kernels.cross_attention.cases import CrossAttentionCase
from semantica.kernels.group_norm.cases import GroupNormCase

ROOT = Path(__file__).parents[1]
GENERATED = re.compile(r"<!-- semantica bench (table .*?) -->\n(.*?)\n<!-- end -->", re.DOTALL)


def test_bytes_and_operations_are_counted_as_by_hand():
    x, wide = torch.ones(1000), torch.ones(1, 1).expand(100, 1000)
    with Traffic() as traffic:
        y = (x.view(10, 100).t() * 2 + 1).contiguous()
        torch.empty_like(y)
        wide + x
    # scale, shift and copy read and write 4000 bytes each; the sum writes 400000, and reads 4 and 4000
    assert traffic.total == 3 * 8000 + 400000 + 4004
    problem = Problem("group_norm", GroupNormCase((2, 8, 4, 4), 4), torch.bfloat16, "cpu")
    small = 2 * (8 + 8 + 2 * 8 + 2 * 8)
    assert problem.effective_bytes("forward") == 2 * 512 + small
    assert problem.effective_bytes("backward") == 3 * 512 + 2 * small
    assert problem.effective_bytes("both") == 5 * 512 + 3 * small
    assert problem.two_pass_bytes("backward", cache=511) - problem.effective_bytes("backward") == 2 * 512
    assert problem.two_pass_bytes("backward", cache=512) == problem.effective_bytes("backward")
    attention = Problem("cross_attention", CrossAttentionCase(2, 8, 3, 32, (5, 4)), torch.float32, "cpu")
    assert attention.operations("forward") == 4 * 2 * 3 * 8 * 9 * 32
    assert attention.operations("both") == attention.operations("forward") * 7 // 2
    for device in ("cpu", "cuda"):
        for quick in (False, True):
            names = [problem.name for problem in problems(device, quick)]
            assert len(names) == len(set(names)) > 3


def test_meta_shapes_are_those_of_the_inputs():
    for problem in [*problems("cpu", True), *problems("cpu", False)[-6:]]:
        drawn = {k: v for k, v in problem.inputs(0).items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        meta = {k: v for k, v in problem.case.inputs(problem.dtype, "meta").items() if k in drawn}
        assert {k: (v.shape, v.dtype) for k, v in meta.items()} == {k: (v.shape, v.dtype) for k, v in drawn.items()}


def row(**changes) -> dict:
    fields = dict(op="group_norm", impl="fused", shape="1x2", layout="contiguous", dtype="float32", device="cpu",
                  direction="forward", median_us=100.0, p20_us=95.0, p80_us=105.0, copy_gbps=10.0)  # fmt: skip
    return fields | changes


def test_a_change_is_clear_when_the_medians_leave_each_others_band():
    def one(**now):
        (found,) = store.compare([row()], [row(**now)])
        return found

    assert one()["ratio"] == 1 and not one()["clear"]
    slow = one(median_us=150.0, p20_us=140.0, p80_us=160.0, copy_gbps=5.0)
    assert slow["clear"] and slow["ratio"] == 1.5 and slow["machine"] == 2.0
    assert slow["low"] == pytest.approx(140 / 105) and slow["high"] == pytest.approx(160 / 95)
    assert one(median_us=50.0, p20_us=45.0, p80_us=55.0)["clear"]
    # noise: the slower run's calls reach down to the faster run's median
    assert not one(median_us=150.0, p20_us=99.0, p80_us=300.0)["clear"]
    assert store.compare([row(impl="eager")], [row()]) == []


def stored(path, *rows) -> str:
    path.write_text(json.dumps({"benchmarks": [{"extra_info": r} for r in rows]}))
    return str(path)


def test_compare_fails_on_a_regression_only_and_names_mistakes(tmp_path, capsys):
    a = stored(tmp_path / "a.json", row(), row(impl="eager"))
    b = stored(tmp_path / "b.json", row(median_us=150.0, p20_us=140.0, p80_us=160.0), row(impl="eager"))
    assert main(["bench", "compare", a, b]) == 0
    assert (
        main(["bench", "compare", a, b, "--fail", "60"]) == 0 and main(["bench", "compare", b, a, "--fail", "5"]) == 0
    )
    capsys.readouterr()
    assert main(["bench", "compare", a, b, "--fail", "20"]) == 1
    out = capsys.readouterr().out
    assert "1.500" in out and out.count("REGRESSED") == 1 and "1 regressed" in out
    text, other = tmp_path / "text.json", tmp_path / "other.json"
    text.write_text("no json")
    other.write_text('{"benchmarks": [{"name": "x"}]}')
    empty = stored(tmp_path / "empty.json", row(shape="other"))
    for arguments, word in (
        ((a, str(tmp_path / "no.json")), "cannot be read"),
        ((a, str(text)), "is not JSON"),
        ((a, str(other)), "holds no results"),
        ((a, empty), "no row in common"),
        ((a, b, "--fail", "-1"), "--fail is -1"),
        ((a,), "required"),
    ):
        capsys.readouterr()
        assert main(["bench", "compare", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("semantica: ") and word in error and "\n" not in error, error


def test_absent_packages_are_named_and_own_functions_are_found():
    present, absent = available(["group_norm"], "cpu", ("json:dumps",))
    assert {"fused", "eager", "compile", "json:dumps"} <= {i.name for i in present}
    assert {i.op for i in present} == {"group_norm"} and not set(absent) & {"fused", "eager"}
    assert next(i for i in present if i.name == "json:dumps").leeway == 2.0
    races = KernelBench(quick=True, device="cpu", words=("eager", "forward", "contiguous")).races
    assert {(problem.partition(" ")[0], direction, *names) for (problem, direction), names in races.items()} == {
        (op, "forward", "eager") for op in OPERATORS
    }


def test_parts_make_up_the_whole():
    def names(part):
        races = KernelBench(device="cpu", words=("fused", "forward"), part=part).races
        return [problem for problem, _ in races]

    assert sorted(names((1, 3)) + names((2, 3)) + names((3, 3))) == sorted(names((1, 1)))


OWN = """
import torch
from semantica.kernels import group_norm_ref

def eager_too(**arguments):
    return group_norm_ref(**arguments)

def eager_but_wrong(**arguments):
    return torch.zeros_like(arguments["x"])
"""


def test_the_verb_from_end_to_end(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def bench(*arguments):
        command = [sys.executable, "-P", "-m", "semantica.cli", "bench", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)

    options = ("kernels", "--quick", "--device", "cpu", "--op", "group_norm", "--filter", "contiguous eager",
               "--json", "o.json", "--html", "o.html", "--png", "o.png")  # fmt: skip
    done = bench(*options, "--impl", "own:eager_too", "own:eager_but_wrong")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("WRONG, not timed") == 2 and "absent: liger" in done.stdout
    content = json.loads((tmp_path / "o.json").read_text())
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    assert [(r["impl"], r["direction"]) for r in rows] == [
        (impl, direction) for direction in ("forward", "backward") for impl in ("eager", "own:eager_too")
    ]
    assert not {"node", "release"} & set(content["machine_info"])
    needed = (
        "op impl shape layout dtype direction median_us p20_us p80_us wall_us bytes effective_bytes gbps flops tflops \
        share_of_copy share_of_matrix_rate max_err max_err_eager device torch triton commit date kernel_hash".split()
    )
    for r, benchmark in zip(rows, content["benchmarks"]):
        assert set(needed) <= set(r) and 0 < r["p20_us"] <= r["median_us"] <= r["p80_us"]
        assert benchmark["stats"]["median"] == pytest.approx(r["median_us"] / 1e6)
        assert benchmark["stats"]["rounds"] == r["rounds"] >= 7
        assert r["effective_gbps"] == pytest.approx(r["effective_bytes"] / r["median_us"] / 1e3)
        assert r["share_of_copy"] is None or r["share_of_copy"] == pytest.approx(r["gbps"] / r["copy_gbps"])
    assert {w["impl"] for w in content["semantica"]["wrong"]} == {"own:eager_but_wrong"}
    page = (tmp_path / "o.html").read_text()
    assert page.count("<svg") == 1 and "own:eager_but_wrong" in page and (tmp_path / "o.png").stat().st_size > 10_000
    # the file is pytest-benchmark's own
    command = [sys.executable, "-P", "-m", "pytest_benchmark", "compare", "o.json", "--columns=median"]
    seen = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert seen.returncode == 0 and "own:eager_too" in seen.stdout + seen.stderr
    assert bench("compare", "o.json", "o.json", "--fail", "1").returncode == 0
    table = bench("table", "o.json").stdout.splitlines()
    assert table[0].startswith("| operator |") and len([line for line in table if "| eager (quick) |" in line]) == 2


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments, word in (
        (["paint"], "unknown benchmark 'paint'"),
        (["kernels", "--impl", "json:dumps"], "--impl needs --op"),
        (["kernels", "--op", "norm"], "norm"),
        (["kernels", "--direction", "sideways"], "sideways"),
        (["kernels", "--quick", "--filter", "no such row"], "no row has all of 'no such row'"),
        (["kernels", "--json", str(tmp_path / "no" / "o.json")], "is not a folder"),
        (["kernels", "--workers", "0"], "--workers is 0"),
        (["kernels", "--part", "3/2"], "--part '3/2'"),
        (["kernels", "--device", "abacus"], "abacus"),
        (["kernels", "--quick", "--op", "group_norm", "--impl", "no_such_module:f"], "no_such_module"),
        (["table"], "at least one"),
    ):
        assert main(["bench", *arguments]) == 2, arguments
        error = capsys.readouterr().err.strip()
        assert error.startswith("semantica: ") and word in error and "\n" not in error, error
    assert main(["bench"]) == 0 and main(["bench", "--help"]) == 0
    assert "semantica bench compare" in capsys.readouterr().out


def test_the_readme_shows_what_is_stored(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = GENERATED.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found
    for command, shown in found:
        words = [sorted(glob.glob(word)) if "*" in word else [word] for word in command.split()]
        assert main(["bench", *itertools.chain(*words)]) == 0
        assert capsys.readouterr().out.strip() == shown


def test_the_summary_is_geometric_means_and_the_least():
    place = {"op": "group_norm", "direction": "forward", "layout": "l", "dtype": "d", "device": "v", "arch": "x86_64"}

    def row(shape, impl, median, kernel_hash=None, spread=1.0):
        times = {"median_us": median, "p20_us": median, "p80_us": spread * median}
        return {**place, "shape": shape, "impl": impl, **times, "kernel_hash": kernel_hash}

    rows = [row("a", "fused", 1.0), row("a", "eager", 2.0), row("a", "compile", 8.0)]
    rows += [row("b", "fused", 1.0), row("b", "eager", 8.0), row("b", "native", 4.0, spread=3.0)]
    rows += [row("c", "fused", 1.0)]
    (line,) = summary(rows)
    assert line == (
        "group_norm", "forward", "l", "d", "~4.00x (4.00x of 1)", "4.00x (2.00x of 2)", "8.00x (8.00x of 1)",
        "~2.83x (2.00x of 2)",
    )  # fmt: skip
    assert summary([row("a", "fused", 1.0, "0" * 16)])[0][0] == "group_norm (stale)"
