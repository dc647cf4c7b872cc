"""What tables make of stored rows: ratios of one run alone, to whoever was fastest, and no figure that no row bears."""

import json

import pytest

from semantica.benchmarks.bench import KINDS
from semantica.benchmarks.harness import store, table
from semantica.benchmarks.harness.summary import evaluations, summary
from semantica.benchmarks.harness.verb import measured
from semantica.benchmarks.kernels.suite import KernelBench
from semantica.benchmarks.unets.table import of_stock
from semantica.cli import main

EARLIER, LATER = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
PLACE = {
    "op": "group_norm", "shape": "a", "layout": "l", "dtype": "d", "direction": "forward", "device": "v",
    "arch": "x86_64", "torch": "2", "triton": "3", "commit": "c", "copy_gbps": 10.0, "matrix_tflops": 1.0,
}  # fmt: skip


def row(impl: str, ms: float, date: str = EARLIER, **more) -> dict:
    times = {"median_us": 1e3 * ms, "p20_us": 1e3 * ms, "p80_us": 1e3 * ms}
    # ours has a hash, as rows of this package do
    return {**PLACE, "impl": impl, **times, "kernel_hash": "0" * 16 if impl == "fused" else None, "date": date} | more


def column(made: table.Column, rows: list[dict]) -> list[str]:
    return [made.write(row, rows) for row in rows]


def test_ratios_are_of_one_run():
    rows = [row("fused", 1), row("eager", 2), row("fused", 2, LATER), row("compile", 3, LATER)]
    assert column(table.against("eager"), rows) == ["2.00x", "1.00x", "", ""]
    assert column(table.against_fastest(), rows) == ["2.00x", "1.00x", "1.50x", "1.00x"]
    # the cost of an adapter, as a share of stock's
    ours, stock = row("ours", 1, added_us=1.0, stock="plain"), row("plain", 2, LATER, added_us=4.0, stock="plain")
    assert of_stock(ours, [ours, stock]) == "" and of_stock(ours, [ours, stock | {"date": EARLIER}]) == "25%"


def test_ratios_to_what_memory_did_not_hold_beside_a_row_are_marked():
    """Those of another heat have ceilings of their own."""
    rows = [row("fused", 1), row("eager", 2, copy_gbps=11.0), row("compile", 3)]
    assert column(table.against("eager"), rows) == ["~2.00x", "1.00x", "~0.67x"]
    assert column(table.against("compile"), rows) == ["3.00x", "~1.50x", "1.00x"]
    ours, stock = row("ours", 1, added_us=1.0, stock="plain"), row("plain", 2, added_us=4.0, copy_gbps=11.0)
    assert of_stock(ours, [ours, stock]) == "~25%"


def test_the_fastest_is_the_fastest_of_all_others():
    """Whatever else was raced, not PyTorch's ways alone; the user's own is nobody's rival."""
    rows = [row("fused", 1), row("eager", 4), row("liger", 2), row("cuda", 0.5, kernel_hash="1"), row("own:norm", 0.1)]
    assert column(table.against_fastest("dtype"), rows)[0] == "2.00x"
    assert summary(rows)[0][-4:] == ("", "4.00x (4.00x of 1)", "", "2.00x (2.00x of 1)")
    asked = {"calls": {"UNet": 3}, "calls_of_all": {"UNet": 3}}
    (line,) = evaluations([row | asked for row in rows])
    assert line[-5:] == ("3.00", "", "12.00", "", "6.00")


def test_the_summary_and_the_sums_are_of_the_latest_run_of_a_problem():
    asked = {"calls": {"UNet": 1}, "calls_of_all": {"UNet": 1}}
    late = [row("fused", 2, LATER, **asked), row("eager", 5, LATER, **asked)]
    rows = [*late, row("fused", 1, **asked), row("eager", 4, **asked), row("compile", 1.5, **asked)]
    # a later run of a rival alone hides nothing
    rows.append(row("native", 1, "2026-01-03T00:00:00+00:00", **asked))
    for order in (rows, rows[::-1]):
        assert summary(order)[0][-4:] == ("", "2.50x (2.50x of 1)", "", "2.50x (2.50x of 1)")
        assert evaluations(order)[0][-5:] == ("2.00", "", "5.00", "", "5.00")


def test_who_was_not_raced_with_the_rest_is_raced_again(tmp_path):
    bench = KernelBench(ops=("group_norm",), device="cpu", directions=("forward",))
    race = next(iter(bench.races))
    bench.races = {race: ["eager", "compile"]}
    problem, _ = bench.problems[race[0]]
    named = {"shape": problem.shape, "layout": problem.layout, "dtype": problem.dtype_name}
    named["device"] = store.environment("cpu")["device"]

    def left(second: str) -> int:
        rows = [row("eager", 1, **named), row("compile", 1, second, **named)]
        held = [{"group": " ".join(race), "extra_info": found} for found in rows]
        (tmp_path / "rows.json").write_text(json.dumps({"benchmarks": held, "semantica": {"wrong": []}}))
        bench.races = {race: ["eager", "compile"]}
        _, _, again = measured(tmp_path / "rows.json", bench)
        assert [len(of["benchmarks"]) for of in again.values()] == [2] * len(bench.races)
        return len(bench.races)

    assert left(EARLIER) == 0 and left(LATER) == 1


def test_a_quick_look_is_called_one(tmp_path, capsys):
    path, known = tmp_path / "rows.json", {"uses": "eager", "effective_gbps": 1.0, "effective_share_of_copy": 0.1}
    known |= {"gbps": None, "share_of_copy": None, "max_err": 0.0, "max_err_eager": 0.0, "wall_us": 1.0}
    rows = [row("eager", 2, **known), row("native", 2, quick=True, **(known | {"uses": "native"}))]
    rows.append(row("fused", 1, quick=True, **(known | {"uses": "fused"})))
    path.write_text(json.dumps({"benchmarks": [{"extra_info": found} for found in rows]}))
    assert main(["bench", "table", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| native (quick) |" in said and "| eager |" in said and "| fused (stale) (quick) |" in said
    assert summary(rows)[0][0] == "group_norm (stale) (quick)"


def test_a_page_names_every_version_that_ran(tmp_path):
    rows = [row("eager", 2), row("native", 2, LATER, commit="e")]
    kind = table.Kind("t", "about", (table.Column("implementation", "{impl}"),), "op", 0, None, lambda rows: {})
    table.page(tmp_path / "page.html", kind, rows, KernelBench(ops=(), device="cpu"))
    assert "c, e" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("runs", "shown"), [(6, ("", "")), (20, ("2.0", "")), (100, ("2.0", "3.0"))])
def test_high_quantiles_of_few_runs_are_not_shown(runs, shown):
    tails = [made for made in KINDS["sample"].columns if made.head in ("p95 ms", "p99 ms")]
    found = row("plain", 1, p95_us=2e3, p99_us=3e3, rounds=runs)
    assert tuple(made.write(found, [found]) for made in tails) == shown
